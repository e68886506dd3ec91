"""Make the photos and datasets that the tests need, and read what a run writes."""

import csv
import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image


def encode(image: Image.Image, **options) -> bytes:
    """An image as the bytes of a JPEG file; options as for Image.save."""
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", **options})
    return file.getvalue()


def jpeg(seed: int, width: int = 60, height: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return encode(Image.fromarray(pixels).resize((width, height)))


def rows(count: int, classes: int = 2) -> list[tuple[bytes, int]]:
    """Photos with their labels, for write_dataset."""
    return [(jpeg(seed), seed % classes) for seed in range(count)]


def write_dataset(folder: Path, train_rows: list, test_rows: list, names: list[str]) -> Path:
    """Write (bytes, label) rows as a dataset laid out as the Hub repository is, without a card."""
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    (folder / "data").mkdir(parents=True)
    for split, split_rows in (("train", train_rows), ("test", test_rows)):
        photos = [{"bytes": data, "path": None} for data, _ in split_rows]
        columns = {"image": photos, "label": [label for _, label in split_rows]}
        split_dataset = datasets.Dataset.from_dict(columns, features=features)
        split_dataset.to_parquet(folder / "data" / f"{split}-0.parquet")
    return folder


def read_history(folder: Path) -> list[dict]:
    with open(folder / "history.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_weights(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_same_run(one: Path, other: Path):
    """That two folders hold the same run, bit for bit, but for the seconds that it took."""
    one = load(one / "last_checkpoint.pth")
    other = load(other / "last_checkpoint.pth")
    assert_same_weights(one["model"], other["model"])
    for number, state in one["optimizer"]["state"].items():
        assert_same_weights(state, other["optimizer"]["state"][number])
    times = dict(seconds=0, photos_per_second=0, input_wait=0)
    timeless = [[{**row, **times} for row in run["history"]] for run in (one, other)]
    assert timeless[0] == timeless[1]
