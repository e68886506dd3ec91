"""Fixtures. The tests run on the CPU, also on a machine with a GPU. To run them on a GPU:

    CUDA_VISIBLE_DEVICES=0 python -m pytest -q tests

Tests that need a CPU or several devices are then skipped, with the reason.
"""

import contextlib
import os
import shutil
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
# Before torch is imported: no GPU, unless it is named.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Looking for a GPU must not initialize CUDA: a copy of such a process cannot use it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# Threads that wait for each other cost more than they gain here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before datasets is imported: no test reads or fills the user's cache.
CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ["HF_HOME"] = CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so all they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from draw_cars import draw_cars  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scripts import SMALL, Fork  # noqa: E402
from small import RESNET50  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402

datasets.disable_progress_bars()
# Runs in the tests' process are like those in a notebook: their workers have to end with them.
sys.ps1 = ">>> "
# With the lowest versions, torchcodec may not load. One test looks at the line that says so.
train.TORCHCODEC_ERROR = None


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take long")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long by design; runs with --slow")
    config.addinivalue_line("markers", "cpu(reason): skipped on a GPU, for this reason")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
        needs_cpu = item.get_closest_marker("cpu")
        if needs_cpu and torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"needs a CPU: {needs_cpu.args[0]}"))


@pytest.fixture(scope="session", autouse=True)
def float32_products():
    """TF32 rounds to 10 bits, more than the tests' bounds allow. train.py's `main` turns it on."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path):
    """Remove a test's files at its end, before the disk is busy with them: all together are 10 GB."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(autouse=True)
def figures(no_leftovers, monkeypatch) -> list[Figure]:
    """The figures that a script saves in the tests' process, in their order, not drawn.

    Drawing them takes most of the time of a small run. Instead, a file gets a PNG's first bytes.
    """
    saved = []

    def note(figure, file, **options):
        saved.append(figure)
        file.write(b"\x89PNG, not drawn")

    monkeypatch.setattr(Figure, "savefig", note)
    return saved


@pytest.fixture(scope="session")
def cars(tmp_path_factory) -> Path:
    """The drawn dataset, with two train photos and one test photo of each of its eight classes."""
    folder = tmp_path_factory.mktemp("cars")
    draw_cars(folder, train_per_class=2, test_per_class=1, width=80)
    return folder


@pytest.fixture
def real_network(monkeypatch):
    """The network of train.py itself, where it is the point."""
    monkeypatch.setattr(train.NETWORK, "build", RESNET50)


@pytest.fixture
def one_thread():
    """The same sums on any machine: their order depends on the number of threads."""
    torch.set_num_threads(1)


def call(main, flags: list) -> int:
    """Call a script's `main` as the script does. Returns the exit status."""
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
    """Run train.py in this process, with small settings."""
    common = ["--dataset", cars, *SMALL]
    return lambda *flags: (call(train.main, [*common, *flags]), *capfd.readouterr())


@pytest.fixture
def run_eval(capfd):
    """Run eval.py in this process."""
    common = ["--workers", 0, "--no-amp"]
    return lambda *flags: (call(evaluation.main, [*common, *flags]), *capfd.readouterr())


@pytest.fixture
def fork(tmp_path):
    """Start a script in a Fork, which does not outlive the test."""
    forks = []

    def start(script: str, *flags, **options) -> Fork:
        folder = tmp_path / f"fork{len(forks)}"
        folder.mkdir()
        forks.append(Fork(script, *flags, folder=folder, **options))
        return forks[-1]

    yield start
    for process in filter(Fork.is_alive, forks):
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


@pytest.fixture
def ranks(fork, cars):
    """Run train.py in processes that find each other as those of torchrun do, on CPUs."""

    def run(processes: int, *flags, inside=contextlib.nullcontext) -> list[tuple[int, str, str]]:
        # It chooses a free port, as torchrun does.
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": 1}
        environment |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        command = ["train.py", "--dataset", cars, *SMALL, *flags]
        places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        started = [fork(*command, inside=inside, **environment, **place) for place in places]
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
    """A drawn dataset of 96 + 32 photos, and the folder of a short run on it."""
    cars, run = tmp_path_factory.mktemp("cars"), tmp_path_factory.mktemp("run")
    draw_cars(cars, train_per_class=12, test_per_class=4)
    flags = [*SMALL, "--resolution", 64, "--batch-size", 16, "--epochs", 2]
    assert call(train.main, ["--dataset", cars, *flags, "--output-dir", run]) == 0
    return SimpleNamespace(cars=cars, run=run)
