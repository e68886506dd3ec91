"""Fine-tune an ImageNet-pretrained ResNet-50 on Stanford Cars: one stage of plain SGD.

    python train.py --resolution 448 --batch-size 64    # 91.78 % test accuracy in 50.3 min
    python train.py                                     # 224 px: 89.38 % in 18.9 min
    python train.py --resume                            # go on after a stop
    torchrun --nproc-per-node 4 train.py                # on four GPUs, each with its own batch norm

The figures are reported by github.com/patr1ckzhu/transfer-learning-stanford-cars, for one RTX 5080;
nobody has measured them with this code yet.
"""

import argparse
import contextlib
import functools
import glob
import io
import itertools
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Before the slow imports: Ctrl-C ends the process at once. Where it is ignored, it stays so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if os.path.expanduser("~") == "~":  # Caches would make a folder ~.
    os.environ["HOME"] = tempfile.gettempdir()

import datasets
import huggingface_hub
import numpy as np
import pandas
import PIL.Image
import PIL.ImageOps
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import v2
from tqdm import tqdm

try:
    from torchcodec.decoders import decode_image
except Exception as error:
    # Its libraries are linked against one build of torch, and cannot be loaded beside another.
    decode_image = None
    TORCHCODEC_ERROR = error

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in 0…1
IMAGENET_STD = (0.229, 0.224, 0.225)
PRETRAINED = ResNet50_Weights.__members__
DEFAULT_DATASET = "tanganke/stanford_cars"
DATASET_REVISION = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif", ".heic", ".heif")
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
DRAW_CROP = v2.RandomResizedCrop(size=224)  # The box does not depend on size.
WORKER_TIMEOUT = 300  # seconds; next_batches waits twice

# torchrun sets these variables for each process that it starts.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULT_WORKERS = max(1, min(16, CORES // LOCAL_WORLD_SIZE))

RUN_FILES = ("last_checkpoint.pth", "best_model.pth", "history.csv")
# The first are not stored with a run. The others may change when it is resumed: the data set may
# have moved, but its classes and numbers of photos are compared.
NOT_SETTINGS = ("output_dir", "resume", "overwrite")
FREE_SETTINGS = ("dataset", "epochs", "workers", "compile")
# No flag of train.py or eval.py may be lower.
LOWEST = dict(resolution=32, batch_size=1, epochs=1, step_size=1, lr=1e-9, momentum=0)
LOWEST.update(weight_decay=0, seed=0, workers=0, num_gradcam=0)


class InputError(Exception):
    """What the user can put right: the command ends with this one line and exit status 1."""


@contextlib.contextmanager
def reported_as(message: str):
    """Turn errors, but not OutOfMemoryError, into an InputError: `message`, and what they say."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = [str(part) for part in (error, error.__cause__) if part]
        reasons = dict.fromkeys(" ".join(text.split())[:400] for text in said)
        raise InputError(f"{message}: {'; '.join(reasons) or type(error).__name__}") from error


def say(text: str):
    """Print `text`, above the progress bar, in the first process."""
    if RANK == 0:
        tqdm.write(text)


# ---------------------------------------------------------------- data


def load_cars(dataset, splits=("train", "test"), classes=None) -> dict:
    """Load `splits` of a Hub data set or of a local folder.

    The columns are `image`, still encoded, and `label`, an index into the names `classes`: those
    of a checkpoint, or else of the first split. Raises InputError where a split cannot be had.
    """
    datasets.disable_progress_bars()
    if RANK > 0 or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    cars = {}
    for split in splits:
        with reported_as(f"cannot load the {split} split of --dataset {dataset}"):
            photos = load_split(dataset, split)
            types = [type(photos.features.get(name)) for name in ("image", "label")]
            if types != [datasets.Image, datasets.ClassLabel]:
                raise ValueError(f"it needs image: Image, label: ClassLabel, not {photos.features}")
            if len(photos) == 0:
                raise ValueError("it has no photos (save_to_disk is not read: use to_parquet)")
            classes = classes or photos.features["label"].names
            photos = label_by_name(photos, classes)
            cars[split] = photos.cast_column("image", datasets.Image(decode=False))
    return cars


def load_split(dataset: str, split: str) -> datasets.Dataset:
    """The split with its own labels: SPLIT/CLASS/*.jpg or data/SPLIT-*.parquet, or from the Hub."""
    folder = Path(dataset)
    if not folder.is_dir():
        # Several processes may ask at once: the Hub's own locks let one of them download.
        with reported_as(f"--dataset {dataset} is no folder, and cannot be had from the Hub"):
            if dataset != DEFAULT_DATASET:
                return datasets.load_dataset(dataset, split=split)
            # The repository also holds seven corrupted copies of the test split.
            files = f"data/{split}-*"
            folder = huggingface_hub.snapshot_download(
                dataset, repo_type="dataset", revision=DATASET_REVISION, allow_patterns=files
            )
    folder = Path(folder).resolve()
    if (folder / split).is_dir():
        return read_class_folders(folder / split)
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"it has neither {split}/CLASS/*.jpg nor data/{split}-*.parquet")
    shards = re.search(r"-of-(\d+)", files[0].stem)
    if shards and int(shards[1]) != len(files):
        raise ValueError(f"it has {len(files)} of the {int(shards[1])} files of {files[0]}")
    # Without an escape, datasets takes a name for a pattern.
    return datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files], split=split)


def find_photos(folder: Path) -> tuple[list[Path], int]:
    """The photos in and below `folder`, told by their suffix, and the number of other files.

    What begins with . or @ is skipped, as Macs and network disks add it. Folders behind links are
    not entered, but counted; of several links to a photo, one is taken.
    """
    photos = {}  # by their real paths
    others = 0
    os.scandir(folder).close()  # rglob skips a folder that it cannot read: this raises.
    for path in sorted(folder.rglob("*")):
        if any(part.startswith((".", "@")) for part in path.relative_to(folder).parts):
            continue
        if path.is_dir() and not path.is_symlink():
            os.scandir(path).close()
        elif path.suffix.lower() in PHOTO_SUFFIXES:
            photos.setdefault(path.resolve(), path)
        else:
            others += 1
    return list(photos.values()), others


def read_class_folders(folder: Path) -> datasets.Dataset:
    """The photos of `folder`, each in or below the folder of its class."""
    columns = {"image": [], "label": []}
    classes = []
    left_out = 0
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "@")):
            continue
        photos, others = find_photos(entry) if entry.is_dir() else ([], 1)
        left_out += others
        if photos:
            columns["image"] += map(str, photos)
            columns["label"] += [len(classes)] * len(photos)
            classes.append(entry.name)
    if left_out:
        say(f"left out  {left_out} files or links in {folder}: photos end in {PHOTO_SUFFIXES}")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    return datasets.Dataset.from_dict(columns, features=features)


def label_by_name(photos: datasets.Dataset, classes: list[str]):
    """`photos` with labels that are indices into `classes`, where its own have the same names.

    They may stand in another order: folders are sorted, and the Hub's are not. As no folder can be
    named "Ram C/V", the characters / - _ are equal, unless two of `classes` differ in nothing else.
    """
    spell = functools.partial(re.sub, "[/_]", "-")
    if len(set(map(spell, classes))) < len(classes):
        spell = str
    expected = [spell(name) for name in classes]
    own = [spell(name) for name in photos.features["label"].names]
    if sorted(own) != sorted(expected):
        missing = sorted(set(expected) - set(own))[:3]
        only_here = sorted(set(own) - set(expected))[:3]
        counts = f"{len(own)} classes, and not the {len(expected)} of training"
        raise ValueError(f"it has {counts}; only here: {only_here}, missing: {missing}")
    for row, label in enumerate(photos["label"]):
        if label not in range(len(own)):
            raise ValueError(f"row {row} has label {label}, which is no class")
    if own == expected:
        return photos
    labels = [expected.index(own[label]) for label in photos["label"]]
    feature = datasets.ClassLabel(names=classes)
    return photos.remove_columns("label").add_column("label", labels, feature=feature)


def decode_photo(encoded: bytes) -> torch.Tensor:
    """Decode an image file to upright RGB: (3, H, W) uint8, with the channels last in memory.

    Of an animation, it is the first frame. Raises ValueError for a photo more than 50 times as
    long as wide, whose crop would fill the memory, and what the decoder raises for a damaged file.
    """
    if decode_image:
        photo = decode_image(encoded)  # It is RGB and upright by EXIF.
        if photo.ndim == 4:
            photo = photo[0]
    else:
        with PIL.Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
            if image.mode.startswith("I"):
                raise ValueError("16-bit greys are read by torchcodec alone")
            upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
        photo = torch.from_numpy(np.array(upright)).movedim(-1, 0)
    height, width = photo.shape[1:]
    if max(height, width) > 50 * min(height, width):
        raise ValueError(f"{width} × {height} pixels are no photo")
    return photo


def random_crop(photo: torch.Tensor, resolution: int) -> torch.Tensor:
    """Train crop of (3, H, W) uint8: contiguous (R, R, 3) uint8, mirrored or not.

    In draws and pixels it is torchvision's RandomResizedCrop and RandomHorizontalFlip.
    """
    place = DRAW_CROP.make_params([photo])
    # resize is fast in the layout (H, W, 3), and keeps it.
    cut_out = v2.functional.crop(photo, **place).movedim(0, -1).contiguous()
    resized = v2.functional.resize(cut_out.movedim(-1, 0), [resolution] * 2, antialias=True)
    if torch.rand(1) < 0.5:
        resized = resized.flip(-1)
    return resized.movedim(0, -1)


def center_crop(photo: torch.Tensor, resolution: int, side_for_224: int = 256) -> torch.Tensor:
    """Centre crop of (3, H, W) uint8: contiguous (R, R, 3) uint8. The recipe's side is 256."""
    shorter_side = int(resolution * side_for_224 / 224)
    resized = v2.functional.resize(photo, [shorter_side], antialias=True)
    return v2.functional.center_crop(resized, [resolution]).movedim(0, -1).contiguous()


class CarPhotos(torch.utils.data.Dataset):
    """The photos of all splits. An item, asked for by (split, row, seed), is a crop and its label.

    `crops[split]` turns (3, H, W) uint8 and R into (R, R, 3) uint8, or, for eval.py, into
    (views, R, R, 3). What it draws at random follows from the seed in the key, whatever the number
    of workers. Raises InputError, naming it, for a photo that cannot be decoded.
    """

    def __init__(self, cars: dict, crops: dict[str, Callable], resolution: int):
        self.cars = cars
        self.crops = crops
        self.resolution = resolution

    def __getitems__(self, keys: list[tuple]) -> list[tuple]:
        """The items of a batch of one split, whose rows are looked up at once."""
        photos = self.cars[keys[0][0]][[row for _, row, _ in keys]]
        crops = map(self.load_crop, keys, photos["image"])
        return list(zip(crops, photos["label"], strict=True))

    def load_crop(self, key: tuple, image: dict | None) -> torch.Tensor:
        """The crop of a still encoded photo: {"bytes": …, "path": …}, of which one may be None."""
        split, row, seed = key
        if image is None or image == {"bytes": None, "path": None}:
            raise InputError(f"the {split} photo in row {row} is missing")
        name = image["path"] or f"in row {row}"
        with reported_as(f"the {split} photo {name} cannot be decoded"):
            photo = decode_photo(image["bytes"] or Path(image["path"]).read_bytes())
        # torch.manual_seed would go through all kinds of devices, which takes 0.1 ms.
        torch.default_generator.manual_seed(seed)
        return self.crops[split](photo, self.resolution)


def train_batch_sizes(num_photos: int, batch_size: int) -> list[int]:
    """How many photos each batch of an epoch has, over all processes.

    A last batch of less than an eighth of the others is left out: its batch norm statistics would
    decide a whole step, just before the evaluation. Raises InputError for what cannot be shared.
    """
    if batch_size % WORLD_SIZE or min(batch_size, num_photos) < 2 * WORLD_SIZE:
        rule = f"a multiple of {WORLD_SIZE}, with two photos or more for each process"
        raise InputError(f"--batch-size {batch_size} of {num_photos} photos has to be {rule}")
    sizes = [min(batch_size, num_photos - start) for start in range(0, num_photos, batch_size)]
    if sizes[-1] < max(sizes[0] / 8, 2 * WORLD_SIZE):
        sizes.pop()
    return sizes


def test_batches(num_photos: int, batch_size: int) -> list[list]:
    """The keys of each test batch of this process; no photo counts twice."""
    keys = [("test", row, 0) for row in range(RANK, num_photos, WORLD_SIZE)]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


def all_batches(num_train, batch_sizes, own_test_batches, epochs, seed) -> Iterator[list]:
    """Yield the keys of the run's batches, as far as they fall to this process.

    As one sampler serves all epochs, the workers load the next one during the evaluation.
    """
    for epoch in epochs:
        rng = np.random.default_rng([seed, epoch])
        rows = rng.permutation(num_train).tolist()
        crop_seeds = rng.integers(2**32, size=num_train).tolist()
        keys = zip(itertools.repeat("train"), rows, crop_seeds, strict=False)
        for batch_size in batch_sizes:
            yield list(itertools.islice(keys, batch_size))[RANK::WORLD_SIZE]
        yield from own_test_batches


def make_loader(photos: CarPhotos, key_batches: Iterable, workers: int):
    """Load batches of keys, once, as (B, R, R, 3) uint8 crops and (B,) int64 labels."""
    return DataLoader(
        photos,
        batch_sampler=key_batches,
        num_workers=workers,
        pin_memory=DEVICE.type == "cuda",
        timeout=WORKER_TIMEOUT if workers else 0,
    )


def next_batches(batches: Iterator, count: int, title: str) -> Iterator:
    """Yield the next `count` of `batches`, with a progress bar in a terminal."""
    for _ in tqdm(range(count), title, leave=False, disable=RANK > 0 or not sys.stderr.isatty()):
        try:
            yield next(batches)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            # A stop of the whole run, as by Ctrl-Z, counts as waiting, so that it tries once more.
            yield next(batches)


@functools.cache  # A copy to the GPU in each step would make the CPU wait for it.
def rgb_on_device(values: tuple) -> torch.Tensor:
    """Three values in 0…1, scaled to 0…255: (3, 1, 1) float32."""
    return 255 * torch.tensor(values, device=DEVICE).view(3, 1, 1)


def move_and_normalize(images: torch.Tensor) -> torch.Tensor:
    """Move (B, R, R, 3) uint8 to DEVICE: (B, 3, R, R) float32, normalised, channels_last."""
    channels_first = images.to(DEVICE, non_blocking=True).movedim(-1, -3)
    return channels_first.sub(rgb_on_device(IMAGENET_MEAN)).div_(rgb_on_device(IMAGENET_STD))


# ---------------------------------------------------------------- model


def pick_precision(amp: bool, amp_dtype: str | None = None) -> torch.dtype:
    """`amp_dtype`, or the device's: float16 on CUDA, bfloat16 on CPUs that have it, or float32."""
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


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint, or a bare state dict, onto the CPU; code that it may hold is not run.

    Returns a dict whose `model` is the state dict, without the prefixes of torch.compile and
    DistributedDataParallel. Raises InputError for a file that is damaged, or not of finite weights.
    """
    with reported_as(f"cannot read the checkpoint {path}"):
        if path.suffix == ".safetensors":
            raise ValueError("safetensors: torch.save what safetensors.torch.load_file returns")
        try:
            # torchvision's references and timm keep their flags beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            # torch's own message is long, and advises to run the code.
            code = re.findall(r"GLOBAL (\S+)", str(error))
            raise ValueError(f"it is damaged, or holds code that is not run {code or ''}") from None
        checkpoint = {"model": checkpoint.get("state_dict", checkpoint), **checkpoint}
        if "model_ema" in checkpoint or "state_dict_ema" in checkpoint:
            say(f"{path} also holds an EMA of the weights, which is not used")
        prefix = re.compile(r"^((_orig_mod|module)\.)+")
        state = {prefix.sub("", name): value for name, value in checkpoint["model"].items()}
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("it holds weights that are not finite")
    return {**checkpoint, "model": state}


def build_model(weights: str, num_classes: int) -> torch.nn.Module:
    """ResNet-50 with a `num_classes`-way fc, from a torchvision name, a file, or "none".

    The fc is always new: classes of equal number may be others, or in another order. Raises
    InputError where the weights cannot be had or are another network's.
    """
    model = resnet50(num_classes=num_classes)
    if weights == "none":
        return model
    with reported_as(f"cannot load --weights {weights}"):
        if weights in PRETRAINED:
            state = PRETRAINED[weights].get_state_dict(check_hash=True)
        else:
            state = read_checkpoint(Path(weights))["model"]
        state = {**state, "fc.weight": model.fc.weight, "fc.bias": model.fc.bias}
        model.load_state_dict(state)
    return model


def compile_full_batches(network: torch.nn.Module, batch_size: int) -> Callable:
    """torch.compile `network` for this batch size: an epoch's last batch is not worth a minute."""
    # By default, a second size would be compiled again, to a slower graph for any size.
    compiled = torch.compile(network, dynamic=False)

    def forward(images: torch.Tensor) -> torch.Tensor:
        if len(images) == batch_size:
            return compiled(images)
        return network(images)

    return forward


def build_states(args, checkpoint: dict, num_classes, precision) -> dict:
    """Network, optimizer, scheduler and scaler, as `checkpoint` has them, or new if it is empty."""
    torch.manual_seed(args.seed)
    # One process loads the weights: DistributedDataParallel hands them to the others.
    weights = "none" if checkpoint or RANK > 0 else args.weights
    model = build_model(weights, num_classes).to(DEVICE, memory_format=torch.channels_last)
    # Fused, it skips a step that overflows on the GPU, and the CPU need not wait for the word.
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    # Where the first step is skipped, torch would go on with momentum in uninitialised memory. From
    # zero, the momentum of the first step is its gradient, as it is without `fused`.
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.step_size, gamma=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == torch.float16)
    states = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    for name, component in states.items():
        if checkpoint.get(name):  # The scaler of a run without float16 has no state.
            component.load_state_dict(checkpoint[name])
    return states


# ---------------------------------------------------------------- one epoch, one evaluation


def train_one_epoch(forward, batches, batch_sizes, autocast, optimizer, scaler) -> dict:
    """Take a step for each of `batches`: (B, R, R, 3) uint8 crops and (B,) int64 labels.

    Under torchrun they are this process's part of batches of `batch_sizes` photos. Returns mean
    loss and accuracy (0…1) over all processes, train photos per second, and the share (0…1) of the
    time that was spent waiting for photos: on CUDA an upper bound, since the CPU runs ahead.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    loss_sum, correct = sums  # Views: adding to them adds to `sums`.
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
    train_loss, train_accuracy = (sums / num_photos).tolist()  # This waits for the GPU.
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


# ---------------------------------------------------------------- a run, from flags to files


def check_lowest(parser: argparse.ArgumentParser, args):
    """End with a line and status 2 where a flag's value is below LOWEST, or no number."""
    for name, lowest in LOWEST.items():
        value = getattr(args, name, None)
        if value is not None and not value >= lowest:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is less than {lowest}")


def parse_args(argv, settings: dict | None = None) -> argparse.Namespace:
    """The flags, with `settings` as defaults; None (workers, compile, …) is decided at a start."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    # fmt: off
    add("--dataset", default=DEFAULT_DATASET, help="Hub data set or folder (%(default)s)")
    add("--weights", default="IMAGENET1K_V2", help="of torchvision, a file or none (%(default)s)")
    add("--resolution", type=int, default=224, help="pixels of a crop's side (%(default)s)")
    add("--batch-size", type=int, default=128, help="photos in a step of all GPUs (%(default)s)")
    add("--epochs", type=int, default=90, help="passes over the train split (%(default)s)")
    add("--lr", type=float, help="first learning rate (0.1 × batch size / 128)")
    add("--momentum", type=float, default=0.9, help="SGD's momentum (%(default)s)")
    add("--weight-decay", type=float, default=1e-4, help="SGD's decay (%(default)s)")
    add("--step-size", type=int, default=30, help="epochs until lr is a tenth (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--workers", type=int, help="decoding processes per GPU (its share of cores, at most 16)")
    add("--output-dir", type=Path, default=".", help="for what the run writes (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="mixed precision (on)")
    add("--amp-dtype", choices=["float16", "bfloat16"],
        help="mixed precision's type (float16; on CPUs bfloat16 if they have it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on for CUDA)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true",
        help="go on after the last saved epoch, or begin where there is no run")
    add("--overwrite", action="store_true", help="replace the run there once an epoch is done")
    # fmt: on
    parser.set_defaults(**(settings or {}))
    args = parser.parse_args(argv)
    check_lowest(parser, args)
    if Path(args.dataset).is_dir():
        # Stored with the run, and eval.py may be started in another folder.
        args.dataset = str(Path(args.dataset).resolve())
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 128
    return args


def atomic_write(path: Path, write: Callable):
    """Let `write` fill a binary file beside `path`, and move it over `path` once it is whole.

    Raises InputError where it cannot be written; `path` is then as it was.
    """
    contents = io.BytesIO()  # torch.save to a file hides why it fails.
    write(contents)
    draft = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with reported_as(f"cannot write {path}"):
            draft.write_bytes(contents.getvalue())
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def make_output_dir(folder: Path):
    """Make `folder` where it is missing; raises InputError where nothing can be written there."""
    with reported_as(f"cannot write to --output-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def open_run(args: argparse.Namespace, argv) -> tuple:
    """The flags, and the checkpoint of the run that they resume: empty for a new one.

    Raises InputError where the folder cannot be written, or holds a run that is to stay.
    """
    folder = args.output_dir
    make_output_dir(folder)
    existing = [name for name in RUN_FILES if (folder / name).exists()]
    if existing and not (args.resume or args.overwrite):
        choice = "choose --resume, --overwrite, or another --output-dir"
        raise InputError(f"{folder} already holds {', '.join(existing)}: {choice}")
    for draft in folder.glob(".partial-*"):  # A killed run left it.
        draft.unlink(missing_ok=True)
    if args.overwrite or not existing:
        return args, {}
    checkpoint = read_checkpoint(folder / "last_checkpoint.pth")
    settings = checkpoint["settings"]
    args = parse_args(argv, settings)
    for name, of_run in settings.items():
        now = getattr(args, name)
        if now != of_run and name not in FREE_SETTINGS:
            flag = f"--{name.replace('_', '-')} {now}"
            raise InputError(f"{flag}: the run to resume in {folder} has {of_run}")
    # A kill may have come between last_checkpoint.pth and the others: all are written again.
    write_run(checkpoint, folder)
    return args, checkpoint


def copy_to_cpu(state: object) -> object:
    """A copy of a state dict, whose tensors are the CPU's, with the strides that they had."""
    if isinstance(state, torch.Tensor):
        return state.to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copy_to_cpu(value) for name, value in state.items()}
    return state


def write_run(run: dict, folder: Path):
    """Write last_checkpoint.pth and what follows from it, and then print the last epoch."""
    history = run["history"]
    atomic_write(folder / "last_checkpoint.pth", functools.partial(torch.save, run))
    best = max(history, key=lambda row: row["test_accuracy"])
    if best["epoch"] == run["epoch"]:
        names = ("model", "classes", "resolution", "epoch", "settings")
        best_model = {name: run[name] for name in names}
        best_model["test_accuracy"] = best["test_accuracy"]
        atomic_write(folder / "best_model.pth", functools.partial(torch.save, best_model))
    table = pandas.DataFrame(history)
    atomic_write(folder / "history.csv", functools.partial(table.to_csv, index=False))
    say("  ".join(f"{name} {value:.5g}" for name, value in history[-1].items()))


# ---------------------------------------------------------------- processes


def run_command(main: Callable[[], None]):
    """Call `main`; what a user can put right ends the command with one line and status 1."""
    # A console without "×" shows "?". A pipe gets each line at once, as Ctrl-C flushes nothing.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    message = ""
    try:
        main()
    except InputError as error:
        message = str(error)
        if "Original Traceback" in message:  # A worker's error ends with it.
            message = message.splitlines()[-1].partition(": ")[2]
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: use a smaller --batch-size or --resolution"
    except RuntimeError as error:
        # A worker dies of a bus error, or says "unable to write to file </torch_…>: No space left".
        if not re.search("Bus error|</torch_.*No space left", str(error)):
            raise
        message = "/dev/shm is too small: use docker's --shm-size, or --workers 0"
    else:
        # After an error, NCCL would wait here for processes that wait for this one.
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def start_process():
    """Set torch up, and join the processes that torchrun started, if it did."""
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    elif torch.backends.cuda.is_built():
        try:
            torch.cuda.init()
        except Exception as error:
            say(f"warning   no GPU can be used, and a CPU takes days: {error}")
    if decode_image is None:
        why = " ".join(str(TORCHCODEC_ERROR).split())[:200]
        say(f"warning   Pillow decodes, slowly; get torchcodec from the same index as torch: {why}")
    if WORLD_SIZE > 1:
        dist.init_process_group(dist.get_default_backend_for_device(DEVICE))


def train(args: argparse.Namespace, checkpoint: dict):
    """Train from the start, or from `checkpoint` on, and save the run after every epoch."""
    history = checkpoint.get("history", [])
    epochs = range(len(history) + 1, args.epochs + 1)
    precision = pick_precision(args.amp, args.amp_dtype)
    autocast = autocast_to(precision)
    workers = DEFAULT_WORKERS if args.workers is None else args.workers
    compiled = DEVICE.type == "cuda" if args.compile is None else args.compile
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    say(f"device    {WORLD_SIZE} × {device}, {precision}, {workers=}, {compiled=}")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    say(f"settings  {settings}")

    cars = load_cars(args.dataset, classes=checkpoint.get("classes"))
    classes = cars["train"].features["label"].names
    num_photos = {split: len(cars[split]) for split in cars}
    say(f"data      {num_photos} photos, {len(classes)} classes")
    if checkpoint and checkpoint["num_photos"] != num_photos:
        raise InputError(f"--dataset: the run began with {checkpoint['num_photos']} photos")
    batch_sizes = train_batch_sizes(num_photos["train"], args.batch_size)
    local_batch_size = args.batch_size // WORLD_SIZE
    own_test_batches = test_batches(num_photos["test"], local_batch_size)
    photos = CarPhotos(cars, {"train": random_crop, "test": center_crop}, args.resolution)
    keys = all_batches(num_photos["train"], batch_sizes, own_test_batches, epochs, args.seed)
    batches = iter(make_loader(photos, keys, workers))  # The workers start here.

    states = build_states(args, checkpoint, len(classes), precision)
    model, optimizer, scheduler, scaler = states.values()
    train_forward = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    test_forward = model
    if compiled:
        train_forward = compile_full_batches(train_forward, local_batch_size)
        test_forward = compile_full_batches(model, local_batch_size)
        say("compiling takes a minute or two of the first epoch")
    say(f"{len(history)} of {args.epochs} epochs are done; go on after a stop with --resume")
    pending_write = None
    with ThreadPoolExecutor(max_workers=1) as writer:
        for epoch in epochs:
            epoch_start = time.perf_counter()
            model.train()
            steps = next_batches(batches, len(batch_sizes), "train")
            trained = train_one_epoch(
                train_forward, steps, batch_sizes, autocast, optimizer, scaler
            )
            model.eval()
            if WORLD_SIZE > 1:
                # As in each step, the first process's batch norm statistics become everybody's.
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            steps = next_batches(batches, len(own_test_batches), "test")
            tested = evaluate(test_forward, steps, autocast)
            # The train loss may be infinite: GradScaler skips a step that overflows in float16.
            if not math.isfinite(tested["test_loss"]):
                raise InputError(f"epoch {epoch}: no finite test loss; start anew at a lower --lr")
            row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0], **trained, **tested}
            history.append({**row, "seconds": time.perf_counter() - epoch_start})
            scheduler.step()
            if RANK == 0:
                if pending_write:
                    pending_write.result()  # It raises what stopped it.
                run = {name: component.state_dict() for name, component in states.items()}
                run.update(settings=settings, classes=classes, num_photos=num_photos)
                run.update(resolution=args.resolution, epoch=epoch, history=list(history))
                # A thread writes this copy while the next epoch changes the states.
                pending_write = writer.submit(write_run, copy_to_cpu(run), args.output_dir)
        if pending_write:
            pending_write.result()
    best = max(history, key=lambda row: row["test_accuracy"])
    minutes = sum(row["seconds"] for row in history) / 60
    say(f"{minutes:.1f} min; last test accuracy {history[-1]['test_accuracy']:.2%}")
    say(f"best {best['test_accuracy']:.2%}, in epoch {best['epoch']}: chosen on the test split")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    start_process()
    opened = [open_run(args, argv) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        # All take the flags and the run of the first process, so that they cannot differ.
        dist.broadcast_object_list(opened)
    train(*opened[0])


if __name__ == "__main__":
    run_command(main)
