"""Fine-tune an ImageNet-pretrained ResNet-50 on Stanford Cars: one stage of plain SGD.

    python train.py --resolution 448 --batch-size 64    # the best accuracy
    python train.py                                     # 224 px, in less than half the time
    python train.py --resume                            # continue a run that was stopped
    torchrun --nproc-per-node 4 train.py                # train on four GPUs

This program has not been measured on a GPU yet. The reference whose recipe it follows,
github.com/patr1ckzhu/transfer-learning-stanford-cars, reports 91.78% in 50.3 min at 448 px, and
89.38% in 18.9 min at 224 px, on one RTX 5080. Like the reference, it chooses the best epoch on the
test split, which makes that accuracy a little optimistic; --val-split avoids it.
"""

# The recipe is in one part, below the flags. The loop is in train_run. eval.py imports this file.

import argparse
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pandas
import PIL.Image
import PIL.ImageOps
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import v2
from tqdm import tqdm

TORCHCODEC_ERROR = None
try:
    from torchcodec.decoders import decode_image
except Exception as error:
    # torchcodec's libraries only load beside the torch version that they were built for.
    decode_image = None
    TORCHCODEC_ERROR = error

DEFAULT_DATASET = "tanganke/stanford_cars"
DATASET_REVISION = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in 0…1
IMAGENET_STD = (0.229, 0.224, 0.225)
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif", ".heic", ".heif")
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
OTHER_FILES = f"files that do not end in {' '.join(PHOTO_SUFFIXES)}"
VAL_NAMES = ("val", "valid", "validation", "dev")
SECONDS_BETWEEN_LINES = 60  # The progress is printed at most that often, without a terminal.

# torchrun sets these variables for each process that it starts.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULT_WORKERS = max(1, min(16, CORES // LOCAL_WORLD_SIZE))

# The files of a run, in the order in which --overwrite deletes them.
RUN_FILES = (
    "last_checkpoint.pth",
    "best_model.pth",
    "history.csv",
    "training_curves.png",
    "settings.json",
)
# The settings of a run are all flags but these.
NOT_SETTINGS = ("output_dir", "resume", "overwrite")
# These settings may change when a run is resumed. The dataset may have moved: its classes and
# numbers of photos are compared instead of its path.
CHANGEABLE_SETTINGS = ("dataset", "epochs", "workers", "compile")


class InputError(Exception):
    """A mistake the user can fix. The scripts print its message as one line and exit with 1."""


@contextlib.contextmanager
def reported_as(message: str):
    """Re-raise an error as an InputError that says `message` and the reason.

    Errors that only a bug in this program raises keep their type and traceback.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (NameError, AttributeError, TypeError, IndexError, AssertionError):
        raise
    except Exception as error:
        reason = one_line(error)
        if error.__cause__ and one_line(error.__cause__) != reason:
            reason += f"; {one_line(error.__cause__)}"
        raise InputError(f"{message}: {reason}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, and at most 400 characters of it."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s*\n\s*", " ", text)[:400]


def log(text: str):
    """Print a line in the first process, above its progress bar."""
    if RANK == 0:
        tqdm.write(text)


# ---------------------------------------------------------------- flags


def number(kind: type, lowest: float, highest: float = math.inf) -> Callable:
    """Return an argparse type: a finite int or float (`kind`) from `lowest` to `highest`."""

    def parse(text: str):
        limits = f"at least {lowest}"
        if highest < math.inf:
            limits += f" and at most {highest}"
        message = f"{text} is not {'an integer' if kind is int else 'a number'} of {limits}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(message) from None
        if not lowest <= value <= highest or value == math.inf:
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


def fraction_type(text: str) -> float:
    value = number(float, 0)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not less than 1")
    return value


def path_type(text: str) -> Path:
    # The shell does not expand the ~ in --output-dir=~/run.
    return Path(text).expanduser()


def weights_type(text: str) -> str:
    file = path_type(text)
    return str(file.resolve()) if file.is_file() else text


def dataset_type(text: str) -> str:
    # Absolute paths are stored with the run, which may be resumed in another folder.
    folder = path_type(text)
    return str(folder.resolve()) if folder.is_dir() else text


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. A default of None means: choose when the run starts."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    yes_or_no = argparse.BooleanOptionalAction
    # fmt: off
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--weights", type=weights_type, default=NETWORK.weights.name,
        help="pretrained weights: a torchvision name, a file, or none (default: %(default)s)")
    recipe.add_argument("--resolution", type=number(int, 32), default=224,
        help="side of the square crops, in pixels (default: %(default)s)")
    recipe.add_argument("--batch-size", type=number(int, 1), default=128,
        help="photos in a step, over all GPUs (default: %(default)s)")
    recipe.add_argument("--epochs", type=number(int, 1), default=90,
        help="passes over the train split (default: %(default)s)")
    recipe.add_argument("--lr", type=number(float, 1e-9),
        help="initial learning rate (default: 0.1 at batch size 128, and proportional to it)")
    recipe.add_argument("--step-size", type=number(int, 1), default=30,
        help="epochs after which the learning rate is divided by 10 (default: %(default)s)")
    recipe.add_argument("--momentum", type=number(float, 0, 1), default=0.9,
        help="momentum of SGD (default: %(default)s)")
    recipe.add_argument("--weight-decay", type=number(float, 0), default=1e-4,
        help="weight decay of all parameters (default: %(default)s)")
    recipe.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="seed of the new layer, of the order of the photos and of their crops "
        "(default: %(default)s)")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", type=dataset_type, default=DEFAULT_DATASET,
        help="name of a Hub dataset, or path of a folder (default: %(default)s)")
    data.add_argument("--val-split", type=fraction_type, default=0.0, metavar="FRACTION",
        help="hold out this fraction of each class of the train split, and choose the best epoch "
        "on it instead of on the test split. The names of the photos decide which, not --seed. "
        "Not allowed if the dataset has a val split, which is then used (default: 0)")

    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--workers", type=number(int, 0),
        help=f"processes per GPU that load photos (default: {DEFAULT_WORKERS} on this machine)")
    hardware.add_argument("--amp", action=yes_or_no, default=True,
        help="use mixed precision (default: yes)")
    hardware.add_argument("--amp-dtype", choices=["float16", "bfloat16"],
        help="data type of mixed precision (default: float16; on CPUs bfloat16 if they have it, "
        "else none)")
    hardware.add_argument("--compile", action=yes_or_no,
        help="use torch.compile (default: yes on GPUs)")

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", type=path_type, default=Path("."),
        help="folder that the run writes to (default: the current folder)")
    existing_run = run.add_mutually_exclusive_group()
    existing_run.add_argument("--resume", action="store_true",
        help="continue the run in the output folder after its last saved epoch, or start one")
    existing_run.add_argument("--overwrite", action="store_true",
        help="delete the run in the output folder and start a new one")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None, settings: dict | None = None) -> argparse.Namespace:
    """Parse the flags. The defaults are the `settings` of the run to resume, if there is one."""
    parser = build_parser()
    parser.set_defaults(**(settings or {}))
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = default_lr(args.batch_size)
    return args


# ---------------------------------------------------------------- the recipe

# To change it: NETWORK; random_crop (augmentation); training_loss_sum (label smoothing, mixup);
# build_optimizer; lr_factor and default_lr (schedule). The other defaults are those of the flags
# above. Gradient clipping goes into train_one_epoch.

# The network. For another one of torchvision.models, such as ConvNeXt, change these four lines.
NETWORK = SimpleNamespace(
    build=resnet50,
    weights=ResNet50_Weights.IMAGENET1K_V2,
    head="fc",  # the last layer, replaced by a new one for the classes of the dataset
    gradcam_layer="layer4.2",  # the last one with feature maps, of R/32 x R/32 cells
)


def random_crop(photo: torch.Tensor, resolution: int) -> torch.Tensor:
    """Crop, resize and mirror a photo at random, for training.

    Its random numbers come from torch, which is seeded for each photo. With the same ones, the
    result equals that of torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Args:
        photo: (3, H, W) uint8.
        resolution: R, in pixels.

    Returns:
        (R, R, 3) uint8, contiguous.
    """
    box = v2.RandomResizedCrop.get_params(photo, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    # resize is faster with the channels last in memory, and keeps that layout.
    region = v2.functional.crop(photo, *box).permute(1, 2, 0).contiguous()
    crop = v2.functional.resize(region.permute(2, 0, 1), [resolution] * 2, antialias=True)
    if torch.rand(1) < 0.5:
        crop = crop.flip(-1)
    return crop.permute(1, 2, 0)


def center_crop(photo: torch.Tensor, resolution: int, resize_at_224: int = 256) -> torch.Tensor:
    """Resize a photo and crop its center, for the evaluation.

    Args:
        photo: (3, H, W) uint8.
        resolution: R, in pixels.
        resize_at_224: the shorter side is resized to int(R * resize_at_224 / 224) pixels. The
            recipe has 256; six-view TTA in eval.py also uses 224 and 288.

    Returns:
        (R, R, 3) uint8, contiguous.
    """
    shorter_side = int(resolution * resize_at_224 / 224)
    resized = v2.functional.resize(photo, [shorter_side], antialias=True)
    crop = v2.functional.center_crop(resized, [resolution])
    return crop.permute(1, 2, 0).contiguous()


def training_loss_sum(
    network: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum, not the mean, of a batch's losses, and the number of correct predictions.

    Label smoothing, mixup or another loss belongs here. Random numbers may come from torch, NumPy
    or `random`, which are seeded for each epoch: a resumed run draws the same ones.

    Args:
        network: the network in training mode.
        images: (B, 3, R, R) float32, normalized.
        targets: (B,) int64.
    """
    logits = network(images)
    loss_sum = F.cross_entropy(logits, targets, reduction="sum")
    num_correct = (logits.argmax(1) == targets).sum()
    return loss_sum, num_correct


def default_lr(batch_size: int) -> float:
    """Return the learning rate of the reference's runs: 0.1 at batch size 128, 0.05 at 64."""
    return 0.1 * batch_size / 128


def lr_factor(args: argparse.Namespace, epoch: int) -> float:
    """Return what the learning rates are multiplied by in an epoch, counted from 1.

    Step decay, as in the reference. A factor that depends on args.epochs changes if a run is
    resumed with another --epochs.
    """
    return 0.1 ** ((epoch - 1) // args.step_size)


def build_optimizer(network: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return the optimizer. For another one, replace the whole body.

    Parameter groups may have learning rates of their own; lr_factor multiplies each of them.
    """
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        # GradScaler then skips a step that overflowed without a CPU-GPU synchronization.
        fused=True,
    )
    # For SGD alone: if the first step is skipped, fused SGD goes on with momentum in uninitialized
    # memory. From zero, momentum is the gradient after the first step, as it is without `fused`.
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# ---------------------------------------------------------------- loading photos


def read_encoded(image: dict | None) -> bytes:
    """Return the bytes of an image file: {"bytes": …, "path": …}, one of which may be None."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise ValueError("it is missing")
    if image["bytes"] is not None:
        return image["bytes"]
    return Path(image["path"]).read_bytes()


def decode_photo(encoded: bytes) -> torch.Tensor:
    """Decode an image file to upright RGB: (3, H, W) uint8, channels last in memory.

    For animations, the first frame is returned. Raises ValueError for a damaged file, and for an
    aspect ratio over 50: such a file is not a photo, and resizing its shorter side could fill the
    memory.
    """
    try:
        if decode_image:
            photo = decode_image(encoded)  # RGB, turned upright by its EXIF orientation
        else:
            photo = decode_with_pillow(encoded)
    except Exception as error:
        # For damaged files, decoders raise errors of any type.
        raise ValueError(f"{type(error).__name__}: {one_line(error)}") from error
    if photo.ndim == 4:
        photo = photo[0]
    height, width = photo.shape[1:]
    if max(height, width) > 50 * min(height, width):
        raise ValueError(f"{width} x {height} pixels have an aspect ratio over 50")
    return photo


def decode_with_pillow(encoded: bytes) -> torch.Tensor:
    """Decode an image file without torchcodec: (3, H, W) uint8, channels last in memory."""
    with PIL.Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
        if image.mode.startswith("I"):
            # Pillow would clip them to white.
            raise ValueError("16-bit grayscale photos need torchcodec")
        upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


class CroppedPhotos(torch.utils.data.Dataset):
    """Crops of the photos of several splits. An index is (split, row, seed).

    One dataset of all splits lets one set of workers load the next train batches during an
    evaluation. The seed of an index makes a crop independent of the number of workers.

    Args:
        splits: datasets from load_split, by name.
        crops: for each split, a function from a photo (3, H, W) uint8 and R to its crop
            (R, R, 3) uint8, or to several crops.
        resolution: R, in pixels.

    An item is a crop and its label. Raises InputError, which names the photo, for one that cannot
    be loaded.
    """

    def __init__(self, splits: dict, crops: dict[str, Callable], resolution: int):
        self.splits = splits
        self.crops = crops
        self.resolution = resolution

    def __getitem__(self, index: tuple[str, int, int]) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[tuple[str, int, int]]) -> list[tuple[torch.Tensor, int]]:
        """Return the items of a batch, whose indices are of one split. DataLoader calls this."""
        split = indices[0][0]
        rows = [row for _, row, _ in indices]
        photos = self.splits[split][rows]
        items = []
        for index, image, label in zip(indices, photos["image"], photos["label"], strict=True):
            items.append((self.load_crop(index, image), label))
        return items

    def load_crop(self, index: tuple[str, int, int], image: dict | None) -> torch.Tensor:
        """Decode and crop a photo, as the dataset stores it."""
        split, row, seed = index
        name = image["path"] if image and image["path"] else f"in row {row}"
        with reported_as(f"the {split} photo {name} cannot be decoded"):
            photo = decode_photo(read_encoded(image))
        # With --workers 0, the random numbers of the training step go on as if there were no crop.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.crops[split](photo, self.resolution)


def check_batch_size(batch_size: int, num_photos: int):
    """Raise InputError if the processes cannot share batches of this size."""
    if batch_size % WORLD_SIZE:
        raise InputError(f"--batch-size {batch_size} is not a multiple of {WORLD_SIZE} processes")
    if min(batch_size, num_photos) < 2 * WORLD_SIZE:
        reason = f"batch norm needs two photos in each of {WORLD_SIZE} processes"
        raise InputError(f"--batch-size {batch_size}, {num_photos} train photos: {reason}")


def train_batch_sizes(num_photos: int, batch_size: int) -> list[int]:
    """Return the number of photos in each batch of an epoch, over all processes.

    A last batch is left out if it is smaller than an eighth of the others, or than two photos for
    each process: a step with the batch norm statistics of so few photos, just before the
    evaluation, does more harm than good. Its photos come in other epochs. The published runs leave
    out none: 8144 photos are 63 batches of 128 and one of 80, or 127 of 64 and one of 16.
    """
    sizes = [min(batch_size, num_photos - start) for start in range(0, num_photos, batch_size)]
    if sizes[-1] < max(sizes[0] / 8, 2 * WORLD_SIZE):
        sizes.pop()
    return sizes


def train_batches(num_photos: int, batch_sizes: list[int], seed: int, epoch: int) -> Iterator[list]:
    """Yield the indices of each train batch of an epoch: this process's share of them."""
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(num_photos).tolist()
    crop_seeds = rng.integers(2**32, size=num_photos).tolist()
    indices = [("train", row, crop_seed) for row, crop_seed in zip(rows, crop_seeds, strict=True)]
    start = 0
    for batch_size in batch_sizes:
        yield indices[start : start + batch_size][RANK::WORLD_SIZE]
        start += batch_size


def eval_batches(split: str, num_photos: int, batch_size: int) -> list[list]:
    """Return the indices of `split` in batches: this process's share. No photo counts twice."""
    indices = [(split, row, 0) for row in range(RANK, num_photos, WORLD_SIZE)]
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


@contextlib.contextmanager
def open_loader(photos: CroppedPhotos, index_batches: Iterable, workers: int):
    """Start `workers` processes, and yield an iterator of (B, R, R, 3) uint8 crops and (B,) labels.

    Leaving the context ends the workers. In a notebook, the traceback of an error would otherwise
    keep them alive. Raises InputError for errors of the workers that the user can fix.
    """
    context = None
    if workers and sys.platform == "linux":
        # Python 3.14's default, forkserver, would import torch again in each worker. Workers never
        # use CUDA, so they may be forked after its initialization.
        context = "fork"
    loader = DataLoader(
        photos,
        batch_sampler=index_batches,
        num_workers=workers,
        pin_memory=DEVICE.type == "cuda",
        multiprocessing_context=context,
        worker_init_fn=ignore_interrupts,
    )
    batches = iter(loader)
    try:
        with worker_errors():
            yield batches
    finally:
        if workers:
            batches._shutdown_workers()  # DataLoader has no public method for it.


def ignore_interrupts(worker: int):
    """Ignore Ctrl-C in a worker: the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def take_batches(batches: Iterator, count: int, title: str) -> Iterator:
    """Yield the next `count` batches, and show the progress: a bar, or a line each minute."""
    shows_bar = RANK == 0 and sys.stderr.isatty()
    shows_lines = RANK == 0 and not shows_bar
    last_line = time.monotonic()
    for step in tqdm(range(count), title, leave=False, disable=not shows_bar):
        if shows_lines and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            print(f"{title}: {step} of {count} steps", file=sys.stderr, flush=True)
        yield next(batches)


@contextlib.contextmanager
def worker_errors():
    """Re-raise errors of workers that the user can fix as an InputError of one line.

    The death of a worker may be raised anywhere in the main process, by its signal handler.
    """
    try:
        yield
    except InputError as error:
        # DataLoader puts the worker's traceback before the message.
        last_line = str(error).splitlines()[-1]
        raise InputError(last_line.split("InputError: ")[-1]) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        text = one_line(error)
        # A worker without shared memory dies of a bus error, or reports a full /torch_… file.
        if "Bus error" in text or re.search("</torch_.*No space left", text):
            raise InputError(
                "the shared memory of the workers, /dev/shm, is full: use docker's --shm-size, or "
                f"--workers 0 ({text})"
            ) from error
        is_killed = re.search("DataLoader worker .*(signal: Killed|exited unexpectedly)", text)
        if is_killed or not isinstance(error, RuntimeError):
            raise InputError(
                "a worker process was killed, probably because the memory (RAM) is full: use fewer "
                f"--workers ({text})"
            ) from error
        raise


# ---------------------------------------------------------------- network, precision, compilation


def build_network(weights: str, num_classes: int) -> torch.nn.Module:
    """Return NETWORK with the weights of a torchvision name or a file, or random ones for "none".

    The head always has random weights and `num_classes` outputs. Raises InputError for weights that
    cannot be loaded.
    """
    network = NETWORK.build(num_classes=num_classes)
    if weights == "none":
        return network
    names = type(NETWORK.weights).__members__  # IMAGENET1K_V1, IMAGENET1K_V2, …
    with reported_as(f"cannot load --weights {weights}"):
        if weights in names:
            show_bar = RANK == 0 and sys.stderr.isatty()
            state = names[weights].get_state_dict(progress=show_bar, check_hash=True)
        elif Path(weights).is_file():
            state = read_checkpoint(Path(weights))["model"]
        else:
            raise ValueError(f"it is neither a file nor one of {[*names, 'none']}")
        for name, value in network.state_dict().items():
            if name.startswith(f"{NETWORK.head}."):
                state[name] = value
        network.load_state_dict(state)
    return network


def build_training(
    args: argparse.Namespace, checkpoint: dict, num_classes: int, precision: torch.dtype
) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """Return the network, the optimizer and the scaler, in the state of `checkpoint` if any."""
    torch.manual_seed(args.seed)
    # One process loads the weights: DistributedDataParallel copies them to the others.
    weights = "none" if checkpoint or RANK > 0 else args.weights
    network = build_network(weights, num_classes)
    network.to(DEVICE, memory_format=torch.channels_last)
    optimizer = build_optimizer(network, args)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == torch.float16)
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint and checkpoint["scaler"]:  # Runs without float16 have no scaler state.
        scaler.load_state_dict(checkpoint["scaler"])
    return network, optimizer, scaler


def pick_precision(amp: bool, amp_dtype: str | None) -> torch.dtype:
    """Return the data type of mixed precision, or float32 for none.

    By default that is float16 on CUDA, as in the reference, and on a CPU bfloat16 if it has
    instructions for it: without them, mixed precision is slower than float32.
    """
    if not amp:
        return torch.float32
    if amp_dtype:
        return getattr(torch, amp_dtype)
    if DEVICE.type == "cuda":
        return torch.float16
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 does not have it.
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def autocast_to(precision: torch.dtype) -> torch.autocast:
    """Return the context of mixed precision, which does nothing for float32."""
    return torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32)


def use_compile(requested: bool | None) -> bool:
    """Return whether to compile the network: as requested, or else on CUDA if that is possible.

    Raises InputError if it was requested and is not possible.
    """
    if requested is False or (requested is None and DEVICE.type == "cpu"):
        return False
    missing = missing_for_compile()
    if missing and requested:
        raise InputError(f"--compile needs {missing}")
    if missing:
        log(f"warning     torch.compile is off, and training slower: it needs {missing}")
    return not missing


def missing_for_compile() -> str:
    """Return what torch.compile lacks on this machine, or "".

    It builds code at run time: on CPUs in C++, and on CUDA with Triton, which builds its driver in
    C with the headers of Python.
    """
    if DEVICE.type == "cpu":
        compilers = [os.environ.get("CXX"), "g++", "clang++"]
        package = "g++"
    else:
        if torch.cuda.get_device_capability() < (7, 0):
            return "a GPU of compute capability 7.0 or higher"
        if not importlib.util.find_spec("triton"):
            return "the package triton"
        compilers = [os.environ.get("CC"), "gcc", "clang", "cc"]
        package = "gcc"
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        return f"a compiler (package {package})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (package python3-dev)"
    return ""


class CompiledForFullBatches(torch.nn.Module):
    """A network that is compiled for batches of one size.

    Smaller batches, the last of an epoch, run uncompiled: they are not worth minutes of compiling.
    The network itself stays as it is; checkpoints contain its state dict.
    """

    def __init__(self, network: torch.nn.Module, batch_size: int):
        super().__init__()
        self.network = network
        self.batch_size = batch_size
        # By default, a second size would be compiled again, to a slower graph for any size.
        self.compiled_forward = torch.compile(network.forward, dynamic=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) == self.batch_size:
            return self.compiled_forward(images)
        return self.network(images)


# ---------------------------------------------------------------- one epoch, one evaluation


@functools.cache  # Copying them to the GPU in each step would be a CPU-GPU synchronization.
def rgb_on_device(values: tuple) -> torch.Tensor:
    """Return three values in 0…1 as a tensor in 0…255: (3, 1, 1) float32 on DEVICE."""
    return 255 * torch.tensor(values, device=DEVICE).view(3, 1, 1)


def move_and_normalize(images: torch.Tensor) -> torch.Tensor:
    """Move (B, R, R, 3) uint8 to DEVICE: (B, 3, R, R) float32, normalized, channels_last."""
    images = images.to(DEVICE, non_blocking=True).permute(0, 3, 1, 2)
    return images.sub(rgb_on_device(IMAGENET_MEAN)).div_(rgb_on_device(IMAGENET_STD))


def train_one_epoch(
    network: torch.nn.Module,
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
) -> dict:
    """Take an optimizer step for each batch.

    Args:
        network: the network, or under torchrun the DistributedDataParallel around it.
        batches: ((images, targets), batch_size): (B, R, R, 3) uint8 and (B,) int64 on the CPU, and
            the number of photos in the step over all processes.
        autocast: the context of mixed precision.

    Returns:
        the mean loss and the accuracy (0…1) over all processes, train photos per second, and the
        fraction of the time that was spent waiting for photos. On CUDA that is an upper bound,
        since the CPU runs ahead of the GPU.
    """
    network.train()
    total_loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    total_correct = torch.zeros((), dtype=torch.float64, device=DEVICE)
    num_photos = 0
    seconds_waited = 0.0
    start = time.perf_counter()
    step_end = start
    for (images, targets), batch_size in batches:
        seconds_waited += time.perf_counter() - step_end
        images = move_and_normalize(images)
        targets = targets.to(DEVICE, non_blocking=True)
        optimizer.zero_grad()
        with autocast:
            loss_sum, num_correct = training_loss_sum(network, images, targets)
            # DistributedDataParallel averages gradients over the processes, whose shares of a batch
            # may differ by one photo. So this is the mean over the whole batch.
            loss = loss_sum * WORLD_SIZE / batch_size
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # Summed on the device: .item() would be a CPU-GPU synchronization in every step.
        total_loss += loss_sum.detach()
        total_correct += num_correct
        num_photos += batch_size
        step_end = time.perf_counter()
    totals = torch.stack([total_loss, total_correct])
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    mean_loss, accuracy = (totals / num_photos).tolist()  # Waits for the GPU.
    seconds = time.perf_counter() - start
    return {
        "train_loss": mean_loss,
        "train_accuracy": accuracy,
        "photos_per_second": num_photos / seconds,
        "input_wait": seconds_waited / seconds,
    }


@torch.no_grad()
def evaluate(
    network: torch.nn.Module, batches: Iterable, autocast: torch.autocast
) -> tuple[float, float]:
    """Return the mean loss and the accuracy (0…1) over all processes.

    Batches are (B, R, R, 3) uint8 images and (B,) int64 targets on the CPU.
    """
    network.eval()
    total_loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    total_correct = torch.zeros((), dtype=torch.float64, device=DEVICE)
    num_photos = 0
    for images, targets in batches:
        images = move_and_normalize(images)
        targets = targets.to(DEVICE, non_blocking=True)
        with autocast:
            logits = network(images)
            total_loss += F.cross_entropy(logits, targets, reduction="sum")
        total_correct += (logits.argmax(1) == targets).sum()
        num_photos += len(targets)
    totals = torch.stack([total_loss, total_correct, total_loss.new_tensor(num_photos)])
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    loss_sum, num_correct, num_evaluated = totals.tolist()
    return loss_sum / num_evaluated, num_correct / num_evaluated


# ---------------------------------------------------------------- the loop


def train_run(
    args: argparse.Namespace,
    run: dict,
    splits: dict[str, datasets.Dataset],
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
    workers: int,
    compiled: bool,
):
    """Train the epochs that are missing in `run`, and save it after each of them.

    Args:
        run: what a checkpoint contains besides states, from describe_run. Its "history" grows, a
            row for each epoch, and so does "elapsed", in seconds.
        splits: the train split and the one on which the best epoch is chosen, from load_splits.

    Raises InputError if weights or batch norm statistics are not finite after an epoch, if a photo
    cannot be loaded, or if a file cannot be written.
    """
    eval_split = choose_eval_split(splits)
    batch_sizes = train_batch_sizes(len(splits["train"]), args.batch_size)
    local_batch_size = args.batch_size // WORLD_SIZE
    own_eval_batches = eval_batches(eval_split, len(splits[eval_split]), local_batch_size)
    history = run["history"]
    epochs = range(len(history) + 1, args.epochs + 1)

    def index_batches() -> Iterator[list]:
        # In the order in which the loop below takes them.
        for epoch in epochs:
            yield from train_batches(len(splits["train"]), batch_sizes, args.seed, epoch)
            yield from own_eval_batches

    crops = {"train": random_crop, eval_split: center_crop}
    photos = CroppedPhotos(splits, crops, args.resolution)
    eval_network = network
    if compiled:
        eval_network = CompiledForFullBatches(network, batch_sizes[0] // WORLD_SIZE)
    train_network = eval_network
    if WORLD_SIZE > 1:
        train_network = DistributedDataParallel(eval_network)
        # Only the evaluation reads buffers, and broadcast_buffers precedes it. As an argument, this
        # would also skip the first synchronization.
        train_network.broadcast_buffers = False

    start = time.perf_counter()
    elapsed_before = run["elapsed"]
    with (
        background_writer(args.output_dir) as write,
        open_loader(photos, index_batches(), workers) as batches,
    ):
        for epoch in epochs:
            epoch_start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor(args, epoch)
            seed_random_numbers(args.seed, epoch)

            title = f"epoch {epoch}/{args.epochs}"
            train_steps = take_batches(batches, len(batch_sizes), f"{title} train")
            train_steps = zip(train_steps, batch_sizes, strict=True)
            metrics = train_one_epoch(train_network, train_steps, optimizer, scaler, autocast)
            broadcast_buffers(network)
            if not all_finite(network.state_dict()):
                remedy = "start again with a lower --lr"
                raise InputError(f"epoch {epoch}: the weights contain NaN or Inf: {remedy}")
            eval_steps = take_batches(batches, len(own_eval_batches), f"{title} {eval_split}")
            loss, accuracy = evaluate(eval_network, eval_steps, autocast)

            metrics[f"{eval_split}_loss"] = loss
            metrics[f"{eval_split}_accuracy"] = accuracy
            metrics["seconds"] = time.perf_counter() - epoch_start
            lr = optimizer.param_groups[0]["lr"]
            history.append({"epoch": epoch, "lr": lr, **metrics})
            log(epoch_line(history, eval_split, args.epochs, first_epoch=epochs[0]))
            run["elapsed"] = elapsed_before + time.perf_counter() - start
            if RANK == 0:
                write({**run, "epoch": epoch, **states_of(network, optimizer, scaler)})
    run["elapsed"] = elapsed_before + time.perf_counter() - start  # The last write is in it.


def seed_random_numbers(seed: int, epoch: int):
    """Seed what the steps of an epoch draw: dropout, stochastic depth, mixup.

    Crops have seeds of their own, so these numbers depend on seed, epoch, step and process alone.
    """
    epoch_seed = int(np.random.SeedSequence([seed, epoch, RANK]).generate_state(1)[0])
    torch.manual_seed(epoch_seed)
    np.random.seed(epoch_seed)
    random.seed(epoch_seed)


def broadcast_buffers(network: torch.nn.Module):
    """Copy the batch norm statistics of the first process to the others."""
    if WORLD_SIZE > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def all_finite(state: dict[str, torch.Tensor]) -> bool:
    """Return whether a state dict is free of NaN and Inf. On CUDA: one synchronization."""
    return bool(torch.stack([value.isfinite().all() for value in state.values()]).all())


def states_of(network, optimizer, scaler) -> dict:
    """Return the state dicts that a checkpoint contains."""
    return {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }


@contextlib.contextmanager
def background_writer(folder: Path):
    """Yield a function that writes a run to `folder` while the next epoch trains.

    Each call waits for the write before it. Leaving the context waits too, also after Ctrl-C.
    Errors of a write are raised by whichever waits for it.
    """
    writing = None

    def write(run: dict):
        nonlocal writing
        if writing:
            writing.result()
        # The next epoch changes the tensors while they are written.
        writing = start_thread(write_run, copy_to_cpu(run), folder)

    try:
        yield write
    finally:
        if writing:
            writing.result()


def start_thread(function: Callable, *args) -> Future:
    """Call `function` in a daemon thread, and return its Future.

    Python waits for the threads of an executor before it exits, even after a second Ctrl-C.
    """
    future = Future()

    def call():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def copy_to_cpu(state: object) -> object:
    """Copy nested dicts and lists, and move their tensors to the CPU with the same strides."""
    if isinstance(state, torch.Tensor):
        return state.to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copy_to_cpu(value) for name, value in state.items()}
    if isinstance(state, list):
        return [copy_to_cpu(value) for value in state]
    return state


def best_row(history: list[dict], eval_split: str) -> dict:
    """Return the row of the best epoch: the first one with the highest accuracy."""
    return max(history, key=lambda row: row[f"{eval_split}_accuracy"])


def epoch_line(history: list[dict], eval_split: str, last_epoch: int, first_epoch: int) -> str:
    """Format the last row of `history`. `first_epoch` is the first one of this start."""
    row = history[-1]
    columns = [f"epoch {row['epoch']:3d}/{last_epoch}", f"lr {row['lr']:#.4g}"]
    for split in ("train", eval_split):
        loss = row[f"{split}_loss"]
        accuracy = row[f"{split}_accuracy"]
        columns.append(f"{split} loss {loss:.4f} acc {accuracy:.2%}")
    columns.append(f"{row['seconds']:.1f} s")

    # The first epoch takes longer: it compiles the network and picks kernels.
    seconds = [past["seconds"] for past in history if past["epoch"] > first_epoch]
    epochs_left = last_epoch - row["epoch"]
    if seconds and epochs_left:
        minutes = epochs_left * sum(seconds) / len(seconds) / 60
        columns.append(f"{minutes:.0f} min left" if minutes >= 1 else "<1 min left")
    if best_row(history, eval_split) is row:
        columns.append("best")
    return " | ".join(columns)


def draw_curves(history: list[dict], eval_split: str) -> Figure:
    """Plot loss, accuracy and learning rate of all epochs, and mark the best epoch."""
    table = pandas.DataFrame(history).replace([math.inf, -math.inf], math.nan)
    figure = Figure(figsize=(13, 4))  # inches
    # An automatic layout would take twice as long, while the next epoch trains.
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.14, top=0.92)
    loss_axes, accuracy_axes, lr_axes = figure.subplots(1, 3)
    for split in ("train", eval_split):
        loss_axes.plot(table["epoch"], table[f"{split}_loss"], ".-", label=split)
        accuracy_axes.plot(table["epoch"], 100 * table[f"{split}_accuracy"], ".-", label=split)
    best = best_row(history, eval_split)
    accuracy = best[f"{eval_split}_accuracy"]
    label = f"best: {accuracy:.2%} in epoch {best['epoch']}"
    accuracy_axes.plot(best["epoch"], 100 * accuracy, "*", markersize=12, label=label)
    lr_axes.plot(table["epoch"], table["lr"], ".-")
    loss_axes.set(title="loss", xlabel="epoch", yscale="log")
    accuracy_axes.set(title="accuracy (%)", xlabel="epoch")
    lr_axes.set(title="learning rate", xlabel="epoch", yscale="log")
    loss_axes.legend()
    accuracy_axes.legend()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


# ---------------------------------------------------------------- the files of a run


def make_output_dir(folder: Path):
    """Create `folder` if it is missing. Raises InputError if nothing can be written there."""
    with reported_as(f"cannot write to --output-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def atomic_write(path: Path, write: Callable):
    """Let `write` fill a binary file, and move it to `path` when it is complete.

    Raises InputError if it cannot be written. `path` is then as it was before.
    """
    contents = io.BytesIO()  # torch.save hides why it cannot write to a file.
    write(contents)
    draft = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with reported_as(f"cannot write {path}"):
            draft.write_bytes(contents.getvalue())
            with open(draft, "rb") as file:
                os.fsync(file.fileno())  # A power failure must not leave an empty file at `path`.
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def open_run(args: argparse.Namespace, argv: list[str] | None) -> tuple:
    """Return the flags, the checkpoint to resume from ({} for none), and whether the run is new.

    Raises InputError if the folder holds another run, or cannot be written to.
    """
    folder = args.output_dir
    make_output_dir(folder)
    for draft in folder.glob(".partial-*"):
        # A killed run left it, or a live one is writing it now and may move it at any moment.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - draft.stat().st_mtime > 3600:
                draft.unlink()

    existing = [name for name in RUN_FILES if (folder / name).exists()]
    if existing and not (args.resume or args.overwrite):
        raise InputError(
            f"{folder} already holds {', '.join(existing)}: choose --resume, --overwrite, or "
            "another --output-dir"
        )
    if args.resume and not existing:
        log(f"no run in {folder} yet: starting one")
    if args.overwrite or not existing:
        return args, {}, True
    if existing == ["settings.json"]:
        log(f"the run in {folder} has not saved an epoch yet: starting it again")
        return restart_args(folder, argv), {}, False
    path = folder / "last_checkpoint.pth"
    checkpoint = read_checkpoint(path)
    if "history" not in checkpoint:
        raise InputError(f"{path} is not a last_checkpoint.pth of this program")
    args = args_of_run(checkpoint["settings"], argv)
    # A kill may have come between last_checkpoint.pth and the other files.
    write_run(checkpoint, folder)
    return args, checkpoint, False


def restart_args(folder: Path, argv: list[str] | None) -> argparse.Namespace:
    """Return the flags of a run that was stopped in its first epoch."""
    path = folder / "settings.json"
    with reported_as(f"cannot read {path}"):
        settings = json.loads(path.read_text())["settings"]
    return args_of_run(settings, argv)


def args_of_run(settings: dict, argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags with the settings of a run as defaults.

    Raises InputError if a flag differs that may not be changed.
    """
    args = parse_args(argv, settings)
    for name, value in vars(args).items():
        if name in NOT_SETTINGS or name in CHANGEABLE_SETTINGS:
            continue
        # Runs of earlier versions lack the flags that were added since.
        stored = settings.get(name, build_parser().get_default(name))
        if value != stored:
            flag = f"--{name.replace('_', '-')} {value}"
            raise InputError(f"{flag}: the run to resume in {args.output_dir} has {stored}")
    return args


def describe_run(
    settings: dict, splits: dict[str, datasets.Dataset], numerics: str, checkpoint: dict
) -> dict:
    """Return what a checkpoint contains besides states.

    `numerics` names the precision and the number of processes, which affect the results too. Raises
    InputError if the run to resume (`checkpoint`) had other photos.
    """
    history = checkpoint.get("history", [])
    run = {
        "settings": settings,
        "classes": splits["train"].features["label"].names,
        "num_photos": {name: len(split) for name, split in splits.items()},
        "resolution": settings["resolution"],
        "numerics": numerics,
        "history": history,
        # In seconds since the first epoch began. Earlier versions stored only those of each epoch.
        "elapsed": checkpoint.get("elapsed", sum(row["seconds"] for row in history)),
    }
    if settings["val_split"]:
        # A dataset may change so that other photos are held out, without changing any number.
        run["val_fingerprint"] = fingerprint(splits["val"])
    if checkpoint and checkpoint["num_photos"] != run["num_photos"]:
        before = format_counts(checkpoint["num_photos"])
        now = format_counts(run["num_photos"])
        raise InputError(f"--dataset: the run to resume has {before}, but there are {now}")
    if checkpoint and checkpoint.get("val_fingerprint") != run.get("val_fingerprint"):
        raise InputError("--dataset: the photos of the val split differ from the run to resume")
    if checkpoint.get("numerics", numerics) != numerics:
        log(f"note        the run had {checkpoint['numerics']}, and continues with {numerics}")
    return run


def claim_folder(args: argparse.Namespace, settings: dict, is_new: bool):
    """Write settings.json, once flags, data and weights are known to be good.

    This deletes the run to overwrite. Of two new runs that start in one folder, the second one
    finds the file of the first: it raises InputError.
    """
    folder = args.output_dir
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "torchcodec", "datasets", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    contents = {"settings": settings, "versions": versions, "device": device_name()}
    text = json.dumps(contents, indent=2).encode()
    path = folder / "settings.json"
    if not is_new:
        atomic_write(path, lambda file: file.write(text))
        return
    with reported_as(f"cannot write {path}"):
        if args.overwrite:
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
        try:
            with open(path, "xb") as file:
                file.write(text)
        except FileExistsError:
            raise InputError(
                f"another run has started in {folder}: choose another --output-dir"
            ) from None


def write_run(run: dict, folder: Path):
    """Write last_checkpoint.pth, and from it all files of a run except settings.json."""
    history = run["history"]
    eval_split = choose_eval_split(run["num_photos"])
    atomic_write(folder / "last_checkpoint.pth", functools.partial(torch.save, run))
    best = best_row(history, eval_split)
    if best["epoch"] == run["epoch"]:
        names = ("model", "classes", "resolution", "epoch", "settings", "val_fingerprint")
        best_model = {name: run[name] for name in names if name in run}
        best_model[f"{eval_split}_accuracy"] = best[f"{eval_split}_accuracy"]
        atomic_write(folder / "best_model.pth", functools.partial(torch.save, best_model))
    table = pandas.DataFrame(history)
    write_csv = functools.partial(table.to_csv, index=False, na_rep="nan")
    atomic_write(folder / "history.csv", write_csv)
    figure = draw_curves(history, eval_split)
    write_png = functools.partial(figure.savefig, format="png", dpi=100)
    atomic_write(folder / "training_curves.png", write_png)


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this program or another one, or a bare state dict, onto the CPU.

    It is loaded with weights_only=True, so no code is executed. Returns a dict whose "model" is the
    state dict, without the prefixes of torch.compile and DistributedDataParallel. Raises InputError
    for a file that is damaged, or that has no finite weights.
    """
    with reported_as(f"cannot read the checkpoint {path}"):
        if path.suffix == ".safetensors":
            raise ValueError("save what safetensors.torch.load_file returns with torch.save")
        try:
            # Checkpoints of torchvision's references and of timm contain their flags.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            # torch's own message is long, and recommends to execute the code.
            code = ", ".join(re.findall(r"GLOBAL (\S+)", str(error)))
            reason = f"it is damaged, or contains code, which is not executed {code}"
            raise ValueError(reason.rstrip()) from None
        if not isinstance(checkpoint, dict):
            raise ValueError(f"it contains a {type(checkpoint).__name__}, not a state dict")

        others = checkpoint
        for key in ("model", "state_dict", "model_state_dict"):
            if isinstance(checkpoint.get(key), dict):
                state = checkpoint[key]
                break
        else:
            state = checkpoint
            others = {}
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                keys = "model, state_dict or model_state_dict"
                raise ValueError(f"no state dict under {keys}: {name} is not a tensor")
        prefix = re.compile(r"^((_orig_mod|module)\.)+")
        state = {prefix.sub("", name): value for name, value in state.items()}
        if not state:
            raise ValueError("it contains no weights")
        if not all_finite(state):
            raise ValueError("the weights contain NaN or Inf")
    return {**others, "model": state}


# ---------------------------------------------------------------- reading datasets


def load_splits(args: argparse.Namespace, checkpoint: dict) -> dict[str, datasets.Dataset]:
    """Return the train split, and the split on which the best epoch is chosen: "val" or "test".

    It is "val" with --val-split, or if the dataset has a val split; the test split is not read
    then. A run to resume (`checkpoint`) keeps its splits. Raises InputError.
    """
    with reported_as(f"cannot load --dataset {args.dataset}"):
        sources = find_splits(args.dataset, ["train"] if args.val_split else ["train", "test"])
        if args.val_split and "val" in sources:
            raise ValueError("it has a val split of its own: leave out --val-split")
        train_split = load_split(sources, "train", checkpoint.get("classes"))
        if args.val_split:
            return hold_out(train_split, args.val_split)

        eval_split = choose_eval_split(checkpoint.get("num_photos", sources))
        if eval_split not in sources and not checkpoint:
            raise ValueError("it has no test or val split: --val-split 0.1 holds out 10% of train")
        classes = train_split.features["label"].names
        return {"train": train_split, eval_split: load_split(sources, eval_split, classes)}


def choose_eval_split(splits: Iterable[str]) -> str:
    """Return the name of the split, one of `splits`, on which the best epoch is chosen."""
    return "val" if "val" in splits else "test"


def find_splits(dataset: str, wanted: list[str]) -> dict:
    """Return the sources of a dataset's splits, by name, for load_split.

    A source is a folder of class folders, a list of parquet files, or a Dataset from the Hub. From
    the default dataset, only the `wanted` splits are downloaded. The splits "valid", "validation"
    and "dev" are called "val". Raises InputError.
    """
    folder = Path(dataset)
    if not folder.is_dir():
        # Under torchrun all processes ask; the locks of the Hub's cache let one of them download.
        reason = "is not a folder and could not be loaded from the Hub"
        with reported_as(f"--dataset {dataset} {reason}"):
            if dataset != DEFAULT_DATASET:
                return with_val(load_from_hub(dataset))
            # The repository also holds seven corrupted copies of the test split.
            downloaded = huggingface_hub.snapshot_download(
                dataset,
                repo_type="dataset",
                revision=DATASET_REVISION,
                allow_patterns=[f"data/{split}-*" for split in wanted],
            )
            folder = Path(downloaded)

    folder = folder.resolve()
    files = sorted(folder.glob("data/*.parquet"))
    if not files:
        files = sorted(folder.glob("*.parquet"))
    sources = {}
    for file in files:
        split = file.stem.partition("-")[0]
        sources.setdefault(split, []).append(file)
    for path in folder.iterdir():
        if path.is_dir() and is_visible(path.name) and path.name != "data":
            sources[path.name] = path
    return with_val(sources)


def load_from_hub(dataset: str) -> datasets.DatasetDict:
    """Load all splits of a Hub dataset. Raises ValueError if it has several configurations."""
    try:
        return datasets.load_dataset(dataset)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
        names = ", ".join(datasets.get_dataset_config_names(dataset))
        download = f"hf download {dataset} --repo-type dataset --local-dir DIR"
        raise ValueError(
            f"it has the configurations {names}: download it with `{download}`, and pass "
            "the folder of one of them"
        ) from None


def with_val(sources: dict) -> dict:
    """Return `sources` with the name "val" for the val split. Raises ValueError for several."""
    found = [name for name in sources if name in VAL_NAMES]
    if len(found) > 1:
        raise ValueError(f"it has several val splits: {', '.join(found)}")
    return {"val" if name in found else name: source for name, source in sources.items()}


def load_split(sources: dict, split: str, classes: list[str] | None = None) -> datasets.Dataset:
    """Load a split with the columns `image` (still encoded) and `label`.

    A label is an index into `classes`, the class names of training. None stands for the split's own
    names. Raises ValueError for a split that is missing, empty, or has other columns or classes.
    """
    source = sources.get(split)
    if source is None:
        expected = f"{split}/CLASS/PHOTO or data/{split}-*.parquet"
        raise ValueError(f"it has no {split} split ({expected}), but {sorted(sources)}")
    if isinstance(source, Path):
        photos = read_class_folders(source)
    elif isinstance(source, list):
        photos = read_parquet(source, split)
    else:
        photos = source

    image = photos.features.get("image")
    label = photos.features.get("label")
    if not isinstance(image, datasets.Image) or not isinstance(label, datasets.ClassLabel):
        columns = "image: Image and label: ClassLabel"
        raise ValueError(f"the {split} split needs the columns {columns}, not {photos.features}")
    if image.mode not in (None, "RGB"):
        raise ValueError(f"image has mode {image.mode}, but photos are always decoded to RGB")
    if len(photos) == 0:
        raise ValueError(f"the {split} split has no photos")

    photos = label_by_name(photos, classes or label.names)
    num_classes = photos.features["label"].num_classes
    num_empty = num_classes - len(set(photos["label"][:]))
    if num_empty:
        log(f"note        {num_empty} of {num_classes} classes have no {split} photos")
    return photos.cast_column("image", datasets.Image(decode=False))


def read_parquet(files: list[Path], split: str) -> datasets.Dataset:
    """Read the parquet files of a split. Each may list its class names in an order of its own."""
    total = re.search(r"-of-(\d+)$", files[0].stem)
    if total and int(total[1]) != len(files):
        raise ValueError(f"it has {len(files)} of the {int(total[1])} files of {files[0]}")
    parts = []
    for file in files:
        try:
            # from_parquet treats a path as a glob pattern, unless it is escaped.
            parts.append(datasets.Dataset.from_parquet(glob.escape(str(file)), split=split))
        except Exception as error:
            cache = datasets.config.HF_DATASETS_CACHE
            reason = one_line(error.__cause__ or error)
            raise ValueError(
                f"cannot read {file}, or the copy of it that datasets keeps in {cache} "
                f"(that folder may be full; it can be deleted): {reason}"
            ) from error

    labels = [part.features.get("label") for part in parts]
    if any(label != labels[0] for label in labels):
        for file, label in zip(files, labels, strict=True):
            if not isinstance(label, datasets.ClassLabel):
                raise ValueError(f"{file} has no class names, unlike other files of the split")
        classes = list(dict.fromkeys(name for label in labels for name in label.names))
        parts = [label_by_name(part, classes) for part in parts]
    return datasets.concatenate_datasets(parts)


def read_class_folders(folder: Path) -> datasets.Dataset:
    """List the photos of `folder`, each in or below the folder of its class."""
    if (folder / "state.json").exists() or (folder / "dataset_info.json").exists():
        raise ValueError(f"{folder} was written by save_to_disk: write it with to_parquet instead")
    columns = {"image": [], "label": []}
    classes = []
    left_out = Counter()
    for path in sorted(folder.iterdir()):
        if not is_visible(path.name):
            continue
        if path.is_dir():
            photos, reasons = find_photos(path)
            left_out.update(reasons)
            if photos:
                columns["image"].extend(str(photo) for photo in photos)
                columns["label"].extend([len(classes)] * len(photos))
                classes.append(path.name)
        elif path.suffix.lower() in PHOTO_SUFFIXES:
            left_out["photos that are not in the folder of a class"] += 1
        else:
            left_out[OTHER_FILES] += 1

    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not classes:
        raise ValueError(f"{folder}/CLASS holds no photos: found {counts or 'no files'}")
    if left_out:
        log(f"left out    {counts}, in {folder}")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    return datasets.Dataset.from_dict(columns, features=features)


def find_photos(folder: Path) -> tuple[list[Path], Counter]:
    """Return the photos in and below `folder`, and the number of files left out for each reason.

    Links to folders are not followed. Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError):
        raise error

    files = []
    left_out = Counter()
    for parent, subfolders, names in os.walk(folder, onerror=fail):
        subfolders[:] = [name for name in subfolders if is_visible(name)]
        for name in subfolders:
            if Path(parent, name).is_symlink():
                left_out["links to folders"] += 1
        files.extend(Path(parent, name) for name in names if is_visible(name))

    photos = {}  # from real paths, so that a photo and links to it count once
    for path in sorted(files):
        if path.suffix.lower() not in PHOTO_SUFFIXES:
            left_out[OTHER_FILES] += 1
        elif path.resolve() in photos:
            left_out["links to photos that are already included"] += 1
        else:
            photos[path.resolve()] = path
    return list(photos.values()), left_out


def is_visible(name: str) -> bool:
    """Return False for what macOS, network disks and notebooks add to folders."""
    return not name.startswith((".", "@"))


def label_by_name(photos: datasets.Dataset, classes: list[str]) -> datasets.Dataset:
    """Map the labels of `photos` to indices into `classes`, by the names of the classes.

    The names may be in another order, and fewer. No folder can be named like the class "Ram C/V" of
    Stanford Cars, so "/", "-" and "_" count as equal if exactly one class matches. Raises
    ValueError for names that do not match, and for labels out of range.
    """
    names = photos.features["label"].names
    labels = photos["label"][:]
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < len(names):
            raise ValueError(f"row {row} has label {label}, which is out of range")
    if names == classes:
        return photos

    similar = {}
    for index, name in enumerate(classes):
        similar.setdefault(re.sub("[/_]", "-", name), []).append(index)
    new_labels = {name: index for index, name in enumerate(classes)}
    for name in names:
        candidates = similar.get(re.sub("[/_]", "-", name), [])
        if len(candidates) == 1:
            new_labels.setdefault(name, candidates[0])

    found = [new_labels.get(name) for name in names]
    if None in found or len(set(found)) < len(found):
        unknown = [name for name in names if name not in new_labels] or names
        missing = [name for index, name in enumerate(classes) if index not in found]
        raise ValueError(
            f"its {len(names)} classes are not among the {len(classes)} of training: "
            f"only here {unknown[:3]}, only in training {missing[:3]}"
        )
    feature = datasets.ClassLabel(names=classes)
    labels = [found[label] for label in labels]
    return photos.remove_columns("label").add_column("label", labels, feature=feature)


def hold_out(photos: datasets.Dataset, fraction: float) -> dict[str, datasets.Dataset]:
    """Divide the train split into "train" and "val", which gets `fraction` of each class.

    At least one photo of a class is held out, and one is kept. Which ones follows from a hash of a
    photo's name: its path below the split's folder, or its row in the parquet files. Raises
    ValueError for a class of one photo.
    """
    names = [str(row) for row in range(len(photos))]
    paths = photo_paths(photos)
    if all(path and os.path.isabs(path) for path in paths):  # those of read_class_folders
        root = os.path.commonpath(paths)
        names = [os.path.relpath(path, root) for path in paths]
    rows_of = {}
    for row, label in enumerate(photos["label"][:]):
        rows_of.setdefault(label, []).append(row)

    held_out = []
    for label, rows in rows_of.items():
        if len(rows) == 1:
            name = photos.features["label"].names[label]
            raise ValueError(f"--val-split: the class {name!r} has only one train photo")
        rows.sort(key=lambda row: hashlib.sha256(os.fsencode(names[row])).digest())
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out.extend(rows[:count])
    kept = sorted(set(range(len(photos))) - set(held_out))
    return {"train": photos.select(kept), "val": photos.select(sorted(held_out))}


def photo_paths(photos: datasets.Dataset) -> list:
    """Return the column image.path, without reading a photo."""
    table = photos.flatten().select_columns("image.path").with_format("arrow")[:]
    return table["image.path"].to_pylist()


def fingerprint(photos: datasets.Dataset) -> str:
    """Return a hash of the photos of a split, in their order. Raises InputError."""
    digest = hashlib.sha256()
    with reported_as("cannot read the photos of the val split"):
        for photo in photos:
            digest.update(hashlib.sha256(read_encoded(photo["image"])).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- what is printed


def format_counts(num_photos: dict[str, int]) -> str:
    """Return "8144 train and 8041 test photos"."""
    return " and ".join(f"{count} {split}" for split, count in num_photos.items()) + " photos"


def device_name() -> str:
    """Return the name of the GPU, or "CPU", and the number of processes."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    return name if WORLD_SIZE == 1 else f"{WORLD_SIZE} processes, each on {name}"


def precision_name(precision: torch.dtype) -> str:
    """Return "float16 mixed precision", "float32 (TF32)" or "float32"."""
    name = str(precision).removeprefix("torch.")
    if precision != torch.float32:
        return f"{name} mixed precision"
    return f"{name} (TF32)" if DEVICE.type == "cuda" else name


def log_without_gpu(consequence: str):
    """Print a line if no GPU can be used, and torch's reason if there is one that cannot."""
    if DEVICE.type == "cuda":
        return
    log(f"no GPU found: {consequence}")
    if torch.backends.cuda.is_built():
        try:
            torch.cuda.init()
        except Exception as error:
            reason = one_line(error)
            if "no NVIDIA driver" not in reason and "No CUDA GPUs" not in reason:
                log(f"warning     {reason}")


def log_resume(args: argparse.Namespace, checkpoint: dict):
    """Print where a run continues."""
    eval_split = choose_eval_split(checkpoint["num_photos"])
    best = best_row(checkpoint["history"], eval_split)
    accuracy = f"{best[f'{eval_split}_accuracy']:.2%}"
    progress = f"epoch {checkpoint['epoch']} of {args.epochs}"
    log(f"resuming after {progress} (best {accuracy} in epoch {best['epoch']})")
    if not (args.output_dir / "best_model.pth").exists():
        log(f"note        best_model.pth is missing: it is saved once {accuracy} is beaten")


def log_settings(settings: dict):
    """Print the settings of the recipe: "resolution 224, batch size 128, …"."""
    not_recipe = ("dataset", "val_split", "workers", "amp", "amp_dtype", "compile")
    recipe = {name: value for name, value in settings.items() if name not in not_recipe}
    texts = [f"{name.replace('_', ' ')} {value}" for name, value in recipe.items()]
    log(f"settings    {', '.join(texts)}")


def log_result(args: argparse.Namespace, run: dict):
    """Print the last and the best accuracy of a run, and the command that comes next."""
    eval_split = choose_eval_split(run["num_photos"])
    last = run["history"][-1]
    best = best_row(run["history"], eval_split)
    column = f"{eval_split}_accuracy"
    folder = args.output_dir
    log(
        f"trained {last['epoch']} epochs in {run['elapsed'] / 60:.1f} min. "
        f"Last {last[column]:.2%}. Best {best[column]:.2%} in epoch {best['epoch']} "
        f"(chosen on the {eval_split} split): {folder / 'best_model.pth'}"
    )
    command = ["python", "eval.py", "--tta"]
    if folder != Path("."):
        command += ["--checkpoint", str(folder / "best_model.pth")]
    log(f"next: {shlex.join(command)}")


# ---------------------------------------------------------------- processes and main


def run_command(main: Callable[[], None]):
    """Call `main`. A mistake the user can fix ends the process with one line and status 1.

    Ctrl-C ends it with status 130.
    """
    if hasattr(sys.stdout, "reconfigure"):  # It is missing in a notebook.
        # Names that the terminal cannot show get a "?". A file receives each line at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    script = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        sys.exit(f"{script}: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"{script}: the memory of the GPU is full: use a smaller --batch-size")
    except KeyboardInterrupt:
        sys.exit(130)
    # Not after an error: NCCL would wait for processes that wait for this one.
    if dist.is_initialized():
        dist.destroy_process_group()


def in_first_process(function: Callable, *args):
    """Call `function` in the first process; return its result or raise its InputError in all."""
    result = None
    error = None
    if RANK == 0:
        try:
            result = function(*args)
        except InputError as caught:
            error = caught
    if WORLD_SIZE > 1:
        objects = [result, error]
        dist.broadcast_object_list(objects)
        result, error = objects
    if error:
        raise error
    return result


def set_up():
    """Choose the device and TF32, and connect the processes that torchrun started."""
    torch.set_float32_matmul_precision("high")  # TF32
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        dist.init_process_group(dist.get_default_backend_for_device(DEVICE))
    datasets.disable_progress_bars()
    if RANK > 0 or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    if TORCHCODEC_ERROR:
        reason = one_line(TORCHCODEC_ERROR)[:200]
        remedy = "install torchcodec from the same index as torch"
        log(f"warning     Pillow decodes the photos, more slowly: {remedy} ({reason})")


def main(argv: list[str] | None = None):
    """Train as the flags in `argv` say. Raises InputError for a mistake the user can fix."""
    args = parse_args(argv)
    set_up()
    # Picks the fastest kernels by timing them. In eval.py, accuracies could differ between starts.
    torch.backends.cudnn.benchmark = True
    args, checkpoint, is_new = in_first_process(open_run, args, argv)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    workers = DEFAULT_WORKERS if args.workers is None else args.workers
    if checkpoint and args.epochs <= checkpoint["epoch"]:
        log(f"nothing to train: {checkpoint['epoch']} epochs are done, of --epochs {args.epochs}")
        log_result(args, checkpoint)
        return
    if checkpoint:
        log_resume(args, checkpoint)
    log_without_gpu("training on the CPU (the full recipe would take days)")
    compiled = use_compile(args.compile)
    precision = pick_precision(args.amp, args.amp_dtype)
    compiling = "torch.compile" if compiled else "no torch.compile"
    log(f"device      {device_name()}, {precision_name(precision)}, {compiling}, {workers} workers")

    splits = load_splits(args, checkpoint)
    check_batch_size(args.batch_size, len(splits["train"]))
    numerics = f"{precision_name(precision)} in {WORLD_SIZE} processes"
    run = describe_run(settings, splits, numerics, checkpoint)
    log(f"data        {format_counts(run['num_photos'])}, {len(run['classes'])} classes")
    log_settings(settings)
    network, optimizer, scaler = build_training(args, checkpoint, len(run["classes"]), precision)
    if compiled:
        log("compiling   takes a minute or two of the first epoch")

    in_first_process(claim_folder, args, settings, is_new)
    try:
        autocast = autocast_to(precision)
        train_run(args, run, splits, network, optimizer, scaler, autocast, workers, compiled)
    except KeyboardInterrupt as interrupt:
        # In a notebook, the frames of the traceback would keep the progress bar.
        traceback.clear_frames(interrupt.__traceback__)
        log("interrupted: --resume continues after the last saved epoch")
        raise
    except Exception:
        if RANK == 0 and not (args.output_dir / "last_checkpoint.pth").exists():
            # Nothing was saved: the corrected command may use the folder.
            (args.output_dir / "settings.json").unlink(missing_ok=True)
        raise
    log_result(args, run)


if __name__ == "__main__":
    run_command(main)
