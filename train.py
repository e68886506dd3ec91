"""Fine-tune an ImageNet-pretrained ResNet-50 on Stanford Cars: one stage of plain SGD.

The two runs to reproduce, with the test accuracy and the time on one RTX 5080 that are reported by
github.com/patr1ckzhu/transfer-learning-stanford-cars:

    python train.py --resolution 448 --batch-size 64 --lr 0.05    # 91.78 %, 50.3 min
    python train.py --resolution 224 --batch-size 128 --lr 0.1    # 89.38 %, 18.9 min

Go on after a stop, with the settings of the run that was stopped:

    python train.py --resume

Train on four GPUs, with the same recipe:

    torchrun --nproc-per-node 4 train.py --resolution 448 --batch-size 64 --lr 0.05

"""

import argparse
import contextlib
import csv
import functools
import glob
import io
import itertools
import math
import os
import pickle
import re
import signal
import socket
import struct
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Listener
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C always ends the process at once, without tracebacks.
    # KeyboardInterrupt could also get lost in a destructor. Every file survives it, as any kill.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import datasets
import filelock
import huggingface_hub
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets.info import DatasetInfosDict
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import v2
from tqdm import tqdm

try:
    from torchcodec.decoders import decode_image
except Exception as error:
    # Its libraries are linked against one build of torch, and cannot be loaded beside another's.
    decode_image = None
    TORCHCODEC_ERROR = error

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in 0…1
IMAGENET_STD = (0.229, 0.224, 0.225)
PRETRAINED = ResNet50_Weights.__members__
DEFAULT_DATASET = "tanganke/stanford_cars"
DATASET_REVISION = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
# What torchcodec reads.
PHOTO_SUFFIXES = ".jpg .jpeg .jfif .png .webp .gif .avif .heic .heif".split()
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
MAX_MEGAPIXELS = 256  # Decoded, they take 768 MB in each worker; phones take 200 megapixels.
PIL.Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is below these phones'.
WORKER_TIMEOUT = 600  # seconds without a batch, after which a run ends and does not wait for ever
LOCK_TIMEOUT = 10  # seconds; the workers of a run that was killed hold its lock for five

# torchrun sets these variables for each process that it starts.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
# macOS and Windows do not tell which cores a process may use.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULT_WORKERS = max(1, min(16, CORES // LOCAL_WORLD_SIZE))

# What a run writes to its output folder.
RUN_FILES = ("last_checkpoint.pth", "best_model.pth", "history.csv", "training_curves.png")
# A run and its resumption have to agree in these.
FIXED_SETTINGS = (
    "weights resolution batch_size lr momentum weight_decay step_size seed amp amp_dtype".split()
)


class InputError(Exception):
    """What the user can put right: the command ends with this one line and exit status 1."""


def one_line(error: BaseException) -> str:
    """What `error` says, on one line; where a worker raised it, without the worker's traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]  # The last line is "NameOfType: message".
    # torchcodec begins with the place in its source: decode_rows, DecodeJpeg.cpp:287, …
    text = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", text)
    text = " ".join(text.split())
    return "".join(character for character in text if character.isprintable())


def reason(error: BaseException) -> str:
    """What `error` says, in at most 200 characters."""
    return one_line(error)[:200] or type(error).__name__


@contextlib.contextmanager
def reported_as(message: str, types=(OSError, ValueError, RuntimeError)):
    """Turn an error of `types` into an InputError: `message`, and the reason.

    By default these are the errors of files, of networks and of data. Others, such as NameError and
    KeyError, are mistakes in this code, and keep their traceback.
    """
    try:
        yield
    except (InputError, BrokenPipeError):  # run_command knows what to do with both.
        raise
    except types as error:
        # datasets raises an error that says little, and gives the reason as its cause.
        raise InputError(f"{message}: {reason(error.__cause__ or error)}") from error


def say(text: str):
    """Print `text`, above the progress bar, in the first process."""
    if RANK == 0:
        tqdm.write(text)


# ---------------------------------------------------------------- data


def load_cars(
    dataset: str, splits: tuple = ("train", "test"), classes: list[str] | None = None
) -> dict[str, datasets.Dataset]:
    """Load `splits`, and nothing else, of a Hub data set or of a local folder.

    Each split has the columns `image` (still encoded) and `label` (a ClassLabel). All labels are
    indices into `classes`, which are a checkpoint's, or else into those of the first split. Raises
    InputError where a split cannot be had, or where its classes are others.
    """
    datasets.disable_progress_bars()
    cars = {}
    for split in splits:
        with reported_as(f"cannot load the {split} split of --dataset {dataset}"):
            loaded = load_split(dataset, split)
            classes = classes or loaded.features["label"].names
            cars[split] = label_by_name(loaded, classes)
    return cars


def load_split(dataset: str, split: str) -> datasets.Dataset:
    """The split with its own labels. Raises ValueError where it is no set of labelled photos."""
    if Path(dataset).is_dir():
        loaded = read_folder(Path(dataset).resolve(), split)
    elif dataset == DEFAULT_DATASET:
        # Only these, because the repository also holds seven corrupted copies of the test split.
        files = ["README.md", f"data/{split}-*"]
        cache = huggingface_hub.constants.HF_HUB_CACHE
        with reported_as(f"the Hub is out of reach, and its files in {cache} are not whole"):
            folder = huggingface_hub.snapshot_download(
                dataset, repo_type="dataset", revision=DATASET_REVISION, allow_patterns=files
            )
            # Without a network it is whatever the cache has: read_folder counts the files.
            loaded = read_folder(Path(folder), split)
    else:
        say(f"there is no folder {dataset}: looking for such a data set on the Hub")
        message = f"--dataset {dataset} is no folder, and cannot be had from the Hub"
        with reported_as(message, Exception):
            loaded = datasets.load_dataset(dataset, split=split)

    columns = {name: type(feature).__name__ for name, feature in loaded.features.items()}
    if columns.get("image") != "Image" or columns.get("label") != "ClassLabel":
        required = "the columns 'image' (Image) and 'label' (ClassLabel)"
        raise ValueError(f"it needs {required}, and has {columns}")
    if len(loaded) == 0:
        raise ValueError("it has no photos")
    labels = range(loaded.features["label"].num_classes)
    for row, label in enumerate(loaded["label"]):
        if label not in labels:
            raise ValueError(f"row {row} has label {label}, which is no class")
    return loaded.cast_column("image", datasets.Image(decode=False))


def read_folder(folder: Path, split: str) -> datasets.Dataset:
    """Read SPLIT/CLASS/*.jpg or, as on the Hub, data/SPLIT-*.parquet of a folder."""
    if (folder / split).is_dir():
        return read_class_folders(folder / split)

    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"it has neither {split}/CLASS/*.jpg nor data/{split}-*.parquet")
    shards = re.search(r"-of-(\d+)", files[0].stem)
    if shards and int(shards[1]) != len(files):
        counted = f"it has {len(files)} of the {split} split's files"
        raise ValueError(f"{counted}; {files[0].name} says that there are {int(shards[1])}")
    # Escaped, because datasets takes every name for a pattern.
    patterns = [glob.escape(str(file)) for file in files]
    names = ", ".join(file.name for file in files)
    cache = f"HF_DATASETS_CACHE={datasets.config.HF_DATASETS_CACHE}"
    message = f"cannot read {names} in {folder / 'data'}, or write to {cache}"
    with reported_as(message, Exception):
        # Files of pandas and others lack the features, and so the names of the classes: README.md
        # has them.
        described = list(DatasetInfosDict.from_directory(str(folder)).values())
        features = described[0].features if len(described) == 1 else None
        return datasets.load_dataset(
            str(folder), data_files={split: patterns}, features=features, split=split
        )


def find_photos(folder: Path) -> tuple[list[Path], list[Path]]:
    """The photos in and below `folder`, told by their suffix, and the other files; both sorted.

    Hidden files and folders, as notebooks and Macs add them, and network disks' @eaDir are skipped.
    """
    files = []

    def fail(error: OSError):  # By default os.walk passes over a folder that cannot be read.
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and name != "@eaDir"]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    photos = [path for path in files if path.suffix.lower() in PHOTO_SUFFIXES]
    return sorted(photos), sorted(set(files) - set(photos))


def read_class_folders(folder: Path) -> datasets.Dataset:
    """The photos of `folder`, each in or below the folder of its class."""
    photos, left_out = find_photos(folder)
    left_out += [path for path in photos if path.parent == folder]  # They have no class.
    photos = [path for path in photos if path.parent != folder]
    if left_out:
        counted = f"{len(left_out)} files in {folder}, such as {left_out[0]}"
        say(f"left out  {counted}: photos are CLASS/* with {' '.join(PHOTO_SUFFIXES)}")
    for path in photos:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{str(path)!a} is not named in UTF-8: rename it") from None
    class_of = [path.relative_to(folder).parts[0] for path in photos]
    classes = sorted(set(class_of))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    columns = {
        "image": [str(path) for path in photos],
        "label": [classes.index(name) for name in class_of],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def label_by_name(loaded: datasets.Dataset, classes: list[str]) -> datasets.Dataset:
    """`loaded` with labels that are indices into `classes`, where its own have the same names.

    They may stand in another order: folders are sorted, and the Hub's are not.
    """
    # macOS stores the names of files with accents as characters of their own (NFD).
    own = [unicodedata.normalize("NFC", name) for name in loaded.features["label"].names]
    expected = [unicodedata.normalize("NFC", name) for name in classes]
    if set(own) != set(expected):
        only_here = sorted(set(own) - set(expected))[:3]
        missing = sorted(set(expected) - set(own))[:3]
        raise ValueError(
            f"it has {len(own)} classes, and the checkpoint or train split {len(expected)}; "
            f"only here: {only_here}, missing: {missing}"
        )
    if own == expected:
        return loaded
    labels = [expected.index(own[label]) for label in loaded["label"]]
    feature = datasets.ClassLabel(names=classes)
    return loaded.remove_columns("label").add_column("label", labels, feature=feature)


def decode_photo(encoded: bytes) -> torch.Tensor:
    """Decode an image file to upright RGB: (3, H, W) uint8, with the channels last in memory.

    Of an animation, it is the first frame. Raises ValueError for what is no photo or would fill
    the memory, and RuntimeError for a damaged one.
    """
    width = height = frames = 1
    # A file whose header Pillow cannot read, such as HEIC, passes: torchcodec reads or refuses it.
    with contextlib.suppress(OSError, ValueError, IndexError, struct.error):
        with PIL.Image.open(io.BytesIO(encoded)) as header:
            width, height = header.size
            if header.format != "MPO":  # A JPEG with more pictures, of which one is decoded.
                frames = getattr(header, "n_frames", 1)
    megapixels = width * height * frames / 1e6
    if megapixels > MAX_MEGAPIXELS:
        raise ValueError(f"its {megapixels:.0f} megapixels are over the limit, {MAX_MEGAPIXELS}")
    if max(width, height) > 50 * min(width, height):
        # Resized by its shorter side, it would fill the memory.
        raise ValueError(f"{width} × {height} pixels are no photo")
    try:
        if decode_image is None:
            return decode_with_pillow(encoded)
        decoded = decode_image(encoded)  # By default RGB, and turned as EXIF says.
    except ValueError:
        raise ValueError("it is no JPEG, PNG, WebP, GIF, AVIF or HEIC file") from None
    if decoded.ndim == 4:
        return decoded[0]
    return decoded


def decode_with_pillow(encoded: bytes) -> torch.Tensor:
    """`decode_photo` where torchcodec cannot be loaded: about half as fast."""
    with PIL.Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
        upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.array(upright)).movedim(-1, 0)


@functools.cache  # Making it takes longer than using it.
def random_resized_crop(resolution: int) -> v2.RandomResizedCrop:
    return v2.RandomResizedCrop(resolution, antialias=True)


def random_crop(photo: torch.Tensor, resolution: int) -> torch.Tensor:
    """Train crop of (3, H, W) uint8: contiguous (R, R, 3) uint8, mirrored or not.

    In draws and pixels it is torchvision's RandomResizedCrop and RandomHorizontalFlip.
    """
    place = random_resized_crop(resolution).make_params([photo])
    # Contiguous as (H, W, 3), since resize would take a mere slice of it for another layout, and
    # copy its result into that.
    cut_out = v2.functional.crop(photo, **place).movedim(0, -1).contiguous()
    size = [resolution, resolution]
    resized = v2.functional.resize(cut_out.movedim(-1, 0), size, antialias=True)
    if torch.rand(1) < 0.5:
        resized = resized.flip(-1)
    return resized.movedim(0, -1)


def center_crop(photo: torch.Tensor, resolution: int, side_for_224: int = 256) -> torch.Tensor:
    """Test crop of (3, H, W) uint8: contiguous (R, R, 3) uint8.

    The shorter side is resized to int(R · side_for_224 / 224), which at 224 px is the recipe's
    256, and the centre is taken. The views of eval.py have other sides.
    """
    shorter_side = int(resolution * side_for_224 / 224)
    resized = v2.functional.resize(photo, [shorter_side], antialias=True)
    return v2.functional.center_crop(resized, [resolution]).movedim(0, -1).contiguous()


class CarPhotos(torch.utils.data.Dataset):
    """The photos of all splits. An item, asked for by (split, row, seed), is a crop and its label.

    `crops[split]` turns (3, H, W) uint8 and R into (R, R, 3) uint8, or, for eval.py, into
    (views, R, R, 3). What it draws at random follows from the seed in the key, so that neither the
    number of workers nor a stop and resumption changes it. Raises InputError, naming the photo, for
    a damaged one.
    """

    def __init__(self, cars: dict, crops: dict[str, Callable], resolution: int):
        self.cars = cars
        self.crops = crops
        self.resolution = resolution

    def __getitem__(self, key: tuple[str, int, int]) -> tuple[torch.Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple]) -> list[tuple]:
        """The items of a batch of one split, whose rows are looked up at once."""
        split = keys[0][0]
        columns = self.cars[split][[row for _, row, _ in keys]]
        images = columns["image"]
        crops = [self.load_crop(*key, image) for key, image in zip(keys, images, strict=True)]
        return list(zip(crops, columns["label"], strict=True))

    def load_crop(self, split: str, row: int, seed: int, image: dict | None) -> torch.Tensor:
        if image is None:
            raise InputError(f"the {split} photo in row {row} is missing")
        name = image["path"] or f"in row {row}"
        with reported_as(f"the {split} photo {name} cannot be decoded"):
            encoded = image["bytes"]
            if encoded is None:
                encoded = Path(image["path"]).read_bytes()
            photo = decode_photo(encoded)
        # torch.manual_seed would go through all kinds of devices, which takes 0.1 ms.
        torch.default_generator.manual_seed(seed)
        return self.crops[split](photo, self.resolution)


def train_batch_sizes(num_photos: int, batch_size: int) -> list[int]:
    """How many photos each batch of an epoch has, over all processes.

    A last batch of less than an eighth of the others, or of less than two photos a process, is left
    out: its batch norm statistics would decide a whole step and, at a momentum of 0.1, a tenth of
    the running statistics, just before the evaluation. Raises InputError where the processes cannot
    share the batches.
    """
    if batch_size % WORLD_SIZE or min(batch_size, num_photos) < 2 * WORLD_SIZE:
        raise InputError(
            f"--batch-size {batch_size} of {num_photos} train photos does not fit {WORLD_SIZE} "
            "processes: it has to be a multiple of that number, with two photos or more for each"
        )
    batch_size = min(batch_size, num_photos)
    full_batches, last_batch = divmod(num_photos, batch_size)
    sizes = [batch_size] * full_batches
    if last_batch >= max(batch_size / 8, 2 * WORLD_SIZE):
        sizes.append(last_batch)
    return sizes


def train_batches(num_photos: int, batch_sizes: list[int], epoch: int, seed: int) -> Iterator[list]:
    """Yield the keys of each batch of `epoch`, as far as they fall to this process."""
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(num_photos).tolist()
    crop_seeds = rng.integers(2**32, size=num_photos).tolist()
    keys = [("train", row, crop_seed) for row, crop_seed in zip(rows, crop_seeds, strict=True)]
    start = 0
    for batch_size in batch_sizes:
        yield keys[start : start + batch_size][RANK::WORLD_SIZE]
        start += batch_size


def test_batches(num_photos: int, batch_size: int) -> list[list]:
    """The keys of each test batch of this process; no photo counts twice."""
    own_keys = [("test", row, 0) for row in range(RANK, num_photos, WORLD_SIZE)]
    own_size = math.ceil(batch_size / WORLD_SIZE)
    return [own_keys[start : start + own_size] for start in range(0, len(own_keys), own_size)]


def all_batches(
    num_train: int, batch_sizes: list[int], own_test_keys: list, epochs: range, seed: int
) -> Iterator[list]:
    """Yield the keys of the run's batches, in the order of its steps and evaluations.

    One sampler for all of it lets the workers begin with what comes next while the device works.
    """
    for epoch in epochs:
        yield from train_batches(num_train, batch_sizes, epoch, seed)
        yield from own_test_keys


def start_worker(worker: int):
    """Let a worker end without a traceback, at Ctrl-C and where the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # multiprocessing's thread that hands batches over calls it where the main process is killed.
    sys.excepthook = lambda *error: None


def make_loader(photos: CarPhotos, key_batches: Iterable[list], workers: int) -> DataLoader:
    """Load batches of keys, once, as (B, R, R, 3) uint8 crops and (B,) int64 labels."""
    if workers:
        # Tried here, since a worker that cannot open a socket to hand batches over cannot say so.
        temporary = tempfile.gettempdir()
        with reported_as(f"set a shorter TMPDIR than {temporary} for the workers' sockets"):
            Listener().close()
    return DataLoader(
        photos,
        batch_sampler=key_batches,
        num_workers=workers,
        pin_memory=DEVICE.type == "cuda",
        worker_init_fn=start_worker,
        timeout=WORKER_TIMEOUT if workers else 0,
    )


@functools.cache  # A copy to the GPU in each step would make the CPU wait for it.
def imagenet_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of RGB in 0…255: each (3, 1, 1) float32 on DEVICE."""
    mean_and_std = 255 * torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=DEVICE)
    return mean_and_std.view(2, 3, 1, 1).unbind()


def move_and_normalize(images: torch.Tensor) -> torch.Tensor:
    """Move (B, R, R, 3) uint8 to DEVICE: (B, 3, R, R) float32, normalised, channels_last."""
    mean, std = imagenet_statistics()
    channels_first = images.to(DEVICE, non_blocking=True).movedim(-1, -3)
    return channels_first.sub(mean).div_(std)


# ---------------------------------------------------------------- model


def pick_precision(amp: bool, amp_dtype: str | None = None) -> torch.dtype:
    """The dtype for autocast: `amp_dtype`, and where that is None, the device's own.

    That is float16 on CUDA, bfloat16 on a CPU that computes it natively, and float32 on others.
    Without `amp` it is float32.
    """
    if not amp:
        return torch.float32
    if amp_dtype:
        return getattr(torch, amp_dtype)
    if DEVICE.type == "cuda":
        return torch.float16
    # torch 2.10 has no such function, and computes in float32.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return torch.bfloat16
    return torch.float32


def autocast_to(precision: torch.dtype) -> torch.autocast:
    """Mixed precision with `precision`; none with float32."""
    return torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32)


# What a checkpoint may hold beside tensors: torchvision's references and timm store their flags,
# and many programs a numpy scalar, whose function has one name in numpy 2 and another in numpy 1.
PLAIN_TYPES = [
    argparse.Namespace,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *[type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")],
]


def load_file(path: Path) -> object:
    """Read what torch.save wrote, onto the CPU. No code that the file may hold is run."""
    with reported_as(f"{path} is missing, damaged, or no file of torch.save", Exception):
        try:
            with torch.serialization.safe_globals(PLAIN_TYPES):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own message is long, and advises options that this program does not have.
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused is None:
                raise ValueError("it cannot be unpickled") from None
            raise InputError(
                f"{path} holds a {refused[1]}, and only tensors and plain values are read"
            ) from None


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint, or a bare state dict, of a ResNet-50 onto the CPU.

    Returns a dict whose `model` is the state dict, without the prefixes of torch.compile and
    DistributedDataParallel; fc may be missing. Raises InputError where the weights, or what stands
    beside them, cannot be of a ResNet-50.
    """
    checkpoint = load_file(path)
    with reported_as(f"{path} holds no ResNet-50"):
        if not isinstance(checkpoint, dict):
            raise ValueError(f"it is a {type(checkpoint).__name__}, and no dict")
        if "model" not in checkpoint:
            checkpoint = {"model": checkpoint.get("state_dict", checkpoint)}
        if not isinstance(checkpoint["model"], dict):
            raise ValueError(f"its model is a {type(checkpoint['model']).__name__}, and no dict")
        prefix = re.compile(r"^((_orig_mod|module)\.)+")
        state = {prefix.sub("", str(name)): value for name, value in checkpoint["model"].items()}

        num_classes = 1000
        bias = state.get("fc.bias")
        if isinstance(bias, torch.Tensor) and bias.ndim == 1:
            num_classes = len(bias)
        # On the meta device the network has shapes and no weights: assign=True gives it the file's.
        with torch.device("meta"):
            model = resnet50(num_classes=num_classes)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        if missing not in ([], ["fc.weight", "fc.bias"]) or unexpected:
            raise ValueError(f"it lacks {missing[:3]}, and has {unexpected[:3]}")
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("it holds weights that are not finite")
        # Where the file has no fc, the network's is still on the meta device.
        checkpoint["model"] = {
            name: value for name, value in model.state_dict().items() if not value.is_meta
        }

        types = dict(classes=list, history=list, settings=dict, resolution=int, epoch=int)
        for name in types.keys() & checkpoint.keys():
            if not isinstance(checkpoint[name], types[name]):
                raise ValueError(f"its {name} is no {types[name].__name__}")
        classes = checkpoint.get("classes", [""] * num_classes)
        if len(classes) != num_classes or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"it names other than the {num_classes} classes of its fc")
        if not 32 <= checkpoint.get("resolution", 224) <= 4096:
            raise ValueError(f"its resolution is {checkpoint['resolution']} px")
    return checkpoint


def build_model(weights: str, num_classes: int) -> torch.nn.Module:
    """ResNet-50 with a `num_classes`-way fc, from a torchvision name, a file, or "none".

    The fc is new for torchvision's weights, and for a file with another number of classes.
    Raises InputError where the weights cannot be had or are another architecture's.
    """
    model = resnet50(num_classes=num_classes)
    if weights == "none":
        return model
    if Path(weights).is_file():
        state = read_checkpoint(Path(weights))["model"]
    elif weights in PRETRAINED:
        # For the download, which would wait for ever for a proxy that never answers.
        socket.setdefaulttimeout(30)
        advice = (
            f"check the network, and delete a damaged file in {torch.hub.get_dir()}/checkpoints"
        )
        with reported_as(f"cannot load --weights {weights} ({advice})"):
            show_bar = sys.stderr.isatty()
            state = PRETRAINED[weights].get_state_dict(progress=show_bar, check_hash=True)
    else:
        names = ", ".join(PRETRAINED)
        raise InputError(f"--weights {weights} is neither a file nor one of {names}, none")
    if weights in PRETRAINED or len(state.get("fc.bias", ())) != num_classes:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    model.load_state_dict(state, strict=False)
    return model


def compile_full_batches(network: torch.nn.Module, batch_size: int) -> Callable:
    """torch.compile `network` for batches of `batch_size`.

    An epoch's last batch is smaller, and not worth a second compilation. Where the batches of train
    and test differ, dynamic=False keeps the second from a slower graph for batches of any size.
    """
    compiled = torch.compile(network, dynamic=False)

    def forward(images: torch.Tensor) -> torch.Tensor:
        if len(images) == batch_size:
            return compiled(images)
        return network(images)

    return forward


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with one learning rate for all parameters, and with momentum that begins at zero."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,
        # GradScaler then skips a step on the GPU: the CPU does not wait to hear of an overflow.
        fused=True,
    )
    # torch leaves the memory of new buffers as it finds it where the first step is skipped. From
    # zero, the first step's momentum is its gradient, as it is without `fused`.
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# ---------------------------------------------------------------- one epoch, one evaluation


def next_batches(batches: Iterable, count: int, title: str) -> tqdm:
    """The next `count` of `batches`, with a progress bar in a terminal."""
    hidden = RANK > 0 or not sys.stderr.isatty()
    wanted = itertools.islice(batches, count)
    return tqdm(wanted, desc=title, total=count, leave=False, disable=hidden)


def train_one_epoch(forward, batches, batch_sizes, autocast, optimizer, scaler) -> dict:
    """Take a step for each of `batches`: (B, R, R, 3) uint8 crops and (B,) int64 labels.

    Under torchrun they are this process's part of batches of `batch_sizes` photos. Returns mean
    loss and accuracy (0…1) over all processes, train photos per second, and the share (0…1) of
    the time that this process waited for photos. On CUDA, where the CPU runs ahead of the GPU,
    that share is an upper bound: the GPU may still have had work.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    loss_sum, correct = sums  # They are views of `sums`: adding to them adds to it.
    waited = 0.0
    start = time.perf_counter()
    step_end = start
    for (images, targets), batch_size in zip(batches, batch_sizes, strict=True):
        waited += time.perf_counter() - step_end
        targets = targets.to(DEVICE, non_blocking=True)
        with autocast:
            logits = forward(move_and_normalize(images))
            batch_loss = F.cross_entropy(logits, targets, reduction="sum")
            # DistributedDataParallel takes the mean over the processes, whatever their shares.
            loss = batch_loss * WORLD_SIZE / batch_size
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # Summed on the device: .item() would make the CPU wait for the GPU in every step.
        loss_sum += batch_loss.detach()
        correct += (logits.argmax(1) == targets).sum()
        step_end = time.perf_counter()
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    num_photos = sum(batch_sizes)
    train_loss, train_accuracy = (sums / num_photos).tolist()  # Here the CPU waits for the GPU.
    seconds = time.perf_counter() - start
    return {
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "photos_per_second": num_photos / seconds,
        "input_wait": waited / seconds,
    }


@torch.no_grad()
def evaluate(forward, batches, autocast) -> dict:
    """Mean loss and accuracy (0…1), over all processes, of crops and labels as in training."""
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    loss_sum, correct, total = sums
    for images, targets in batches:
        targets = targets.to(DEVICE, non_blocking=True)
        with autocast:
            logits = forward(move_and_normalize(images)).float()
        loss_sum += F.cross_entropy(logits, targets, reduction="sum")
        correct += (logits.argmax(1) == targets).sum()
        total += len(targets)
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    test_loss, test_accuracy = (sums[:2] / total).tolist()
    return {"test_loss": test_loss, "test_accuracy": test_accuracy}


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(number_type: type, low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: an int or a float, as `number_type` says, from `low` to `high`."""

    def parse(text: str) -> float:
        value = number_type(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = number_type.__name__  # argparse names the type: "invalid int value".
    return parse


def parse_args(argv: list[str] | None, settings: dict | None = None) -> argparse.Namespace:
    """The flags; `settings` of a run to resume take the place of the defaults.

    What follows from the machine and was left out is None, so that a run may go on elsewhere.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    # fmt: off
    parser = Parser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    on_or_off = argparse.BooleanOptionalAction

    add("--dataset", default=DEFAULT_DATASET, help="Hub data set or local folder (%(default)s)")
    add("--weights", default="IMAGENET1K_V2",
        help="torchvision weights name, state dict file or none (%(default)s)")
    add("--resolution", type=number(int, 32, 4096), default=224,
        help="side of the crops in pixels (%(default)s)")
    add("--batch-size", type=number(int, 2, 65536), default=128,
        help="photos in a step, over all devices (%(default)s)")
    add("--epochs", type=number(int, 1, 100_000), default=90,
        help="passes over the train split (%(default)s)")
    add("--lr", type=number(float, 1e-9, 1000),
        help="learning rate of the first epochs (0.1 × batch size / 128)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD (%(default)s)")
    add("--weight-decay", type=number(float, 0, 1), default=1e-4, help="of SGD (%(default)s)")
    add("--step-size", type=number(int, 1, 100_000), default=30,
        help="epochs after which lr is divided by 10 (%(default)s)")
    add("--seed", type=number(int, 0, 2**32), default=0,
        help="of the new fc, the order of the photos and their crops (%(default)s)")
    add("--workers", type=number(int, 0, 256),
        help="processes that decode photos, for each GPU (cores / GPUs, at most 16)")
    add("--output-dir", type=Path, default=".", help="for what the run writes (%(default)s)")
    add("--amp", action=on_or_off, default=True, help="mixed precision (on)")
    add("--amp-dtype", choices=["float16", "bfloat16"],
        help="its type (float16 on CUDA, bfloat16 on a CPU that has it, else no mixed precision)")
    add("--compile", action=on_or_off, help="torch.compile (on for CUDA)")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--resume", action="store_true",
        help="go on after the last saved epoch, with the run's flags; begin where there is no run")
    exclusive.add_argument("--overwrite", action="store_true",
        help="replace the run that the output folder holds")
    # fmt: on

    parser.set_defaults(**(settings or {}))
    args = parser.parse_args(argv)
    if Path(args.dataset).is_dir():
        # Stored with the run, and eval.py may be started in another folder.
        args.dataset = str(Path(args.dataset).resolve())
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 128
    return args


# ---------------------------------------------------------------- a run, from start to end


def atomic_write(path: Path, contents: bytes):
    """Write a file beside `path`, and move it over `path` once it is whole.

    Raises InputError where it cannot be written; `path` is then as it was.
    """
    draft = path.with_name(f".partial-{path.name}")
    unharmed = " (the old one is whole)" if path.exists() else ""
    try:
        with reported_as(f"cannot write {path}{unharmed}"):
            draft.write_bytes(contents)
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def make_output_dir(folder: Path):
    """Make `folder` where it is missing; raises InputError where nothing can be written there."""
    with reported_as(f"cannot write to --output-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def lock_folder(folder: Path) -> filelock.FileLock:
    """Lock `folder` as long as the lock is referenced; raises InputError where that cannot be."""
    path = folder / ".lock"
    lock = filelock.FileLock(path, timeout=LOCK_TIMEOUT)
    with reported_as(f"cannot lock {path}, which may be deleted while no run is writing there"):
        try:
            lock.acquire()
        except filelock.Timeout:
            # Where a file system has no locks, the file itself is the lock, and a kill leaves it.
            advice = f"if there is none, delete {path}"
            raise InputError(f"another run is writing to --output-dir {folder}: {advice}") from None
    return lock


def open_run(argv: list[str] | None) -> tuple:
    """Read the flags, lock the output folder, and read the run that it holds, if it is resumed.

    Returns the flags, the checkpoint or None, and the lock. Raises InputError where the folder is
    in use, cannot be written, or holds a run that the flags cannot resume and do not overwrite.
    """
    args = parse_args(argv)
    folder = args.output_dir
    make_output_dir(folder)
    lock = lock_folder(folder)
    last = folder / "last_checkpoint.pth"
    existing = [name for name in RUN_FILES if (folder / name).exists()]
    if args.resume and not existing:
        say(f"no run in {folder}: starting one")
    if args.overwrite or not existing:
        return args, None, lock
    if not args.resume:
        raise InputError(
            f"{folder} holds a run already ({', '.join(existing)}): go on with it with --resume, "
            "replace it with --overwrite, or choose another --output-dir"
        )
    checkpoint = read_checkpoint(last)
    required = "settings classes num_photos resolution epoch history optimizer scheduler scaler"
    if not all(name in checkpoint for name in required.split()) or not checkpoint["history"]:
        raise InputError(f"{last} is no checkpoint to resume: it needs {required}")

    # Parsed again, now that the defaults are known: flags that were left out are those of the run.
    args = parse_args(argv, checkpoint["settings"])
    check_settings(args, checkpoint)
    # A kill may have come after last_checkpoint.pth and before the files that follow from it.
    write_run(checkpoint, folder)
    if not (folder / "best_model.pth").exists():
        say("best_model.pth is gone: the next epoch that is better than the best writes it again")
    return args, checkpoint, lock


def check_settings(args: argparse.Namespace, checkpoint: dict):
    """Raise InputError where the flags cannot go on with the run of `checkpoint`."""
    other_run = f"the run to resume in {args.output_dir}"
    for name in FIXED_SETTINGS:
        now = getattr(args, name)
        before = checkpoint["settings"].get(name)
        if now != before:
            flag = f"--{name.replace('_', '-')} {now}"
            raise InputError(f"{flag} differs from {other_run}, which has {before}")
    epochs_done = len(checkpoint["history"])
    if args.epochs < epochs_done:
        raise InputError(
            f"--epochs {args.epochs} is less than the {epochs_done} that {other_run} has done"
        )


def check_same_data(data: dict):
    """Raise InputError where this process's classes or numbers of photos are not the first's."""
    if WORLD_SIZE > 1:
        of_first = [data]
        dist.broadcast_object_list(of_first)
        if of_first[0] != data:
            raise InputError(f"process {RANK} has another data set than the first: {data}")


def restore_states(checkpoint: dict, num_photos: dict, stateful: dict):
    """Load the states of `checkpoint` into `stateful`; raises InputError for other photos."""
    if checkpoint["num_photos"] != num_photos:
        before = checkpoint["num_photos"]
        raise InputError(
            f"the data set has changed since the run began: {num_photos}, not {before}"
        )
    for name, component in stateful.items():
        if checkpoint[name]:  # The scaler of a run without float16 has no state.
            component.load_state_dict(checkpoint[name])


def copy_to_cpu(state: object) -> object:
    """A copy of a state dict, whose tensors are the CPU's, with the strides that they had."""
    if isinstance(state, torch.Tensor):
        return state.to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copy_to_cpu(value) for name, value in state.items()}
    if isinstance(state, list):
        return [copy_to_cpu(value) for value in state]
    return state


def best_epoch(history: list[dict]) -> dict:
    """The first of the epochs with the best test accuracy."""
    return max(history, key=lambda row: row["test_accuracy"])


def write_run(checkpoint: dict, folder: Path):
    """Write last_checkpoint.pth, which holds the whole run, and then what follows from it."""
    history = checkpoint["history"]
    # Contiguous as torchvision's, for whoever loads it without this program.
    model = {name: value.contiguous() for name, value in checkpoint["model"].items()}
    checkpoint = {**checkpoint, "model": model}
    atomic_write(folder / "last_checkpoint.pth", to_bytes(checkpoint))
    best = best_epoch(history)
    if best["epoch"] == history[-1]["epoch"]:
        names = ("model", "classes", "resolution", "epoch", "settings")
        best_model = {name: checkpoint[name] for name in names}
        best_model["test_accuracy"] = best["test_accuracy"]
        atomic_write(folder / "best_model.pth", to_bytes(best_model))
    write_csv(history, folder / "history.csv")
    picture = io.BytesIO()
    plot_history(history).savefig(picture, format="png")
    atomic_write(folder / "training_curves.png", picture.getvalue())


def write_csv(rows: list[dict], path: Path):
    """Write `rows`, which all have the same names, below a line of these names."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, table.getvalue().encode())


def to_bytes(checkpoint: dict) -> bytes:
    """What torch.save writes. To a file, it would hide the system's reason where a disk is full."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def plot_history(history: list[dict]) -> Figure:
    """Loss and accuracy of both splits by epoch, with a dotted line at each change of lr."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")  # inches
    epochs = [row["epoch"] for row in history]
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for split in ("train", "test"):
        losses = [max(row[f"{split}_loss"], 1e-6) for row in history]  # 0 has no logarithm.
        loss_axes.plot(epochs, losses, marker=".", label=split)
        accuracies = [100 * row[f"{split}_accuracy"] for row in history]
        accuracy_axes.plot(epochs, accuracies, marker=".", label=split)
    loss_axes.set(ylabel="loss", yscale="log")  # The first test loss may be a hundred times others.
    accuracy_axes.set(ylabel="accuracy, %")
    for axes in figure.axes:
        for before, after in itertools.pairwise(history):
            if before["lr"] != after["lr"]:
                axes.axvline(after["epoch"] - 0.5, color="grey", linestyle=":")
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def finish_epoch(checkpoint: dict, folder: Path, epochs: range):
    """Write the run, and then print the line of its last epoch: what is printed is saved."""
    write_run(checkpoint, folder)
    row = checkpoint["history"][-1]
    epochs_left = epochs[-1] - row["epoch"]
    # The first epoch after a start says little about the others: its steps were compiled.
    left = f"  {epochs_left * row['seconds'] / 60:.1f} min left" if row["epoch"] > epochs[0] else ""
    say(
        f"epoch {row['epoch']}/{epochs[-1]}  lr {row['lr']:.3g}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.2%}  "
        f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:.2%}  "
        f"{row['seconds']:.1f} s  {row['photos_per_second']:.1f} photos/s  "
        f"{row['input_wait']:.0%} waiting for photos{left}"
    )


def say_summary(history: list[dict]):
    best = best_epoch(history)
    minutes = sum(row["seconds"] for row in history) / 60
    say(
        f"best test accuracy {best['test_accuracy']:.2%} in epoch {best['epoch']}, chosen on the "
        f"test split; last epoch {history[-1]['test_accuracy']:.2%}; {minutes:.1f} min in all"
    )


# ---------------------------------------------------------------- errors and processes

SMALL_SHARED_MEMORY = (
    "the shared memory in /dev/shm (df -h shows its size) is too small: "
    "give the container more with --shm-size or --ipc=host, or use --workers 0"
)
# Parts of the errors that a user can mend, with the advice for each; the first that fits counts.
ADVICE = {
    "OutOfMemoryError": "the GPU's memory is full: choose a smaller --batch-size or --resolution",
    "allocate memory": "the memory is full: choose a smaller --batch-size or fewer --workers",
    "no kernel image": "this build of torch was not made for this GPU: install one that was",
    "torch._dynamo": "torch.compile failed: try again with --no-compile",
    "torch._inductor": "torch.compile failed: try again with --no-compile",
    # Before the shared memory, which such an error may name as well.
    "Too many open files": "raise the limit (ulimit -n 65536), or use fewer --workers",
    "</torch_": SMALL_SHARED_MEMORY,  # "unable to open shared memory object </torch_4711_…>"
    "shared memory": SMALL_SHARED_MEMORY,
    "DataLoader worker (pid": "a worker has ended: where memory was short, use fewer --workers",
    "DataLoader timed out": "the workers hand nothing over: look at the disk, or use --workers 0",
    "EADDRINUSE": "the port is taken: choose another with --master-port",
    "by peer": "another process of this run has ended: its message tells why",
}


def explain(error: Exception) -> str:
    """One line for an error of torch or of the system that a user can mend; empty for others."""
    described = f"{type(error)} {one_line(error)}"
    for sign, advice in ADVICE.items():
        if sign in described:
            return f"{advice} ({reason(error)})"
    if isinstance(error, OSError):
        return reason(error)
    return ""


def prepare_streams():
    """Let standard output and standard error take any text, wherever they lead."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Closed by >&- or 2>&-.
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):  # A notebook's is none.
            # A console that cannot show "×" shows "?". A pipe gets each line at once, since Ctrl-C
            # leaves no time to hand over what was printed.
            stream.reconfigure(errors="replace", line_buffering=True)


def run_command(main: Callable[[], None]) -> int:
    """Call `main` and return the exit status; what a user can put right becomes one line."""
    prepare_streams()
    try:
        main()
        sys.stdout.flush()
        return 0
    except InputError as error:
        message = one_line(error)
    except BrokenPipeError:
        message = ""  # Whoever reads the output, as head does, wants no more of it.
    except (OSError, RuntimeError) as error:
        message = explain(error)
        if not message:
            raise
    finally:
        # Here main has returned, and what held DistributedDataParallel is gone.
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # What cannot be printed is dropped: Python would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def start_process():
    """Set torch up, and join the processes that torchrun started, if it did."""
    if (WORLD_SIZE > 1 or RANK > 0) and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"RANK is {RANK} and WORLD_SIZE is {WORLD_SIZE}, and MASTER_ADDR is not set: "
            "start several processes with torchrun, and for one, unset these variables"
        )
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    if DEVICE.type == "cpu" and torch.backends.cuda.is_built():
        try:
            torch.cuda.init()
        except Exception as error:
            say(f"warning   no GPU can be used, and a CPU takes days: {reason(error)}")
    if DEVICE.type == "cuda":
        gpus = torch.cuda.device_count()
        if LOCAL_WORLD_SIZE > gpus:
            raise InputError(f"this machine has {gpus} GPUs: start that many processes, at most")
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        backend = dist.get_default_backend_for_device(DEVICE)
        dist.init_process_group(backend)


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None):
    # In each process, so that --help ends all of them; open_run parses the first one's flags again.
    args = parse_args(argv)
    start_process()
    checkpoint = None
    if RANK == 0:
        args, checkpoint, lock = open_run(argv)  # `lock` is held until main returns.
    if WORLD_SIZE > 1:
        # All take the flags and the run of the first process, so that they cannot differ.
        opened = [args, checkpoint]
        dist.broadcast_object_list(opened)
        args, checkpoint = opened

    history = checkpoint["history"] if checkpoint else []
    epochs = range(len(history) + 1, args.epochs + 1)
    if not epochs:
        say(f"all {args.epochs} epochs are done; --resume with more --epochs trains on")
        say_summary(history)
        return

    precision = pick_precision(args.amp, args.amp_dtype)
    workers = DEFAULT_WORKERS if args.workers is None else args.workers
    compiled = DEVICE.type == "cuda" if args.compile is None else args.compile
    device_name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    compilation = "compiled" if compiled else "not compiled"
    say(f"device    {WORLD_SIZE} × {device_name}, {precision}, {compilation}, {workers} workers")
    if decode_image is None:
        say(
            "warning   Pillow decodes the photos, about half as fast: torchcodec cannot be loaded, "
            "and has to come from the same index as torch "
            f"({reason(TORCHCODEC_ERROR)})"
        )
    settings = vars(args).copy()
    for name in ("output_dir", "resume", "overwrite"):  # These are not the run's.
        del settings[name]
    say("settings  " + " ".join(f"{name}={value}" for name, value in settings.items()))
    cars = load_cars(args.dataset, classes=checkpoint["classes"] if checkpoint else None)
    classes = cars["train"].features["label"].names
    num_photos = {split: len(cars[split]) for split in cars}
    data = {"classes": classes, "num_photos": num_photos}
    check_same_data(data)
    counts = f"{num_photos['train']} train and {num_photos['test']} test photos"
    say(f"data      {counts}, {len(classes)} classes")
    batch_sizes = train_batch_sizes(num_photos["train"], args.batch_size)
    left_out = num_photos["train"] - sum(batch_sizes)
    if left_out:
        say(f"          each epoch leaves out {left_out} of them, too few for a last batch")

    torch.manual_seed(args.seed)
    # One process loads the weights: DistributedDataParallel hands them to the others.
    start_from = "none" if checkpoint or RANK > 0 else args.weights
    model = build_model(start_from, len(classes))
    model.to(DEVICE, memory_format=torch.channels_last)
    network = model
    if WORLD_SIZE > 1:
        # Batch norm's statistics are those of a process's own photos until the evaluation.
        network = DistributedDataParallel(model, broadcast_buffers=False)
    train_forward = network
    test_forward = model
    if compiled:
        train_forward = compile_full_batches(network, batch_sizes[0] // WORLD_SIZE)
        test_forward = compile_full_batches(model, args.batch_size // WORLD_SIZE)
    optimizer = make_optimizer(model, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.step_size, gamma=0.1)
    autocast = autocast_to(precision)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == torch.float16)
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if checkpoint:
        restore_states(checkpoint, num_photos, stateful)
        say(f"resumed after epoch {len(history)}")
    # Each checkpoint says this, beside its states and its history.
    run = {**data, "settings": settings, "resolution": args.resolution}

    crops = {"train": random_crop, "test": center_crop}
    photos = CarPhotos(cars, crops, args.resolution)
    own_test_keys = test_batches(num_photos["test"], args.batch_size)
    key_batches = all_batches(num_photos["train"], batch_sizes, own_test_keys, epochs, args.seed)
    batches = iter(make_loader(photos, key_batches, workers))
    if args.overwrite and RANK == 0:
        # Now that nothing else can be refused. After a kill in the first epoch, --resume would else
        # go on with the old run.
        for name in RUN_FILES:
            (args.output_dir / name).unlink(missing_ok=True)
    if compiled:
        say("the first steps are compiled, which takes a minute or two")
    say("Ctrl-C is safe once an epoch is printed: --resume goes on after the last one")
    epoch_start = time.perf_counter()
    write = None
    with ThreadPoolExecutor(max_workers=1) as writer:  # Its end waits for what is being written.
        for epoch in epochs:
            model.train()
            trained = train_one_epoch(
                forward=train_forward,
                batches=next_batches(batches, len(batch_sizes), "train"),
                batch_sizes=batch_sizes,
                autocast=autocast,
                optimizer=optimizer,
                scaler=scaler,
            )
            model.eval()
            if WORLD_SIZE > 1:
                # The first process's batch norm statistics become everybody's.
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            own_test = next_batches(batches, len(own_test_keys), "test")
            tested = evaluate(forward=test_forward, batches=own_test, autocast=autocast)
            # A train loss may be: GradScaler skips the step of a batch that has overflowed.
            if not math.isfinite(tested["test_loss"]):
                raise InputError(
                    f"the test loss is not finite in epoch {epoch}: begin again with a "
                    "smaller --lr and --overwrite, or in a new --output-dir with "
                    "--weights OLD/best_model.pth"
                )

            epoch_end = time.perf_counter()
            seconds = epoch_end - epoch_start
            epoch_start = epoch_end
            lr = scheduler.get_last_lr()[0]
            history.append({"epoch": epoch, "lr": lr, **trained, **tested, "seconds": seconds})
            scheduler.step()
            if RANK == 0:
                if write:
                    write.result()  # Waits for the epoch before; raises what stopped it.
                states = {name: component.state_dict() for name, component in stateful.items()}
                # Copied here, where the GPU has nothing else to do: a thread writes it while the
                # next epoch changes the states.
                copied = copy_to_cpu({**run, **states, "epoch": epoch, "history": history})
                write = writer.submit(finish_epoch, copied, args.output_dir, epochs)
        if RANK == 0:
            write.result()
    say_summary(history)


if __name__ == "__main__":
    sys.exit(run_command(main))
