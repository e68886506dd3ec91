"""Data sets, folders and photos: what is taken, how it is cropped, and in which order."""

import hashlib
import shutil
import struct
import time
import unicodedata
import zlib
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
import torch
from files import assert_same_weights, encode, jpeg, load, read_history, rows, write_dataset
from PIL import Image
from scripts import SMALL, refusal, run, success
from stand_in_hub import stand_in_hub
from torchvision import transforms
from torchvision.transforms import v2

import train

# ---------------------------------------------------------------- data sets and folders


def damaged(path):
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(len(data) - 300) + data[-200:])


def truncated(path):
    path.write_bytes(path.read_bytes()[:-50])


def empty(path):
    path.write_bytes(b"")


def git_lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")


@pytest.mark.parametrize("damage", [damaged, truncated, empty, git_lfs_pointer])
def test_a_parquet_file_that_is_not_whole_is_refused_by_name(tmp_path, damage):
    folder = write_dataset(tmp_path / "cars", rows(4), rows(4), ["a", "b"])
    damage(folder / "data/train-0.parquet")
    with pytest.raises(train.InputError, match="train-0.parquet"):
        train.load_cars(str(folder))


def test_half_of_the_files_are_not_taken_for_the_data_set(tmp_path):
    folder = write_dataset(tmp_path / "cars", rows(4), rows(4), ["a", "b"])
    (folder / "data/train-0.parquet").rename(folder / "data/train-00000-of-00002.parquet")
    with pytest.raises(train.InputError, match="1 of the train split's files; .* there are 2"):
        train.load_cars(str(folder))


def test_a_backup_beside_the_data_is_not_loaded_too(tmp_path):
    folder = write_dataset(tmp_path / "cars", rows(4), rows(4), ["a", "b"])
    shutil.copytree(folder / "data", folder / "backup")
    assert len(train.load_cars(str(folder))["train"]) == 4


@pytest.mark.parametrize("name", ["cars*", "cars [v2]", "cars?", "."])
def test_a_path_is_a_path_and_no_pattern(tmp_path, monkeypatch, name):
    write_dataset(tmp_path / "cars-sibling", rows(4), rows(4), ["a", "b"])
    folder_name = "cars here" if name == "." else name
    folder = write_dataset(tmp_path / folder_name, rows(2), rows(4), ["a", "b"])
    monkeypatch.chdir(folder if name == "." else tmp_path)
    cars = train.load_cars(name)
    assert len(cars["train"]) == 2
    assert len(cars["test"]) == 4


def test_an_image_folder_gives_the_same_photos_and_classes(cars, tmp_path, run_train):
    for split, photos in train.load_cars(str(cars)).items():
        names = photos.features["label"].names
        for row, item in enumerate(photos):
            folder = tmp_path / split / names[item["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row:03}.jpg").write_bytes(item["image"]["bytes"])
    found = train.load_cars(str(tmp_path))
    assert found["train"].features["label"].names == names
    assert np.bincount(found["train"]["label"]).tolist() == [2] * 8
    assert len(found["test"]) == 8
    for item in found["test"]:
        assert names[item["label"]] in item["image"]["path"]
    success(run_train("--dataset", tmp_path, "--output-dir", tmp_path / "run", "--epochs", 1))


def test_classes_behind_links_and_in_deeper_folders_are_found(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b/2012/blue"):
            (tmp_path / "cars" / split / name).mkdir(parents=True)
            (tmp_path / "cars" / split / name / "photo.jpg").write_bytes(jpeg(0))
        (tmp_path / f"elsewhere_{split}").mkdir()
        (tmp_path / f"elsewhere_{split}/photo.jpg").write_bytes(jpeg(0))
        (tmp_path / "cars" / split / "c").symlink_to(tmp_path / f"elsewhere_{split}")
    cars = train.load_cars(str(tmp_path / "cars"))
    assert cars["train"].features["label"].names == ["a", "b", "c"]
    assert list(cars["train"]["label"]) == [0, 1, 2]


def write_folders(folder: Path, names: list[str]) -> Path:
    """Write a photo under each of `names`, which are SPLIT/CLASS/FILE."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(seed))
    return folder


@pytest.fixture
def two_folders(tmp_path) -> Path:
    """A data set of two classes in folders, with eight train photos."""
    names = [f"train/{name}/{row}.jpg" for name in "ab" for row in range(4)]
    return write_folders(tmp_path / "cars", [*names, "test/a/0.jpg", "test/b/0.jpg"])


HIDDEN = [
    ".ipynb_checkpoints/car.jpg",
    "a/.ipynb_checkpoints/car.jpg",
    "@eaDir/car.jpg",
    "a/@eaDir/car.jpg/small.jpg",
    "a/._0.jpg",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_other_programs_hide_among_the_photos_is_passed_over(two_folders, name):
    write_folders(two_folders, [f"train/{name}", f"test/{name}"])
    cars = train.load_cars(str(two_folders))
    assert cars["train"].features["label"].names == ["a", "b"]
    assert len(cars["train"]) == 8
    assert len(cars["test"]) == 2


def test_photos_of_every_suffix_are_trained_on(two_folders, run_train, tmp_path):
    photo = Image.new("RGB", (48, 32))
    formats = {"jfif": "JPEG", "JPG": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP"}
    for suffix, kind in {**formats, "avif": "AVIF"}.items():
        (two_folders / f"train/a/more.{suffix}").write_bytes(encode(photo, format=kind))
    (two_folders / "train/a/misnamed.jpg").write_bytes(encode(photo, format="AVIF"))
    flags = ["--dataset", two_folders, "--epochs", 1, "--output-dir", tmp_path / "run"]
    out = success(run_train(*flags))
    assert "15 train and 2 test photos" in out
    assert "left out" not in out


def test_the_files_that_are_left_out_are_counted_with_an_example(two_folders, capsys):
    write_folders(two_folders, ["train/a/scan.bmp", "train/b/notes.txt", "test/stray.jpg"])
    train.load_cars(str(two_folders))
    in_train, in_test = capsys.readouterr().out.splitlines()
    assert f"2 files in {two_folders / 'train'}, such as " in in_train
    assert "scan.bmp" in in_train
    assert f"1 files in {two_folders / 'test'}, such as " in in_test
    assert "stray.jpg" in in_test


@pytest.mark.parametrize("name", ["train/a/Citro\udcebn.jpg", "train/Citro\udcebn/0.jpg"])
def test_a_name_that_is_not_utf8_is_said(two_folders, run_train, tmp_path, name):
    write_folders(two_folders, [name])
    err = refusal(run_train("--dataset", two_folders, "--output-dir", tmp_path / "run"))
    assert "Citro\\udcebn" in err
    assert "is not named in UTF-8" in err


def test_a_data_set_in_a_folder_that_is_not_named_in_utf8_is_said(run_train, tmp_path):
    folder = write_folders(tmp_path / "Citro\udcebn", ["train/a/0.jpg", "test/a/0.jpg"])
    err = refusal(run_train("--dataset", folder, "--output-dir", tmp_path / "run"))
    assert "Citro" in err
    assert "UTF-8" in err


# ---------------------------------------------------------------- classes


def move_test_split(source: Path, folder: Path):
    shutil.move(source / "data/test-0.parquet", folder / "data/test-0.parquet")


def test_the_same_classes_in_another_order_are_mapped_by_name(tmp_path):
    photos = rows(4)
    folder = write_dataset(tmp_path / "cars", photos, photos, ["a", "b"])
    turned_around = [(encoded, 1 - label) for encoded, label in photos]
    move_test_split(write_dataset(tmp_path / "other", photos, turned_around, ["b", "a"]), folder)
    test = train.load_cars(str(folder))["test"]
    assert test.features["label"].names == ["a", "b"]
    assert list(test["label"]) == [label for _, label in photos]
    assert [item["image"]["bytes"] for item in test] == [encoded for encoded, _ in photos]


def test_names_are_equal_in_every_form_of_unicode(tmp_path):
    names = [unicodedata.normalize(form, "Citroën") for form in ("NFC", "NFD")]
    folder = write_folders(tmp_path, [f"train/{names[0]}/0.jpg", f"test/{names[1]}/0.jpg"])
    assert list(train.load_cars(str(folder))["test"]["label"]) == [0]


def test_classes_that_differ_are_named_and_counted(tmp_path):
    names = ["train/a/0.jpg", "train/b/0.jpg", "test/a/0.jpg", "test/c/0.jpg", "test/d/0.jpg"]
    folder = write_folders(tmp_path, names)
    with pytest.raises(train.InputError) as error:
        train.load_cars(str(folder))
    assert "it has 3 classes" in str(error.value)
    assert "train split 2" in str(error.value)
    assert "only here: ['c', 'd'], missing: ['b']" in str(error.value)


@pytest.fixture
def bare_cars(cars, tmp_path) -> Path:
    """The drawn data set without features in its files, as pandas, polars and DuckDB write them."""
    folder = shutil.copytree(cars, tmp_path / "bare")
    for path in folder.glob("data/*"):
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.replace_schema_metadata(), path)
    return folder


def test_the_card_names_the_classes_of_files_without_features(cars, bare_cars):
    expected = train.load_cars(str(cars))["test"]
    test = train.load_cars(str(bare_cars))["test"]
    assert test.features == expected.features
    assert list(test) == list(expected)


# ---------------------------------------------------------------- caches and the Hub


def test_a_local_folder_that_changes_is_read_anew(tmp_path):
    for width in (30, 60):
        shutil.rmtree(tmp_path / "cars", ignore_errors=True)
        photos = [(jpeg(0, width), 0), (jpeg(1, width), 1)]
        folder = write_dataset(tmp_path / "cars", photos, photos, ["a", "b"])
        item = train.load_cars(str(folder))["test"][0]
        assert train.decode_photo(item["image"]["bytes"]).shape[2] == width


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """Turn huggingface_hub to a URL, as HF_ENDPOINT does, and to an empty cache."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def turn(url: str):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)

    return turn


def test_the_default_data_set_is_downloaded_once(cars, tmp_path, run_train, hub_at):
    hub = shutil.copytree(cars, tmp_path / "hub")
    for name in ("contrast", "motion_blur"):
        test_file = hub / "data/test-00000-of-00001.parquet"
        shutil.copy(test_file, hub / f"data/{name}-00000-of-00001.parquet")
    flags = ["--dataset", train.DEFAULT_DATASET, "--epochs", 1, "--output-dir"]
    # The tests are offline, until they turn to a URL.
    assert train.DEFAULT_DATASET in refusal(run_train(*flags, tmp_path / "offline"))

    with stand_in_hub(hub, train.DEFAULT_DATASET, train.DATASET_REVISION) as (url, fetched):
        hub_at(url)
        success(run_train(*flags, tmp_path / "online"))
    files = [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train")]
    assert sorted(fetched) == ["README.md", *files]

    hub_at("http://127.0.0.1:9")
    success(run_train(*flags, tmp_path / "unreachable"))


@pytest.mark.parametrize("network", ["turned off", "out of reach"])
def test_half_of_the_default_data_set_is_not_enough_without_the_hub(
    cars, tmp_path, run_train, hub_at, monkeypatch, network
):
    with stand_in_hub(cars, train.DEFAULT_DATASET, train.DATASET_REVISION) as (url, _):
        hub_at(url)
        train.load_cars(train.DEFAULT_DATASET, ("train",))
    hub_at("http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", network == "turned off")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # It asks six times.
    flags = ["--dataset", train.DEFAULT_DATASET, "--output-dir", tmp_path / "run"]
    status, _, err = run_train(*flags)
    assert status == 1
    line = err.splitlines()[-1]
    assert str(tmp_path / "cache") in line
    assert "not whole" in line
    assert "out of reach" in line


def test_a_misspelt_folder_is_no_folder_and_no_data_set_of_the_hub(run_train, tmp_path):
    status, out, err = run_train("--dataset", "foldr", "--output-dir", tmp_path)
    assert "there is no folder foldr: looking for such a data set on the Hub" in out
    refused = refusal((status, out, err))
    assert "foldr is no folder" in refused
    assert "Hub" in refused


def test_the_variable_of_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache should be")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_dataset(tmp_path / "cars", rows(4), rows(4), ["a", "b"])
    with pytest.raises(train.InputError, match=f"HF_DATASETS_CACHE={tmp_path / 'cache'}: "):
        train.load_cars(str(folder))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(tmp_path, cars):
    cache = tmp_path / "cache"
    cache.write_text("a file where the cache should be")
    environment = {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache)}
    flags = ["--dataset", cars, *SMALL, "--output-dir", tmp_path]
    status, _, err = run("train.py", *flags, small=False, environment=environment)
    assert status == 1
    assert str(cache) in err


def no_such_folder(folder):
    return "nowhere"


def no_test_split(folder):
    write_dataset(folder, rows(8), rows(8), ["a", "b"])
    (folder / "data/test-0.parquet").unlink()
    return "test split"


def no_label_column(folder):
    write_dataset(folder, rows(8), rows(8), ["a", "b"])
    for path in folder.glob("data/*"):
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.select(["image"]).replace_schema_metadata(), path)
    return "'label'"


def no_image_column(folder):
    write_dataset(folder, rows(8), rows(8), ["a", "b"])
    for path in folder.glob("data/*"):
        photos = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder))
        photos.rename_column("image", "picture").to_parquet(path)
    return "'image'"


def empty_test_split(folder):
    write_dataset(folder, rows(8), [], ["a", "b"])
    return "test-0.parquet"


def other_class_names(folder):
    write_dataset(folder, rows(8), rows(8), ["a", "b"])
    other = write_dataset(folder.with_name("other"), rows(8), rows(8), ["a", "c"])
    shutil.move(other / "data/test-0.parquet", folder / "data/test-0.parquet")
    return "classes"


NOT_TAKEN = [
    no_such_folder,
    no_test_split,
    no_label_column,
    no_image_column,
    empty_test_split,
    other_class_names,
]


@pytest.mark.parametrize("make", NOT_TAKEN, ids=lambda make: make.__name__)
def test_data_sets_that_cannot_be_trained_on_are_refused(run_train, tmp_path, make):
    words = make(tmp_path / "nowhere")
    flags = ["--dataset", tmp_path / "nowhere", "--output-dir", tmp_path / "run"]
    assert words in refusal(run_train(*flags))


@pytest.mark.parametrize("label", [-1, None, 2])
def test_labels_that_are_no_class_are_refused(tmp_path, label):
    folder = write_dataset(tmp_path, [*rows(2), (jpeg(2), label)], rows(2), ["a", "b", "c"])
    # datasets itself writes no label beyond the class count: the last class is taken away here.
    for path in folder.glob("data/*"):
        table = pyarrow.parquet.read_table(path)
        features = table.schema.metadata[b"huggingface"].replace(b'"b", "c"', b'"b"')
        table = table.replace_schema_metadata({b"huggingface": features})
        pyarrow.parquet.write_table(table, path)
    with pytest.raises(train.InputError, match=f"row 2 has label {label}"):
        train.load_cars(str(folder))


def test_one_class_trains(run_train, tmp_path):
    photos = rows(4, classes=1)
    folder = write_dataset(tmp_path / "cars", photos, photos, ["a"])
    flags = ["--dataset", folder, "--output-dir", tmp_path / "run", "--batch-size", 4]
    success(run_train(*flags, "--epochs", 1))
    assert read_history(tmp_path / "run")[0]["test_accuracy"] == 1


def test_one_photo_is_too_few_for_batch_norm(run_train, tmp_path):
    folder = write_dataset(tmp_path / "cars", rows(1), rows(1), ["a", "b"])
    err = refusal(run_train("--dataset", folder, "--output-dir", tmp_path / "run"))
    assert "1 train photos" in err


# ---------------------------------------------------------------- photos


def upright(mode: str = "RGB") -> Image.Image:
    """Red over blue with a green corner: no two of the eight EXIF orientations look alike."""
    photo = Image.new("RGB", (48, 32), (220, 30, 30))
    photo.paste((30, 30, 220), (0, 16, 48, 32))
    photo.paste((30, 200, 30), (0, 0, 16, 8))
    return photo.convert(mode)


# How a camera stores the upright photo, by the EXIF orientation that it then writes.
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int, **options) -> bytes:
    photo = upright()
    if orientation in STORED_AS:
        photo = photo.transpose(STORED_AS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo, exif=exif.tobytes(), **options)


def with_a_malformed_tag(orientation: int) -> bytes:
    """A JPEG file whose EXIF data hold an orientation, and a unit in letters."""
    entries = struct.pack(">HHIHxx", 0x0112, 3, 1, orientation)
    entries += struct.pack(">HHI4s", 0x0128, 2, 4, b"inch")
    exif = b"MM\0*" + struct.pack(">IH", 8, 2) + entries + struct.pack(">I", 0)
    photo = upright().transpose(STORED_AS[orientation])
    return encode(photo, quality=95, exif=b"Exif\0\0" + exif)


def animated(kind: str) -> bytes:
    white = Image.new("RGB", (48, 32), "white")
    return encode(upright(), format=kind, save_all=True, append_images=[white], lossless=True)


def one_colour_png(width: int, height: int, rows: int) -> bytes:
    """A small PNG file that claims width × height pixels and holds so many rows of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    packer = zlib.compressobj(1)
    row = b"\0" + b"\x80\x40\x20" * width
    pixels = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def grey(dtype: type) -> np.ndarray:
    """(32, 48) from black to white."""
    return np.linspace(0, np.iinfo(dtype).max, 32 * 48).reshape(32, 48).astype(dtype)


# A file, and the RGB image that it shows.
TAKEN = {
    "jpeg": (lambda: encode(upright(), quality=95), upright()),
    "cmyk": (lambda: encode(upright("CMYK"), quality=95), upright("CMYK").convert("RGB")),
    "grey jpeg": (lambda: encode(upright("L"), quality=95), upright("L").convert("RGB")),
    "png": (lambda: encode(upright(), format="PNG"), upright()),
    "alpha": (lambda: encode(upright("RGBA"), format="PNG"), upright()),
    "palette": (lambda: encode(upright().quantize(4), format="PNG", transparency=0), upright()),
    "grey png": (lambda: encode(upright("L"), format="PNG"), upright("L").convert("RGB")),
    "webp": (lambda: encode(upright(), format="WEBP", lossless=True), upright()),
    "animated webp": (lambda: animated("WEBP"), upright()),
    "gif": (lambda: encode(upright(), format="GIF"), upright()),
    "animated gif": (lambda: animated("GIF"), upright()),
    "avif": (lambda: encode(upright(), format="AVIF", quality=95), upright()),
    "exif with a malformed tag": (lambda: with_a_malformed_tag(6), upright()),
    "one pixel": (
        lambda: encode(Image.new("RGB", (1, 1), "red")),
        Image.new("RGB", (1, 1), (254, 0, 0)),
    ),
    "5000 px": (
        lambda: one_colour_png(5000, 5000, 5000),
        Image.new("RGB", (5000, 5000), (128, 64, 32)),
    ),
}
for turn in range(1, 9):
    TAKEN[f"exif {turn} jpeg"] = (lambda turn=turn: turned(turn, quality=95), upright())
    TAKEN[f"exif {turn} png"] = (lambda turn=turn: turned(turn, format="PNG"), upright())


@pytest.mark.parametrize("kind", TAKEN)
def test_every_kind_of_photo_is_upright_rgb(kind):
    make, expected = TAKEN[kind]
    photo = train.decode_photo(make())
    expected = v2.functional.pil_to_tensor(expected)
    assert photo.dtype == torch.uint8
    assert photo.shape == expected.shape
    assert (photo.int() - expected.int()).abs().float().mean() < 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_greyscale_and_16_bit_become_rgb_of_the_same_brightness(dtype):
    photo = train.decode_photo(encode(Image.fromarray(grey(dtype)), format="PNG"))
    expected = (grey(dtype) / np.iinfo(dtype).max * 255).round()
    assert photo.shape == (3, 32, 48)
    assert photo.dtype == torch.uint8
    assert np.abs(photo.numpy() - expected).max() <= 1


REFUSED = {
    "empty": lambda: b"",
    "cut off": lambda: encode(upright().resize((600, 400)))[:3000],
    "text": lambda: b"a text named .jpg",
    "1 x 5000": lambda: encode(Image.new("RGB", (1, 5000))),
    "bomb of 400 million pixels": lambda: one_colour_png(20000, 20000, 1),
    # Pillow would hand it to Ghostscript.
    "eps": lambda: encode(upright(), format="EPS"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_photo_is_refused_by_its_row(kind, run_train, tmp_path):
    photos = [(encode(upright()), 0), (REFUSED[kind](), 0)]
    folder = write_dataset(tmp_path / "cars", rows(8), photos, ["a", "b"])
    err = refusal(run_train("--dataset", folder, "--output-dir", tmp_path / "run"))
    assert "the test photo in row 1 cannot be decoded" in err


NOT_READ = {
    "bmp": lambda: encode(upright(), format="BMP"),
    "tiff": lambda: encode(upright(), format="TIFF"),
    "float tiff": lambda: encode(Image.fromarray(np.float32(grey(np.uint8))), format="TIFF"),
    "ppm": lambda: encode(upright(), format="PPM"),
    "16-bit pgm": lambda: b"P5 48 32 65535\n" + grey(np.uint16).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_a_photo_of_another_format_is_refused_with_the_formats_that_are_read(kind):
    with pytest.raises(ValueError) as error:
        train.decode_photo(NOT_READ[kind]())
    assert str(error.value) == "it is no JPEG, PNG, WebP, GIF, AVIF or HEIC file"


def test_a_photo_of_a_folder_is_refused_by_its_path(two_folders, run_train, tmp_path):
    path = two_folders / "test/b/0.jpg"
    path.write_bytes(NOT_READ["bmp"]())
    err = refusal(run_train("--dataset", two_folders, "--output-dir", tmp_path / "run"))
    assert f"the test photo {path} cannot be decoded: it is no JPEG, PNG, " in err
    assert " at 0x" not in err


def test_a_row_without_a_photo_is_called_missing(run_train, tmp_path):
    folder = write_dataset(tmp_path / "cars", rows(8), [*rows(1), (None, 0)], ["a", "b"])
    err = refusal(run_train("--dataset", folder, "--output-dir", tmp_path / "run"))
    assert "the test photo in row 1 is missing" in err


def test_a_bomb_is_refused_by_its_megapixels():
    with pytest.raises(ValueError, match="its 400 megapixels are over the limit, 256"):
        train.decode_photo(one_colour_png(20000, 20000, 1))


def test_a_phones_200_megapixels_are_not_too_many():
    # The file has one row of them: it is refused as damaged, which takes no memory.
    with pytest.raises(RuntimeError) as error:
        train.decode_photo(one_colour_png(20000, 10000, 1))
    assert "megapixels" not in str(error.value)


def test_the_pictures_of_a_phones_jpeg_do_not_add_up_and_those_of_an_animation_do(monkeypatch):
    monkeypatch.setattr(train, "MAX_MEGAPIXELS", 0.003)
    first, second = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))
    options = {"save_all": True, "append_images": [second]}
    decoded = train.decode_photo(encode(first, format="MPO", **options))
    assert decoded.shape == (3, 40, 60)
    assert decoded[0].min() > 250, "it is not the first picture"
    with pytest.raises(ValueError, match="megapixels"):
        train.decode_photo(encode(first, format="GIF", **options))


def test_a_worker_too_names_the_row_of_a_photo_that_it_cannot_decode(run_train, tmp_path):
    photos = rows(8)
    photos[3] = (photos[3][0][:200], 1)
    folder = write_dataset(tmp_path / "cars", photos, rows(8), ["a", "b"])
    flags = ["--dataset", folder, "--output-dir", tmp_path / "run", "--workers", 1]
    err = refusal(run_train(*flags))
    assert ": the train photo in row 3 cannot be decoded: " in err
    assert "Traceback" not in err


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("size", [(60, 40), (640, 427), (333, 500)])
@pytest.mark.parametrize("resolution", [64, 224])
def test_crops_equal_the_pil_path_within_one(size, resolution):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    photo = Image.fromarray(pixels)
    tensor = v2.functional.pil_to_tensor(photo)
    random_crop = [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip()]
    pairs = []
    for seed in range(3):
        torch.manual_seed(seed)
        ours = train.random_crop(tensor, resolution)
        torch.manual_seed(seed)
        pairs.append((ours, transforms.Compose(random_crop)(photo)))
    for side in (256, 224, 288):
        resize = transforms.Resize(int(resolution * side / 224))
        theirs = transforms.CenterCrop(resolution)(resize(photo))
        pairs.append((train.center_crop(tensor, resolution, side), theirs))
    for ours, theirs in pairs:
        assert ours.dtype == torch.uint8
        assert ours.shape == (resolution, resolution, 3)
        assert ours.is_contiguous()
        assert np.abs(ours.numpy().astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (64, 73), (73, 73), (37, 640), (500, 11)])
@pytest.mark.parametrize("resolution", [64, 301])
def test_center_crops_are_torchvisions(size, resolution):
    photo = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).movedim(-1, 0)
    for side in (256, 224, 288):
        resized = v2.Resize(int(resolution * side / 224), antialias=True)(photo)
        expected = v2.CenterCrop(resolution)(resized).movedim(0, -1)
        assert torch.equal(train.center_crop(photo, resolution, side), expected)


@pytest.mark.parametrize("resolution", [64, 300])
def test_random_crops_are_torchvisions(resolution):
    photo = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8).movedim(-1, 0)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = train.random_crop(photo, resolution)
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(resolution, antialias=True)(photo)
        assert torch.equal(ours, v2.RandomHorizontalFlip()(crop).movedim(0, -1))


def test_crops_are_contiguous():
    photo = torch.zeros(40, 60, 3, dtype=torch.uint8).movedim(-1, 0)
    assert train.center_crop(photo, 33).is_contiguous()
    for seed in range(8):  # Some of these are mirrored.
        torch.manual_seed(seed)
        assert train.random_crop(photo, 33).is_contiguous()


@pytest.fixture
def drawn(run_train, tmp_path, monkeypatch):
    """Run train.py; returns, for each photo in the order of training, its name and its crop's."""
    random_crop = train.random_crop
    crops = []

    def name(pixels: torch.Tensor) -> str:
        return hashlib.sha1(pixels.contiguous().numpy().tobytes()).hexdigest()

    def noting_crop(photo, resolution):
        crop = random_crop(photo, resolution)
        crops.append((name(photo), name(crop)))
        return crop

    monkeypatch.setattr(train, "random_crop", noting_crop)

    def run(*flags) -> list[tuple[str, str]]:
        crops.clear()
        success(run_train(*flags))
        return list(crops)

    return run


def test_draws_depend_on_seed_epoch_and_photo_alone(drawn, tmp_path):
    crops = drawn("--epochs", 2, "--output-dir", tmp_path / "one")
    first, second = crops[:16], crops[16:]
    assert sorted(photo for photo, _ in first) == sorted(photo for photo, _ in second)
    assert len(dict(first)) == 16
    assert [photo for photo, _ in first] != [photo for photo, _ in second]
    assert not set(first) & set(second)

    other_batches = ["--batch-size", 6, "--output-dir", tmp_path / "two"]
    assert sorted(drawn("--epochs", 1, *other_batches)) == sorted(first)
    assert sorted(drawn("--epochs", 2, *other_batches, "--resume")) == sorted(second)
    assert not set(drawn("--seed", 1, "--epochs", 1, "--output-dir", tmp_path / "three")) & set(
        first
    )


def test_two_photos_of_an_epoch_have_two_draws(drawn, tmp_path):
    folder = write_dataset(tmp_path / "cars", [(jpeg(0), 0)] * 4, rows(2), ["a", "b"])
    flags = ["--dataset", folder, "--batch-size", 4, "--output-dir", tmp_path / "run"]
    crops = drawn(*flags, "--epochs", 1)
    assert len(set(crops)) == 4


# ---------------------------------------------------------------- the last batch of an epoch


def epochs_of(drawn, tmp_path, photos: int, epochs: int) -> list[set[str]]:
    """The names of the photos that each epoch uses, of so many in batches of 24."""
    folder = write_dataset(tmp_path / "cars", rows(photos), rows(2), ["a", "b"])
    flags = ["--dataset", folder, "--batch-size", 24, "--epochs", epochs, "--output-dir"]
    used = [photo for photo, _ in drawn(*flags, tmp_path / "run")]
    size = len(used) // epochs
    return [set(used[start : start + size]) for start in range(0, len(used), size)]


def test_a_last_batch_of_an_eighth_is_kept(drawn, tmp_path):
    (used,) = epochs_of(drawn, tmp_path, photos=27, epochs=1)
    assert len(used) == 27


def test_a_smaller_last_batch_is_left_out_and_its_photos_come_in_other_epochs(drawn, tmp_path):
    used = epochs_of(drawn, tmp_path, photos=26, epochs=3)
    assert [len(photos) for photos in used] == [24, 24, 24]
    assert len(set.union(*used)) == 26


def test_the_plan_says_how_many_photos_an_epoch_leaves_out(run_train, tmp_path):
    flags = ["--epochs", 1, "--output-dir"]
    left_out = "each epoch leaves out 1 of them"
    assert left_out in success(run_train(*flags, tmp_path / "1", "--batch-size", 15))
    assert "leaves out" not in success(run_train(*flags, tmp_path / "2", "--batch-size", 14))


def test_a_batch_size_above_the_split_is_one_batch_of_all(run_train, tmp_path):
    flags = ["--epochs", 1, "--output-dir"]
    success(run_train(*flags, tmp_path / "16", "--batch-size", 16))
    success(run_train(*flags, tmp_path / "999", "--batch-size", 999))
    all_at_once = load(tmp_path / "16/best_model.pth")["model"]
    assert_same_weights(all_at_once, load(tmp_path / "999/best_model.pth")["model"])
