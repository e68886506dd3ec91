"""Datasets, folders and photos: which are taken, how photos are cropped, and in which order."""

import contextlib
import csv
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pillow_heif
import pytest
import torch
from files import encode, jpeg, load, read_history, rows, write_dataset
from PIL import Image
from pyarrow import Table, parquet
from scripts import SMALL, refusal, run, success
from stand_in_hub import stand_in_hub
from torchvision.transforms import v2

import train


def upright(mode: str = "RGB") -> Image.Image:
    """Red over blue with a green corner: no two of the eight EXIF orientations look alike."""
    photo = Image.new("RGB", (48, 32), (220, 30, 30))
    photo.paste((30, 30, 220), (0, 16, 48, 32))
    photo.paste((30, 200, 30), (0, 0, 16, 8))
    return photo.convert(mode)


def write_folders(folder: Path, *names: str) -> Path:
    """Write a photo under each of `names`, which are CLASS/FILE, in both splits."""
    for split in ("train", "test"):
        for seed, name in enumerate(names):
            (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / split / name).write_bytes(jpeg(seed))
    return folder


@pytest.fixture
def folders(tmp_path) -> Path:
    """A dataset of two classes in folders, with four photos of each in both splits."""
    return write_folders(tmp_path / "cars", *(f"{c}/{row}.jpg" for c in "ab" for row in range(4)))


@pytest.fixture
def train_on(run_train, tmp_path):
    """Train an epoch on a dataset. Its files are in the folder `run`."""
    return partial(run_train, "--output-dir", tmp_path / "run", "--epochs", 1, "--dataset")


@pytest.fixture
def evaluate_run(run_eval, tmp_path):
    """Evaluate the run of `train_on`, beside it."""
    flags = ["--checkpoint", tmp_path / "run/best_model.pth", "--output-dir", tmp_path / "report"]
    return partial(run_eval, *flags, "--num-gradcam", 0)


@pytest.fixture
def evaluate_with(run_eval, finished, tmp_path):
    """Evaluate the test split of a dataset with a checkpoint of these classes and a few more.

    Its network takes every photo for the second one.
    """

    def evaluate(folder: Path, *classes: str) -> tuple[int, str, str]:
        best = load(finished / "best_model.pth")
        best["classes"] = [*classes, *(f"Filler {index}" for index in range(8))][:8]
        best["model"]["fc.bias"][1] = 1000
        torch.save(best, tmp_path / "named.pth")
        flags = ["--checkpoint", tmp_path / "named.pth", "--output-dir", tmp_path / "report"]
        return run_eval(*flags, "--dataset", folder, "--num-gradcam", 0)

    return evaluate


def read_predictions(folder: Path) -> list[dict]:
    with open(folder / "predictions.csv", newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def message(outcome: tuple[int, str, str], folder: Path) -> str:
    """Return what a refusal says, but for the script's name and the path of `folder`.

    Both may hold the words that a test looks for.
    """
    return refusal(outcome).partition(": ")[2].replace(str(folder), "")


# ---------------------------------------------------------------- what is refused


def in_tables(change, folder):
    for path in folder.glob("data/*"):
        parquet.write_table(change(parquet.read_table(path)), path)


def put(column, row, value):
    def change(table):
        values = table.to_pylist()
        values[row][column] = value
        return Table.from_pylist(values, table.schema)

    return partial(in_tables, change)


TRAIN = "data/train-0.parquet"
OF_THREE = "data/train-00000-of-00003.parquet"
# What is done to the dataset, and words that the message has to say.
REFUSED = {
    "no folder": (shutil.rmtree, ["Hub"]),
    "no train": (lambda folder: shutil.rmtree(folder / "data"), ["train split"]),
    "no test": (lambda folder: (folder / "data/test-0.parquet").unlink(), ["--val-split"]),
    "one of three files": (
        lambda folder: os.rename(folder / TRAIN, folder / OF_THREE),
        ["1 of", " 3 ", "train"],
    ),
    "zeros in a file": (
        lambda folder: os.pwrite(os.open(folder / TRAIN, os.O_WRONLY), bytes(999), 99),
        ["data/train-"],
    ),
    "a file cut off": (lambda folder: os.truncate(folder / TRAIN, 2000), ["data/train-"]),
    "a pointer of Git LFS": (
        lambda folder: (folder / TRAIN).write_text("version https://git-lfs\n"),
        ["data/train-"],
    ),
    "no rows": (partial(in_tables, lambda table: table.slice(0, 0)), ["train"]),
    "one photo": (partial(in_tables, lambda table: table.slice(0, 1)), ["--batch-size"]),
    "no labels": (
        partial(in_tables, lambda table: table.select(["image"])),
        ["train", "ClassLabel"],
    ),
    "no class names": (
        partial(in_tables, lambda table: table.replace_schema_metadata()),
        ["train", "ClassLabel", "Value("],
    ),
    "label -1": (put("label", 2, -1), ["row 2", "label -1"]),
    "label 2 of 2": (put("label", 2, 2), ["row 2", "label 2"]),
    "label None": (put("label", 2, None), ["row 2", "label None"]),
    "photo without bytes": (
        put("image", 1, {"bytes": None, "path": None}),
        ["train", "row 1 "],
    ),
    "photo of text": (put("image", 1, {"bytes": b"text", "path": None}), ["train", "row 1 "]),
    # They are a damaged photo, and not a reason to open a file of that name.
    "photo of no bytes": (put("image", 1, {"bytes": b"", "path": "a.jpg"}), ["train", " a.jpg "]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_datasets_are_refused_in_one_line(train_on, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    folder = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"])
    change, words = REFUSED[kind]
    change(folder)
    said = message(train_on(folder), folder)
    for word in words:
        assert word in said


def test_a_label_out_of_range_is_found_among_300_000_in_seconds(train_on, tmp_path):
    folder = write_dataset(tmp_path / "cars", rows(8), [], ["a", "b"])
    schema = parquet.read_schema(folder / TRAIN)
    images = [{"bytes": None, "path": f"/cars/{row}.jpg"} for row in range(300_000)]
    labels = [row % 2 for row in range(299_999)] + [2]
    table = Table.from_pydict({"image": images, "label": labels}, schema)
    parquet.write_table(table, folder / "data/test-0.parquet")
    start = time.perf_counter()
    assert "row 299999 " in message(train_on(folder), folder)
    assert time.perf_counter() - start < 10


@pytest.fixture(params=["torchcodec", "Pillow"])
def decoder(request, monkeypatch) -> str:
    if request.param == "Pillow":
        monkeypatch.setattr(train, "decode_image", None)
    return request.param


def test_a_photo_on_which_a_decoder_fails_with_any_error_is_named(
    folders, train_on, decoder, monkeypatch
):
    def fail(*args, **options):
        raise TypeError("a damaged file, as Pillow may say it")

    monkeypatch.setattr(train, "decode_image", fail if train.decode_image else None)
    monkeypatch.setattr(Image, "open", fail)
    said = refusal(train_on(folders))
    assert f"{folders}/train/" in said
    assert "TypeError: a damaged file" in said


def test_a_decoders_reason_is_said_once(run_train, tmp_path, monkeypatch):
    photos = [*rows(7), (b"not a photo", 1)]
    write_dataset(tmp_path / "cars", photos, rows(4), ["a", "b"])
    decode_photo = train.decode_photo

    def fail(encoded):
        if encoded == b"not a photo":
            raise KeyError("bad magic")
        return decode_photo(encoded)

    monkeypatch.setattr(train, "decode_photo", fail)
    flags = ["--dataset", tmp_path / "cars", "--output-dir", tmp_path / "run"]
    err = refusal(run_train(*flags))
    assert "the train photo in row 7" in err
    assert err.count("bad magic") == 1
    assert err == refusal(run_train(*flags, "--workers", 1))


NO_PHOTOS = {
    "empty": b"",
    "cut off": encode(upright().resize((600, 400)))[:3000],
    "text": b"a text named .jpg",
}


PLACES = [("train", kind, 0) for kind in NO_PHOTOS] + [("train", "text", 1), ("test", "text", 0)]


@pytest.mark.parametrize("split, kind, workers", PLACES)
def test_files_that_are_not_photos_are_named_with_their_split(
    folders, train_on, decoder, split, kind, workers
):
    path = folders / split / "b/0.jpg"
    path.write_bytes(NO_PHOTOS[kind])
    outcome = train_on(folders, "--workers", workers)
    assert str(path) in refusal(outcome)
    assert split in message(outcome, path)


# ---------------------------------------------------------------- files, folders and classes


@pytest.mark.parametrize("name", ["cars*", "cars [v2]", "."])
def test_paths_are_not_glob_patterns_and_are_read_again(tmp_path, train_on, monkeypatch, name):
    write_dataset(tmp_path / "cars-sibling", rows(8), rows(8), ["a", "b"])
    folder = tmp_path / ("cars here" if name == "." else name)
    for count in (3, 5):
        shutil.rmtree(folder, ignore_errors=True)
        write_dataset(folder, rows(count), rows(4), ["a", "b"])
        shutil.copytree(folder / "data", folder / "backup")
        monkeypatch.chdir(folder if name == "." else tmp_path)
        out = success(train_on(name, "--overwrite", "--batch-size", 3))
        assert f"{count} train and 4 test photos" in out


def test_the_files_of_a_split_are_read_in_their_order(tmp_path, train_on, evaluate_run):
    folder = write_dataset(tmp_path / "cars", rows(8), [], ["a", "b"])
    for index, label in enumerate([1, 0, 0]):
        shard = write_dataset(tmp_path / f"{index}", [], [(jpeg(0), label)], ["a", "b"])
        name = f"data/test-{index:05}-of-00003.parquet"
        shutil.copy(shard / "data/test-0.parquet", folder / name)
    (folder / "data/test-0.parquet").unlink()
    success(train_on(folder))
    success(evaluate_run())
    labels = [photo["true"] for photo in read_predictions(tmp_path / "report")]
    assert labels == ["b", "a", "a"]


def test_parquet_files_of_one_split_with_other_class_names_are_refused(run_train, tmp_path):
    for index, names in enumerate((["a", "b"], ["b", "a"])):
        write_dataset(tmp_path / f"{index}", rows(4), rows(4), names)
    shutil.copy(tmp_path / "1/data/train-0.parquet", tmp_path / "0/data/train-1.parquet")
    err = refusal(run_train("--dataset", tmp_path / "0", "--output-dir", tmp_path / "run"))
    assert "align" in err and "label" in err


def test_files_of_a_split_with_and_without_class_names_are_refused(tmp_path, train_on):
    folder = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"])
    table = parquet.read_table(folder / TRAIN).replace_schema_metadata()
    parquet.write_table(table, folder / "data/train-1.parquet")
    assert "train" in message(train_on(folder), folder)


def test_photos_of_every_suffix_are_loaded_and_hidden_files_are_not(folders, train_on):
    write_folders(folders, ".ipynb_checkpoints/car.jpg", "@eaDir/car.jpg", "a/._0.jpg")
    write_folders(folders, "a/.ipynb_checkpoints/car.jpg", "a/@eaDir/car.jpg/small.jpg")
    formats = {"jfif": "JPEG", "JPG": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP"}
    for suffix, kind in {**formats, "avif": "AVIF", "misnamed.jpg": "AVIF"}.items():
        (folders / f"train/a/more.{suffix}").write_bytes(encode(upright(), format=kind))
    out = success(train_on(folders))
    assert "15 train and 8 test photos, 2 classes" in out


def test_a_class_may_be_a_link_but_links_to_folders_within_it_are_not_followed(
    folders, evaluate_with, tmp_path
):
    elsewhere = write_folders(folders.with_name("elsewhere"), "0.jpg", "2012/blue/1.jpg") / "test"
    (folders / "test/c").symlink_to(elsewhere)
    for name, target in {"back": ".", "album": elsewhere}.items():
        (folders / "test/a" / name).symlink_to(target)
    success(evaluate_with(folders, "a", "b", "c"))
    labels = [photo["true"] for photo in read_predictions(tmp_path / "report")]
    assert labels == [*"aaaabbbbcc"]


@pytest.mark.parametrize("locked", ["test", "test/b", "test/b/2012"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(folders, train_on, monkeypatch, locked):
    write_folders(folders, "b/2012/0.jpg")

    def read_unless_locked(read, path="."):  # Permissions do not bind root.
        if str(path) == str(folders / locked):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(read_unless_locked, getattr(os, name)))
    said = refusal(train_on(folders))
    assert "Permission denied" in said
    assert f"{folders / locked}'" in said


def test_unknown_classes_are_refused_with_their_real_names(folders, train_on):
    (folders / "test/b").rename(folders / "test/Ford_F  150")
    shutil.copytree(folders / "test/a", folders / "test/Tank")
    (folders / "train/b").rename(folders / "train/Ford F-150")
    said = message(train_on(folders), folders)
    for name in ("Ford_F  150", "Tank", "Ford F-150"):
        assert name in said


@pytest.mark.parametrize("layout", ["folders", "parquet"])
def test_a_split_may_lack_classes_and_a_line_says_how_many(
    folders, train_on, evaluate_run, tmp_path, layout
):
    if layout == "folders":
        write_folders(folders, "c/0.jpg")
        shutil.rmtree(folders / "test/a")
        shutil.rmtree(folders / "test/c")
    else:
        shutil.rmtree(folders)
        write_dataset(folders, rows(8, 3), [(jpeg(seed), 1) for seed in range(4)], [*"abc"])
    assert "2 of 3 classes" in success(train_on(folders))
    success(evaluate_run())
    assert [photo["true"] for photo in read_predictions(tmp_path / "report")] == [*"bbbb"]


@pytest.mark.parametrize("kind", ["photos without a class", "other files", "nothing"])
def test_a_folder_without_photos_is_named(folders, train_on, kind):
    shutil.rmtree(folders / "train")
    (folders / "train/a").mkdir(parents=True)
    if kind == "photos without a class":
        (folders / "train/0.jpg").write_bytes(jpeg(0))
    if kind == "other files":
        (folders / "train/a/0.bmp").write_bytes(encode(upright(), format="BMP"))
    assert f"{folders}/train" in refusal(train_on(folders))


# ---------------------------------------------------------------- val splits


@pytest.fixture
def many(tmp_path) -> Path:
    """Folders of two classes with ten photos each in both splits."""
    names = [f"{c}/{row}.jpg" for c in "ab" for row in range(10)]
    return write_folders(tmp_path / "many", *names)


def damage(folder: Path):
    """Make it impossible to read the photos in a folder."""
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"not a photo")


def test_a_share_of_each_class_is_held_out_and_the_test_split_is_not_read(
    many, train_on, evaluate_run, tmp_path
):
    damage(many / "test")
    out = success(train_on(many, "--val-split", 0.3, "--epochs", 2, "--seed", 1))
    assert "14 train and 6 val photos" in out
    assert "val split" in out.partition("Best ")[2]
    run = tmp_path / "run"
    history = read_history(run)
    assert not any("test" in name for name in history[0])
    best = load(run / "best_model.pth")
    assert not any("test" in name for name in best)

    # eval.py finds the photos of the run, although it has no --seed of the run.
    out = success(evaluate_run("--split", "val"))
    assert "chosen on this split" in out
    val_loss = read_metrics(tmp_path / "report")["val"]["loss"]
    assert val_loss == pytest.approx(history[int(best["epoch"]) - 1]["val_loss"], rel=1e-4)
    held_out = read_predictions(tmp_path / "report")
    assert sorted(photo["true"] for photo in held_out) == [*"aaabbb"]
    success(evaluate_run("--split", "train"))
    kept = read_predictions(tmp_path / "report")
    assert len(kept) == 14
    names = {photo["file"] for photo in held_out + kept}
    assert names == {str(path) for path in many.glob("train/*/*.jpg")}

    # With other photos, others would be held out.
    Path(held_out[0]["file"]).unlink()
    assert str(many) in refusal(evaluate_run("--split", "val"))


def test_classes_too_small_for_a_val_split_are_counted_and_named(run_train, tmp_path):
    photos = [(jpeg(row), max(0, row - 4)) for row in range(8)]
    write_dataset(tmp_path / "cars", photos, photos, ["many", "one", "two", "three"])
    flags = ["--dataset", tmp_path / "cars", "--val-split", 0.5, "--output-dir", tmp_path / "run"]
    err = refusal(run_train(*flags))
    assert "--val-split" in err and "3 of 4" in err and "one, two, three" in err


def test_each_class_gives_its_share_of_the_val_photos(train_on, run_eval, tmp_path):
    cars = write_dataset(tmp_path / "cars", rows(40, 10), rows(10, 10), [*"abcdefghij"])
    success(train_on(cars, "--val-split", 0.25))
    flags = ["--checkpoint", tmp_path / "run/best_model.pth", "--num-gradcam", 0]
    success(run_eval(*flags, "--split", "val"))
    labels = [photo["true"] for photo in read_predictions(tmp_path / "run")]
    assert sorted(labels) == [*"abcdefghij"]


def test_a_line_counts_the_classes_without_a_val_photo(train_on, tmp_path):
    photos = [(jpeg(row), min(row // 8, 2)) for row in range(18)]  # 8, 8 and 2
    folder = write_dataset(tmp_path / "cars", photos, photos, ["a", "b", "c"])
    assert "1 of 3 classes have no val photo" in success(train_on(folder, "--val-split", 0.17))


@pytest.mark.parametrize("change", ["fewer photos", "another order"])
def test_photos_that_would_be_divided_in_another_way_are_refused(
    train_on, tmp_path, evaluate_run, change
):
    photos = rows(16)
    flags = ["--val-split", 0.25, "--resume", "--epochs"]
    folder = write_dataset(tmp_path / "cars", photos, photos, ["a", "b"])
    success(train_on(folder, *flags, 1))
    shutil.rmtree(folder)
    others = photos[:14] if change == "fewer photos" else sorted(photos, key=lambda photo: photo[1])
    write_dataset(folder, others, photos, ["a", "b"])
    assert "held out" in refusal(evaluate_run("--split", "val"))
    assert "--dataset" in refusal(train_on(folder, *flags, 2))


@pytest.mark.parametrize("layout, name", [("folders", "valid"), ("parquet", "validation")])
def test_a_dataset_s_own_val_split_is_used_and_test_is_not_read(
    many, train_on, evaluate_run, tmp_path, layout, name
):
    dataset, count = many, 20
    if layout == "parquet":
        dataset, count = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"]), 4
        (dataset / "data/test-0.parquet").rename(dataset / f"data/{name}-0.parquet")
    else:
        shutil.copytree(many / "test", many / name)
        damage(many / "test")
    assert f" train and {count} val photos" in success(train_on(dataset))
    assert "val_accuracy" in read_history(tmp_path / "run")[0]
    assert f" of {count}, " in success(evaluate_run("--split", "val"))
    assert "--val-split" in refusal(train_on(dataset, "--overwrite", "--val-split", 0.1))
    if layout == "parquet":
        assert "--split val" in refusal(evaluate_run("--split", "test"))


def test_two_val_splits_are_refused_by_their_names(many, train_on):
    shutil.copytree(many / "test", many / "dev")
    shutil.copytree(many / "test", many / "valid")
    said = message(train_on(many), many)
    assert "dev" in said
    assert "valid" in said


def test_a_run_that_chose_on_the_test_split_does_not_go_on_with_a_val_split(folders, train_on):
    success(train_on(folders))
    shutil.copytree(folders / "test", folders / "val")
    err = refusal(train_on(folders, "--resume", "--epochs", 2))
    assert "8 test photos" in err and "8 val photos" in err


# ---------------------------------------------------------------- class names


@pytest.mark.parametrize("layout", ["folders", "parquet"])
def test_classes_are_mapped_by_name_in_any_order_with_a_dash_for_a_slash(
    tmp_path, evaluate_with, layout
):
    with_slash = ["Ram C/V Cargo Van Minivan 2012", "Audi", "BMW"]
    with_dash = ["Audi", "Ram C-V Cargo Van Minivan 2012"]  # in another order, and fewer
    if layout == "folders":
        folder = write_folders(tmp_path / "cars", *[f"{name}/0.jpg" for name in with_dash])
        success(evaluate_with(folder, *with_slash))
        expected = ["Audi", "Ram C/V Cargo Van Minivan 2012"]
    else:
        folder = write_dataset(tmp_path / "cars", rows(2), rows(3, 3), with_slash)
        success(evaluate_with(folder, "BMW", *with_dash))
        expected = ["Ram C-V Cargo Van Minivan 2012", "Audi", "BMW"]
    photos = read_predictions(tmp_path / "report")
    assert [photo["true"] for photo in photos] == expected
    # The output of the network's second class has its name.
    assert {photo["predicted"] for photo in photos} == {"Audi"}


def test_two_classes_that_differ_in_a_dash_alone_stay_two(tmp_path, evaluate_with):
    folder = write_folders(tmp_path / "cars", "a-b/0.jpg", "c/0.jpg")
    success(evaluate_with(folder, "a/b", "c", "a-b"))
    labels = [photo["true"] for photo in read_predictions(tmp_path / "report")]
    assert labels == ["a-b", "c"]
    both = write_dataset(tmp_path / "both", rows(2), rows(2), ["a/b", "a-b"])
    said = message(evaluate_with(both, "a-b", "c"), both)
    assert "a/b" in said
    twins = write_folders(tmp_path / "twins", "a-b-c/0.jpg")
    assert "a-b-c" in message(evaluate_with(twins, "a/b-c", "a-b/c"), twins)
    success(evaluate_with(both, "a-b", "c", "a/b"))
    labels = [photo["true"] for photo in read_predictions(tmp_path / "report")]
    assert labels == ["a/b", "a-b"]


def test_a_test_split_with_its_names_in_another_order_is_evaluated_by_name(
    tmp_path, train_on, evaluate_run
):
    names = ["a", "b", "c"]
    folder = write_dataset(tmp_path / "cars", rows(9, 3), rows(6, 3), names)
    turned = [(photo, 2 - label) for photo, label in rows(6, 3)]
    other = write_dataset(tmp_path / "turned", rows(9, 3), turned, names[::-1])
    shutil.copy(folder / TRAIN, other / TRAIN)
    success(train_on(other))
    assert load(tmp_path / "run/best_model.pth")["classes"] == names
    (epoch,) = read_history(tmp_path / "run")
    # The same photos of the same classes, with the names in the order of training.
    success(evaluate_run("--dataset", folder))
    loss = read_metrics(tmp_path / "report")["test"]["loss"]
    assert epoch["test_loss"] == pytest.approx(loss, rel=1e-4)


# ---------------------------------------------------------------- the Hub


@contextlib.contextmanager
def turned_to(url: str, cache: Path, offline: bool = False):
    """Turn huggingface_hub and datasets to a URL, as HF_ENDPOINT does, with another cache."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
        for module in (constants, datasets.config):
            for name, value in dict(ENDPOINT=url, HF_ENDPOINT=url, HF_HUB_OFFLINE=offline).items():
                patch.setattr(module, name, value, raising=False)
        yield


@pytest.fixture
def train_from(train_on, tmp_path, monkeypatch):
    """Train from a Hub at a URL. What it downloads stays for the test's next run."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # The client asks six times.

    def run(url: str, dataset: str = train.DEFAULT_DATASET, offline: bool = False):
        with turned_to(url, tmp_path / "cache", offline):
            return train_on(dataset, "--overwrite")

    return run


DEFAULT = (train.DEFAULT_DATASET, train.DATASET_REVISION)
FILES = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "test")]
NOWHERE = "http://127.0.0.1:9"
FAULTS = {
    NOWHERE: "Connection refused",
    "huggingface.co": "missing an 'http://' or 'https://' protocol",
    401: "Invalid credentials in Authorization header",
    404: "404 Not Found",
    429: "429 Too Many Requests",
}


def assert_not_loaded(outcome: tuple[int, str, str], reason: str):
    """That the script ends with one line; before it, the client may say that it asks again."""
    status, _, err = outcome
    assert status == err.count(".py: ") == 1
    last_line = err.splitlines()[-1]
    assert f"--dataset {train.DEFAULT_DATASET}" in last_line
    assert "Hub" in last_line
    assert reason in last_line


def test_the_default_dataset_is_downloaded_once(cars, tmp_path, train_from):
    hub = shutil.copytree(cars, tmp_path / "hub")
    (hub / "data/contrast-00000-of-00001.parquet").write_bytes(b"the test split, corrupted")
    with stand_in_hub(hub, *DEFAULT) as (url, fetched):
        assert train_from(url)[::2] == (0, "")  # There are no bars where no terminal is.
    assert sorted(fetched) == sorted(FILES)
    success(train_from(NOWHERE))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_another_dataset_of_the_hub_is_trained_on(
    tmp_path, train_from, run_eval, monkeypatch, split
):
    hub = write_dataset(tmp_path / "hub", rows(8), rows(4), ["a", "b"])
    (hub / "data/test-0.parquet").rename(hub / f"data/{split}-0.parquet")
    repository = f"somebody/with-{split}"
    evaluated = "test" if split == "test" else "val"
    with stand_in_hub(hub, repository, "main") as (url, _):
        out = success(train_from(url, repository))
        assert f"8 train and 4 {evaluated} photos" in out
        with turned_to(url, tmp_path / "cache"):
            flags = ["--checkpoint", tmp_path / "run/best_model.pth", "--num-gradcam", 0]
            assert " of 4, " in success(run_eval(*flags, "--split", evaluated))


@pytest.mark.parametrize("fault", FAULTS)
def test_network_errors_are_one_line_with_the_reason(cars, train_from, fault):
    with stand_in_hub(cars, *DEFAULT, status=fault) as (url, _):
        assert_not_loaded(train_from(url if isinstance(fault, int) else fault), FAULTS[fault])


@pytest.mark.parametrize("file", [1, 2])
def test_an_interrupted_download_continues_in_the_next_run(cars, train_from, file):
    with stand_in_hub(cars, *DEFAULT, dies_in=file) as (url, _):
        assert_not_loaded(train_from(url), "without sending")
    assert f"--dataset {DEFAULT[0]}" in refusal(train_from(NOWHERE, offline=True))
    with stand_in_hub(cars, *DEFAULT) as (url, fetched):
        success(train_from(url))
    assert fetched
    success(train_from(NOWHERE))


@pytest.mark.slow
def test_processes_that_ask_at_once_download_each_file_once(cars, tmp_path, ranks):
    flags = ["--dataset", train.DEFAULT_DATASET, "--epochs", 1, "--output-dir", tmp_path / "run"]
    with stand_in_hub(cars, *DEFAULT, seconds=0.5) as (url, fetched):
        outcomes = ranks(2, *flags, inside=partial(turned_to, url, tmp_path / "cache"))
    for outcome in outcomes:
        success(outcome)
    assert sorted(fetched) == sorted(FILES)


def test_a_name_is_looked_up_on_the_hub_which_is_said_first_and_a_resumed_run_does_so(
    tmp_path, train_from
):
    hub = write_dataset(tmp_path / "hub", rows(8), rows(4), ["a", "b"])
    with stand_in_hub(hub, "somebody/cars", "main") as (url, _):
        out = success(train_from(url, "somebody/cars"))
        assert "somebody/cars is not a folder here: asking the Hugging Face Hub" in out
        with turned_to(url, tmp_path / "cache"):
            train.main(["--resume", "--epochs", "2", "--output-dir", str(tmp_path / "run")])
    assert len(read_history(tmp_path / "run")) == 2


# ---------------------------------------------------------------- decoding


def decode(encoded: bytes) -> torch.Tensor:
    return train.decode_photo(encoded)


# How a camera stores the upright photo, by the EXIF orientation that it then writes.
STORED_AS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
STORED_AS |= {5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


def turned(orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright().transpose(Image.Transpose[STORED_AS[orientation]])
    return encode(stored, exif=exif.tobytes(), **options)


def animated(kind: str) -> bytes:
    white = Image.new("RGB", (48, 32), "white")
    return encode(upright(), format=kind, save_all=True, append_images=[white], lossless=True)


PALETTE = upright().resize((1200, 900)).quantize(256)
# A file, and the RGB image that it shows.
TAKEN = {
    "cmyk": (encode(upright("CMYK"), quality=95), upright("CMYK").convert("RGB")),
    "grey jpeg": (encode(upright("L"), quality=95), upright("L").convert("RGB")),
    "mpo": (animated("MPO"), upright()),
    "alpha": (encode(upright("RGBA"), format="PNG"), upright()),
    "large palette": (encode(PALETTE, format="PNG", transparency=0), PALETTE.convert("RGB")),
    "animated webp": (animated("WEBP"), upright()),
    "animated gif": (animated("GIF"), upright()),
    "avif": (encode(upright(), format="AVIF", quality=95), upright()),
}
TAKEN |= {f"exif {turn} png": (turned(turn, format="PNG"), upright()) for turn in STORED_AS}
TAKEN |= {f"exif {turn} jpeg": (turned(turn, quality=95), upright()) for turn in STORED_AS}


@pytest.mark.parametrize("kind", TAKEN)
def test_every_kind_of_photo_is_upright_rgb(kind, decoder):
    encoded, expected = TAKEN[kind]
    photo = decode(encoded)
    expected = v2.functional.pil_to_tensor(expected)
    assert (photo.dtype, photo.shape) == (expected.dtype, expected.shape)
    difference = (photo.int() - expected.int()).abs().float()
    lossless = any(word in kind for word in ("png", "palette", "alpha", "webp", "gif"))
    assert difference.max() <= 1 if lossless else difference.mean() < 4


def test_16_bits_keep_their_brightness_or_are_refused(decoder):
    gray = np.arange(256).reshape(16, 16)
    encoded = encode(Image.fromarray((257 * gray).astype(np.uint16)), format="PNG")
    try:
        photo = decode(encoded)
    except ValueError:
        assert train.decode_image is None, "torchcodec can read it"
    else:
        assert np.abs(photo.numpy().astype(int) - gray).max() <= 1


@pytest.mark.skipif(train.decode_image is None, reason="torchcodec cannot be loaded")
def test_pillow_decodes_a_jpeg_as_torchcodec_does(monkeypatch):
    for seed in range(3):
        expected = decode(jpeg(seed, 300, 200))
        with monkeypatch.context() as patch:
            patch.setattr(train, "decode_image", None)
            photo = decode(jpeg(seed, 300, 200))
        assert photo.stride() == expected.stride()
        assert (photo.int() - expected.int()).abs().max() <= 1


@pytest.mark.slow
def test_a_torchcodec_of_another_torch_lets_pillow_decode(cars, tmp_path):
    (tmp_path / "torchcodec").mkdir()
    stub = "raise OSError('libcudart.so.13: cannot open shared object file')"
    (tmp_path / "torchcodec/__init__.py").write_text(stub)
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path / "run"]
    stubbed = {"PYTHONPATH": str(tmp_path)}
    out = success(run("train.py", *flags, environment=stubbed))
    assert "Pillow" in out
    assert "libcudart.so.13" in out
    report = ["--checkpoint", tmp_path / "run/best_model.pth", "--output-dir", tmp_path]
    success(run("eval.py", *report, environment=stubbed))


@pytest.mark.skipif(train.decode_image is None, reason="Pillow reads no HEIC")
def test_a_phones_heic_photo_is_upright_rgb():
    pillow_heif.register_heif_opener()
    photo = decode(turned(6, format="HEIF", quality=95))
    assert (photo.int() - v2.functional.pil_to_tensor(upright()).int()).abs().float().mean() < 4


# ---------------------------------------------------------------- crops


def crop_for_training(photo: torch.Tensor, resolution: int) -> torch.Tensor:
    return train.random_crop(SimpleNamespace(resolution=resolution), photo)


def crop_for_evaluation(photo: torch.Tensor, resolution: int, side: int) -> torch.Tensor:
    return train.center_crop(SimpleNamespace(resolution=resolution), photo, resize_at_224=side)


@pytest.mark.parametrize("size", [(60, 40), (640, 427), (333, 500), (73, 64), (11, 300)])
@pytest.mark.parametrize("resolution", [64, 224, 300])
def test_crops_are_torchvisions_and_contiguous(size, resolution):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    random_steps = [v2.RandomResizedCrop(resolution), v2.RandomHorizontalFlip()]
    pairs = [(crop_for_training, random_steps)] * 5
    for side in (256, 224, 288):
        steps = [v2.Resize(int(resolution * side / 224)), v2.CenterCrop(resolution)]
        pairs.append((partial(crop_for_evaluation, side=side), steps))
    for seed, (crop, steps) in enumerate(pairs):
        photo = torch.from_numpy(pixels).movedim(-1, 0)
        torch.manual_seed(seed)
        ours = crop(photo, resolution)
        torch.manual_seed(seed)
        same = v2.Compose(steps)(photo).movedim(0, -1)
        torch.manual_seed(seed)
        of_pil = np.asarray(v2.Compose(steps)(Image.fromarray(pixels)))
        assert ours.is_contiguous()
        assert torch.equal(ours, same)
        assert np.abs(ours.numpy().astype(int) - of_pil).max() <= 3  # It rounds otherwise.


@pytest.fixture
def crops(monkeypatch) -> list[tuple[int, int]]:
    """For each photo, in the order of training, its hash and its crop's."""
    random_crop = train.random_crop
    noted = []

    def noting_crop(*args, **options):
        crop = random_crop(*args, **options)
        (photo,) = (value for value in args if isinstance(value, torch.Tensor))
        noted.append((hash(photo.numpy().tobytes()), hash(crop.numpy().tobytes())))
        return crop

    monkeypatch.setattr(train, "random_crop", noting_crop)
    return noted


def test_crops_depend_on_seed_epoch_and_row_alone(crops, train_on, tmp_path):
    folder = write_dataset(tmp_path, [(jpeg(i // 2), 0) for i in range(16)], rows(1), ["a", "b"])
    success(train_on(folder, "--epochs", 2))
    success(train_on(folder, "--overwrite", "--batch-size", 6))
    success(train_on(folder, "--resume", "--batch-size", 6, "--epochs", 2))
    success(train_on(folder, "--overwrite", "--seed", 1))
    first, second, again, resumed, other = (crops[16 * run : 16 * run + 16] for run in range(5))
    assert sorted(photo for photo, _ in first) == sorted(photo for photo, _ in second)
    assert [photo for photo, _ in first] != [photo for photo, _ in second]
    assert len(dict(first)) == 8
    assert len(set(first + second + other)) == 48
    assert sorted(again) == sorted(first)
    assert sorted(resumed) == sorted(second)


def test_a_small_last_batch_is_left_out_and_comes_in_other_epochs(crops, train_on, tmp_path):
    folder = write_dataset(tmp_path / "26", rows(26), rows(2), ["a", "b"])
    success(train_on(folder, "--batch-size", 24, "--epochs", 3))
    assert len(crops) == 3 * 24
    assert len(dict(crops)) == 26


def test_a_last_batch_of_one_photo_is_left_out_though_it_is_an_eighth(crops, train_on, tmp_path):
    folder = write_dataset(tmp_path / "17", rows(17), rows(2), ["a", "b"])
    success(train_on(folder, "--batch-size", 8))
    assert len(crops) == 16


def test_a_last_batch_of_an_eighth_of_the_others_is_trained_on(crops, train_on, tmp_path):
    success(
        train_on(write_dataset(tmp_path / "27", rows(27), rows(2), ["a", "b"]), "--batch-size", 24)
    )
    assert len(dict(crops)) == 27
