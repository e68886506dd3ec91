import gc
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HOME"] = (
    tempfile.mkdtemp()
)  # before datasets is imported: no test reads or fills the user's cache
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402
import pytest  # noqa: E402
import torchvision.models.resnet  # noqa: E402
from draw_cars import draw_cars  # noqa: E402
from small import use_small_resnet  # noqa: E402

use_small_resnet()
import eval as evaluation  # noqa: E402
import train  # noqa: E402

datasets.disable_progress_bars()


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run the tests that are long by design"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long by design; runs with --slow, or where CI=true")
    config.addinivalue_line(
        "filterwarnings", "ignore:The image decoding and encoding:DeprecationWarning"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or os.environ.get("CI") == "true":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


SMALL = "--weights none --resolution 33 --batch-size 8 --lr 0.01 --workers 0 --no-compile --no-amp".split()


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
def run_train(capfd, cars):
    """Run train.py in this process, with small settings; returns exit status, standard output and standard error."""

    def run(*flags: object) -> tuple[int, str, str]:
        argv = ["--dataset", str(cars), *SMALL, *map(str, flags)]
        try:
            status = train.run_command(lambda: train.main(argv))
        except SystemExit as stop:  # argparse
            status = stop.code
        gc.collect()  # a run that failed keeps its lock until its frames go: elsewhere, with its process
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def run_script():
    """Run a script as a user does; returns what subprocess.run returns."""

    def run(script: str, *flags: object, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
        )

    return run


def encode(image, **options) -> bytes:
    """A PIL image as the bytes of a file; options as for Image.save."""
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", **options})
    return file.getvalue()


def write_dataset(folder: Path, train_rows: list, test_rows: list, names: list[str]) -> Path:
    """Write (bytes, label) rows as a data set laid out as the Hub repository is, without a card."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", train_rows), ("test", test_rows)):
        columns = {
            "image": [{"bytes": data, "path": None} for data, _ in rows],
            "label": [label for _, label in rows],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            folder / "data" / f"{split}-0.parquet"
        )
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A drawn data set of 96 + 32 photos, and the folder of a short run of the small network on it."""
    cars, run = tmp_path_factory.mktemp("trained_cars"), tmp_path_factory.mktemp("trained_run")
    draw_cars(cars, train_per_class=12, test_per_class=4)
    flags = (
        "--weights none --resolution 64 --batch-size 16 --lr 0.01 --epochs 4 --workers 0".split()
    )
    assert (
        train.run_command(
            lambda: train.main(["--dataset", str(cars), *flags, "--output-dir", str(run)])
        )
        == 0
    )
    return cars, run
