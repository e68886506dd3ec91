import os
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
# The processes that the tests start find the same modules.
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
# It would hide that a script keeps back what it has printed.
os.environ.pop("PYTHONUNBUFFERED", None)
# Before datasets is imported: no test reads or fills the user's cache.
CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ["HF_HOME"] = CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported: threads that wait for each other cost more than they gain here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torchvision.models.resnet  # noqa: E402
from draw_cars import draw_cars  # noqa: E402
from scripts import SMALL, Fork  # noqa: E402
from small import use_small_resnet  # noqa: E402

use_small_resnet()
import eval as evaluation  # noqa: E402
import train  # noqa: E402

datasets.disable_progress_bars()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take long")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long by design; runs with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture(scope="session")
def cars(tmp_path_factory) -> Path:
    """The drawn data set, with two train photos and one test photo of each of its eight classes."""
    folder = tmp_path_factory.mktemp("cars")
    draw_cars(folder, train_per_class=2, test_per_class=1, width=80)
    return folder


@pytest.fixture
def real_network(monkeypatch):
    """ResNet-50 itself, where the network is the point."""
    for script in (train, evaluation):
        monkeypatch.setattr(script, "resnet50", torchvision.models.resnet.resnet50)


@pytest.fixture
def one_thread():
    """The same sums on any machine: their order depends on the number of threads."""
    torch.set_num_threads(1)


def call(main, flags: list) -> int:
    """Call a script's `main` as the script does; returns the exit status."""
    argv = [str(flag) for flag in flags]
    try:
        train.run_command(lambda: main(argv))
    except SystemExit as stop:
        if isinstance(stop.code, str):  # As Python itself does at the end of a script.
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code
    return 0


@pytest.fixture
def run_train(capfd, cars):
    """Run train.py in this process, with small settings: exit status, output and errors."""
    common = ["--dataset", cars, *SMALL]
    return lambda *flags: (call(train.main, [*common, *flags]), *capfd.readouterr())


@pytest.fixture
def run_eval(capfd):
    """Run eval.py in this process: exit status, output and errors."""
    common = ["--workers", 0, "--no-amp"]
    return lambda *flags: (call(evaluation.main, [*common, *flags]), *capfd.readouterr())


@pytest.fixture
def fork(tmp_path):
    """Start a script in a Fork, which does not outlive the test."""
    forks = []

    def start(script: str, *flags, **environment) -> Fork:
        folder = tmp_path / f"fork{len(forks)}"
        folder.mkdir()
        forks.append(Fork(script, *flags, folder=folder, **environment))
        return forks[-1]

    yield start
    for process in filter(Fork.is_alive, forks):
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


@pytest.fixture
def ranks(fork, cars):
    """Run spy.py in processes that find each other as those of torchrun do: how each has ended."""

    def run(processes: int, *flags, **environment) -> list[tuple[int, str, str]]:
        # It chooses a free port, as torchrun does.
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": 1}
        environment |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        command = ["tests/spy.py", "--dataset", cars, *SMALL, *flags]
        places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        started = [fork(*command, **environment, **place) for place in places]
        return [process.end() for process in started]

    return run


@pytest.fixture(scope="session")
def finished(cars, tmp_path_factory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--dataset", cars, *SMALL, "--epochs", 2, "--step-size", 1, "--output-dir", folder]
    assert call(train.main, flags) == 0
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A drawn data set of 96 + 32 photos, and the folder of a short run on it."""
    cars, run = tmp_path_factory.mktemp("cars"), tmp_path_factory.mktemp("run")
    draw_cars(cars, train_per_class=12, test_per_class=4)
    flags = [*SMALL, "--resolution", 64, "--batch-size", 16, "--epochs", 2]
    assert call(train.main, ["--dataset", cars, *flags, "--output-dir", run]) == 0
    return SimpleNamespace(cars=cars, run=run)
