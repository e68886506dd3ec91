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
from files import encode, jpeg, rows, write_dataset
from PIL import Image
from pyarrow import Table, parquet
from scripts import refusal, success
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
    """A data set of two classes in folders, with four photos of each in both splits."""
    return write_folders(tmp_path / "cars", *(f"{c}/{row}.jpg" for c in "ab" for row in range(4)))


def labels_of(folder: Path, *classes: str) -> list[int]:
    return list(train.load_cars(str(folder), ("test",), list(classes))["test"]["label"])


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
UNREADABLE = "cannot load the train split of --dataset "
REFUSED = [
    ("is no folder, and cannot be had from the Hub", shutil.rmtree),
    ("neither train/CLASS", lambda folder: shutil.rmtree(folder / "data")),
    ("use to_parquet", lambda folder: datasets.load_dataset(str(folder)).save_to_disk(folder)),
    ("the test split", lambda folder: (folder / "data/test-0.parquet").unlink()),
    ("has 1 of", lambda folder: os.rename(folder / TRAIN, folder / "data/train-of-2.parquet")),
    (UNREADABLE, lambda folder: os.pwrite(os.open(folder / TRAIN, os.O_WRONLY), bytes(999), 99)),
    (UNREADABLE, lambda folder: os.truncate(folder / TRAIN, 2000)),
    (UNREADABLE, lambda folder: (folder / TRAIN).write_text("version https://git-lfs\n")),
    (UNREADABLE, partial(in_tables, lambda table: table.slice(0, 0))),
    ("--batch-size", partial(in_tables, lambda table: table.slice(0, 1))),
    ("not {'image'", partial(in_tables, lambda table: table.select(["image"]))),
    ("Value(", partial(in_tables, lambda table: table.replace_schema_metadata())),
    ("row 2 has label -1, which is no class", put("label", 2, -1)),
    ("row 2 has label 2, which is no class", put("label", 2, 2)),
    ("row 2 has label None, which is no class", put("label", 2, None)),
    ("the train photo in row 1 is missing", put("image", 1, None)),
    ("the train photo in row 1 is missing", put("image", 1, {"bytes": None, "path": None})),
    ("train photo in row 1 cannot be decoded: ", put("image", 1, {"bytes": b"text", "path": None})),
]


@pytest.mark.parametrize("words, change", REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_line(train_on, tmp_path, words, change):
    folder = write_dataset(tmp_path / "cars", rows(8), rows(4), ["a", "b"])
    change(folder)
    assert words in refusal(train_on(folder))


@pytest.fixture(params=["torchcodec", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(train, "decode_image", None)
        monkeypatch.setattr(train, "TORCHCODEC_ERROR", OSError("no library"), raising=False)


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in NO_PHOTOS), ("text", 1)])
def test_what_is_no_photo_is_refused_by_its_path(folders, train_on, decoder, kind, workers):
    path = folders / "train/b/0.jpg"
    path.write_bytes(NO_PHOTOS[kind])
    refused = refusal(train_on(folders, "--workers", workers))
    assert f".py: the train photo {path} cannot be decoded: " in refused


# ---------------------------------------------------------------- files, folders and classes


@pytest.mark.parametrize("name", ["cars*", "cars [v2]", "cars?", "."])
def test_a_path_is_no_pattern_and_is_read_anew(tmp_path, monkeypatch, name):
    write_dataset(tmp_path / "cars-sibling", rows(4), rows(4), ["a", "b"])
    folder = tmp_path / ("cars here" if name == "." else name)
    for count in (2, 3):
        shutil.rmtree(folder, ignore_errors=True)
        write_dataset(folder, rows(count), rows(4), ["a", "b"])
        shutil.copytree(folder / "data", folder / "backup")
        monkeypatch.chdir(folder if name == "." else tmp_path)
        assert [len(photos) for photos in train.load_cars(name).values()] == [count, 4]


def test_photos_of_every_suffix_are_trained_on_and_none_that_programs_hide(folders, train_on):
    write_folders(folders, ".ipynb_checkpoints/car.jpg", "@eaDir/car.jpg", "a/._0.jpg")
    write_folders(folders, "a/.ipynb_checkpoints/car.jpg", "a/@eaDir/car.jpg/small.jpg")
    formats = {"jfif": "JPEG", "JPG": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP"}
    for suffix, kind in {**formats, "avif": "AVIF", "misnamed.jpg": "AVIF"}.items():
        (folders / f"train/a/more.{suffix}").write_bytes(encode(upright(), format=kind))
    out = success(train_on(folders, "--batch-size", 999))
    assert "{'train': 15, 'test': 8} photos, 2 classes" in out
    assert "left out" not in out


def test_links_add_no_photo_twice_and_are_not_followed_within_a_class(folders, capsys):
    elsewhere = write_folders(folders.with_name("elsewhere"), "0.jpg", "2012/blue/1.jpg") / "test"
    (folders / "test/c").symlink_to(elsewhere)
    links = {"up": "../..", "back": ".", "album": elsewhere, "00.jpg": "0.jpg", "9.jpg": "0.jpg"}
    for name, target in links.items():
        (folders / "test/a" / name).symlink_to(target)
    photos = train.load_cars(str(folders), ("test",))["test"]
    names = [image["path"].removeprefix(f"{folders}/test/")[0] for image in photos["image"]]
    assert names == [*"aaaabbbbcc"]
    assert list(photos["label"]) == [0] * 4 + [1] * 4 + [2] * 2
    assert f"left out  3 files or links in {folders / 'test'}: " in capsys.readouterr().out


@pytest.mark.parametrize("locked", ["test", "test/b", "test/b/2012"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(folders, monkeypatch, locked):
    write_folders(folders, "b/2012/0.jpg")

    def read_unless_locked(read, path="."):  # Permissions do not bind root.
        if str(path) == str(folders / locked):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(read_unless_locked, getattr(os, name)))
    with pytest.raises(train.InputError, match=f"Permission denied: '{folders / locked}'"):
        labels_of(folders)


def test_classes_that_differ_are_named_and_counted(folders):
    shutil.move(folders / "test/b", folders / "test/c")
    shutil.copytree(folders / "test/c", folders / "test/d")
    said = r"it has 3 classes, and not the 2 of training; only here: \['c', 'd'\], missing: \['b'\]"
    with pytest.raises(train.InputError, match=said):
        train.load_cars(str(folders))


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
        with pytest.raises(train.InputError, match="it has 2 classes"):
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


def assert_not_had(outcome: tuple[int, str, str], reason: str):
    """That the script ends with one line; before it, the client may say that it asks again."""
    status, _, err = outcome
    assert status == err.count(".py: ") == 1
    assert "cannot be had from the Hub: " in err.splitlines()[-1]
    assert reason in err.splitlines()[-1]


def test_the_default_data_set_is_downloaded_once(cars, tmp_path, hub_at):
    hub = shutil.copytree(cars, tmp_path / "hub")
    (hub / "data/contrast-00000-of-00001.parquet").write_bytes(b"the test split, corrupted")
    with stand_in_hub(hub, *DEFAULT) as (url, fetched):
        assert hub_at(url)()[::2] == (0, "")  # There are no bars where no terminal is.
    assert fetched == FILES
    success(hub_at(NOWHERE)())


def test_another_data_set_of_the_hub_is_trained_on(cars, hub_at):
    with stand_in_hub(cars, "somebody/cars", "main") as (url, _):
        assert "{'train': 16, 'test': 8} photos" in success(hub_at(url, "somebody/cars")())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_network_is_one_line_with_its_reason(cars, hub_at, fault):
    with stand_in_hub(cars, *DEFAULT, status=fault) as (url, _):
        assert_not_had(hub_at(url if isinstance(fault, int) else fault)(), FAULTS[fault])


@pytest.mark.parametrize("file", [1, 2])
def test_the_next_run_goes_on_after_a_server_that_died_in_mid_file(cars, hub_at, file):
    with stand_in_hub(cars, *DEFAULT, dies_in=file) as (url, _):
        assert_not_had(hub_at(url)(), "without sending")
    assert f"--dataset {DEFAULT[0]}" in refusal(hub_at(NOWHERE, offline=True)())
    with stand_in_hub(cars, *DEFAULT) as (url, fetched):
        success(hub_at(url)())
    assert fetched == FILES[file - 1 :]


def test_processes_that_ask_at_once_download_each_file_once(cars, hub_at):
    with stand_in_hub(cars, *DEFAULT, seconds=0.5) as (url, fetched):
        hub_at(url)
        with ThreadPoolExecutor() as threads:  # The Hub's locks hold for threads too.
            list(threads.map(train.load_cars, [train.DEFAULT_DATASET] * 3))
    assert fetched == FILES


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
    grey = np.arange(256).reshape(16, 16)
    encoded = encode(Image.fromarray((257 * grey).astype(np.uint16)), format="PNG")
    if train.decode_image:
        assert np.array_equal(train.decode_photo(encoded), [grey] * 3)
    monkeypatch.setattr(train, "decode_image", None)
    with pytest.raises(ValueError, match="16-bit"):
        train.decode_photo(encoded)


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
        pairs.append((partial(train.center_crop, side_for_224=side), steps))
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


def test_draws_depend_on_seed_epoch_and_row_alone(crops, train_on, tmp_path):
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
