"""Fine-tune an ImageNet-pretrained ResNet-50 on Stanford Cars: plain SGD, one stage, nothing frozen.

The two published runs, each on one RTX 5080:

    python train.py --resolution 448 --batch-size 64 --lr 0.05    # 91.78 % test accuracy, 50.3 min
    python train.py --resolution 224 --batch-size 128 --lr 0.1    # 89.38 % test accuracy, 18.9 min

Go on after a stop, with the settings of the run that was stopped; or train on four GPUs, with the same recipe:

    python train.py --resume
    torchrun --nproc-per-node 4 train.py --resolution 448 --batch-size 64 --lr 0.05

Try it with no GPU, no Hub and no pretrained weights, on drawn cars:

    python tests/draw_cars.py drawn_cars
    python train.py --dataset drawn_cars --weights none --resolution 64 --batch-size 16 --lr 0.004 \
        --epochs 9 --step-size 5 --output-dir drawn_run
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import RandomResizedCrop, v2
from tqdm import tqdm

try:
    from torchvision.io import decode_image
except ImportError:  # deprecated since torchvision 0.29: once it is gone, Pillow decodes all
    decode_image = None
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0…1
DEFAULT_DATASET = "tanganke/stanford_cars"
DATASET_REVISION = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # this process may use
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun has started on this machine
WORKERS = max(1, min(16, CORES // LOCAL_RANKS))
AS_BEFORE = "the checkpoints of the epochs before are as they were"
# What decides the result: kept in the checkpoints, and the same in a run and its resumption.
SETTINGS = "dataset weights resolution batch_size epochs lr momentum weight_decay step_size seed amp".split()


class InputError(Exception):
    """What the user can put right: the command ends with this message on one line and exit status 1."""


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


# ---------------------------------------------------------------- data


def locate(dataset: str, wanted: tuple[str, ...]) -> str:
    """The folder that holds the files of a data set's `wanted` splits, downloaded where it is not local.

    Raises InputError where the Hub knows no such data set, or cannot be reached and no copy is in its cache.
    """
    if Path(dataset).is_dir():
        return dataset
    source = dict(repo_id=dataset, revision=DATASET_REVISION if dataset == DEFAULT_DATASET else None)
    offline = None
    try:
        HfApi().dataset_info(**source, timeout=10)  # tried once, where snapshot_download goes on for 24 s
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(f"--dataset {dataset} is neither a folder nor a data set that the Hub shows you") from error
    except Exception as error:  # whatever the HTTP client raises without a network
        offline = first_line(error)
    try:  # not the seven corrupted copies of the test split that the repository holds too
        files = ["README.md", *(f"**/{split}-*" for split in wanted)]
        return snapshot_download(**source, repo_type="dataset", allow_patterns=files, local_files_only=bool(offline))
    except Exception as error:
        reason = offline or first_line(error)
        raise InputError(f"cannot download --dataset {dataset}, and no copy is in the cache: {reason}") from error


def load_cars(dataset: str, wanted: tuple[str, ...] = ("train", "test")) -> dict[str, datasets.Dataset]:
    """Load the `wanted` splits, and nothing else, of a Hub data set or of a local folder.

    A local folder is laid out as the Hub repository is (README.md, data/*.parquet) or as train/CLASS/*.jpg and
    test/CLASS/*.jpg. Each split has the columns `image` (still encoded) and `label` (a ClassLabel). Raises InputError
    where the data set cannot be had, lacks a split or a column, or has labels that do not fit.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    splits, folder = {}, locate(dataset, wanted)
    for split in wanted:
        # By file, as split names are looked up in a cache that does not see a local folder change.
        attempts = [(folder, {split: f"**/{split}-*.parquet"}), (folder, {split: f"{split}/**"}), (dataset, None)]
        for path, data_files in attempts[:2] if folder == dataset else attempts:
            try:
                photos = datasets.load_dataset(path, data_files=data_files, split=split)
                break
            except Exception as error:  # no such file or split, or what datasets and pyarrow raise of a damaged one
                reason = first_line(error)
        else:
            raise InputError(f"cannot load the {split} split of --dataset {dataset}: {reason}")
        kinds = {name: type(feature).__name__ for name, feature in photos.features.items()}
        if kinds.get("image") != "Image" or kinds.get("label") != "ClassLabel" or not len(photos):
            needs = "photos with the columns 'image' (Image) and 'label' (ClassLabel)"
            raise InputError(
                f"the {split} split of --dataset {dataset} needs {needs}; it has {len(photos)} with {kinds}"
            )
        for row, label in enumerate(photos["label"]):
            if label is None or not 0 <= label < photos.features["label"].num_classes:
                raise InputError(f"the {split} photo in row {row} of --dataset {dataset} has label {label}: no class")
        splits[split] = photos.cast_column("image", datasets.Image(decode=False))
    first, last = (splits[split].features["label"].names for split in (wanted[0], wanted[-1]))
    if first != last:
        names = sorted(set(first) ^ set(last)) or "the same in another order"
        raise InputError(f"the splits of --dataset {dataset} differ in their classes: {names}"[:500])
    return splits


def fingerprint(cars: dict[str, datasets.Dataset]) -> str:
    """Digest of class names, labels and file sizes, by which a data set that has changed is noticed."""
    digest = hashlib.sha256()
    for photos in cars.values():
        sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(photos.data["image"], "bytes")).to_pylist()
        digest.update(repr((photos.features["label"].names, list(photos["label"]), sizes)).encode())
    return digest.hexdigest()


def decode_photo(encoded: bytes) -> torch.Tensor:
    """Decode an image file to upright RGB: (3, H, W) uint8. Raises what its decoder raises where it is no photo."""
    with Image.open(io.BytesIO(encoded)) as photo:  # reads the header alone, and refuses decompression bombs
        if max(photo.size) > 50 * min(photo.size):
            raise ValueError(f"{photo.width} × {photo.height} pixels are no photo")
        # torchvision is a little faster than Pillow; Pillow reads more formats, and CMYK as it is meant.
        if decode_image and photo.format in ("JPEG", "PNG") and photo.mode in ("RGB", "L"):
            data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
            pixels = decode_image(data, mode="RGB", apply_exif_orientation=True)
            return v2.functional.to_dtype(pixels, torch.uint8, scale=True)  # from uint16, for a 16-bit PNG
        upright = ImageOps.exif_transpose(photo)
        if upright.mode.startswith("I;16"):  # convert() would clip it to white
            return torch.from_numpy((np.asarray(upright) // 257).astype(np.uint8)).expand(3, -1, -1)
        upright = upright.convert("RGBA") if upright.mode == "P" else upright  # else Pillow warns of transparency
        return v2.functional.pil_to_tensor(upright.convert("RGB"))


class CarPhotos(torch.utils.data.Dataset):
    """The photos of one split. An item, asked for as (epoch, row), is `crop` of the photo, and its label.

    `crop` gets (3, H, W) uint8 and R, and returns (…, 3, R, R); the item has the channels last, (…, R, R, 3), as
    decoder, resize and GPU do, so that none of them has to transpose it. What `crop` draws at random is a function of
    (seed, epoch, row), whichever worker runs it. Raises InputError, naming split and row, for a photo that cannot be
    decoded.
    """

    def __init__(self, photos: datasets.Dataset, crop: Callable, resolution: int, seed: int = 0):
        self.photos, self.crop, self.resolution, self.seed = photos, crop, resolution, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, row = key
        try:
            image, label = map(self.photos[row].get, ("image", "label"))
            photo = decode_photo(Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"])
        except Exception as error:  # each decoder raises its own
            where = f"the {self.photos.split} photo in row {row}"
            raise InputError(f"{where} cannot be decoded: {first_line(error)}") from error
        draw = np.random.SeedSequence([self.seed, epoch, row]).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(draw))
            return self.crop(photo, self.resolution).movedim(-3, -1), label


def random_crop(photo: torch.Tensor, resolution: int) -> torch.Tensor:
    """Train crop of (3, H, W) uint8: (3, R, R). RandomResizedCrop with torchvision's scale and ratio, then mirroring.

    Pixel for pixel v2's; but resizing a copy of the crop is faster, and leaves its channels last.
    """
    top, left, height, width = RandomResizedCrop.get_params(photo, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    crop = photo[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    crop = v2.functional.resize(crop, [resolution, resolution], antialias=True)[0]
    return crop.flip(-1) if torch.rand(1) < 0.5 else crop


def center_crop(photo: torch.Tensor, resolution: int, side_at_224: int = 256) -> torch.Tensor:
    """Test crop of (3, H, W) uint8: (3, R, R). The shorter side to int(R·side_at_224/224), then the centre."""
    photo = v2.functional.resize(photo, [int(resolution * side_at_224 / 224)], antialias=True)
    return v2.functional.center_crop(photo, [resolution])


def batch_keys(photos: int, batch_size: int, epochs=(0,), seed: int | None = None, rank: int = 0, ranks: int = 1):
    """Yield, batch by batch and epoch after epoch, the (epoch, row) keys that fall to one of `ranks` processes.

    The order is drawn from (seed, epoch) if there is a seed. One sampler for all epochs lets the workers begin the next
    one while the test split is evaluated.
    """
    for epoch in epochs:
        rows = range(photos) if seed is None else np.random.default_rng([seed, epoch]).permutation(photos).tolist()
        for start in range(0, photos, batch_size):
            yield [(epoch, row) for row in rows[start : start + batch_size][rank::ranks]]


def start_worker(worker: int):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops its workers
    sys.excepthook = lambda *error: None  # errors go to the main process; what is left is a pipe closed at the end


def make_loader(photos: CarPhotos, keys: Iterable, workers: int, device: torch.device) -> DataLoader:
    """Load the batches of `photos` that `keys` lists in `workers` processes."""
    pin = device.type == "cuda"
    return DataLoader(photos, batch_sampler=keys, num_workers=workers, pin_memory=pin, worker_init_fn=start_worker)


def keep_batches(batches: Iterable, kept: list) -> Iterator:
    """Yield `batches`, and keep them in `kept`: test crops are the same in every epoch."""
    for batch in batches:
        kept.append([part if part.is_pinned() else part.clone() for part in batch])  # else in scarce shared memory
        yield batch


def free_memory() -> int:
    """Bytes of main memory that are free, for this container where there is one; 0 where Linux does not tell."""
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return free if limit.startswith("max") else min(free, int(limit) - int(used))
    except FileNotFoundError as error:
        return 0 if error.filename == "/proc/meminfo" else free


@functools.cache
def imagenet_mean_std(device: torch.device) -> torch.Tensor:
    """Mean and standard deviation of ImageNet's RGB in 0…255: (2, 1, 3, 1, 1) float32 on `device`."""
    return 255 * torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).view(2, 1, 3, 1, 1)


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move (B, R, R, 3) uint8 to `device` and normalise there: (B, 3, R, R) float32, channels_last."""
    mean, std = imagenet_mean_std(device)
    return images.to(device, non_blocking=True).movedim(-1, -3).sub(mean).div_(std)


# ---------------------------------------------------------------- model


def pick_precision(device: torch.device, amp: bool) -> torch.dtype:
    """The dtype for autocast: bfloat16 where `device` computes it natively, float16 on older GPUs, else float32."""
    if amp and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # Private names: torch 2.10 has no public ones.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if amp and native else torch.float32


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint, or a bare state dict, of a ResNet-50 onto the CPU, running no code that the file may hold.

    Returns a dict whose `model` is the state dict, without the prefixes of torch.compile and DistributedDataParallel.
    Raises InputError for anything else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of the formats of files that are then refused
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = checkpoint if isinstance(checkpoint.get("model"), dict) else {"model": checkpoint}
        state = {re.sub(r"^((_orig_mod|module)\.)+", "", name): value for name, value in checkpoint["model"].items()}
        shapes = {name: value.shape for name, value in state.items()}
        with torch.device("meta"):
            expected = resnet50(num_classes=len(state["fc.bias"])).state_dict()
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it is damaged or holds more than tensors and plain values") from error
    except Exception as error:  # whatever the readers of zip files and old formats raise, and dicts of other things
        raise InputError(f"{path} cannot be read as a checkpoint of a ResNet-50: {first_line(error)}") from error
    if shapes != {name: value.shape for name, value in expected.items()}:
        raise InputError(f"{path} holds the weights of another architecture than ResNet-50")
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(f"{path} holds weights that are not finite")
    return {**checkpoint, "model": state}


def build_model(weights: str, num_classes: int) -> torch.nn.Module:
    """ResNet-50 from a torchvision weights name, a checkpoint file, or "none", with a `num_classes`-way fc.

    The fc is new for torchvision's weights, and for a file with another number of classes. Raises InputError where
    the weights cannot be had or are another architecture's.
    """
    model = resnet50(num_classes=num_classes)
    if weights == "none":
        return model
    if Path(weights).is_file():
        state = read_checkpoint(Path(weights))["model"]
    elif weights in ResNet50_Weights.__members__:
        try:
            state = ResNet50_Weights[weights].get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except Exception as error:  # no network, or a damaged file
            advice = f"check the network, and delete a damaged file in {torch.hub.get_dir()}/checkpoints"
            raise InputError(f"cannot load --weights {weights}: {first_line(error)}; {advice}") from error
    else:
        names = ", ".join(ResNet50_Weights.__members__)
        raise InputError(f"--weights {weights} is neither a file nor one of {names}, none")
    if weights in ResNet50_Weights.__members__ or len(state["fc.bias"]) != num_classes:
        del state["fc.weight"], state["fc.bias"]
    model.load_state_dict(state, strict=False)
    return model


# ---------------------------------------------------------------- one epoch, one evaluation


def sum_over_processes(values: torch.Tensor) -> list[float]:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def train_one_epoch(epoch, forward, batches, sizes, optimizer, scaler, autocast) -> tuple[float, ...]:
    """Take a step for each of `batches`, of (B, R, R, 3) uint8 crops and (B,) labels: this process's part of `sizes`.

    Returns mean loss and accuracy (0…1), over all processes, the share (0…1) of its time that this one waited for
    photos, and the seconds of the first step. Raises InputError where a loss is not finite.
    """
    losses, correct, first, waited, start = [], 0, None, 0.0, time.perf_counter()
    asked, ranks = start, dist.get_world_size() if dist.is_initialized() else 1
    for (images, targets), size in zip(batches, sizes, strict=True):
        waited += time.perf_counter() - asked
        with autocast:
            logits = forward(images)
            targets = targets.to(logits.device, non_blocking=True)
            loss = F.cross_entropy(logits, targets, reduction="sum") / size
        optimizer.zero_grad()
        scaler.scale(loss * ranks).backward()  # DistributedDataParallel takes the mean over the processes
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach().double())  # left on the device: .item() here would make the CPU wait for the GPU
        correct += (logits.argmax(1) == targets).sum()
        asked = time.perf_counter()
        first = first or asked - start
    *losses, correct = sum_over_processes(torch.stack([*losses, correct.double()]))
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} in epoch {epoch}, step {step}: use a smaller --lr; {AS_BEFORE}")
    share = waited / (time.perf_counter() - start)
    return float(np.average(losses, weights=sizes)), correct / sum(sizes), share, first


@torch.no_grad()
def evaluate(epoch, forward, batches, autocast, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy (0…1), over all processes' `batches` of (B, R, R, 3) uint8 crops and (B,) labels.

    Raises InputError where the loss is not finite.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, photos
    for images, targets in batches:
        targets = targets.to(device, non_blocking=True)
        with autocast:
            logits = forward(images).float()
        sums[0] += F.cross_entropy(logits, targets, reduction="sum")
        sums[1] += (logits.argmax(1) == targets).sum()
        sums[2] += len(targets)
    loss, correct, photos = sum_over_processes(sums)
    if not math.isfinite(loss):
        raise InputError(f"the test loss is {loss} after epoch {epoch}: use a smaller --lr; {AS_BEFORE}")
    return loss / photos, correct / photos


# ---------------------------------------------------------------- what a run writes


@contextlib.contextmanager
def whole_file(path: Path):
    """Give a name beside `path` to write to, and move it over `path` at the end: there whole, or not at all.

    Raises InputError where it cannot be written; `path` is then as it was.
    """
    draft = path.with_name(f".partial-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise InputError(f"cannot write {path}: {first_line(error)}; what was there before is whole") from error
    finally:
        draft.unlink(missing_ok=True)


def make_output_dir(folder: Path):
    """Make `folder` where it is missing; raises InputError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {folder}: {error.strerror}") from error


def write_results(checkpoint: dict, output_dir: Path):
    """Bring best_model.pth, history.csv and training_curves.png up to `checkpoint`, which holds all they need."""
    if checkpoint["best_epoch"] == checkpoint["epoch"]:
        best = {key: checkpoint[key] for key in ("model", "classes", "epoch", "settings")}
        best |= {"resolution": best["settings"]["resolution"], "test_accuracy": checkpoint["best_accuracy"]}
        with whole_file(output_dir / "best_model.pth") as draft:
            torch.save(best, draft)
    with whole_file(output_dir / "history.csv") as draft, open(draft, "w", newline="") as file:
        rows = csv.DictWriter(file, checkpoint["history"][-1])
        rows.writeheader()
        rows.writerows(checkpoint["history"])
    with whole_file(output_dir / "training_curves.png") as draft:
        plot_history(checkpoint["history"]).savefig(draft, format="png")


def plot_history(history: list[dict]) -> Figure:
    """Loss and accuracy of both splits by epoch, with each change of the learning rate marked."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    positive = all(row["train_loss"] > 0 and row["test_loss"] > 0 for row in history)
    loss.set(ylabel="cross-entropy loss", yscale="log" if positive else "linear")  # early epochs reach far up
    accuracy.set(ylabel="accuracy (%)")
    for axes, measure, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for split in ("train", "test"):
            values = [scale * row[f"{split}_{measure}"] for row in history]
            axes.plot([row["epoch"] for row in history], values, marker=".", label=split)
        for before, after in itertools.pairwise(history):
            if before["lr"] != after["lr"]:
                axes.axvline(after["epoch"] - 0.5, color="grey", linestyle=":")
                place = dict(xy=(after["epoch"] - 0.5, 1.01), xycoords=("data", "axes fraction"), ha="center")
                axes.annotate(f"lr {after['lr']:.2g}", color="grey", **place)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# ---------------------------------------------------------------- command line


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None, **limits) -> argparse.Namespace:
    """Parse `argv` (None: the command line); wrong flags and numbers outside `limits` end in one line, status 2."""
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    args = parser.parse_args(argv)
    for name, (low, high) in limits.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value:g} is not between {low:g} and {high:g}")
    return args


def parse_args(argv: list[str] | None, defaults: dict) -> argparse.Namespace:
    """The flags of train.py; `defaults` go before the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, choice = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", default=DEFAULT_DATASET, help="Hub data set or local folder (%(default)s)")
    add("--weights", default="IMAGENET1K_V2", help="torchvision weights name, state dict file or none (%(default)s)")
    add("--resolution", type=int, default=224, help="side of the crops in pixels (%(default)s)")
    add("--batch-size", type=int, default=128, help="photos in a step, over all devices (%(default)s)")
    add("--epochs", type=int, default=90, help="passes over the train split (%(default)s)")
    add("--lr", type=float, help="learning rate of the first epochs (0.1 × batch size / 128)")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (%(default)s)")
    add("--weight-decay", type=float, default=1e-4, help="weight decay of SGD (%(default)s)")
    add("--step-size", type=int, default=30, help="epochs after which lr is divided by 10 (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the new fc, the order of photos and the crops (%(default)s)")
    add("--workers", type=int, default=WORKERS, help="processes that decode photos (cores, at most 16: %(default)s)")
    add("--output-dir", type=Path, default=".", help="folder for what the run writes (%(default)s)")
    after = parser.add_mutually_exclusive_group()
    after.add_argument("--resume", action="store_true", help="go on after the last finished epoch, with its settings")
    after.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    add("--amp", action=choice, default=True, help="mixed precision, where the device computes it natively (on)")
    add("--compile", action=choice, default=torch.cuda.is_available(), help="torch.compile (on for CUDA, else off)")
    parser.set_defaults(**defaults)
    limits = dict(resolution=(32, 4096), batch_size=(1, 65536), epochs=(1, 100000), lr=(1e-9, 1e3), momentum=(0, 1))
    limits |= dict(weight_decay=(0, 1), step_size=(1, 100000), seed=(0, 2**32), workers=(0, 256))
    return parse_flags(parser, argv, **limits)


def run_command(main: Callable[[], None]) -> int:
    """Call `main` and return the exit status; what a user can put right becomes one line on standard error."""
    rank = int(os.environ.get("RANK", 0))
    if "RANK" not in os.environ:  # under torchrun, end at once: a handler would wait for the other processes
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        main()
        return 0
    except InputError as error:  # behind a worker's traceback, where it comes from a worker
        message, status = str(error).rstrip().rpartition("InputError: ")[2], 1
    except KeyboardInterrupt as stop:
        message, status = str(stop) or "stopped", 130
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            message = "the GPU's memory is full: choose a smaller --batch-size or --resolution"
        elif "DataLoader worker" in str(error):
            message = f"{first_line(error)} Finished epochs are saved; with less memory, use fewer --workers"
        else:
            raise
        status = 1
    threading.excepthook = lambda error: None  # a loader's threads that the end cuts off have nothing to add
    print(f"{Path(sys.argv[0]).name}{f' (rank {rank})' * (rank > 0)}: {message}", file=sys.stderr)
    return status


def join_processes() -> tuple[torch.device, int, int]:
    """The device of this process, its rank, and the number of processes: those that torchrun started, or one."""
    set_by_torchrun = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, ranks, local = (int(os.environ.get(name, default)) for name, default in set_by_torchrun.items())
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"this machine has {torch.cuda.device_count()} GPUs: start that many processes, at most")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if ranks == LOCAL_RANKS:  # one store outlives torchrun's restarts: no process may read what a dead one left
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=device if cuda else None)
    return device, rank, ranks


def open_run(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """Read the flags, and the checkpoint if they say --resume and there is one, whose settings they then default to.

    Raises InputError where the output folder cannot be written, where it holds a run that the flags neither resume
    nor overwrite, and where a flag differs from the settings of the run to resume.
    """
    args = parse_args(argv, {})
    make_output_dir(args.output_dir)
    names = ("last_checkpoint.pth", "best_model.pth", "history.csv")
    found = [args.output_dir / name for name in names if (args.output_dir / name).exists()]
    if args.overwrite or not found:
        return args, None
    try:
        run = read_checkpoint(found[0])
        accuracy, settings = run.get("best_accuracy", run.get("test_accuracy")), run["settings"]
        what = f"{settings['resolution']} px, epoch {run['epoch']}, best test accuracy {percent(accuracy)}"
    except (InputError, KeyError, TypeError) as error:
        what, run = first_line(error), {}
    if not args.resume or "optimizer" not in run:
        raise InputError(
            f"{args.output_dir} holds a run already ({found[0].name}: {what}): replace it with --overwrite, "
            "choose another --output-dir" + ", or go on with it with --resume" * ("optimizer" in run)
        )
    args = parse_args(argv, settings)
    for name, before in settings.items():
        if (now := getattr(args, name)) != before and not (name == "epochs" and now > before):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {now} differs from the {before} of the run to resume in {args.output_dir}")
    return args, run


def main(argv: list[str] | None = None):
    args, checkpoint = open_run(argv)
    scaled = "" if args.lr else f" (0.1 × {args.batch_size}/128)"
    args.lr = args.lr or 0.1 * args.batch_size / 128
    settings = {name: getattr(args, name) for name in SETTINGS}

    device, rank, ranks = join_processes()
    dtype = pick_precision(device, args.amp)
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    if ranks > 1 and os.environ["LOCAL_RANK"] != "0":
        dist.barrier()  # the first process of each machine downloads and prepares the data and the weights
    cars = load_cars(args.dataset)
    data, classes = fingerprint(cars), cars["train"].features["label"].names
    torch.manual_seed(args.seed)
    model = build_model("none" if checkpoint else args.weights, len(classes))
    if ranks > 1 and os.environ["LOCAL_RANK"] == "0":
        dist.barrier()
    train_count, test_count = len(cars["train"]), len(cars["test"])
    sizes = [min(args.batch_size, train_count - start) for start in range(0, train_count, args.batch_size)]
    if checkpoint and checkpoint["data"] != data:
        raise InputError(f"--dataset {args.dataset} has changed since the run in {args.output_dir} was started")
    if args.batch_size > train_count or args.batch_size % ranks:
        limit = f"at most the {train_count} train photos, and a multiple of the {ranks} processes"
        raise InputError(f"--batch-size {args.batch_size} does not fit: it has to be {limit}")
    if min(sizes) < ranks or (args.resolution == 32 and min(sizes) < 2 * ranks):
        few = f"a batch of {min(sizes)}, too small for {ranks} process(es) at --resolution {args.resolution}"
        raise InputError(f"--batch-size {args.batch_size} leaves {few}: choose another")

    model = model.to(device, memory_format=torch.channels_last)
    network = DistributedDataParallel(model, [device] if device.type == "cuda" else None) if ranks > 1 else model
    compiled, compiled_test = (torch.compile(module) if args.compile else module for module in (network, model))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.step_size, gamma=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    history = []
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        history = checkpoint["history"]
        if rank == 0:
            write_results(checkpoint, args.output_dir)  # the run may have been killed before it did

    full = args.batch_size // ranks  # the last batch is smaller, and not worth a second compilation

    def forward(images: torch.Tensor) -> torch.Tensor:
        return (compiled if len(images) == full else network)(normalize(images, device))

    def infer(images: torch.Tensor) -> torch.Tensor:
        return (compiled_test if len(images) == full else model)(normalize(images, device))

    epochs = range(len(history) + 1, args.epochs + 1)
    keys = batch_keys(train_count, args.batch_size, epochs, args.seed, rank, ranks)
    photos = CarPhotos(cars["train"], random_crop, args.resolution, args.seed)
    train_batches = iter(make_loader(photos, keys, args.workers, device))
    test_keys = [keys for keys in batch_keys(test_count, args.batch_size, rank=rank, ranks=ranks) if keys]
    crop_bytes = test_count * 3 * args.resolution**2 * LOCAL_RANKS // ranks  # on this machine
    keep, kept = crop_bytes < free_memory() / 2, []
    photos = CarPhotos(cars["test"], center_crop, args.resolution)
    # These workers start now, too: a fork in mid-run would make a large process copy each page that it then writes.
    keys = test_keys * len(epochs[:1] if keep else epochs)
    test_batches = iter(make_loader(photos, keys, args.workers, device))

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if rank == 0:
        print(
            f"""\
device  {ranks} × {name}; {str(dtype)[6:]}, channels_last{", torch.compile" * args.compile}; {args.workers} workers
data    {args.dataset}: {train_count} train and {test_count} test photos, {len(classes)} classes
        test crops ({crop_bytes / 1e9:.2f} GB) are {"kept in memory" if keep else "decoded again each epoch"}
model   ResNet-50, all {sum(p.numel() for p in model.parameters()):,} parameters, weights {args.weights}
recipe  {args.resolution} px, batch {args.batch_size}, {args.epochs} epochs of {len(sizes)} steps, seed {args.seed}
        SGD, lr {args.lr:g}{scaled}, divided by 10 every {args.step_size} epochs,
        momentum {args.momentum:g}, weight decay {args.weight_decay:g}
output  {args.output_dir}{f", resumed after epoch {len(history)}" if history else ""}""",
            flush=True,
        )

    epoch, start = len(history), time.perf_counter()
    try:
        for epoch in epochs:
            train_start, title = time.perf_counter(), f"epoch {epoch}/{args.epochs}"
            batches = itertools.islice(train_batches, len(sizes))
            bar = tqdm(batches, title, len(sizes), leave=False, disable=True if rank else None)
            model.train()
            trained = train_one_epoch(epoch, forward, bar, sizes, optimizer, scaler, autocast)
            train_loss, train_accuracy, waited, first = trained
            rate = train_count / (time.perf_counter() - train_start)
            model.eval()
            if ranks > 1:
                for buffer in model.buffers():  # each process has batch norm statistics of its own photos
                    dist.broadcast(buffer, 0)
            batches = itertools.islice(test_batches, len(test_keys))
            if keep:
                batches = kept or keep_batches(test_batches, kept)
            test_loss, test_accuracy = evaluate(epoch, infer, batches, autocast, device)
            row = dict(epoch=epoch, lr=scheduler.get_last_lr()[0], train_loss=train_loss, train_accuracy=train_accuracy)
            row |= dict(test_loss=test_loss, test_accuracy=test_accuracy, photos_per_second=rate, input_wait=waited)
            row |= dict(seconds=time.perf_counter() - start)
            start += row["seconds"]  # so that the next epoch's seconds begin with what is written after this one
            history.append(row)
            scheduler.step()
            if rank > 0:
                continue
            best = max(history, key=lambda row: row["test_accuracy"])
            checkpoint = {name: part.state_dict() for name, part in parts.items()}
            # On the CPU and contiguous: GPU and channels_last are no matter of whoever reads it.
            checkpoint["model"] = {name: value.cpu().contiguous() for name, value in checkpoint["model"].items()}
            checkpoint |= dict(epoch=epoch, best_epoch=best["epoch"], best_accuracy=best["test_accuracy"])
            checkpoint |= dict(history=history, classes=classes, settings=settings, data=data)
            with whole_file(args.output_dir / "last_checkpoint.pth") as draft:
                torch.save(checkpoint, draft)
            write_results(checkpoint, args.output_dir)
            print(
                f"{title}  lr {row['lr']:.3g}  train loss {train_loss:.4f} acc {percent(train_accuracy)}  "
                f"test loss {test_loss:.4f} acc {percent(test_accuracy)}  {row['seconds']:.1f} s  {rate:.1f} photos/s  "
                f"{waited:.0%} waiting for photos  "
                f"{(args.epochs - epoch) * row['seconds'] / 60:.1f} min left"
                + f"  (first step {first:.1f} s, with compilation)"
                * (args.compile and epoch == epochs[0]),
                flush=True,
            )
    except KeyboardInterrupt as stop:
        how = f"go on with: python train.py --resume --output-dir {args.output_dir}" if history else "nothing is saved"
        raise KeyboardInterrupt(f"stopped in epoch {epoch}; {how}") from stop
    if ranks > 1:
        dist.barrier()  # until the first process has written the last epoch
        dist.destroy_process_group()
    if rank > 0:
        return
    best, last = max(history, key=lambda row: row["test_accuracy"]), history[-1]
    print(
        f"best test accuracy {percent(best['test_accuracy'])} in epoch {best['epoch']}, chosen on the test split; "
        f"last epoch {percent(last['test_accuracy'])}; {sum(row['seconds'] for row in history) / 60:.1f} min in all"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
