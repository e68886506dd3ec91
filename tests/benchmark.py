"""Measure the speed of train.py and eval.py beside a textbook loop, timm and NVIDIA DALI.

    python tests/draw_cars.py large --width 608     # drawn photos as large as those of Stanford Cars
    python tests/benchmark.py --dataset large       # on the GPU; with CUDA_VISIBLE_DEVICES= on the CPU

The textbook loop, in this file: PIL photos from `datasets`, torchvision's v1 transforms, ToTensor
and Normalize in the workers, float32, and `.item()` in each step. Its TTA evaluates the single view
and then each of the six; eval.py is timed with its start. On CUDA its batches are half as large:
in float32, a batch of 64 photos at 448 px needs more than 20 GB.

timm's loader (as its train.py uses it) and DALI's CPU pipeline (one thread) are measured where they
are installed: pip install timm nvidia-dali-cuda130 nvidia-nvimgcodec-cu13. DALI gets the encoded
photos from memory. Figures are medians (lowest–highest) of alternating measurements.
"""

import argparse
import contextlib
import csv
import functools
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models.resnet import resnet50

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402
import train  # noqa: E402

BATCH_SIZE = 16  # of the input rows

# ---------------------------------------------------------------- the textbook


class TextbookPhotos(torch.utils.data.Dataset):
    def __init__(self, photos: datasets.Dataset, transform: Callable):
        self.photos = photos.cast_column("image", datasets.Image())
        self.transform = transform

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        item = self.photos[row]
        return self.transform(item["image"].convert("RGB")), item["label"]


def textbook_loader(
    cars: dict, split: str, resolution: int, batch_size: int, workers: int, side=256, mirrored=0
) -> DataLoader:
    crop = [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip()]
    if split == "test":
        resize = transforms.Resize(int(resolution * side / 224))
        mirror = transforms.RandomHorizontalFlip(mirrored)
        crop = [resize, transforms.CenterCrop(resolution), mirror]
    normalize = transforms.Normalize(train.IMAGENET_MEAN, train.IMAGENET_STD)
    transform = transforms.Compose([*crop, transforms.ToTensor(), normalize])
    return DataLoader(TextbookPhotos(cars[split], transform), batch_size, num_workers=workers)


def textbook_epoch(model, optimizer, batches):
    model.train()
    loss_sum = 0.0
    for images, targets in batches:
        images = images.to(train.DEVICE)
        targets = targets.to(train.DEVICE)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(targets)


@torch.no_grad()
def textbook_logits(model, batches) -> torch.Tensor:
    model.eval()
    return torch.cat([model(images.to(train.DEVICE)).cpu() for images, _ in batches])


def textbook_tta(model, cars: dict, sizes: tuple[int, int, int]) -> torch.Tensor:
    """Seven passes over the test split: the single view, then the six, whose mean is returned."""
    passes = []
    for view in [(256, 0), *itertools.product((224, 256, 288), (0, 1))]:
        passes.append(textbook_logits(model, textbook_loader(cars, "test", *sizes, *view)))
    return torch.stack(passes[1:]).mean(0)


# ---------------------------------------------------------------- timm and DALI


def timm_loader(photos: datasets.Dataset, resolution: int, workers: int) -> DataLoader:
    """Train crops as timm's train.py loads them: PIL, bilinear, collated as uint8."""
    from timm.data import create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(
        resolution,
        is_training=True,
        use_prefetcher=True,
        color_jitter=None,
        interpolation="bilinear",
    )
    images = TextbookPhotos(photos, transform)
    return DataLoader(images, BATCH_SIZE, num_workers=workers, collate_fn=fast_collate)


def dali_batches(photos: datasets.Dataset, resolution: int, decodes_whole: bool) -> Iterator:
    """Train crops of DALI's CPU pipeline with one thread: of `photos`, once."""
    from nvidia.dali import fn, pipeline_def, types

    encoded = [np.frombuffer(photo["image"]["bytes"], np.uint8) for photo in photos]

    def next_batch() -> list:
        return [next(endless) for _ in range(BATCH_SIZE)]

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=1, device_id=None)
    def pipeline():
        photo = fn.external_source(next_batch)
        if decodes_whole:
            image = fn.decoders.image(photo, device="cpu", output_type=types.RGB)
            crop = fn.random_resized_crop(image, size=resolution, antialias=True)
        else:
            image = fn.decoders.image_random_crop(
                photo,
                device="cpu",
                output_type=types.RGB,
                random_area=(0.08, 1),
                random_aspect_ratio=(3 / 4, 4 / 3),
            )
            crop = fn.resize(image, size=[resolution, resolution], antialias=True)
        return fn.flip(crop, horizontal=fn.random.coin_flip())

    endless = itertools.cycle(encoded)
    pipe = pipeline()
    pipe.build()
    for _ in range(len(encoded) // BATCH_SIZE):
        (crops,) = pipe.run()
        yield crops, range(BATCH_SIZE)


# ---------------------------------------------------------------- measuring


def input_rate(batches: Iterator) -> float:
    """Photos per second of a loader, from its first batch on: without the start of its workers."""
    next(batches)
    start = time.perf_counter()
    photos = sum(len(labels) for _, labels in batches)
    return photos / (time.perf_counter() - start)


def seconds(call: Callable, *args) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def noting(name: str, events: list):
    """Patch train.py's function `name` to note each call in `events`: name, start, end (seconds)."""
    function = getattr(train, name)

    def call(*args, **options):
        start = time.perf_counter()
        result = function(*args, **options)
        events.append((name, start, time.perf_counter()))
        return result

    return mock.patch.object(train, name, call)


def spread(values: list[float]) -> str:
    """Median (lowest–highest)."""
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def our_loader(photos: datasets.Dataset, split: str, resolution: int, workers: int) -> DataLoader:
    """What train.py and eval.py load from `photos`, in their order."""
    args = argparse.Namespace(resolution=resolution)
    crop = {"train": train.random_crop, "test": train.center_crop}[split]
    cropped = train.CroppedPhotos(photos, split, functools.partial(crop, args))
    indices = [(row, row) for row in range(len(photos))]
    starts = range(0, len(photos), BATCH_SIZE)
    return train.make_loader(cropped, [indices[s : s + BATCH_SIZE] for s in starts], workers)


def print_row(what: str, resolution: int, ours: list[float], textbook: list[float]):
    ratio = statistics.median(ours) / statistics.median(textbook)
    cells = f"{what} | {resolution} | {spread(ours)} | {spread(textbook)} | {ratio:.2f} ×"
    print(f"| {cells} |", flush=True)


def repeated(cars: dict, count: int) -> dict:
    """`count` photos of each split: the first ones, or all of them again and again."""
    rows = range(count)
    return {split: cars[split].select([row % len(cars[split]) for row in rows]) for split in cars}


# ---------------------------------------------------------------- the rows


def input_rows(cars: dict, resolution: int, args: argparse.Namespace):
    """What a loader hands over, of both splits, with one worker and with two."""
    count = args.photos or 640
    cars = repeated(cars, count)
    for split, workers in itertools.product(cars, (1, 2)):
        textbook_batches = textbook_loader(cars, split, resolution, BATCH_SIZE, workers)
        ours = []
        textbook = []
        for _ in range(args.repeats):
            ours.append(input_rate(iter(our_loader(cars[split], split, resolution, workers))))
            textbook.append(input_rate(iter(textbook_batches)))
        print_row(f"{split} input, workers: {workers}", resolution, ours, textbook)


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # The package around it is not installed.
        return False


def peer_row(cars: dict, resolution: int, args: argparse.Namespace):
    """Train crops of this program, timm and DALI, each with one worker or thread."""
    photos = repeated(cars, args.photos or 640)["train"]
    rates = {}
    for _ in range(args.repeats):
        batches = iter(our_loader(photos, "train", resolution, 1))
        rates.setdefault("this program", []).append(input_rate(batches))
        if is_installed("timm"):
            batches = iter(timm_loader(photos, resolution, 1))
            rates.setdefault("timm", []).append(input_rate(batches))
        if is_installed("nvidia.dali"):
            for whole, name in ((False, "DALI, crop alone"), (True, "DALI, whole photo")):
                batches = dali_batches(photos, resolution, whole)
                rates.setdefault(name, []).append(input_rate(batches))
    texts = [f"{name} {spread(values)}" for name, values in rates.items()]
    print(f"train input at {resolution} px, one worker, photos/s: {', '.join(texts)}\n", flush=True)


def run_rows(cars: dict, resolution: int, args: argparse.Namespace):
    """train.py for three epochs and eval.py --tta, beside the textbook's epoch and evaluations."""
    cuda = train.DEVICE.type == "cuda"
    count = args.photos or (8144 if cuda else int(64 * (224 / resolution) ** 2))
    batch_size = min(count, int((128 if cuda else 8) * 224 / resolution))
    cars = repeated(cars, count)
    model = resnet50(num_classes=cars["train"].features["label"].num_classes).to(train.DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9, weight_decay=1e-4)
    textbook_batch_size = batch_size // 2 if cuda else batch_size
    sizes = (resolution, textbook_batch_size, train.DEFAULT_WORKERS)
    ours = []
    textbook = []
    pauses = []
    waits = []
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),
        mock.patch.object(train, "load_splits", lambda *args: cars),
        mock.patch.object(evaluation, "load_evaluated_split", lambda *args: cars["test"]),
    ):
        recipe = f"--weights none --resolution {resolution} --batch-size {batch_size} --lr 0.001"
        precision = [] if args.amp else ["--no-amp"]
        for _ in range(args.repeats):
            events = []
            with noting("evaluate", events), noting("move_and_normalize", events):
                flags = [*recipe.split(), *precision, "--epochs", "3", "--dataset", args.dataset]
                train.main([*flags, "--overwrite", "--output-dir", folder])
            with open(Path(folder) / "history.csv", newline="") as file:
                last = list(csv.DictReader(file))[-1]
            waits.append(float(last["input_wait"]))
            for (before, _, end), (_, start, _) in itertools.pairwise(events):
                if before == "evaluate":  # What follows is a train step.
                    pauses.append(start - end)
            _, start, end = events[-1]
            report = ["--output-dir", folder, "--checkpoint", f"{folder}/best_model.pth"]
            report += precision
            tta = seconds(evaluation.main, [*report, "--tta", "--num-gradcam", "0"])
            ours.append([float(last["photos_per_second"]), count / (end - start), count / tta])

            loader = textbook_loader(cars, "train", *sizes)
            epoch = seconds(textbook_epoch, model, optimizer, loader)
            test = seconds(textbook_logits, model, textbook_loader(cars, "test", *sizes))
            tta = seconds(textbook_tta, model, cars, sizes)
            textbook.append([count / epoch, count / test, count / tta])
    for column, name in enumerate(("train epoch", "test evaluation", "eval.py --tta")):
        our_rates = [rates[column] for rates in ours]
        print_row(name, resolution, our_rates, [rates[column] for rates in textbook])
    print(f"\n{resolution} px, batch {batch_size}, {count} photos an epoch:")
    print(f"waiting for photos {statistics.median(waits):.1%} of the third epoch's training")
    print(f"pause between epochs, seconds: {spread(pauses)}, the copy of the run in it")
    if cuda:
        print(f"GPU memory {torch.cuda.max_memory_reserved() / 1e9:.1f} GB, the textbook's too")
    print()


def main(argv: list[str] | None = None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # fmt: off
    add = parser.add_argument
    add("--dataset", type=train.path_or_name, default=train.DEFAULT_DATASET, help="as for train.py (%(default)s)")
    add("--resolution", type=int, nargs="+", default=[224, 448], help="of the crops (224 448)")
    add("--photos", type=int,
        help="behind a figure (640 of input; in an epoch 8144, without CUDA 64 or, at 448 px, 16)")
    add("--amp", action=argparse.BooleanOptionalAction, default=True,
        help="mixed precision in this program (on)")
    add("--repeats", type=int, default=3, help="measurements behind each median (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    sources = train.find_splits(args.dataset)
    cars = {split: train.load_split(sources, split) for split in ("train", "test")}
    precision = train.amp_dtype(argparse.Namespace(amp=args.amp, amp_dtype=None))
    print(f"{train.DEVICE.type}, {precision} beside float32, {train.DEFAULT_WORKERS} workers")
    print(f"torch {torch.__version__}, medians of {args.repeats} (lowest–highest)\n")
    for resolution in args.resolution:
        print("| photos/s | px | this program | textbook | ratio |\n|---|---|---|---|---|")
        input_rows(cars, resolution, args)
        run_rows(cars, resolution, args)
        peer_row(cars, resolution, args)


if __name__ == "__main__":
    main()
