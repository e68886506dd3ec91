"""Fine-tune an ImageNet-pretrained ResNet-50 on Stanford Cars: one stage of plain SGD.

The two published runs, each on one RTX 5080:

    python train.py --resolution 448 --batch-size 64 --lr 0.05    # 91.78 % accuracy, 50.3 min
    python train.py --resolution 224 --batch-size 128 --lr 0.1    # 89.38 % accuracy, 18.9 min

Go on after a stop, with the settings of the run that was stopped:

    python train.py --resume

Train on four GPUs, with the same recipe:

    torchrun --nproc-per-node 4 train.py --resolution 448 --batch-size 64 --lr 0.05

"""

import argparse
import contextlib
import csv
import datetime
import functools
import glob
import io
import itertools
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# Set before matplotlib is imported: no window is opened, and a notebook's backend may be missing.
os.environ["MPLBACKEND"] = "agg"
if __name__ == "__main__":
    # The imports take seconds, in which Ctrl-C would end in a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import datasets
import filelock
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import RandomResizedCrop, v2
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in 0…1
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_DATASET = "tanganke/stanford_cars"
DATASET_REVISION = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
PRETRAINED = ResNet50_Weights.__members__
# Bytes of test crops that are kept in memory: at 224 px the whole test split takes 1.2 GB.
KEPT_CROPS_LIMIT = 2e9

# torchrun sets these variables for each process that it starts.
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
# macOS and Windows do not tell which cores a process may use.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = max(1, min(16, CORES // LOCAL_PROCESSES))

# These settings decide the result: a run and its resumption have to agree in them.
RECIPE = ("resolution", "batch_size", "lr", "momentum", "weight_decay", "step_size", "epochs")
SETTINGS = (*RECIPE, "weights", "seed", "amp")


class InputError(Exception):
    """What the user can put right: the command ends with this one line and exit status 1."""


def reason(error: BaseException) -> str:
    """What `error` says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def reported_as(message: str):
    """Turn any error inside into an InputError: `message`, and the reason behind it.

    The libraries under this program raise dozens of types for damaged files and lost networks.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{message}: {reason(error.__cause__ or error)}") from error


# ---------------------------------------------------------------- data


def load_cars(dataset: str, splits: tuple = ("train", "test")) -> dict[str, datasets.Dataset]:
    """Load `splits`, and nothing else, of a Hub data set or of a local folder.

    Each split has the columns `image` (still encoded) and `label` (a ClassLabel). Raises
    InputError where a split cannot be had, or where the splits differ in their classes.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    cars = {split: load_split(dataset, split) for split in splits}
    classes = [photos.features["label"].names for photos in cars.values()]
    if classes[0] != classes[-1]:
        differing = sorted(set(classes[0]) ^ set(classes[-1]))[:5]
        raise InputError(f"the splits of --dataset {dataset} differ in their classes: {differing}")
    return cars


def load_split(dataset: str, split: str) -> datasets.Dataset:
    with reported_as(f"cannot load the {split} split of --dataset {dataset}"):
        if Path(dataset).is_dir():
            photos = read_folder(Path(dataset).resolve(), split)
        elif dataset == DEFAULT_DATASET:
            # By name, since the repository also holds seven corrupted copies of the test split.
            files = ["README.md", f"data/{split}-*"]
            folder = snapshot_download(
                dataset, repo_type="dataset", revision=DATASET_REVISION, allow_patterns=files
            )
            photos = read_folder(Path(folder), split)
        else:
            photos = datasets.load_dataset(dataset, split=split)

    columns = {name: type(feature).__name__ for name, feature in photos.features.items()}
    if columns.get("image") != "Image" or columns.get("label") != "ClassLabel" or not len(photos):
        needs = "photos with the columns 'image' (Image) and 'label' (ClassLabel)"
        text = f"the {split} split of --dataset {dataset} needs {needs}"
        raise InputError(f"{text}; it has {len(photos)} with {columns}")
    num_classes = photos.features["label"].num_classes
    for row, label in enumerate(photos["label"]):
        if label is None or not 0 <= label < num_classes:
            text = f"the {split} photo in row {row} of --dataset {dataset}"
            raise InputError(f"{text} has label {label}, which is no class")
    return photos.cast_column("image", datasets.Image(decode=False))


def read_folder(folder: Path, split: str) -> datasets.Dataset:
    """Read SPLIT/CLASS/*.jpg or, as on the Hub, data/SPLIT-*.parquet of a folder."""
    if (folder / split).is_dir():
        images = ImageFolder(folder / split)
        label = datasets.ClassLabel(names=images.classes)
        features = datasets.Features({"image": datasets.Image(), "label": label})
        columns = {"image": [path for path, _ in images.samples], "label": images.targets}
        return datasets.Dataset.from_dict(columns, features=features, split=split)

    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not files:
        wanted = f"{split}/CLASS/*.jpg nor data/{split}-*.parquet"
        raise InputError(f"--dataset {folder} has no {split} split: neither {wanted}")
    for file in files:
        shards = re.search(r"-of-(\d+)", file.stem)
        if shards and int(shards[1]) != len(files):
            text = f"{folder / 'data'} has {len(files)} of the {split} split's files"
            raise InputError(f"{text}; {file.name} says that there are {int(shards[1])}")
        with reported_as(f"{file} is damaged, or is no parquet file"):
            pyarrow.parquet.read_metadata(file)
    # Escaped, as datasets takes every name for a pattern.
    patterns = [glob.escape(str(file)) for file in files]
    names = ", ".join(file.name for file in files)
    with reported_as(f"cannot load the {split} split from {names} in {folder / 'data'}"):
        return datasets.load_dataset(str(folder), data_files={split: patterns}, split=split)


def decode_photo(encoded: bytes) -> torch.Tensor:
    """Decode an image file to upright RGB: (3, H, W) uint8, with the channels last in memory.

    Raises what Pillow raises where it is no photo, and ValueError where it is a thin line.
    """
    # The formats are listed, since Pillow would hand an EPS file to Ghostscript.
    formats = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    with Image.open(io.BytesIO(encoded), formats=formats) as photo:
        if max(photo.size) > 50 * min(photo.size):
            raise ValueError(f"{photo.width} × {photo.height} pixels are no photo")
        ImageOps.exif_transpose(photo, in_place=True)
        if photo.mode.startswith("I;16"):
            # Pillow's own conversion of 16 bits would clip them to white.
            grey = (np.asarray(photo) // 257).astype(np.uint8)
            pixels = np.stack([grey, grey, grey], axis=-1)
        elif photo.mode == "P":
            # By way of RGBA, else Pillow warns that a palette's transparency is lost.
            pixels = np.array(photo.convert("RGBA").convert("RGB"))
        else:
            pixels = np.array(photo.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def random_crop(photo: torch.Tensor, resolution: int) -> torch.Tensor:
    """Train crop of (3, H, W) uint8: (R, R, 3) uint8. RandomResizedCrop, then random mirroring.

    Pixel for pixel torchvision's v2; but resizing a copy of the crop is a third faster.
    """
    top, left, height, width = RandomResizedCrop.get_params(
        photo, scale=(0.08, 1), ratio=(3 / 4, 4 / 3)
    )
    crop = photo[None, :, top : top + height, left : left + width]
    crop = crop.contiguous(memory_format=torch.channels_last)
    crop = v2.functional.resize(crop, [resolution, resolution], antialias=True)[0]
    if torch.rand(1) < 0.5:
        crop = crop.flip(-1)
    return crop.movedim(0, -1)


def center_crop(photo: torch.Tensor, resolution: int, side_at_224: int = 256) -> torch.Tensor:
    """Test crop of (3, H, W) uint8: (R, R, 3) uint8.

    The shorter side is resized to int(R · side_at_224 / 224), then the centre is taken.
    """
    shorter_side = int(resolution * side_at_224 / 224)
    resized = v2.functional.resize(photo, [shorter_side], antialias=True)
    return v2.functional.center_crop(resized, [resolution]).movedim(0, -1)


class CarPhotos(torch.utils.data.Dataset):
    """The photos of one split. An item, asked for as (epoch, row), is a crop and its label.

    `crop` turns (3, H, W) uint8 and R into (…, R, R, 3) uint8. What it draws at random is a
    function of (seed, epoch, row) alone, so that neither the number of workers nor a stop and
    resumption changes it. Raises InputError, naming split and row, for a damaged photo.
    """

    def __init__(self, photos: datasets.Dataset, crop: Callable, resolution: int, seed: int = 0):
        self.photos = photos
        self.crop = crop
        self.resolution = resolution
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, row = key
        with reported_as(f"the {self.photos.split} photo in row {row} cannot be decoded"):
            photo = self.photos[row]
            encoded = photo["image"]["bytes"]
            if encoded is None:
                encoded = Path(photo["image"]["path"]).read_bytes()
            pixels = decode_photo(encoded)
        crop_seed = np.random.SeedSequence([self.seed, epoch, row]).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(crop_seed))
            return self.crop(pixels, self.resolution), photo["label"]


def split_into_batches(rows, batch_size: int, epoch: int = 0, rank: int = 0, processes: int = 1):
    """Lists of the (epoch, row) keys of each batch that fall to process `rank` of `processes`."""
    batches = []
    for start in range(0, len(rows), batch_size):
        own_rows = rows[start : start + batch_size][rank::processes]
        batches.append([(epoch, row) for row in own_rows])
    return batches


def shuffled_batches(count: int, batch_size: int, epochs: Iterable[int], seed: int) -> Iterator:
    """Yield this process's batches of keys, epoch after epoch; (seed, epoch) draws the order.

    One sampler for all epochs lets the workers begin the next one during the evaluation.
    """
    for epoch in epochs:
        rows = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        yield from split_into_batches(rows, batch_size, epoch, RANK, PROCESSES)


def start_worker(worker: int):
    """Leave Ctrl-C to the main process, and end without a word when that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signal_number, frame: os._exit(0))
    # The main process reports a worker's errors. Threads would add that it no longer answers.
    sys.excepthook = lambda *error: None


def make_loader(photos: CarPhotos, batches: Iterable, workers: int, pin: bool) -> DataLoader:
    """Load `batches` of keys as (B, …, R, R, 3) uint8 crops and (B,) int64 labels."""
    return DataLoader(
        photos,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=start_worker,
    )


@functools.cache
def imagenet_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of RGB in 0…255: each (3, 1, 1) float32 on `device`."""
    mean_and_std = 255 * torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)
    return mean_and_std.view(2, 3, 1, 1).unbind()


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move (B, R, R, 3) uint8 to `device`: (B, 3, R, R) float32, normalised, channels_last."""
    mean, std = imagenet_statistics(device)
    channels_first = images.to(device, non_blocking=True).movedim(-1, -3)
    return channels_first.sub(mean).div_(std)


# ---------------------------------------------------------------- model


def pick_precision(device: torch.device, amp: bool) -> torch.dtype:
    """The dtype for autocast: float16 on CUDA, bfloat16 on a CPU that has it, else float32."""
    if not amp:
        return torch.float32
    if device.type == "cuda":
        return torch.float16
    # Private names, because torch 2.10 has no public ones for this.
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint, or a bare state dict, of a ResNet-50 onto the CPU.

    No code that the file may hold is run. Returns a dict whose `model` is the state dict, without
    the prefixes of torch.compile and DistributedDataParallel. Raises InputError for all else.
    """
    with (
        reported_as(f"{path} is damaged, or of another architecture than ResNet-50"),
        warnings.catch_warnings(action="ignore"),  # They are about files that are refused then.
    ):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # Its own message tells how to run the code in the file.
            raise ValueError("it holds more than tensors and plain values") from None
        checkpoint = loaded
        if "model" not in loaded:
            checkpoint = {"model": loaded.get("state_dict", loaded)}
        prefix = re.compile(r"^((_orig_mod|module)\.)+")
        state = {prefix.sub("", name): value for name, value in checkpoint["model"].items()}
        with torch.device("meta"):
            model = resnet50(num_classes=len(state.get("fc.bias", ())))
        model.load_state_dict(state, assign=True)
        finite = all(value.isfinite().all() for value in model.state_dict().values())
    if not finite:
        raise InputError(f"{path} holds weights that are not finite")
    checkpoint["model"] = model.state_dict()
    check_fields(checkpoint, path)
    return checkpoint


def check_fields(checkpoint: dict, path: Path):
    """Raise InputError where what stands beside the weights, if anything does, makes no sense."""
    kinds = {"classes": list, "resolution": int, "epoch": int, "settings": dict, "history": list}
    for name, kind in kinds.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise InputError(f"{path} is not of train.py: its {name} is no {kind.__name__}")
    num_classes = len(checkpoint["model"]["fc.bias"])
    if len(checkpoint.get("classes", range(num_classes))) != num_classes:
        raise InputError(f"{path} names other than the {num_classes} classes of its fc")
    if not 32 <= checkpoint.get("resolution", 32) <= 4096:
        raise InputError(f"{path} says {checkpoint['resolution']} px, which is not 32 to 4096")


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
        socket.setdefaulttimeout(30)  # A proxy that never answers would be waited for for ever.
        cache = f"{torch.hub.get_dir()}/checkpoints"
        advice = f"check the network, and delete a damaged file in {cache}"
        with reported_as(f"cannot load --weights {weights} ({advice})"):
            show_bar = sys.stderr.isatty()
            state = PRETRAINED[weights].get_state_dict(progress=show_bar, check_hash=True)
    else:
        names = ", ".join(PRETRAINED)
        raise InputError(f"--weights {weights} is neither a file nor one of {names}, none")
    if weights in PRETRAINED or len(state["fc.bias"]) != num_classes:
        del state["fc.weight"], state["fc.bias"]
    model.load_state_dict(state, strict=False)
    return model


def compile_full_batches(network: torch.nn.Module, batch_size: int) -> Callable:
    """torch.compile `network` for batches of `batch_size`.

    An epoch's last batch is smaller, and not worth a second compilation.
    """
    compiled = torch.compile(network)

    def forward(images: torch.Tensor) -> torch.Tensor:
        if len(images) == batch_size:
            return compiled(images)
        return network(images)

    return forward


# ---------------------------------------------------------------- one epoch, one evaluation


def train_one_epoch(forward, batches, batch_sizes, device, autocast, optimizer, scaler) -> dict:
    """Take a step for each of `batches`: (B, R, R, 3) uint8 crops and (B,) int64 labels.

    Under torchrun they are this process's part of batches of `batch_sizes` photos. Returns mean
    loss and accuracy (0…1) over all processes, train photos per second, and the share (0…1) of
    the time that this process waited for photos.
    """
    hidden = True if RANK > 0 else None  # None hides it where standard error is no terminal.
    bar = tqdm(batches, "train", len(batch_sizes), leave=False, disable=hidden)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    loss_sum, correct = sums  # Views of it: what is added to them is added there.
    waited = 0.0
    start = time.perf_counter()
    step_end = start
    for (images, targets), batch_size in zip(bar, batch_sizes, strict=True):
        waited += time.perf_counter() - step_end
        targets = targets.to(device, non_blocking=True)
        with autocast:
            logits = forward(normalize(images, device))
            batch_loss = F.cross_entropy(logits, targets, reduction="sum")
            # DistributedDataParallel takes the mean over the processes, whatever their shares.
            loss = batch_loss * PROCESSES / batch_size
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # Summed on the device: .item() would make the CPU wait for the GPU in every step.
        loss_sum += batch_loss.detach()
        correct += (logits.argmax(1) == targets).sum()
        step_end = time.perf_counter()
    if PROCESSES > 1:
        dist.all_reduce(sums)
    photos = sum(batch_sizes)
    train_loss, train_accuracy = (sums / photos).tolist()  # Here the CPU waits for the GPU.
    seconds = time.perf_counter() - start
    return {
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "photos_per_second": photos / seconds,
        "input_wait": waited / seconds,
    }


@torch.no_grad()
def evaluate(forward, batches, device, autocast) -> dict:
    """Mean loss and accuracy (0…1), over all processes, of crops and labels as in training."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    loss_sum, correct, photos = sums
    for images, targets in batches:
        targets = targets.to(device, non_blocking=True)
        with autocast:
            logits = forward(normalize(images, device)).float()
        loss_sum += F.cross_entropy(logits, targets, reduction="sum")
        correct += (logits.argmax(1) == targets).sum()
        photos += len(targets)
    if PROCESSES > 1:
        dist.all_reduce(sums)
    return {"test_loss": (loss_sum / photos).item(), "test_accuracy": (correct / photos).item()}


# ---------------------------------------------------------------- what a run writes


@contextlib.contextmanager
def whole_file(path: Path):
    """Give a name beside `path` to write to, and move it over `path` once it is whole.

    Raises InputError where it cannot be written; `path` is then as it was.
    """
    draft = path.with_name(f".partial-{path.name}")
    free = shutil.disk_usage(path.parent).free / 1e6
    before = "what was there before is whole"
    try:
        with reported_as(f"cannot write {path} ({before}; {free:.0f} MB are free)"):
            yield draft
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def make_output_dir(folder: Path):
    """Make `folder` where it is missing; raises InputError where nothing can be written there."""
    with reported_as(f"cannot write to --output-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def best_epoch(history: list[dict]) -> dict:
    """The first of the epochs with the best test accuracy."""
    return max(history, key=lambda row: row["test_accuracy"])


def save_run(checkpoint: dict, output_dir: Path):
    """Write last_checkpoint.pth, which holds the whole run, and then what follows from it."""
    with whole_file(output_dir / "last_checkpoint.pth") as draft:
        torch.save(checkpoint, draft)
    history = checkpoint["history"]
    best = best_epoch(history)
    if best is history[-1]:
        names = ("model", "classes", "resolution", "epoch", "settings")
        best_model = {name: checkpoint[name] for name in names}
        best_model["test_accuracy"] = best["test_accuracy"]
        with whole_file(output_dir / "best_model.pth") as draft:
            torch.save(best_model, draft)
    with whole_file(output_dir / "history.csv") as draft, open(draft, "w", newline="") as file:
        rows = csv.DictWriter(file, history[-1])
        rows.writeheader()
        rows.writerows(history)
    with whole_file(output_dir / "training_curves.png") as draft:
        plot_history(history).savefig(draft, format="png")


def plot_history(history: list[dict]) -> Figure:
    """Loss and accuracy of both splits by epoch, with a dotted line at each change of lr."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")  # inches
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    loss_axes.set(ylabel="cross-entropy loss")
    accuracy_axes.set(ylabel="accuracy (0…1)")
    epochs = [row["epoch"] for row in history]
    for axes, measure in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        for split in ("train", "test"):
            values = [row[f"{split}_{measure}"] for row in history]
            axes.plot(epochs, values, marker=".", label=split)
        for before, after in itertools.pairwise(history):
            if before["lr"] != after["lr"]:
                axes.axvline(after["epoch"] - 0.5, color="grey", linestyle=":")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: a number of `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {low:g} to {high:g}")

    return parse


def parse_args(argv: list[str] | None, settings: dict | None = None) -> argparse.Namespace:
    """The flags; `settings` of a run to resume take the place of the recipe's defaults."""
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
    add("--batch-size", type=number(int, 1, 65536), default=128,
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
    add("--workers", type=number(int, 0, 256), default=WORKERS,
        help="processes that decode photos, for each split and each GPU (%(default)s)")
    add("--output-dir", type=Path, default=".", help="for what the run writes (%(default)s)")
    add("--amp", action=on_or_off, default=True, help="mixed precision, where it is native (on)")
    add("--compile", action=on_or_off, default=torch.cuda.is_available(),
        help="torch.compile (on for CUDA)")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--resume", action="store_true",
        help="go on after the last finished epoch, with its settings")
    exclusive.add_argument("--overwrite", action="store_true",
        help="replace the run that the output folder holds")
    # fmt: on

    parser.set_defaults(**(settings or {}))
    args = parser.parse_args(argv)
    if Path(args.dataset).is_dir():
        args.dataset = str(Path(args.dataset).resolve())  # eval.py may look from another folder.
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 128
    return args


def open_run(argv: list[str] | None) -> tuple:
    """Read the flags, lock the output folder, and read the run that it holds, if it is resumed.

    Returns the flags, the checkpoint or None, and the lock, which the end of the process frees.
    Raises InputError where the folder is in use or cannot be written, holds a run that the flags
    neither resume nor overwrite, or holds a run with other settings.
    """
    args = parse_args(argv)
    folder = args.output_dir
    make_output_dir(folder)
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    if RANK == 0:
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(f"another run is writing to --output-dir {folder}") from error

    last = folder / "last_checkpoint.pth"
    names = (last.name, "best_model.pth", "history.csv")
    present = [name for name in names if (folder / name).exists()]
    if args.overwrite or not present:
        return args, None, lock
    if not args.resume:
        raise InputError(
            f"{folder} holds a run already ({', '.join(present)}): go on with it with --resume, "
            "replace it with --overwrite, or choose another --output-dir"
        )
    checkpoint = read_checkpoint(last)
    needed = ("settings", "classes", "photos", "history", "optimizer", "scheduler", "scaler")
    if not all(name in checkpoint for name in needed):
        raise InputError(f"{last} is no checkpoint to resume: it needs {', '.join(needed)}")
    resumed_args = parse_args(argv, checkpoint["settings"])
    for name in SETTINGS:
        now = getattr(resumed_args, name)
        before = checkpoint["settings"].get(name)
        if now != before and not (name == "epochs" and now > before):
            flag = f"--{name.replace('_', '-')} {now}"
            raise InputError(f"{flag} differs from the {before} of the run to resume in {folder}")
    return resumed_args, checkpoint, lock


# ---------------------------------------------------------------- process


def explain(error: Exception) -> str:
    """One line for an error of torch or of the system that a user can do something about, or ""."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: choose a smaller --batch-size or --resolution"
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return f"torch.compile failed ({reason(error)}): try again with --no-compile"
    if "no kernel image" in text:
        return "this build of torch was not made for this GPU: install one that was"
    if Path("/dev/shm").is_dir() and ("/torch_" in text or "shared memory" in text):
        size = shutil.disk_usage("/dev/shm").total / 1e6
        cure = "give the container more with --shm-size or --ipc=host, or use --workers 0"
        return f"the shared memory in /dev/shm ({size:.0f} MB) is too small: {cure}"
    if "DataLoader worker" in text:
        return f"{reason(error)} Where memory was short, use fewer --workers"
    if PROCESSES > 1 and ("peer" in text or isinstance(error, dist.DistError)):
        return "another process of this run has ended: its own message tells why"
    if isinstance(error, OSError):
        return reason(error)
    return ""


def run_command(main: Callable[[], None]) -> int:
    """Call `main` and return the exit status; what a user can put right becomes one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # A console that cannot show "×" shows "?".
    try:
        main()
        sys.stdout.flush()
        return 0
    except InputError as error:
        # It stands behind the traceback of a worker, where it comes from a worker.
        message = str(error).rstrip().rpartition("InputError: ")[2]
    except BrokenPipeError:
        # Whoever reads the output, as head does, wants no more of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError) as error:
        message = explain(error)
        if not message:
            raise
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return 1


def end_on_signals(output_dir: Path):
    """Make Ctrl-C and SIGTERM end the process at once, with a line that says how to go on.

    A kill loses nothing, so that nothing has to be tidied up. An exception instead can be lost in
    a destructor, and draws tracebacks from threads and workers.
    """

    def end(signal_number, frame):
        if multiprocessing.parent_process() is None:  # This is no worker that has yet to start.
            how = "nothing is saved yet"
            if (output_dir / "last_checkpoint.pth").exists():
                folder = shlex.quote(str(output_dir))
                how = f"go on with: python train.py --resume --output-dir {folder}"
            os.write(2, f"train.py: stopped; {how}\n".encode())
        os._exit(128 + signal_number)

    # Under torchrun the default stays: no handler runs while a process waits for the others.
    if PROCESSES == 1:
        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGTERM, end)


def start_process() -> torch.device:
    """Join the processes that torchrun started, if it did; returns the device of this one."""
    if RANK > 0 and PROCESSES == 1:
        raise InputError(f"RANK is {RANK} and WORLD_SIZE is not set: start it with torchrun")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if LOCAL_PROCESSES > torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InputError(f"this machine has {count} GPUs: start that many processes, at most")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if PROCESSES == 1:
        return device

    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(hours=2),  # The others wait while one downloads.
        device_id=device if device.type == "cuda" else None,
    )
    return device


@contextlib.contextmanager
def one_process_first():
    """On each machine, let one process do what others then find done: downloads, caches."""
    if PROCESSES > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if PROCESSES > 1 and LOCAL_RANK == 0:
        dist.barrier()


def check_processes_agree(settings: dict, checkpoint: dict | None):
    """Raise InputError where torchrun's processes differ in their flags, or in what they resume."""
    if PROCESSES == 1:
        return
    epochs_done = len(checkpoint["history"]) if checkpoint else 0
    starts = [None] * PROCESSES
    dist.all_gather_object(starts, (settings, epochs_done))
    if any(start != starts[0] for start in starts):
        advice = "give each the same flags, and an --output-dir that all share"
        raise InputError(f"the processes differ in settings, or in the run to resume: {advice}")


def plan_batches(args: argparse.Namespace, photos: int) -> list[int]:
    """The sizes of an epoch's batches. Raises InputError where the processes cannot share them."""
    sizes = [min(args.batch_size, photos - start) for start in range(0, photos, args.batch_size)]
    flag = f"--batch-size {args.batch_size}"
    if args.batch_size > photos or args.batch_size % PROCESSES:
        limit = f"at most the {photos} train photos, and a multiple of the {PROCESSES} processes"
        raise InputError(f"{flag} does not fit: it has to be {limit}")
    # Batch norm needs two values: at 32 px the last feature map of a photo has just one.
    fewest = 2 * PROCESSES if args.resolution == 32 else PROCESSES
    if sizes[-1] < fewest:
        rest = f"a last batch of {sizes[-1]}, too small for {PROCESSES} process(es)"
        raise InputError(f"{flag} leaves {rest} at --resolution {args.resolution}: choose another")
    return sizes


def load_test_batches(photos: datasets.Dataset, args: argparse.Namespace, pin: bool) -> Iterable:
    """This process's test crops, to go over in each epoch: a list, or a loader if they are large.

    Test crops never change, so that they are decoded once where memory is not short.
    """
    batches = split_into_batches(range(len(photos)), args.batch_size, 0, RANK, PROCESSES)
    own_batches = [batch for batch in batches if batch]
    crops = CarPhotos(photos, center_crop, args.resolution)
    if len(photos) * 3 * args.resolution**2 > KEPT_CROPS_LIMIT:
        return make_loader(crops, own_batches, args.workers, pin)
    loader = make_loader(crops, own_batches, args.workers, pin=False)
    # Copied, because what a worker hands over takes shared memory, and containers have little.
    return [(images.clone(), targets.clone()) for images, targets in loader]


def resume_run(checkpoint: dict, run: dict, stateful: dict, output_dir: Path) -> list[dict]:
    """Put the parts of `stateful` into the states of `checkpoint`; returns its history."""
    for name in ("classes", "photos"):
        if checkpoint[name] != run[name]:
            dataset = run["settings"]["dataset"]
            raise InputError(f"--dataset {dataset} has changed since the run began: other {name}")
    fused = stateful["optimizer"].param_groups[0]["fused"]
    for name, part in stateful.items():
        if checkpoint[name]:  # The scaler of a run without float16 has no state.
            part.load_state_dict(checkpoint[name])
    # The run may come from another device, where the optimizer's step was another function.
    stateful["optimizer"].param_groups[0]["fused"] = fused
    if RANK == 0:
        save_run(checkpoint, output_dir)  # A kill may have come between the files of an epoch.
        try:
            read_checkpoint(output_dir / "best_model.pth")
        except InputError as error:
            best = best_epoch(checkpoint["history"])["epoch"]
            print(f"{error}; an epoch better than {best} will write it again")
    return checkpoint["history"]


def print_plan(args, run: dict, device: torch.device, precision: torch.dtype, epochs_done: int):
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    compiled = ", torch.compile" if args.compile else ""
    resumed = f", resumed after epoch {epochs_done}" if epochs_done else ""
    photos = run["photos"]
    print(
        f"device  {PROCESSES} × {name}; {precision}, channels_last{compiled}; "
        f"{args.workers} workers\n"
        f"data    {args.dataset}: {photos['train']} train and {photos['test']} test photos, "
        f"{len(run['classes'])} classes\n"
        f"model   ResNet-50, nothing frozen, weights {args.weights}\n"
        f"recipe  {args.resolution} px, batch {args.batch_size}, {args.epochs} epochs, "
        f"seed {args.seed}\n"
        f"        SGD, lr {args.lr:g}, divided by 10 every {args.step_size} epochs, "
        f"momentum {args.momentum:g}, weight decay {args.weight_decay:g}\n"
        f"output  {args.output_dir}{resumed}",
        flush=True,
    )


def print_epoch(row: dict, epochs: int, is_first: bool):
    minutes_left = (epochs - row["epoch"]) * row["seconds"] / 60
    left = "" if is_first else f"  {minutes_left:.1f} min left"  # The first one took longer.
    print(
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.3g}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.2%}  "
        f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:.2%}  "
        f"{row['seconds']:.1f} s  {row['photos_per_second']:.1f} photos/s  "
        f"{row['input_wait']:.0%} waiting for photos{left}",
        flush=True,
    )


def print_summary(history: list[dict]):
    best = best_epoch(history)
    minutes = sum(row["seconds"] for row in history) / 60
    print(
        f"best test accuracy {best['test_accuracy']:.2%} in epoch {best['epoch']}, chosen on the "
        f"test split; last epoch {history[-1]['test_accuracy']:.2%}; {minutes:.1f} min in all"
    )


def main(argv: list[str] | None = None):
    args, checkpoint, lock = open_run(argv)
    end_on_signals(args.output_dir)
    device = start_process()
    cuda = device.type == "cuda"
    settings = {name: getattr(args, name) for name in ("dataset", *SETTINGS)}
    check_processes_agree(settings, checkpoint)

    with one_process_first():
        cars = load_cars(args.dataset)
        classes = cars["train"].features["label"].names
        torch.manual_seed(args.seed)
        model = build_model("none" if checkpoint else args.weights, len(classes))
    photos = {split: len(cars[split]) for split in cars}
    batch_sizes = plan_batches(args, photos["train"])
    run = {
        "settings": settings,
        "resolution": args.resolution,
        "classes": classes,
        "photos": photos,
    }

    model.to(device, memory_format=torch.channels_last)
    network = DistributedDataParallel(model) if PROCESSES > 1 else model
    train_forward = network
    test_forward = model
    if args.compile:
        train_forward = compile_full_batches(network, args.batch_size // PROCESSES)
        test_forward = compile_full_batches(model, args.batch_size // PROCESSES)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=cuda
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.step_size, gamma=0.1)
    precision = pick_precision(device, args.amp)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    history = []
    if checkpoint:
        history = resume_run(checkpoint, run, stateful, args.output_dir)

    epochs = range(len(history) + 1, args.epochs + 1)
    test_batches = load_test_batches(cars["test"], args, pin=cuda)
    train_photos = CarPhotos(cars["train"], random_crop, args.resolution, args.seed)
    keys = shuffled_batches(photos["train"], args.batch_size, epochs, args.seed)
    train_batches = iter(make_loader(train_photos, keys, args.workers, pin=cuda))
    if RANK == 0:
        print_plan(args, run, device, precision, len(history))

    epoch_start = time.perf_counter()
    for epoch in epochs:
        model.train()
        batches = itertools.islice(train_batches, len(batch_sizes))
        trained = train_one_epoch(
            train_forward, batches, batch_sizes, device, autocast, optimizer, scaler
        )
        model.eval()
        if PROCESSES > 1:
            # Each process has the batch norm statistics of its own photos.
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        tested = evaluate(test_forward, test_batches, device, autocast)
        if not math.isfinite(trained["train_loss"] + tested["test_loss"]):
            advice = "use a smaller --lr; what the epochs before wrote is whole"
            raise InputError(f"the loss is not finite in epoch {epoch}: {advice}")

        seconds = time.perf_counter() - epoch_start
        epoch_start += seconds
        lr = scheduler.get_last_lr()[0]
        history.append({"epoch": epoch, "lr": lr, **trained, **tested, "seconds": seconds})
        scheduler.step()
        if RANK == 0:
            states = {name: part.state_dict() for name, part in stateful.items()}
            # On the CPU and contiguous, whatever the device and the memory format here.
            for name, value in states["model"].items():
                states["model"][name] = value.cpu().contiguous()
            save_run({**run, **states, "epoch": epoch, "history": history}, args.output_dir)
            print_epoch(history[-1], args.epochs, is_first=epoch == epochs[0])

    if PROCESSES > 1:
        dist.barrier()  # The first process may still be writing the last epoch.
        dist.destroy_process_group()
    lock.release()
    if RANK == 0:
        print_summary(history)


if __name__ == "__main__":
    sys.exit(run_command(main))
