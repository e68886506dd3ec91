"""Fine-tune an ImageNet-pretrained ResNet-50 on Stanford Cars: one stage of plain SGD.

    python train.py --resolution 448 --batch-size 64    # the best accuracy
    python train.py                                     # 224 px, in less than half the time
    python train.py --resume                            # continue a run that was stopped
    torchrun --nproc-per-node 4 train.py                # train on four GPUs

This program has not been measured on a GPU yet. The reference whose recipe it follows,
github.com/patr1ckzhu/transfer-learning-stanford-cars, reports 91.78% in 50.3 min at 448 px, and
89.38% in 18.9 min at 224 px, on one RTX 5080. Like the reference, it chooses the best epoch on the
test split, which makes that accuracy a little optimistic; --val-split avoids it.

The file reads from top to bottom: recipe, flags, photos, network, step, loop, files of a run,
datasets, main. eval.py imports it.
"""

import argparse
import contextlib
import functools
import glob
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
VAL_NAMES = ("val", "valid", "validation", "dev")
SECONDS_BETWEEN_LINES = 60  # Without a terminal, the progress is printed at most that often.

# torchrun sets these variables for each process that it starts.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULT_WORKERS = max(1, min(16, CORES // LOCAL_WORLD_SIZE))


class InputError(Exception):
    """A mistake the user can fix. The scripts print its message as one line and exit with 1."""


@contextlib.contextmanager
def reported_as(message: str):
    """Re-raise an error as an InputError that says `message` and the reason.

    Errors that are hardly ever the user's mistake, but a bug, keep their type and traceback.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (NameError, AttributeError, TypeError, LookupError, ArithmeticError, AssertionError):
        raise
    except Exception as error:
        reason = one_line(error)
        if error.__cause__:
            reason += f": {one_line(error.__cause__)}"
        raise InputError(f"{message}: {reason}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, and at most 400 characters of it."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s*\n\s*", " ", text)[:400]


def log(text: str):
    """Print a line in the first process, above its progress bar."""
    if RANK == 0:
        tqdm.write(text)


def plural(number: int, noun: str) -> str:
    """Return "1 epoch" or "2 epochs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ---------------------------------------------------------------- the recipe

# To change it: NETWORK; random_crop (augmentation); training_loss (label smoothing, mixup);
# build_optimizer; lr_factor and default_lr (schedule). The numbers are defaults of the flags, in
# parse_args. Gradient clipping goes into train_one_epoch. `args` are the flags; B is the batch size
# and R is args.resolution, in pixels.

# The network. For another CNN of torchvision.models, change these four lines and their import; not
# for DenseNet, GoogLeNet and Inception, whose weights or outputs differ.
NETWORK = SimpleNamespace(
    build=resnet50,
    weights=ResNet50_Weights.IMAGENET1K_V2,
    head="fc",  # the last layer, replaced by a new one for the classes of the dataset
    gradcam_layer="layer4.2",  # the last block; its feature map has R/32 x R/32 cells
)


def random_crop(args: argparse.Namespace, photo: torch.Tensor) -> torch.Tensor:
    """Crop, resize and mirror a photo at random, for training.

    Draw random numbers from torch alone: it is seeded for each photo. With the same ones, the
    result equals that of torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Args:
        photo: (3, H, W) uint8.

    Returns:
        (R, R, 3) uint8.
    """
    box = v2.RandomResizedCrop.get_params(photo, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    # resize is faster with the channels last in memory, and keeps that layout.
    region = v2.functional.crop(photo, *box).permute(1, 2, 0).contiguous()
    crop = v2.functional.resize(region.permute(2, 0, 1), [args.resolution] * 2, antialias=True)
    if torch.rand(1) < 0.5:
        crop = crop.flip(-1)
    # Transforms of (3, R, R) uint8, such as v2.RandAugment()(crop), go here.
    return crop.permute(1, 2, 0)


def center_crop(
    args: argparse.Namespace, photo: torch.Tensor, resize_at_224: int = 256
) -> torch.Tensor:
    """Resize a photo and crop its center, for the evaluation.

    Args:
        photo: (3, H, W) uint8.
        resize_at_224: the shorter side is resized to int(R * resize_at_224 / 224) pixels. The
            recipe has 256; six-view TTA in eval.py also uses 224 and 288.

    Returns:
        (R, R, 3) uint8.
    """
    shorter_side = int(args.resolution * resize_at_224 / 224)
    resized = v2.functional.resize(photo, [shorter_side], antialias=True)
    crop = v2.functional.center_crop(resized, [args.resolution])
    return crop.permute(1, 2, 0).contiguous()


def training_loss(
    args: argparse.Namespace, network: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of a batch, and its logits (B, classes), from which accuracy is counted.

    Label smoothing, mixup or another loss belongs here. Random numbers may come from torch, NumPy
    or `random`, which are seeded for each epoch: a resumed run draws the same ones.

    Args:
        network: the network in training mode.
        images: (B, 3, R, R) float32, normalized.
        targets: (B,) int64.
    """
    logits = network(images)
    loss = F.cross_entropy(logits, targets)
    return loss, logits


def default_lr(batch_size: int) -> float:
    """Return the learning rate of the reference's runs: 0.1 at batch size 128, 0.05 at 64."""
    return 0.1 * batch_size / 128


def lr_factor(args: argparse.Namespace, epochs_done: float) -> float:
    """Return what the learning rates are multiplied by in a step.

    `epochs_done` has a fraction: 3.25 is a quarter into the fourth epoch. So warm-up, or a cosine
    for each step, needs no other change. Here: step decay, as in the reference. A factor that
    depends on args.epochs changes if a run is resumed with another --epochs.
    """
    return 0.1 ** (epochs_done // args.step_size)


def build_optimizer(args: argparse.Namespace, network: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer. For another one, replace the whole body.

    It may have fewer parameters than the network, and parameter groups with learning rates of their
    own: lr_factor multiplies each of them.
    """
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        # Lets GradScaler skip an overflowed step on the GPU, without a CPU-GPU synchronization.
        fused=True,
    )
    # If its first step is skipped, fused SGD would start from momentum in uninitialized memory.
    # From zero, momentum is the gradient after the first step, as it is without `fused`.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# ---------------------------------------------------------------- flags


def at_least(lowest: float, kind: type = int) -> Callable:
    """Return an argparse type: a number, int or float, that is not below `lowest`."""

    def parse(text: str):
        value = kind(text)
        if not value >= lowest:  # so that NaN is refused too
            raise argparse.ArgumentTypeError(f"{text} is not at least {lowest}")
        return value

    parse.__name__ = kind.__name__  # for argparse's message: invalid int value
    return parse


def user_path(text: str) -> Path:
    """An argparse type. The shell does not expand the ~ in --output-dir=~/run."""
    return Path(text).expanduser()


def path_or_name(text: str) -> str:
    """An argparse type: the absolute path of an existing file or folder, or any other name.

    The path is stored with the run, which may be resumed in another folder.
    """
    return str(user_path(text).resolve()) if user_path(text).exists() else text


def parse_args(argv: list[str] | None, settings: dict | None = None) -> argparse.Namespace:
    """Parse the flags. Flags not given take their value from `settings` (of the run to resume).

    A default of None means: choose when the run starts.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    yes_or_no = argparse.BooleanOptionalAction
    # fmt: off
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--weights", type=path_or_name, default=NETWORK.weights.name,
        help="pretrained weights of all layers but the last: a torchvision name, a file, or none "
        "(default: %(default)s)")
    recipe.add_argument("--resolution", type=at_least(32), default=224,
        help="side of the square crops, in pixels (default: %(default)s)")
    recipe.add_argument("--batch-size", type=at_least(1), default=128,
        help="photos in a step, over all GPUs (default: %(default)s)")
    recipe.add_argument("--epochs", type=at_least(1), default=90,
        help="passes over the train split (default: %(default)s)")
    recipe.add_argument("--lr", type=at_least(1e-9, float),
        help="initial learning rate (default: 0.1 at batch size 128, and proportional to it)")
    recipe.add_argument("--step-size", type=at_least(1), default=30,
        help="epochs after which the learning rate is divided by 10 (default: %(default)s)")
    recipe.add_argument("--momentum", type=at_least(0, float), default=0.9,
        help="momentum of SGD (default: %(default)s)")
    recipe.add_argument("--weight-decay", type=at_least(0, float), default=1e-4,
        help="weight decay of all parameters (default: %(default)s)")
    recipe.add_argument("--seed", type=at_least(0), default=0,
        help="seed of the new layer, of the order of the photos and of their crops "
        "(default: %(default)s)")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", type=path_or_name, default=DEFAULT_DATASET,
        help="name of a Hub dataset, or path of a folder (default: %(default)s)")
    data.add_argument("--val-split", type=at_least(0, float), default=0.0, metavar="FRACTION",
        help="hold out this fraction of each class of the train split, and choose the best epoch "
        "on it instead of on the test split. Not allowed if the dataset has a val split, which "
        "is then used (default: 0)")

    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--workers", type=at_least(0),
        help="processes that load train photos, and as many that load test photos, for each GPU "
        f"(default: {DEFAULT_WORKERS} on this machine)")
    hardware.add_argument("--amp", action=yes_or_no, default=True,
        help="use mixed precision (default: yes)")
    hardware.add_argument("--amp-dtype", choices=["float16", "bfloat16"],
        help="data type of mixed precision (default: float16; on CPUs bfloat16 if they have it, "
        "else none)")
    hardware.add_argument("--compile", action=yes_or_no,
        help="use torch.compile (default: yes on GPUs)")

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", type=user_path, default=Path("."),
        help="folder that the run writes to (default: the current folder)")
    existing_run = run.add_mutually_exclusive_group()
    existing_run.add_argument("--resume", action="store_true",
        help="continue the run in the output folder after its last saved epoch, or start one")
    existing_run.add_argument("--overwrite", action="store_true",
        help="delete the run in the output folder and start a new one")
    # fmt: on
    # argparse keeps what is already in the namespace, and does not parse it again.
    args = parser.parse_args(argv, argparse.Namespace(**(settings or {})))
    if args.lr is None:
        args.lr = default_lr(args.batch_size)
    return args


# ---------------------------------------------------------------- loading photos


def decode_photo(encoded: bytes) -> torch.Tensor:
    """Decode an image file to upright RGB: (3, H, W) uint8, channels last in memory.

    For animations, the first frame is returned. Damaged files may raise any exception.
    """
    if decode_image:
        photo = decode_image(encoded)  # RGB, turned upright by its EXIF orientation
        return photo[0] if photo.ndim == 4 else photo
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith("I"):
            # Pillow would clip them to white.
            raise ValueError("16-bit grayscale photos need torchcodec")
        upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


class CroppedPhotos(torch.utils.data.Dataset):
    """Crops of the photos of a split. An index is (row, seed).

    The seed is that of the crop's random numbers: a crop depends neither on the number of workers
    nor on the photos before it.

    Args:
        photos: a dataset from load_split.
        split: its name, for messages.
        crop: a function from a photo (3, H, W) uint8 to its crop (R, R, 3) uint8.

    An item is a crop and its label. Raises InputError, which names the photo, for one that cannot
    be decoded.
    """

    def __init__(self, photos: datasets.Dataset, split: str, crop: Callable):
        self.photos = photos
        self.split = split
        self.crop = crop

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]]:
        """Return the items of a batch. DataLoader calls this: it reads the batch at once."""
        batch = self.photos[[row for row, _ in indices]]
        items = []
        for (row, seed), image, label in zip(indices, batch["image"], batch["label"], strict=True):
            photo = self.load_photo(row, image)
            # With --workers 0, the main process's random state stays as it is.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                items.append((self.crop(photo), label))
        return items

    def load_photo(self, row: int, image: dict) -> torch.Tensor:
        """Decode {"bytes": …, "path": …}, one of which may be None."""
        encoded = image["bytes"]
        try:
            if encoded is None:
                encoded = Path(image["path"]).read_bytes()
            return decode_photo(encoded)
        except Exception as error:
            name = image["path"] or f"in row {row}"
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(
                f"the {self.split} photo {name} cannot be decoded: {reason}"
            ) from error


class TrainBatches(torch.utils.data.Sampler):
    """The train batches of an epoch: for each step, this process's share as a list of (row, seed).

    Order and crops depend on --seed and the epoch alone. A last batch is left out if it is smaller
    than an eighth of the others, or than two photos for each process: a step with the batch norm
    statistics of so few photos, just before the evaluation, does more harm than good. Those photos
    are seen in other epochs. The published runs leave out none: 8144 photos are 63 batches of 128
    and one of 80, or 127 of 64 and one of 16.
    """

    def __init__(self, args: argparse.Namespace, num_photos: int):
        self.seed = args.seed
        self.batch_size = args.batch_size  # over all processes
        self.num_photos = num_photos
        self.num_used = num_photos
        last_batch = num_photos % args.batch_size
        if last_batch < max(args.batch_size / 8, 2 * WORLD_SIZE):
            self.num_used -= last_batch
        self.epoch = 1

    def set_epoch(self, epoch: int):
        """Choose the epoch, counted from 1, of the next iter()."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_used / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = rng.permutation(self.num_photos).tolist()
        crop_seeds = rng.integers(2**32, size=self.num_photos).tolist()
        indices = list(zip(rows, crop_seeds, strict=True))[: self.num_used]
        for start in range(0, self.num_used, self.batch_size):
            batch = indices[start : start + self.batch_size]
            # All processes get the same number, so that the mean of their gradients is the batch's.
            share = len(batch) // WORLD_SIZE
            yield batch[RANK::WORLD_SIZE][:share]


def eval_index_batches(num_photos: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Return (row, 0) of all photos in batches: this process's share. No photo counts twice."""
    indices = [(row, 0) for row in range(RANK, num_photos, WORLD_SIZE)]
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def make_loader(photos: CroppedPhotos, index_batches: Iterable, workers: int) -> DataLoader:
    """Return a loader of crops (B, R, R, 3) uint8 and labels (B,) int64.

    Its workers are persistent, and begin to load at iter(loader).
    """
    context = None
    if workers and sys.platform == "linux":
        # Python 3.14's default, forkserver, would import torch again in each worker. Workers never
        # use CUDA, so they may be forked after its initialization.
        context = "fork"
    return DataLoader(
        photos,
        batch_sampler=index_batches,
        num_workers=workers,
        pin_memory=DEVICE.type == "cuda",
        multiprocessing_context=context,
        generator=torch.Generator(),  # so that iter() does not advance the global random state
        persistent_workers=workers > 0,
    )


def workers_per_loader(args: argparse.Namespace) -> int:
    """Return the number of processes of a loader."""
    return DEFAULT_WORKERS if args.workers is None else args.workers


def make_loaders(
    args: argparse.Namespace, splits: dict[str, datasets.Dataset], eval_split: str
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of the train split and of the one that is evaluated after each epoch."""
    workers = workers_per_loader(args)
    train_photos = CroppedPhotos(splits["train"], "train", functools.partial(random_crop, args))
    train_loader = make_loader(train_photos, TrainBatches(args, len(train_photos)), workers)
    eval_crop = functools.partial(center_crop, args)
    eval_photos = CroppedPhotos(splits[eval_split], eval_split, eval_crop)
    index_batches = eval_index_batches(len(eval_photos), args.batch_size // WORLD_SIZE)
    return train_loader, make_loader(eval_photos, index_batches, workers)


def show_progress(batches: Iterable, title: str) -> Iterator:
    """Yield the batches, and show how many there were: in a bar, or a line each minute."""
    shows_bar = RANK == 0 and sys.stderr.isatty()
    shows_lines = RANK == 0 and not shows_bar
    last_line = time.monotonic()
    bar = tqdm(batches, title, leave=False, disable=not shows_bar)
    for step, batch in enumerate(bar):
        if shows_lines and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            print(f"{title}: {step} of {len(batches)} steps", file=sys.stderr, flush=True)
        yield batch


# ---------------------------------------------------------------- network, precision, compilation


def build_network(weights: str, num_classes: int) -> torch.nn.Module:
    """Return NETWORK with the weights of a torchvision name or a file, or random ones for "none".

    The head always has random weights and `num_classes` outputs. Raises InputError for weights that
    cannot be loaded.
    """
    network = NETWORK.build(num_classes=num_classes)
    if weights == "none":
        return network
    by_name = type(NETWORK.weights).__members__  # IMAGENET1K_V1, IMAGENET1K_V2, …
    if weights in by_name:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(by_name[weights].url).name)
        show_bar = RANK == 0 and sys.stderr.isatty()
        with reported_as(f"cannot load --weights {weights} (if {file} is damaged, delete it)"):
            state = by_name[weights].get_state_dict(progress=show_bar, check_hash=True)
    elif Path(weights).is_file():
        state = read_checkpoint(Path(weights))["model"]
    else:
        choices = ", ".join([*by_name, "none"])
        raise InputError(f"--weights {weights} is neither a file nor one of {choices}")

    # The head stays random: the classes of the weights may be other ones.
    for name, value in network.state_dict().items():
        if name.startswith(f"{NETWORK.head}."):
            state[name] = value
    with reported_as(f"--weights {weights} does not fit the network"):
        network.load_state_dict(state)
    return network


def build_training(
    args: argparse.Namespace, checkpoint: dict, num_classes: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """Return network, optimizer and scaler: new ones, or in the state of `checkpoint`.

    Raises InputError if the checkpoint is of another network or optimizer.
    """
    torch.manual_seed(args.seed)
    # One process loads the weights: DistributedDataParallel copies them to the others.
    weights = "none" if checkpoint or RANK > 0 else args.weights
    network = build_network(weights, num_classes)
    network.to(DEVICE, memory_format=torch.channels_last)
    optimizer = build_optimizer(args, network)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=amp_dtype(args) == torch.float16)
    if checkpoint:
        with reported_as(
            "the checkpoint does not fit NETWORK and build_optimizer: if they were "
            "edited, start a new run"
        ):
            network.load_state_dict(checkpoint["model"])
            options = checkpoint["optimizer"]["param_groups"][0].keys()
            unknown = options - optimizer.param_groups[0].keys()
            if unknown:  # load_state_dict would accept them.
                raise ValueError(f"the optimizer has no options {', '.join(sorted(unknown))}")
            optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # Runs without float16 have no scaler state.
            scaler.load_state_dict(checkpoint["scaler"])
    return network, optimizer, scaler


def amp_dtype(args: argparse.Namespace) -> torch.dtype:
    """Return the data type of mixed precision, or float32 for none.

    By default that is float16 on CUDA, as in the reference, and on a CPU bfloat16 if it has
    instructions for it: without them, mixed precision is slower than float32.
    """
    if not args.amp:
        return torch.float32
    if args.amp_dtype:
        return getattr(torch, args.amp_dtype)
    if DEVICE.type == "cuda":
        return torch.float16
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 does not have it.
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def can_compile(args: argparse.Namespace) -> bool:
    """Return whether to use torch.compile: as --compile says, or else on CUDA if it works there.

    It builds code at run time, for which a compiler, Python's headers or Triton may be missing.
    Raises InputError if it was requested and does not work.
    """
    if args.compile is False or (args.compile is None and DEVICE.type == "cpu"):
        return False
    try:
        torch.compile(lambda value: 2 * value + 1)(torch.ones(8, device=DEVICE))
    except Exception as error:
        if args.compile:
            raise InputError(f"--compile does not work here: {one_line(error)}") from error
        log(f"warning     no torch.compile, and training slower: {one_line(error)}")
        return False
    return True


# ---------------------------------------------------------------- the step


@functools.cache  # Copying them to the GPU in each step would be a CPU-GPU synchronization.
def rgb_on_device(values: tuple) -> torch.Tensor:
    """Return three values in 0…1 as a tensor in 0…255: (3, 1, 1) float32 on DEVICE."""
    return 255 * torch.tensor(values, device=DEVICE).view(3, 1, 1)


def move_and_normalize(images: torch.Tensor) -> torch.Tensor:
    """Move (B, R, R, 3) uint8 to DEVICE: (B, 3, R, R) float32, normalized, channels_last."""
    images = images.to(DEVICE, non_blocking=True).permute(0, 3, 1, 2)
    return images.sub(rgb_on_device(IMAGENET_MEAN)).div_(rgb_on_device(IMAGENET_STD))


def mixed_precision(args: argparse.Namespace) -> torch.autocast:
    """Return the context of mixed precision, which does nothing for float32."""
    dtype = amp_dtype(args)
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def compile_if_full(args: argparse.Namespace, images: torch.Tensor):
    """Return a context in which a compiled network runs as compiled for a full batch only.

    A smaller batch, the last of an epoch, is not worth minutes of compiling.
    """
    if len(images) == args.batch_size // WORLD_SIZE:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def train_one_epoch(
    args: argparse.Namespace,
    epoch: int,
    network: torch.nn.Module,
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> dict:
    """Take an optimizer step for each batch.

    Args:
        epoch: counted from 1.
        network: the network, or under torchrun the DistributedDataParallel around it.
        batches: (B, R, R, 3) uint8 images and (B,) int64 targets on the CPU; it has a length.

    Returns:
        the beginning of a row of history.csv: epoch, learning rate of its first step, mean loss and
        accuracy (0…1) over all processes, train photos per second, and the fraction of the time
        that was spent waiting for photos. On CUDA that is an upper bound, since the CPU runs ahead
        of the GPU.
    """
    network.train()
    # Loss, correct predictions and photos, summed on the device: .item() would be a CPU-GPU
    # synchronization in every step.
    totals = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    seconds_waited = 0.0
    start = time.perf_counter()
    step_end = start
    title = f"epoch {epoch}/{args.epochs} train"
    lr = optimizer.param_groups[0]["initial_lr"] * lr_factor(args, epoch - 1)  # of the first step
    for step, (images, targets) in enumerate(show_progress(batches, title)):
        seconds_waited += time.perf_counter() - step_end
        factor = lr_factor(args, epoch - 1 + step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        images = move_and_normalize(images)
        targets = targets.to(DEVICE, non_blocking=True)

        optimizer.zero_grad()
        with mixed_precision(args), compile_if_full(args, images):
            loss, logits = training_loss(args, network, images, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        num_correct = (logits.argmax(1) == targets).sum()
        totals[0] += loss.detach() * len(targets)
        totals[1] += num_correct
        totals[2] += len(targets)
        step_end = time.perf_counter()
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    loss_sum, num_correct, num_photos = totals.tolist()  # Waits for the GPU.
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch,
        "lr": lr,
        "train_loss": loss_sum / num_photos,
        "train_accuracy": num_correct / num_photos,
        "photos_per_second": num_photos / seconds,
        "input_wait": seconds_waited / seconds,
    }


@torch.no_grad()
def evaluate(
    args: argparse.Namespace, network: torch.nn.Module, batches: Iterable, title: str
) -> tuple[float, float]:
    """Return the mean loss and the accuracy (0…1) over all processes.

    Batches are (B, R, R, 3) uint8 images and (B,) int64 targets on the CPU.
    """
    network.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=DEVICE)  # loss, correct, photos
    for images, targets in show_progress(batches, title):
        images = move_and_normalize(images)
        targets = targets.to(DEVICE, non_blocking=True)
        with mixed_precision(args), compile_if_full(args, images):
            logits = network(images)
            totals[0] += F.cross_entropy(logits, targets, reduction="sum")
        totals[1] += (logits.argmax(1) == targets).sum()
        totals[2] += len(targets)
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    loss_sum, num_correct, num_photos = totals.tolist()
    return loss_sum / num_photos, num_correct / num_photos


# ---------------------------------------------------------------- the loop


def train_epochs(
    args: argparse.Namespace,
    run: dict,
    splits: dict[str, datasets.Dataset],
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
):
    """Train the epochs that are missing in `run`, and save it after each of them.

    Args:
        run: everything in a checkpoint but state dicts, from describe_run: settings, classes,
            numbers of photos, … Its "history" grows, a row for each epoch, and so does "elapsed",
            in seconds.
        splits: the train split and the one on which the best epoch is chosen, from load_splits.

    Raises InputError if weights or batch norm statistics are not finite after an epoch, if a photo
    cannot be decoded, or if a file cannot be written.
    """
    eval_split = run["eval_split"]
    train_loader, eval_loader = make_loaders(args, splits, eval_split)
    train_network = network
    if WORLD_SIZE > 1:
        train_network = DistributedDataParallel(network)
        # Only the evaluation reads buffers, and they are broadcast before it. In the constructor,
        # broadcast_buffers=False would also skip the initial copy of the first process's buffers.
        train_network.broadcast_buffers = False

    start = time.perf_counter() - run["elapsed"]
    first_epoch = len(run["history"]) + 1
    train_loader.batch_sampler.set_epoch(first_epoch)
    train_batches = iter(train_loader)
    writing = None
    with ThreadPoolExecutor(1) as writer:
        for epoch in range(first_epoch, args.epochs + 1):
            epoch_start = time.perf_counter()
            eval_batches = iter(eval_loader)  # The first ones load while the epoch trains.
            seed_random_numbers(args.seed, epoch)
            row = train_one_epoch(args, epoch, train_network, train_batches, optimizer, scaler)
            if epoch < args.epochs:
                train_loader.batch_sampler.set_epoch(epoch + 1)
                train_batches = iter(train_loader)  # The first ones load during the evaluation.

            if WORLD_SIZE > 1:
                for buffer in network.buffers():  # batch norm statistics
                    dist.broadcast(buffer, 0)
            check_finite(args, epoch, network)
            title = f"epoch {epoch}/{args.epochs} {eval_split}"
            loss, accuracy = evaluate(args, network, eval_batches, title)
            row[f"{eval_split}_loss"] = loss
            row[f"{eval_split}_accuracy"] = accuracy
            row["seconds"] = time.perf_counter() - epoch_start
            run["history"].append(row)
            run["elapsed"] = time.perf_counter() - start
            log(epoch_line(run, args.epochs, first_epoch))

            if RANK == 0:
                if writing:
                    writing.result()  # Raises what went wrong with the epoch before.
                states = {
                    "model": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                }
                # The next epoch changes the tensors while they are written.
                checkpoint = copy_to_cpu({**run, "epoch": epoch, **states})
                writing = writer.submit(save_run, checkpoint, args.output_dir)
        if writing:
            writing.result()
    run["elapsed"] = time.perf_counter() - start  # The last write is in it.


def seed_random_numbers(seed: int, epoch: int):
    """Seed what the steps of an epoch draw: dropout, stochastic depth, mixup.

    Crops have seeds of their own, so these numbers depend on seed, epoch, step and process alone.
    """
    epoch_seed = int(np.random.SeedSequence([seed, epoch, RANK]).generate_state(1)[0])
    torch.manual_seed(epoch_seed)
    np.random.seed(epoch_seed)
    random.seed(epoch_seed)


def check_finite(args: argparse.Namespace, epoch: int, network: torch.nn.Module):
    """Raise InputError for NaN or Inf in weights and buffers. On CUDA: one synchronization."""
    values = network.state_dict().values()
    if torch.stack([value.isfinite().all() for value in values]).all():
        return
    remedy = "start a new run with a lower --lr"
    if amp_dtype(args) == torch.float16:
        remedy += ", or with --amp-dtype bfloat16"
    raise InputError(f"epoch {epoch}: the weights contain NaN or Inf: {remedy}")


def copy_to_cpu(state: object) -> object:
    """Copy nested dicts and lists, and move their tensors to the CPU with the same strides."""
    if isinstance(state, torch.Tensor):
        return state.to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copy_to_cpu(value) for name, value in state.items()}
    if isinstance(state, list):
        return [copy_to_cpu(value) for value in state]
    return state


def best_row(run: dict) -> dict:
    """Return the row of the best epoch: the first one with the highest accuracy."""
    return max(run["history"], key=lambda row: row[f"{run['eval_split']}_accuracy"])


def epoch_line(run: dict, last_epoch: int, first_epoch: int) -> str:
    """Format the last row of a run's history. `first_epoch` is the first one of this start."""
    history = run["history"]
    row = history[-1]
    columns = [f"epoch {row['epoch']:3d}/{last_epoch}", f"lr {row['lr']:#.4g}"]
    for split in ("train", run["eval_split"]):
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
    if best_row(run) is row:
        columns.append("best")
    return " | ".join(columns)


# ---------------------------------------------------------------- the files of a run

# The files of a run, in the order in which --overwrite deletes them.
RUN_FILES = (
    "last_checkpoint.pth",
    "best_model.pth",
    "history.csv",
    "training_curves.png",
    "settings.json",
)
# These flags say where a run is; all others are its settings.
NOT_SETTINGS = ("output_dir", "resume", "overwrite")
# These settings may change when a run is resumed. The dataset may have moved: its classes, numbers
# of photos and, with --val-split, labels are compared instead of its path.
CHANGEABLE_SETTINGS = ("dataset", "epochs", "workers", "compile")


def open_run(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Return the flags, and the checkpoint to resume from: {} for a new run.

    Raises InputError if the folder holds another run, if it cannot be written to, or if a flag
    differs from the run to resume.
    """
    args = parse_args(argv)
    folder = args.output_dir
    make_output_dir(folder)
    for draft in folder.glob(".partial-*"):  # of atomic_write; its process may have been killed
        if sys.platform == "linux" and not Path("/proc", draft.name.split("-")[1]).exists():
            draft.unlink(missing_ok=True)
    last_checkpoint = folder / "last_checkpoint.pth"
    best_model = folder / "best_model.pth"
    existing = [file.name for file in (last_checkpoint, best_model) if file.exists()]
    if args.overwrite or not existing:
        if args.resume:
            log(f"no run in {folder} yet: starting one")
        return args, {}
    if not args.resume:
        raise InputError(
            f"{folder} already holds {' and '.join(existing)}: choose --resume, --overwrite, or "
            "another --output-dir"
        )
    if not last_checkpoint.exists():
        raise InputError(
            f"{folder} holds best_model.pth, but not the last_checkpoint.pth that --resume needs"
        )

    checkpoint = read_checkpoint(last_checkpoint)
    if "history" not in checkpoint:
        raise InputError(f"{last_checkpoint} is not a last_checkpoint.pth of this program")
    args = parse_args(argv, checkpoint["settings"])
    for name, stored in checkpoint["settings"].items():
        value = getattr(args, name)
        if value != stored and name not in CHANGEABLE_SETTINGS:
            flag = f"--{name.replace('_', '-')} {value}"
            raise InputError(f"{flag}: the run to resume in {folder} has {stored}")
    return args, checkpoint


def make_output_dir(folder: Path):
    """Create `folder` if it is missing. Raises InputError if nothing can be written there."""
    with reported_as(f"cannot write to --output-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def describe_run(
    args: argparse.Namespace,
    splits: dict[str, datasets.Dataset],
    has_test_split: bool,
    checkpoint: dict,
) -> dict:
    """Return everything in a checkpoint but state dicts.

    Raises InputError if the run to resume (`checkpoint`) had other photos.
    """
    run = {
        "settings": {name: v for name, v in vars(args).items() if name not in NOT_SETTINGS},
        "classes": splits["train"].features["label"].names,
        "resolution": args.resolution,
        "num_photos": {name: len(photos) for name, photos in splits.items()},
        "label_checksums": {name: label_checksum(photos) for name, photos in splits.items()},
        "eval_split": choose_eval_split(splits),
        "has_test_split": has_test_split,
        "device": f"{device_name()}, {amp_dtype(args)}",
        "history": checkpoint.get("history", []),
        "elapsed": checkpoint.get("elapsed", 0.0),  # seconds since the first epoch began
    }
    if checkpoint and checkpoint["num_photos"] != run["num_photos"]:
        raise InputError(
            f"--dataset: the run to resume has {format_counts(checkpoint)}, but there are "
            f"{format_counts(run)}"
        )
    if checkpoint and args.val_split and checkpoint["label_checksums"] != run["label_checksums"]:
        raise InputError(
            "--dataset: its photos are in another order than in the run to resume: with "
            "--val-split, other ones would be held out"
        )
    return run


def label_checksum(photos: datasets.Dataset) -> int:
    """Return a CRC of the labels in their order, on which depends what --val-split holds out."""
    return zlib.crc32(np.array(photos["label"][:], np.int64).tobytes())


def atomic_write(file: Path, write: Callable):
    """Let `write` fill a binary file, and move it to `file` when it is complete.

    Raises InputError if it cannot be written. `file` is then as it was before.
    """
    contents = io.BytesIO()  # torch.save hides why it cannot write to a file.
    write(contents)
    draft = file.with_name(f".partial-{os.getpid()}-{file.name}")
    try:
        with reported_as(f"cannot write {file}"):
            with open(draft, "wb") as output:
                output.write(contents.getbuffer())
                output.flush()
                os.fsync(output.fileno())  # A power failure must not leave an empty `file`.
            os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def save_run(checkpoint: dict, folder: Path):
    """Write all files of a run. last_checkpoint.pth is the first: the others follow from it.

    Raises InputError if another run has saved its first epoch in the folder before this one.
    """
    last_checkpoint = folder / "last_checkpoint.pth"
    if checkpoint["epoch"] == 1 and last_checkpoint.exists():
        raise InputError(f"another run has started in {folder}: choose another --output-dir")
    atomic_write(last_checkpoint, functools.partial(torch.save, checkpoint))
    write_results(checkpoint, folder)


def write_results(checkpoint: dict, folder: Path):
    """Write the files that follow from last_checkpoint.pth."""
    best = best_row(checkpoint)
    if best["epoch"] == checkpoint["epoch"]:
        names = ("model", "classes", "resolution", "epoch", "settings", "label_checksums")
        best_model = {name: checkpoint[name] for name in names}
        accuracy = f"{checkpoint['eval_split']}_accuracy"
        best_model[accuracy] = best[accuracy]
        atomic_write(folder / "best_model.pth", functools.partial(torch.save, best_model))

    packages = ("torch", "torchvision", "datasets", "numpy")
    versions = {package: importlib.metadata.version(package) for package in packages}
    versions["python"] = platform.python_version()
    record = {"settings": checkpoint["settings"], "versions": versions, "device": device_name()}
    text = json.dumps(record, indent=2).encode()
    atomic_write(folder / "settings.json", lambda file: file.write(text))

    table = pandas.DataFrame(checkpoint["history"])
    write_csv = functools.partial(table.to_csv, index=False, na_rep="nan")
    atomic_write(folder / "history.csv", write_csv)
    figure = draw_curves(checkpoint)
    write_png = functools.partial(figure.savefig, format="png", dpi=100)
    atomic_write(folder / "training_curves.png", write_png)


def draw_curves(run: dict) -> Figure:
    """Plot loss, accuracy and learning rate of all epochs, and mark the best epoch."""
    eval_split = run["eval_split"]
    table = pandas.DataFrame(run["history"]).replace([math.inf, -math.inf], math.nan)
    figure = Figure(figsize=(13, 4))  # inches
    # An automatic layout would take twice as long, while the next epoch trains.
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.14, top=0.88, wspace=0.35)
    loss_axes, accuracy_axes, lr_axes = figure.subplots(1, 3)
    for split in ("train", eval_split):
        loss_axes.plot(table["epoch"], table[f"{split}_loss"], ".-", label=split)
        accuracy_axes.plot(table["epoch"], 100 * table[f"{split}_accuracy"], ".-", label=split)
    best = best_row(run)
    accuracy = best[f"{eval_split}_accuracy"]
    label = f"best: {accuracy:.2%} in epoch {best['epoch']}"
    accuracy_axes.plot(best["epoch"], 100 * accuracy, "*", markersize=12, label=label)
    lr_axes.plot(table["epoch"], table["lr"], ".-")
    loss_axes.set(ylabel="loss", xlabel="epoch", yscale="log")
    accuracy_axes.set(ylabel="accuracy (%)", xlabel="epoch")
    lr_axes.set(ylabel="learning rate", xlabel="epoch")
    if table["lr"].min() > 0:
        lr_axes.set_yscale("log")
    for axes in (loss_axes, accuracy_axes):
        # Above the panel, where no curve is.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def read_checkpoint(file: Path) -> dict:
    """Read a checkpoint of this program, or the bare state dict of another one, onto the CPU.

    It is loaded with weights_only=True, so no code is executed. Returns a dict whose "model" is the
    state dict, without the prefixes of torch.compile and DistributedDataParallel. Raises InputError
    for a file that is missing, damaged or something else.
    """
    if not file.is_file():
        raise InputError(f"checkpoint not found: {file}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if "model" not in checkpoint:
            checkpoint = {"model": checkpoint}
        state = {}
        for name, value in checkpoint["model"].items():
            state[re.sub(r"^((_orig_mod|module)\.)+", "", name)] = value.detach()
    except Exception as error:
        # torch may raise any exception for a damaged file, or advise to execute code in it.
        code = re.findall(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {code[0]}" if code else type(error).__name__
        raise InputError(f"cannot read {file}: damaged, or not a state dict ({reason})") from error
    return {**checkpoint, "model": state}


# ---------------------------------------------------------------- reading datasets


def find_splits(dataset: str) -> dict[str, Callable[[], datasets.Dataset]]:
    """Return for each split of a dataset, by name, a function that reads it.

    The splits "valid", "validation" and "dev" are called "val". Raises InputError for a dataset
    that is neither a folder nor on the Hub, and ValueError for several val splits.
    """
    if Path(dataset).is_dir():
        sources = splits_in_folder(Path(dataset))
    else:
        log(f"dataset     {dataset} is not a folder here: asking the Hugging Face Hub")
        with reported_as(
            f"--dataset {dataset} is not a folder and could not be loaded from the Hub"
        ):
            sources = splits_on_hub(dataset)
    val_splits = [split for split in sources if split in VAL_NAMES]
    if len(val_splits) > 1:
        raise ValueError(f"it has several val splits: {', '.join(val_splits)}")
    if val_splits:
        sources["val"] = sources.pop(val_splits[0])
    return sources


def splits_on_hub(dataset: str) -> dict[str, Callable[[], datasets.Dataset]]:
    """Download a dataset, or find it in the cache. Of the default dataset, only train and test.

    Under torchrun all processes ask; the locks of the Hub's cache let one of them download.
    """
    if dataset == DEFAULT_DATASET:
        # The repository also holds seven corrupted copies of the test split.
        folder = huggingface_hub.snapshot_download(
            dataset,
            repo_type="dataset",
            revision=DATASET_REVISION,
            allow_patterns=["data/train-*", "data/test-*"],
        )
        return splits_in_folder(Path(folder))
    loaded = datasets.load_dataset(dataset)
    return {split: functools.partial(loaded.get, split) for split in loaded}


def splits_in_folder(folder: Path) -> dict[str, Callable[[], datasets.Dataset]]:
    """Find SPLIT-*.parquet in `folder` or in its folder "data", and folders of class folders."""
    sources = {}
    files = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    for split, group in itertools.groupby(files, key=lambda file: file.stem.partition("-")[0]):
        sources[split] = functools.partial(read_parquet, list(group))
    for subfolder in folder.iterdir():
        if subfolder.is_dir() and is_visible(subfolder.name) and subfolder.name != "data":
            sources[subfolder.name] = functools.partial(read_class_folders, subfolder)
    return sources


def load_splits(
    sources: dict[str, Callable], val_split: float, classes: list[str] | None
) -> dict[str, datasets.Dataset]:
    """Return the train split, and the split on which the best epoch is chosen: "val" or "test".

    It is "val" with --val-split, or if the dataset has a val split; the test split is not read
    then. `classes` are those of the run to resume, if any. Raises ValueError or InputError.
    """
    if val_split and "val" in sources:
        raise ValueError("it has a val split of its own: leave out --val-split")
    train_split = load_split(sources, "train", classes)
    if val_split:
        splits = hold_out(train_split, val_split)
    else:
        eval_split = choose_eval_split(sources)
        if eval_split not in sources:
            raise ValueError("it has no test or val split: --val-split 0.1 holds out 10% of train")
        classes = train_split.features["label"].names
        splits = {"train": train_split, eval_split: load_split(sources, eval_split, classes)}
    for split, photos in splits.items():
        num_classes = photos.features["label"].num_classes
        num_empty = num_classes - len(set(photos["label"][:]))
        if num_empty:
            log(f"note        {num_empty} of {num_classes} classes have no {split} photo")
    return splits


def choose_eval_split(splits: Iterable[str]) -> str:
    """Return the name of the split, one of `splits`, on which the best epoch is chosen."""
    return "val" if "val" in splits else "test"


def load_split(
    sources: dict[str, Callable], split: str, classes: list[str] | None = None
) -> datasets.Dataset:
    """Load a split with the columns `image` (still encoded) and `label`.

    A label is an index into `classes`, the class names of training. None stands for the split's own
    names. Raises ValueError for a split that is missing, empty, or has other columns or classes.
    """
    if split not in sources:
        layout = f"such as {split}/rose/1.jpg or data/{split}-0.parquet"
        raise ValueError(f"it has no {split} split, {layout}, but {sorted(sources)}")
    photos = sources[split]()
    image = photos.features.get("image")
    label = photos.features.get("label")
    if not isinstance(image, datasets.Image) or not isinstance(label, datasets.ClassLabel):
        columns = "image: Image and label: ClassLabel"
        raise ValueError(f"the {split} split needs the columns {columns}, not {photos.features}")
    if len(photos) == 0:
        raise ValueError(f"the {split} split has no photos")
    photos = photos.select_columns(["image", "label"])  # Others would be read for each batch.
    photos = match_classes(photos, classes or label.names)
    return photos.cast_column("image", datasets.Image(decode=False))


def match_classes(photos: datasets.Dataset, classes: list[str]) -> datasets.Dataset:
    """Map the labels of `photos` to indices into `classes`, by the names of the classes.

    The names may be in another order, and fewer. No folder can be named like the class "Ram C/V" of
    Stanford Cars, so "-" stands for "/" too, unless two classes would become one. Raises ValueError
    for names that do not match, and for labels out of range.
    """
    names = photos.features["label"].names
    labels = photos["label"][:]
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < len(names):
            raise ValueError(f"row {row} has label {label}, which is out of range")
    if names == classes:
        return photos

    # "Ram C/V" in `classes`, "Ram C-V" as a folder, or the other way round.
    index_of = {name: index for index, name in enumerate(classes)}
    dashed = [name.replace("/", "-") for name in classes]
    if len(set(dashed)) == len(classes):
        index_of.update({name: index for index, name in enumerate(dashed)})
    found = [index_of.get(name, index_of.get(name.replace("/", "-"))) for name in names]
    if None in found or len(set(found)) < len(found):
        unknown = [name for name, index in zip(names, found, strict=True) if index is None]
        missing = [name for index, name in enumerate(classes) if index not in found]
        raise ValueError(
            f"its {len(names)} classes are not among the {len(classes)} of training: only here "
            f"{(unknown or names)[:3]}, only in training {missing[:3]}"
        )
    new_labels = [found[label] for label in labels]
    feature = datasets.ClassLabel(names=classes)
    return photos.remove_columns("label").add_column("label", new_labels, feature=feature)


def hold_out(photos: datasets.Dataset, fraction: float) -> dict[str, datasets.Dataset]:
    """Divide the train split into "train" and "val", which gets about `fraction` of each class.

    The same photos are held out each time. Raises ValueError for classes of one photo, and
    InputError if `fraction` is less than a photo of each class.
    """
    # Importing it takes a second, which runs without --val-split save.
    from sklearn.model_selection import train_test_split

    names = photos.features["label"].names
    labels = photos["label"][:]
    numbers = np.bincount(labels, minlength=len(names))
    too_small = [name for name, number in zip(names, numbers, strict=True) if number == 1]
    if too_small:
        raise ValueError(
            f"--val-split needs two train photos of each class: {len(too_small)} of {len(names)} "
            f"classes have one, such as {', '.join(too_small[:3])}"
        )
    with reported_as(f"--val-split {fraction} is not possible"):
        train_rows, val_rows = train_test_split(
            range(len(photos)), test_size=fraction, stratify=labels, random_state=0
        )
    return {"train": photos.select(sorted(train_rows)), "val": photos.select(sorted(val_rows))}


def read_parquet(files: list[Path]) -> datasets.Dataset:
    """Read the parquet files of a split. Raises ValueError if one is missing or unlike the others.

    Each split is read alone: datasets would give the class names of the first to all of them.
    """
    total = re.search(r"-of-(\d+)$", files[0].stem)
    if total and int(total[1]) != len(files):
        raise ValueError(f"it has {len(files)} of the {int(total[1])} files of {files[0]}")
    parts = []
    for file in files:
        with reported_as(f"cannot read {file}"):
            # from_parquet treats a path as a glob pattern, unless it is escaped.
            parts.append(datasets.Dataset.from_parquet(glob.escape(str(file))))
    with reported_as(f"{files[0]} and the other files of its split have different columns"):
        return datasets.concatenate_datasets(parts)


def read_class_folders(folder: Path) -> datasets.Dataset:
    """List the photos of `folder`, each in or below the folder of its class."""
    columns = {"image": [], "label": []}
    classes = []
    for class_folder in sorted(folder.iterdir()):
        if class_folder.is_dir() and is_visible(class_folder.name):
            photos = find_photos(class_folder)
            if photos:
                columns["image"].extend(str(photo) for photo in photos)
                columns["label"].extend([len(classes)] * len(photos))
                classes.append(class_folder.name)
    if not classes:
        example = folder / "rose" / "1.jpg"
        raise ValueError(f"found no photos in class folders, such as {example}")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    return datasets.Dataset.from_dict(columns, features=features)


def find_photos(folder: Path) -> list[Path]:
    """Return the photos in and below `folder`, sorted. Links to folders are not followed.

    Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError):
        raise error

    photos = []
    for parent, subfolders, names in os.walk(folder, onerror=fail):
        subfolders[:] = [name for name in subfolders if is_visible(name)]
        for name in names:
            if is_visible(name) and name.lower().endswith(PHOTO_SUFFIXES):
                photos.append(Path(parent, name))
    return sorted(photos)


def is_visible(name: str) -> bool:
    """Return False for what macOS, network disks and notebooks add to folders."""
    return not name.startswith((".", "@"))


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
        # From a worker: "Caught InputError in DataLoader worker process 0. … InputError: message".
        sys.exit(f"{script}: {str(error).split('InputError: ')[-1].strip()}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{script}: GPU memory is full: use a smaller --batch-size ({one_line(error)})")
    except KeyboardInterrupt:
        sys.exit(130)
    # Not after an error: it can hang if the other processes are in a collective.
    if dist.is_initialized():
        dist.destroy_process_group()


def set_up():
    """Choose the device and TF32, and connect the processes that torchrun started."""
    torch.set_float32_matmul_precision("high")  # TF32
    if DEVICE.type == "cuda":
        num_gpus = torch.cuda.device_count()
        if LOCAL_WORLD_SIZE > num_gpus:
            raise InputError(f"torchrun started {LOCAL_WORLD_SIZE} processes for {num_gpus} GPUs")
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        dist.init_process_group(dist.get_default_backend_for_device(DEVICE))
    datasets.disable_progress_bars()
    if RANK > 0 or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    if TORCHCODEC_ERROR:
        reason = one_line(TORCHCODEC_ERROR)[:200]
        remedy = "install torchcodec from the same index as torch"
        log(f"warning     Pillow decodes the photos, slowly and not HEIC: {remedy} ({reason})")
    if DEVICE.type == "cpu":
        build = " by this build of torch, which has no CUDA" if torch.version.cuda is None else ""
        log(f"no GPU found{build}: using the CPU")


def check_batch_size(batch_size: int, num_photos: int):
    """Raise InputError if the train photos are not enough for a batch, or it cannot be shared."""
    if batch_size % WORLD_SIZE:
        raise InputError(f"--batch-size {batch_size} is not a multiple of {WORLD_SIZE} processes")
    if batch_size < 2 * WORLD_SIZE:
        needed = 2 * WORLD_SIZE
        raise InputError(
            f"--batch-size {batch_size}: batch norm needs {needed}, two photos in each process"
        )
    if batch_size > num_photos:
        suggested = max(2, num_photos // (4 * WORLD_SIZE)) * WORLD_SIZE
        raise InputError(
            f"--batch-size {batch_size} is above the number of train photos, {num_photos}: try "
            f"--batch-size {suggested}, whose learning rate is lower too"
        )


def check_ranks_agree(run: dict):
    """Raise InputError if the processes have other flags, photos or checkpoints."""
    if WORLD_SIZE == 1:
        return
    # Machines may have different numbers of cores, and different folders.
    flags = {name: v for name, v in run["settings"].items() if name not in ("workers", "dataset")}
    own = {
        "flags": flags,
        "classes": run["classes"],
        "numbers of photos": run["num_photos"],
        "epochs in last_checkpoint.pth": len(run["history"]),
    }
    of_ranks = [None] * WORLD_SIZE
    dist.all_gather_object(of_ranks, own)
    for rank, other in enumerate(of_ranks):
        differing = [name for name in own if other[name] != of_ranks[0][name]]
        if differing:
            raise InputError(f"process {rank} and process 0 differ in {' and '.join(differing)}")


def format_counts(run: dict) -> str:
    """Return "8144 train and 8041 test photos"."""
    eval_split = run["eval_split"]
    num_eval = run["num_photos"][eval_split]
    return f"{run['num_photos']['train']} train and {plural(num_eval, f'{eval_split} photo')}"


def device_name() -> str:
    """Return the name of the GPU, or "CPU", and the number of processes."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    return name if WORLD_SIZE == 1 else f"{WORLD_SIZE} processes, each on {name}"


def log_result(args: argparse.Namespace, run: dict):
    """Print the last and the best accuracy of a run, and the command that comes next."""
    eval_split = run["eval_split"]
    last = run["history"][-1]
    best = best_row(run)
    column = f"{eval_split}_accuracy"
    folder = args.output_dir
    log(
        f"trained {plural(last['epoch'], 'epoch')} in {run['elapsed'] / 60:.1f} min. "
        f"Last {last[column]:.2%}. Best {best[column]:.2%} in epoch {best['epoch']} "
        f"(chosen on the {eval_split} split): {folder / 'best_model.pth'}"
    )
    command = ["python", "eval.py", "--tta"]
    if not run["has_test_split"]:
        command += ["--split", eval_split]
    if folder != Path("."):
        command += ["--checkpoint", str(folder / "best_model.pth")]
    log(f"next: {shlex.join(command)}")


def log_start(args: argparse.Namespace, run: dict, checkpoint: dict):
    """Print what will be trained, and where a run continues."""
    steps = plural(len(TrainBatches(args, run["num_photos"]["train"])), "step")
    log(f"data        {format_counts(run)}, {len(run['classes'])} classes, {steps} per epoch")
    not_recipe = ("dataset", "val_split", "workers", "amp", "amp_dtype", "compile")
    recipe = {name: value for name, value in run["settings"].items() if name not in not_recipe}
    texts = [f"{name.replace('_', ' ')} {value}" for name, value in recipe.items()]
    log(f"settings    {', '.join(texts)}")
    if DEVICE.type == "cpu" and args.dataset == DEFAULT_DATASET:
        log("note        on a CPU, the full recipe takes days")
    if checkpoint:
        best = best_row(checkpoint)
        accuracy = format(best[f"{run['eval_split']}_accuracy"], ".2%")
        log(
            f"resuming after epoch {checkpoint['epoch']} of {args.epochs} (best {accuracy} in "
            f"epoch {best['epoch']})"
        )
        if checkpoint["device"] != run["device"]:
            log(f"note        it ran on {checkpoint['device']}, and continues on {run['device']}")
        if not (args.output_dir / "best_model.pth").exists():
            log(f"note        best_model.pth is missing: it is saved once {accuracy} is beaten")


def main(argv: list[str] | None = None):
    """Train as the flags in `argv` say. Raises InputError for a mistake the user can fix."""
    args, checkpoint = open_run(argv)
    set_up()
    # Picks the fastest kernels by timing them. In eval.py, accuracies could differ between starts.
    torch.backends.cudnn.benchmark = True
    done = checkpoint.get("epoch", 0)
    if done >= args.epochs:
        if RANK == 0:
            write_results(checkpoint, args.output_dir)  # A kill may have come before this.
        log(f"nothing to train: --epochs {args.epochs}, and {plural(done, 'epoch')} done")
        log_result(args, checkpoint)
        return

    compiled = can_compile(args)
    compiling = "torch.compile in the first epoch" if compiled else "no torch.compile"
    workers = plural(workers_per_loader(args), "worker")
    log(f"device      {device_name()}, {amp_dtype(args)}, {compiling}, {workers} per split")
    with reported_as(f"cannot load --dataset {args.dataset}"):
        sources = find_splits(args.dataset)
        splits = load_splits(sources, args.val_split, checkpoint.get("classes"))
    check_batch_size(args.batch_size, len(splits["train"]))
    run = describe_run(args, splits, "test" in sources, checkpoint)
    check_ranks_agree(run)  # Nothing is written before this.
    if checkpoint and RANK == 0:
        write_results(checkpoint, args.output_dir)
    log_start(args, run, checkpoint)

    network, optimizer, scaler = build_training(args, checkpoint, len(run["classes"]))
    if compiled:
        network.compile(dynamic=False)  # in place: its state dict keeps its names
    if args.overwrite and RANK == 0:
        with reported_as(f"cannot delete the run in {args.output_dir}"):
            for name in RUN_FILES:
                (args.output_dir / name).unlink(missing_ok=True)
    try:
        train_epochs(args, run, splits, network, optimizer, scaler)
    except BaseException as error:
        if hasattr(sys, "ps1"):
            # In a notebook, the traceback's frames would keep the workers and the progress bar.
            traceback.clear_frames(error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            log("interrupted: --resume continues after the last saved epoch")
        raise
    log_result(args, run)


if __name__ == "__main__":
    run_command(main)
