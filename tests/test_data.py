"""Data sets, folders and photos: what is taken, how it is cropped, and in which order."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

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


def load_split(folder, split: str, classes: list[str] | None = None) -> datasets.Dataset:
    return train.load_split(train.find_splits(str(folder), [split]), split, classes)


def labels_of(folder: Path, *classes: str) -> list[int]:
    return load_split(folder, "test", list(classes) or None)["label"][:]


@pytest.fixture
def train_on(run_train, tmp_path):
    return partial(run_train, "--output-dir", tmp_path / "run", "--epochs", 1, "--dataset")


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
NO_PHOTOS = {
    "empty": b"",
    "cut off": encode(upright().resize((600, 400)))[:3000],
    "text": b"a text named .jpg",
    "1 x 5000": encode(Image.new("RGB", (1, 5000))),
    "eps": encode(upright(), format="EPS"),  # Pillow would hand it to Ghostscript.
    **{kind: encode(upright(), format=kind) for kind in ("bmp", "tiff", "ppm")},
}
BROKEN = "data/train-0.parquet, or the copy of it that datasets keeps in "
REFUSED = [
    ("is not a folder and could not be loaded from the Hub", shutil.rmtree),
    ("no train split (train/CLASS/PHOTO or data/", lambda folder: shutil.rmtree(folder / "data")),
    ("write it with to_parquet", lambda f: datasets.load_dataset(str(f)).save_to_disk(f)),
    ("no test or val split", lambda folder: (folder / "data/test-0.parquet").unlink()),
    ("has 1 of", lambda folder: os.rename(folder / TRAIN, folder / "data/train-of-2.parquet")),
    (BROKEN, lambda folder: os.pwrite(os.open(folder / TRAIN, os.O_WRONLY), bytes(999), 99)),
    (BROKEN, lambda folder: os.truncate(folder / TRAIN, 2000)),
    (BROKEN, lambda folder: (folder / TRAIN).write_text("version https://git-lfs\n")),
    (BROKEN, partial(in_tables, lambda table: table.slice(0, 0))),
    ("--batch-size", partial(in_tables, lambda table: table.slice(0, 1))),
    ("not {'image'", partial(in_tables, lambda table: table.select(["image"]))),
    ("Value(", partial(in_tables, lambda table: table.replace_schema_metadata())),
    ("row 2 has label -1, which is out of range", put("label", 2, -1)),
    ("row 2 has label 2, which is out of range", put("label", 2, 2)),
    ("row 2 has label None, which is out of range", put("label", 2, None)),
    ("train photo in row 1 cannot be decoded: it is missing", put("image", 1, None)),
    ("row 1 cannot be decoded: it is missing", put("image", 1, {"bytes": None, "path": None})),
    ("train photo in row 1 cannot be decoded: ", put("image", 1, {"bytes": b"text", "path": None})),
    # Empty bytes are a damaged photo, and not a reason to open a file of that name.
    ("train photo a.jpg cannot be decoded: ", put("image", 1, {"bytes": b"", "path": "a.jpg"})),
]


@pytest.mark.parametrize("words, change", REFUSED)
def test_unusable_datasets_are_refused_in_one_line(train_on, tmp_path, monkeypatch, words, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    folder = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"])
    change(folder)
    assert words in refusal(train_on(folder))


@pytest.fixture(params=["torchcodec", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(train, "decode_image", None)
        monkeypatch.setattr(train, "TORCHCODEC_ERROR", OSError("no library"), raising=False)


def test_a_decoder_may_fail_with_any_error(folders, train_on, decoder, monkeypatch):
    def fail(*args, **options):
        raise TypeError("a damaged file, as Pillow may say it")

    monkeypatch.setattr(train, "decode_image", fail if train.decode_image else None)
    monkeypatch.setattr(Image, "open", fail)
    assert " cannot be decoded: TypeError: a damaged file" in refusal(train_on(folders))


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in NO_PHOTOS), ("text", 1)])
def test_files_that_are_not_photos_are_refused_by_their_path(
    folders, train_on, decoder, kind, workers
):
    path = folders / "train/b/0.jpg"
    path.write_bytes(NO_PHOTOS[kind])
    refused = refusal(train_on(folders, "--workers", workers))
    assert f".py: the train photo {path} cannot be decoded: " in refused


# ---------------------------------------------------------------- files, folders and classes


@pytest.mark.parametrize("name", ["cars*", "cars [v2]", "cars?", "."])
def test_paths_are_not_glob_patterns_and_are_read_again(tmp_path, monkeypatch, name):
    write_dataset(tmp_path / "cars-sibling", rows(4), rows(4), ["a", "b"])
    folder = tmp_path / ("cars here" if name == "." else name)
    for count in (2, 3):
        shutil.rmtree(folder, ignore_errors=True)
        write_dataset(folder, rows(count), rows(4), ["a", "b"])
        shutil.copytree(folder / "data", folder / "backup")
        monkeypatch.chdir(folder if name == "." else tmp_path)
        assert [len(load_split(name, split)) for split in ("train", "test")] == [count, 4]


def test_photos_of_every_suffix_are_loaded_and_hidden_files_are_not(folders, train_on):
    write_folders(folders, ".ipynb_checkpoints/car.jpg", "@eaDir/car.jpg", "a/._0.jpg")
    write_folders(folders, "a/.ipynb_checkpoints/car.jpg", "a/@eaDir/car.jpg/small.jpg")
    formats = {"jfif": "JPEG", "JPG": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP"}
    for suffix, kind in {**formats, "avif": "AVIF", "misnamed.jpg": "AVIF"}.items():
        (folders / f"train/a/more.{suffix}").write_bytes(encode(upright(), format=kind))
    out = success(train_on(folders, "--batch-size", 999))
    assert "15 train and 8 test photos, 2 classes" in out
    assert "left out" not in out


def test_links_add_no_photo_twice_and_are_not_followed_within_a_class(folders, capsys):
    elsewhere = write_folders(folders.with_name("elsewhere"), "0.jpg", "2012/blue/1.jpg") / "test"
    (folders / "test/c").symlink_to(elsewhere)
    links = {"up": "../..", "back": ".", "album": elsewhere, "00.jpg": "0.jpg", "9.jpg": "0.jpg"}
    for name, target in links.items():
        (folders / "test/a" / name).symlink_to(target)
    photos = load_split(folders, "test")
    names = [image["path"].removeprefix(f"{folders}/test/")[0] for image in photos["image"]]
    assert names == [*"aaaabbbbcc"]
    assert photos["label"][:] == [0] * 4 + [1] * 4 + [2] * 2
    out = capsys.readouterr().out
    assert "3 links to folders" in out
    assert "2 links to photos that are already included" in out
    assert f", in {folders / 'test'}" in out


@pytest.mark.parametrize("locked", ["test", "test/b", "test/b/2012"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(folders, monkeypatch, locked):
    write_folders(folders, "b/2012/0.jpg")

    def read_unless_locked(read, path="."):  # Permissions do not bind root.
        if str(path) == str(folders / locked):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(read_unless_locked, getattr(os, name)))
    with pytest.raises(PermissionError, match=f"Permission denied: '{folders / locked}'"):
        labels_of(folders)


def test_unknown_classes_are_refused_with_their_real_names(folders, train_on):
    (folders / "test/b").rename(folders / "test/b_b  c")
    shutil.copytree(folders / "test/a", folders / "test/d")
    err = refusal(train_on(folders))
    said = "its 3 classes are not among the 2 of training: "
    assert f"{said}only here ['b_b  c', 'd'], only in training ['b']" in err


def test_a_split_may_lack_classes_and_a_line_says_how_many(folders, train_on, tmp_path):
    shutil.rmtree(folders / "test/a")
    write_folders(folders, "c/0.jpg")
    shutil.rmtree(folders / "test/c")
    out = success(train_on(folders))
    assert "note        2 of 3 classes have no test photos" in out
    assert labels_of(folders, "a", "b", "c") == [1] * 4
    in_parquet = write_dataset(tmp_path / "p", rows(4), [(jpeg(0), 1)], ["a", "b"])
    assert "1 of 2 classes have no test photos" in success(train_on(in_parquet, "--overwrite"))


@pytest.mark.parametrize("kind", ["photos without a class", "nothing", "bmp"])
def test_a_folder_without_photos_is_refused_with_what_it_holds(folders, train_on, kind):
    shutil.rmtree(folders / "train")
    (folders / "train/a").mkdir(parents=True)
    found = "no files"
    if kind == "photos without a class":
        (folders / "train/0.jpg").write_bytes(jpeg(0))
        found = "1 photos that are not in the folder of a class"
    if kind == "bmp":
        (folders / "train/a/0.bmp").write_bytes(encode(upright(), format="BMP"))
        found = "1 files that do not end in .jpg .jpeg "
    err = refusal(train_on(folders))
    assert f"{folders}/train/CLASS holds no photos: found {found}" in err
    assert "save_to_disk" not in err


def test_a_cache_that_is_damaged_or_full_is_named(train_on, tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"])
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    success(train_on(folder))
    (arrow,) = cache.rglob("*train.arrow")
    os.truncate(arrow, 1000)
    err = refusal(train_on(folder, "--overwrite"))
    assert f"datasets keeps in {cache} (that folder may be full; it can be deleted): " in err
    shutil.rmtree(cache)
    success(train_on(folder, "--overwrite"))


# ---------------------------------------------------------------- parquet files that disagree


def write_shards(folder: Path, *names: list[str] | None) -> Path:
    """Write a split of one file for each list of class names, with a photo of each class."""
    for index, classes in enumerate(names):
        shard = write_dataset(
            folder / f"{index}", rows(len(classes or "ab"), 2), [], classes or "ab"
        )
        if classes is None:
            in_tables(lambda table: table.replace_schema_metadata(), shard)
        (folder / "data").mkdir(exist_ok=True)
        for split in ("train", "test"):
            shutil.copy(shard / TRAIN, folder / f"data/{split}-{index}.parquet")
    return folder


def test_each_file_of_a_split_has_class_names_in_an_order_of_its_own(tmp_path, train_on):
    folder = write_shards(tmp_path / "order", ["blue", "red"], ["red", "blue"])
    assert load_split(folder, "train")["label"][:] == [0, 1, 1, 0]
    assert load_split(folder, "train", ["red", "blue"])["label"][:] == [1, 0, 0, 1]
    folder = write_shards(tmp_path / "one each", ["blue"], ["red"])
    photos = load_split(folder, "train")
    assert photos.features["label"].names == ["blue", "red"]
    assert photos["label"][:] == [0, 1]
    assert "4 train and 4 test photos, 2 classes" in success(train_on(tmp_path / "order"))


def test_a_file_without_names_among_files_with_names_is_refused(tmp_path, train_on):
    folder = write_shards(tmp_path / "cars", ["a", "b"], None)
    err = refusal(train_on(folder))
    assert f"{folder}/data/train-1.parquet has no class names, unlike other files" in err


def test_photos_of_another_mode_are_refused(tmp_path, train_on):
    folder = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"])
    photos = datasets.Dataset.from_parquet(str(folder / TRAIN))
    photos.cast_column("image", datasets.Image(mode="L")).to_parquet(folder / TRAIN)
    assert "image has mode L, but photos are always decoded to RGB" in refusal(train_on(folder))


def test_labels_of_300_000_rows_are_checked_in_a_few_seconds():
    count = 300_000
    names = [f"class {index}" for index in range(196)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    images = [{"bytes": None, "path": f"/cars/{row}.jpg"} for row in range(count)]
    columns = {"image": images, "label": [row % 196 for row in range(count)]}
    photos = datasets.Dataset.from_dict(columns, features=features)
    start = time.perf_counter()
    split = train.load_split({"train": photos}, "train", names[::-1])
    assert time.perf_counter() - start < 10
    assert split["label"][:3] == [195, 194, 193]


# ---------------------------------------------------------------- val splits


def photo_names(photos: datasets.Dataset) -> set[str]:
    return {image["path"] for image in photos["image"]}


@pytest.fixture
def many(tmp_path) -> Path:
    """Folders of two classes with ten photos each, and one with two."""
    names = [f"{c}/{row}.jpg" for c in "ab" for row in range(10)]
    return write_folders(tmp_path / "many", *names, "c/0.jpg", "c/1.jpg")


def test_a_share_of_each_class_is_held_out_and_the_test_split_is_not_read(
    many, train_on, tmp_path, run_eval
):
    for path in (many / "test").rglob("*.jpg"):
        path.write_bytes(b"not a photo")
    out = success(train_on(many, "--val-split", 0.3, "--epochs", 2))
    assert "data        15 train and 7 val photos, 3 classes" in out
    assert "(chosen on the val split)" in out
    run = tmp_path / "run"
    (row, _) = read_history(run)
    assert {"val_loss", "val_accuracy"} < set(row)
    assert not any("test" in name for name in row)
    best = load(run / "best_model.pth")
    assert "test_accuracy" not in best
    flags = ["--checkpoint", run / "best_model.pth", "--output-dir", run, "--num-gradcam", 0]
    out = success(run_eval(*flags, "--split", "val"))
    assert f"chosen on the val split ({best['val_accuracy']:.2%})" in out.splitlines()[0]
    assert f"({round(7 * best['val_accuracy'])} of 7, " in out
    assert "the epoch was chosen on this split" in out
    assert " of 15, " in success(run_eval(*flags, "--split", "train"))


def test_held_out_photos_depend_on_their_names_alone(many):
    def held_out(folder: Path) -> set[str]:
        splits = train.hold_out(load_split(folder, "train"), 0.3)
        train_names, val_names = photo_names(splits["train"]), photo_names(splits["val"])
        assert not train_names & val_names
        assert len(train_names | val_names) == len(splits["train"]) + len(splits["val"])
        return {name.removeprefix(f"{folder}/train/") for name in val_names}

    first = held_out(many)
    assert [sum(name.startswith(c) for name in first) for c in "abc"] == [3, 3, 1]
    moved = shutil.copytree(many, many.with_name("moved"))
    write_folders(moved, "aa/0.jpg", "aa/1.jpg")
    assert {name for name in held_out(moved) if not name.startswith("aa/")} == first


@pytest.mark.parametrize("share, held_out", [(0.01, [1, 1, 1]), (0.99, [9, 9, 1])])
def test_at_least_one_photo_of_a_class_is_held_out_and_one_is_kept(many, share, held_out):
    labels = train.hold_out(load_split(many, "train"), share)["val"]["label"][:]
    assert [labels.count(label) for label in range(3)] == held_out


def test_a_class_of_one_photo_cannot_be_divided(many, train_on):
    (many / "train/c/0.jpg").unlink()
    err = refusal(train_on(many, "--val-split", 0.3))
    assert "--val-split: the class 'c' has only one train photo" in err


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("layout", ["folders", "parquet", "hub"])
def test_a_dataset_s_own_val_split_is_used(
    many, train_on, run_eval, tmp_path, hub_at, name, layout
):
    if layout == "folders":
        (many / "test").rename(many / name)
        dataset, count = many, 22
    else:
        dataset, count = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"]), 4
        (dataset / "data/test-0.parquet").rename(dataset / f"data/{name}-0.parquet")
    flags = ["--checkpoint", tmp_path / "run/best_model.pth", "--output-dir", tmp_path]
    flags += ["--num-gradcam", 0]
    if layout == "hub":
        repository = f"somebody/{name}"
        with stand_in_hub(dataset, repository, "main") as (url, _):
            out = success(hub_at(url, repository)())
            flags += ["--dataset", repository]
            success(run_eval(*flags, "--split", "val"))
        assert f"train and {count} val photos" in out
        return
    assert f"train and {count} val photos" in success(train_on(dataset))
    assert "no test split: evaluate its val split with --split val" in refusal(run_eval(*flags))
    assert f" of {count}, " in success(run_eval(*flags, "--split", "val"))
    err = refusal(train_on(dataset, "--overwrite", "--val-split", 0.1))
    assert "it has a val split of its own: leave out --val-split" in err


def test_photos_that_would_be_divided_in_another_way_are_refused(
    many, train_on, run_eval, tmp_path
):
    flags = ["--val-split", 0.3, "--resume"]
    success(train_on(many, *flags))
    # The same numbers of photos, but another one of class "c" is held out.
    (many / "train/c/0.jpg").rename(many / "train/c/swap.jpg")
    (many / "train/c/1.jpg").rename(many / "train/c/0.jpg")
    (many / "train/c/swap.jpg").rename(many / "train/c/1.jpg")
    flags_of_eval = ["--checkpoint", tmp_path / "run/best_model.pth", "--output-dir", tmp_path]
    err = refusal(run_eval(*flags_of_eval, "--split", "val"))
    assert "other photos than in the run would be held out" in err
    err = refusal(train_on(many, *flags, "--epochs", 2))
    assert "--dataset: the photos of the val split differ from the run to resume" in err
    err = refusal(train_on(many, "--resume", "--epochs", 2, "--val-split", 0.2))
    assert "--val-split 0.2: the run to resume" in err


def test_a_run_that_chose_on_the_test_split_does_so_when_a_val_split_appears(many, train_on):
    success(train_on(many, "--resume"))
    shutil.copytree(many / "test", many / "val")
    success(train_on(many, "--resume", "--epochs", 2))


# ---------------------------------------------------------------- class names


@pytest.mark.parametrize("character", ["-", "_"])
def test_classes_are_mapped_by_name_in_any_order_with_a_dash_for_a_slash(tmp_path, character):
    with_slash = ["Ram C/V Cargo Van Minivan 2012", "Audi"]
    without = ["Audi", f"Ram C{character}V Cargo Van Minivan 2012"]
    hub = write_dataset(tmp_path / "hub", rows(2), rows(2), with_slash)
    folder = write_folders(tmp_path, *[f"{name}/0.jpg" for name in without])
    assert labels_of(folder, *with_slash) == labels_of(hub, *without) == [1, 0]


def test_two_classes_that_differ_in_a_dash_alone_stay_two(tmp_path):
    folder = write_folders(tmp_path, "a-b/0.jpg", "a_b/0.jpg")
    assert labels_of(folder) == [0, 1]
    assert labels_of(folder, "a_b", "a-b") == [1, 0]
    for classes in (["a/b", "a-b"], ["a-b", "c"]):
        with pytest.raises(ValueError, match="its 2 classes are not among the 2 of training"):
            labels_of(folder, *classes)


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def hub_at(monkeypatch, train_on, tmp_path):
    """Turn huggingface_hub to a URL, as HF_ENDPOINT does; returns the run that trains from it."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # The client asks six times.

    def turn(url: str, dataset: str = train.DEFAULT_DATASET, offline: bool = False):
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
        for module in (constants, datasets.config):
            for name, value in dict(ENDPOINT=url, HF_ENDPOINT=url, HF_HUB_OFFLINE=offline).items():
                monkeypatch.setattr(module, name, value, raising=False)
        return partial(train_on, dataset, "--overwrite")

    return turn


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
    assert "could not be loaded from the Hub: " in err.splitlines()[-1]
    assert reason in err.splitlines()[-1]


def test_the_default_dataset_is_downloaded_once(cars, tmp_path, hub_at):
    hub = shutil.copytree(cars, tmp_path / "hub")
    (hub / "data/contrast-00000-of-00001.parquet").write_bytes(b"the test split, corrupted")
    with stand_in_hub(hub, *DEFAULT) as (url, fetched):
        assert hub_at(url)()[::2] == (0, "")  # There are no bars where no terminal is.
    assert sorted(fetched) == sorted(FILES)
    success(hub_at(NOWHERE)())


def test_another_dataset_of_the_hub_is_trained_on(cars, hub_at):
    with stand_in_hub(cars, "somebody/cars", "main") as (url, _):
        assert "16 train and 8 test photos" in success(hub_at(url, "somebody/cars")())


def test_a_dataset_with_several_configurations_names_them_and_the_command(cars, tmp_path, hub_at):
    configs = []
    for name in ("coupes", "vans"):
        shutil.copytree(cars / "data", tmp_path / "hub" / name)
        configs.append(f"- {{config_name: {name}, data_files: {name}/train-*.parquet}}")
    card = "\n".join(["---", "configs:", *configs, "---"])
    (tmp_path / "hub/README.md").write_text(card)
    with stand_in_hub(tmp_path / "hub", "somebody/cars", "main") as (url, _):
        outcome = hub_at(url, "somebody/cars")()
    assert_not_loaded(outcome, "it has the configurations coupes, vans: download it with `hf ")


@pytest.mark.parametrize("fault", FAULTS)
def test_network_errors_are_one_line_with_the_reason(cars, hub_at, fault):
    with stand_in_hub(cars, *DEFAULT, status=fault) as (url, _):
        assert_not_loaded(hub_at(url if isinstance(fault, int) else fault)(), FAULTS[fault])


@pytest.mark.parametrize("file", [1, 2])
def test_an_interrupted_download_continues_in_the_next_run(cars, hub_at, file):
    with stand_in_hub(cars, *DEFAULT, dies_in=file) as (url, _):
        assert_not_loaded(hub_at(url)(), "without sending")
    assert f"--dataset {DEFAULT[0]}" in refusal(hub_at(NOWHERE, offline=True)())
    with stand_in_hub(cars, *DEFAULT) as (url, fetched):
        success(hub_at(url)())
    assert fetched
    success(hub_at(NOWHERE)())


def test_processes_that_ask_at_once_download_each_file_once(cars, hub_at):
    with stand_in_hub(cars, *DEFAULT, seconds=0.5) as (url, fetched):
        hub_at(url)
        with ThreadPoolExecutor() as threads:  # The Hub's locks hold for threads too.
            wanted = ["train", "test"]
            list(threads.map(lambda _: train.find_splits(train.DEFAULT_DATASET, wanted), range(3)))
    assert sorted(fetched) == sorted(FILES)


# ---------------------------------------------------------------- photos and crops


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
    photo = train.decode_photo(encoded)
    expected = v2.functional.pil_to_tensor(expected)
    assert (photo.dtype, photo.shape) == (expected.dtype, expected.shape)
    difference = (photo.int() - expected.int()).abs().float()
    lossless = any(word in kind for word in ("png", "palette", "alpha", "webp", "gif"))
    assert difference.max() <= 1 if lossless else difference.mean() < 4


def test_16_bits_keep_their_brightness_or_are_refused(monkeypatch):
    gray = np.arange(256).reshape(16, 16)
    encoded = encode(Image.fromarray((257 * gray).astype(np.uint16)), format="PNG")
    if train.decode_image:
        assert np.array_equal(train.decode_photo(encoded), [gray] * 3)
    monkeypatch.setattr(train, "decode_image", None)
    with pytest.raises(ValueError, match="16-bit"):
        train.decode_photo(encoded)


@pytest.mark.skipif(train.decode_image is None, reason="torchcodec cannot be loaded")
def test_pillow_decodes_a_jpeg_as_torchcodec_does(monkeypatch):
    for seed in range(3):
        expected = train.decode_photo(jpeg(seed, 300, 200))
        with monkeypatch.context() as patch:
            patch.setattr(train, "decode_image", None)
            photo = train.decode_photo(jpeg(seed, 300, 200))
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
    assert "same index as torch (libcudart.so.13" in out
    assert "Pillow decodes" in out
    report = ["--checkpoint", tmp_path / "run/best_model.pth", "--output-dir", tmp_path]
    success(run("eval.py", *report, environment=stubbed))


@pytest.mark.skipif(train.decode_image is None, reason="Pillow reads no HEIC")
def test_a_phones_heic_photo_is_upright_rgb():
    pillow_heif.register_heif_opener()
    photo = train.decode_photo(turned(6, format="HEIF", quality=95))
    assert (photo.int() - v2.functional.pil_to_tensor(upright()).int()).abs().float().mean() < 4


@pytest.mark.parametrize("size", [(60, 40), (640, 427), (333, 500), (73, 64), (11, 300)])
@pytest.mark.parametrize("resolution", [64, 224, 301])
def test_crops_are_torchvisions_and_contiguous(size, resolution):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    pairs = [(train.random_crop, [v2.RandomResizedCrop(resolution), v2.RandomHorizontalFlip()])] * 5
    for side in (256, 224, 288):
        steps = [v2.Resize(int(resolution * side / 224)), v2.CenterCrop(resolution)]
        pairs.append((partial(train.center_crop, resize_at_224=side), steps))
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
        assert np.abs(ours.numpy().astype(int) - of_pil).max() <= 1


@pytest.fixture
def crops(monkeypatch) -> list[tuple[int, int]]:
    """For each photo, in the order of training, its hash and its crop's."""
    random_crop = train.random_crop
    noted = []

    def noting_crop(photo, resolution):
        crop = random_crop(photo, resolution)
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
    assert train.train_batch_sizes(27, 24) + train.train_batch_sizes(9, 999) == [24, 3, 9]
    folder = write_dataset(tmp_path / "cars", rows(26), rows(2), ["a", "b"])
    success(train_on(folder, "--batch-size", 24, "--epochs", 3))
    assert len(crops) == 3 * 24
    assert len(dict(crops)) == 26
