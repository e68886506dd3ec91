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
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# Set before matplotlib is imported: no window is opened, and a notebook's backend may be missing.
os.environ["MPLBACKEND"] = "agg"
if __name__ == "__main__":
    # Ctrl-C ends the process at once, which loses nothing. As an exception it can get lost in a
    # destructor, and draws tracebacks from imports, threads and workers.
    signal.signal(signal.SIGINT, lambda signal_number, frame: os._exit(130))

import datasets
import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import v2
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in 0…1
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_DATASET = "tanganke/stanford_cars"
DATASET_REVISION = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
PRETRAINED = ResNet50_Weights.__members__
# Bytes of test crops that stay in memory: at 224 px the whole test split takes 1.2 GB.
CACHED_CROPS_LIMIT = 2e9

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
        # datasets raises an error that says little, and gives the reason as its cause.
        raise InputError(f"{message}: {reason(error.__cause__ or error)}") from error


# ---------------------------------------------------------------- data


def load_cars(dataset: str, splits: tuple = ("train", "test")) -> dict[str, datasets.Dataset]:
    """Load `splits`, and nothing else, of a Hub data set or of a local folder.

    Each split has the columns `image` (still encoded) and `label` (a ClassLabel). Raises
    InputError where a split cannot be had, or where the splits differ in their classes.
    """
    datasets.disable_progress_bars()
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
            # Named, because the repository also holds seven corrupted copies of the test split.
            files = ["README.md", f"data/{split}-*"]
            folder = snapshot_download(
                dataset, repo_type="dataset", revision=DATASET_REVISION, allow_patterns=files
            )
            photos = read_folder(Path(folder), split)
        else:
            photos = datasets.load_dataset(dataset, split=split)

        columns = {name: type(feature).__name__ for name, feature in photos.features.items()}
        labelled = columns.get("image") == "Image" and columns.get("label") == "ClassLabel"
        if not labelled or not len(photos):
            required = "photos with the columns 'image' (Image) and 'label' (ClassLabel)"
            raise ValueError(f"it needs {required}, and has {len(photos)} with {columns}")
        classes = range(photos.features["label"].num_classes)
        for row, label in enumerate(photos["label"]):
            if label not in classes:
                raise ValueError(f"row {row} has label {label}, which is no class")
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
        raise ValueError(f"it has neither {split}/CLASS/*.jpg nor data/{split}-*.parquet")
    shards = re.search(r"-of-(\d+)", files[0].stem)
    if shards and int(shards[1]) != len(files):
        counted = f"it has {len(files)} of the {split} split's files"
        raise ValueError(f"{counted}; {files[0].name} says that there are {int(shards[1])}")
    # They are escaped, because datasets takes every name for a pattern.
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
    with Image.open(io.BytesIO(encoded), formats=formats) as file:
        if max(file.size) > 50 * min(file.size):  # Resizing it would fill the memory.
            raise ValueError(f"{file.width} × {file.height} pixels are no photo")
        photo = ImageOps.exif_transpose(file)
    if photo.mode.startswith("I;16"):
        # Pillow's own conversion of 16 bits would clip them to white.
        photo = Image.fromarray((np.asarray(photo) // 257).astype(np.uint8))
    if photo.mode == "P":
        # Without RGBA in between, Pillow warns that the palette's transparency is lost.
        photo = photo.convert("RGBA")
    return v2.functional.pil_to_tensor(photo.convert("RGB"))


def random_crop(photo: torch.Tensor, resolution: int) -> torch.Tensor:
    """Train crop of (3, H, W) uint8: (R, R, 3) uint8, mirrored or not."""
    crop = v2.RandomResizedCrop(resolution, antialias=True)(photo)
    return v2.RandomHorizontalFlip()(crop).movedim(0, -1)


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


def split_into_batches(rows, batch_size: int, epoch: int = 0) -> Iterator[list]:
    """Yield the (epoch, row) keys of each batch of `rows`, as far as they fall to this process."""
    for start in range(0, len(rows), batch_size):
        own_rows = rows[start : start + batch_size][RANK::PROCESSES]
        if own_rows:
            yield [(epoch, row) for row in own_rows]


def shuffled_batches(count: int, batch_size: int, epochs: Iterable[int], seed: int) -> Iterator:
    """Yield batches of keys, epoch after epoch, in an order that (seed, epoch) draws.

    One sampler for all epochs lets the workers begin the next one during the evaluation.
    """
    for epoch in epochs:
        rows = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        yield from split_into_batches(rows, batch_size, epoch)


def start_worker(worker: int):
    """Leave Ctrl-C to the main process, and end without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signal_number, frame: os._exit(0))
    # The thread that hands batches over would print a traceback once the main process has ended.
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


def load_test_batches(photos: datasets.Dataset, args: argparse.Namespace, pin: bool) -> Iterable:
    """This process's test crops, to go over in each epoch: a list, or a loader if they are large.

    Test crops never change, so that they are decoded once where memory is not short.
    """
    batches = list(split_into_batches(range(len(photos)), args.batch_size))
    crops = CarPhotos(photos, center_crop, args.resolution)
    if len(photos) * 3 * args.resolution**2 > CACHED_CROPS_LIMIT:
        return make_loader(crops, batches, args.workers, pin)
    loader = make_loader(crops, batches, args.workers, pin=False)
    # Cloned, because what a worker hands over takes shared memory, and containers have little.
    return [(images.clone(), targets.clone()) for images, targets in loader]


@functools.cache  # A copy to the GPU in each step would make the CPU wait for it.
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
    the prefixes of torch.compile and DistributedDataParallel. Raises InputError where the weights,
    or what stands beside them, cannot be of a ResNet-50 that train.py trained.
    """
    fields = {"classes": list, "resolution": int, "epoch": int, "settings": dict, "history": list}
    with reported_as(f"{path} is missing, damaged, or of another architecture than ResNet-50"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "model" not in checkpoint:
            checkpoint = {"model": checkpoint.get("state_dict", checkpoint)}
        prefix = re.compile(r"^((_orig_mod|module)\.)+")
        state = {prefix.sub("", name): value for name, value in checkpoint["model"].items()}
        num_classes = len(state.get("fc.bias", [None]))  # load_state_dict says if it is missing.
        with torch.device("meta"):
            model = resnet50(num_classes=num_classes)
        model.load_state_dict(state, assign=True)
        checkpoint["model"] = model.state_dict()
        if not all(value.isfinite().all() for value in checkpoint["model"].values()):
            raise ValueError("it holds weights that are not finite")
        for name, field_type in fields.items():
            if not isinstance(checkpoint.get(name, field_type()), field_type):
                raise ValueError(f"its {name} is no {field_type.__name__}")
        if len(checkpoint.get("classes", range(num_classes))) != num_classes:
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
        socket.setdefaulttimeout(30)  # A proxy that never answers would be waited for for ever.
        advice = (
            f"check the network, and delete a damaged file in {torch.hub.get_dir()}/checkpoints"
        )
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
    loss_sum, correct = sums  # They are views of `sums`: adding to them adds to it.
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
    try:
        with reported_as(f"cannot write {path} (the old one is whole; {free:.0f} MB are free)"):
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


def save_run(run: dict, stateful: dict, history: list[dict], output_dir: Path):
    """Write last_checkpoint.pth, which holds the whole run, and then what follows from it."""
    states = {name: component.state_dict() for name, component in stateful.items()}
    # They are stored on the CPU and contiguous, whatever the device and memory format here.
    for name, value in states["model"].items():
        states["model"][name] = value.cpu().contiguous()
    checkpoint = {**run, **states, "epoch": len(history), "history": history}
    with whole_file(output_dir / "last_checkpoint.pth") as draft:
        torch.save(checkpoint, draft)
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
    epochs = [row["epoch"] for row in history]
    for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "test"):
            values = [row[f"{split}_{measure}"] for row in history]
            axes.plot(epochs, values, marker=".", label=split)
        for before, after in itertools.pairwise(history):
            if before["lr"] != after["lr"]:
                axes.axvline(after["epoch"] - 0.5, color="grey", linestyle=":")
        axes.set(xlabel="epoch", ylabel=measure)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


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

    parse.__name__ = number_type.__name__  # argparse then says "invalid int value".
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
    with reported_as(f"another run is writing to --output-dir {folder}"):
        lock.acquire()

    last = folder / "last_checkpoint.pth"
    names = (last.name, "best_model.pth", "history.csv")
    existing = [name for name in names if (folder / name).exists()]
    if args.overwrite or not existing:
        return args, None, lock
    if not args.resume:
        raise InputError(
            f"{folder} holds a run already ({', '.join(existing)}): go on with it with --resume, "
            "replace it with --overwrite, or choose another --output-dir"
        )
    checkpoint = read_checkpoint(last)
    required = ("settings", "classes", "photos", "history", "optimizer", "scheduler", "scaler")
    if not all(name in checkpoint for name in required):
        raise InputError(f"{last} is no checkpoint to resume: it needs {', '.join(required)}")
    # The flags are parsed again, so that those that were left out are those of the run.
    args = parse_args(argv, checkpoint["settings"])
    for name in SETTINGS:
        now = getattr(args, name)
        before = checkpoint["settings"].get(name)
        if now != before and not (name == "epochs" and now > before):
            flag = f"--{name.replace('_', '-')} {now}"
            raise InputError(f"{flag} differs from the {before} of the run to resume in {folder}")
    return args, checkpoint, lock


# ---------------------------------------------------------------- process

# Regular expressions for the errors that a user can do something about, with the advice for each.
ADVICE = {
    "OutOfMemoryError": "the GPU's memory is full: choose a smaller --batch-size or --resolution",
    "no kernel image": "this build of torch was not made for this GPU: install one that was",
    "torch._(dynamo|inductor)": "torch.compile failed: try again with --no-compile",
    "/torch_|shared memory": (
        "the shared memory in /dev/shm (df -h shows its size) is too small: "
        "give the container more with --shm-size or --ipc=host, or use --workers 0"
    ),
    r"DataLoader worker \(pid": "a worker has ended: where memory was short, use fewer --workers",
    "torch.distributed|by peer": "another process of this run has ended: its message tells why",
}


def explain(error: Exception) -> str:
    """One line for an error of torch or of the system that a user can do something about, or ""."""
    described = f"{type(error)} {error}"
    for pattern, advice in ADVICE.items():
        if re.search(pattern, described):
            return f"{advice} ({reason(error)})"
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
        # Where it comes from a worker, the worker's traceback stands before it.
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


def start_process() -> torch.device:
    """Join the processes that torchrun started, if it did; returns the device of this one."""
    if RANK > 0 and PROCESSES == 1:
        raise InputError(f"RANK is {RANK} and WORLD_SIZE is not set: start it with torchrun")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if LOCAL_PROCESSES > gpus:
            raise InputError(f"this machine has {gpus} GPUs: start that many processes, at most")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if PROCESSES > 1:
        backend = dist.get_default_backend_for_device(device)
        # The timeout is long, because the others may have to wait for one that downloads.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return device


def plan_batches(args: argparse.Namespace, photos: int) -> list[int]:
    """The sizes of an epoch's batches. Raises InputError where the processes cannot share them."""
    starts = range(0, photos, args.batch_size)
    batch_sizes = [min(args.batch_size, photos - start) for start in starts]
    last_batch = batch_sizes[-1]
    # Batch norm needs two values: at 32 px the last feature map of a photo has just one.
    smallest = 2 * PROCESSES if args.resolution == 32 else PROCESSES
    if args.batch_size > photos or args.batch_size % PROCESSES or last_batch < smallest:
        raise InputError(
            f"--batch-size {args.batch_size} does not fit: it has to be at most the {photos} train "
            f"photos, a multiple of the {PROCESSES} processes, and leave a last batch of at least "
            f"{smallest} (now {last_batch}) at --resolution {args.resolution}"
        )
    return batch_sizes


def resume_run(checkpoint: dict, run: dict, stateful: dict, output_dir: Path) -> list[dict]:
    """Load the states of `checkpoint` into the components of `stateful`; returns its history."""
    for name in ("classes", "photos"):
        if checkpoint[name] != run[name]:
            dataset = run["settings"]["dataset"]
            raise InputError(f"--dataset {dataset} has changed since the run began: other {name}")
    # The run may come from another device, where the optimizer's step was another function.
    fused = stateful["optimizer"].param_groups[0]["fused"]
    checkpoint["optimizer"]["param_groups"][0]["fused"] = fused
    for name, component in stateful.items():
        if checkpoint[name]:  # The scaler of a run without float16 has no state.
            component.load_state_dict(checkpoint[name])
    history = checkpoint["history"]
    if RANK == 0:
        # A kill may have come between the files of an epoch.
        save_run(run, stateful, history, output_dir)
        try:
            read_checkpoint(output_dir / "best_model.pth")
        except InputError as error:
            best = best_epoch(history)["epoch"]
            print(f"{error}; an epoch better than {best} will write it again")
    return history


def print_plan(args, run: dict, device: torch.device, precision: torch.dtype, epochs_done: int):
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    photos = f"{run['photos']['train']} train and {run['photos']['test']} test photos"
    print(f"device    {PROCESSES} × {name}, {precision}, channels_last")
    print(f"data      {photos}, {len(run['classes'])} classes")
    print("settings ", *[f"{name}={value}" for name, value in vars(args).items()])
    if epochs_done:
        print(f"resumed after epoch {epochs_done}")
    print("Ctrl-C is safe: --resume goes on after the last finished epoch", flush=True)


def print_epoch(row: dict, epochs: int, is_first: bool):
    minutes_left = (epochs - row["epoch"]) * row["seconds"] / 60
    left = "" if is_first else f"  {minutes_left:.1f} min left"  # The first one also compiled.
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
    device = start_process()
    cuda = device.type == "cuda"
    args = None
    checkpoint = None
    if RANK == 0:
        args, checkpoint, lock = open_run(argv)  # The process holds the lock until it ends.
    if PROCESSES > 1:
        # All take the flags and the run of the first process, so that they cannot differ.
        opened = [args, checkpoint]
        dist.broadcast_object_list(opened)
        args, checkpoint = opened

    cars = load_cars(args.dataset)
    classes = cars["train"].features["label"].names
    photos = {split: len(cars[split]) for split in cars}
    batch_sizes = plan_batches(args, photos["train"])
    # Each checkpoint says this, beside its states and its history.
    run = {
        "settings": {name: getattr(args, name) for name in ("dataset", *SETTINGS)},
        "resolution": args.resolution,
        "classes": classes,
        "photos": photos,
    }

    torch.manual_seed(args.seed)
    model = build_model("none" if checkpoint else args.weights, len(classes))
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
    batch_sampler = shuffled_batches(photos["train"], args.batch_size, epochs, args.seed)
    train_batches = iter(make_loader(train_photos, batch_sampler, args.workers, pin=cuda))
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
            # Each has the batch norm statistics of its own photos: all take the first one's.
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
            save_run(run, stateful, history, args.output_dir)
            print_epoch(history[-1], args.epochs, is_first=epoch == epochs[0])

    if PROCESSES > 1:
        dist.destroy_process_group()
    if RANK == 0:
        print_summary(history)


if __name__ == "__main__":
    sys.exit(run_command(main))
