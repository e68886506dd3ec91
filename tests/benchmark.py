"""How fast train.py and eval.py are, beside a textbook loop in this file: one table, one run.

    python tests/draw_cars.py large --width 608     # drawn photos of the size of Stanford Cars'
    python tests/benchmark.py --dataset large       # on the GPU, if there is one
    CUDA_VISIBLE_DEVICES= python tests/benchmark.py --dataset large --resolution 448

The textbook is PIL photos from `datasets`, torchvision's v1 transforms, ToTensor and Normalize in
the workers, float32, and `.item()` in each step; its TTA evaluates the single view, and then each
of the six. Both are measured in turn; the table has medians, with the lowest and the highest.
"""

import argparse
import contextlib
import csv
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models.resnet import resnet50

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402
import train  # noqa: E402

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


def textbook_loader(photos, crop: list, batch_size: int, workers: int) -> DataLoader:
    normalize = transforms.Normalize(train.IMAGENET_MEAN, train.IMAGENET_STD)
    transform = transforms.Compose([*crop, transforms.ToTensor(), normalize])
    return DataLoader(TextbookPhotos(photos, transform), batch_size, num_workers=workers)


def textbook_crop(split: str, resolution: int, side_for_224: int = 256, mirrored=False) -> list:
    if split == "train":
        return [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip()]
    resize = transforms.Resize(int(resolution * side_for_224 / 224))
    mirror = transforms.RandomHorizontalFlip(float(mirrored))
    return [resize, transforms.CenterCrop(resolution), mirror]


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


def textbook_tta(model, photos, resolution: int, batch_size: int, workers: int) -> torch.Tensor:
    """Seven passes over `photos`: the single view, then the six, whose mean logits are returned."""
    passes = []
    for side, mirrored in [(256, False), *itertools.product((224, 256, 288), (False, True))]:
        crop = textbook_crop("test", resolution, side, mirrored)
        passes.append(textbook_logits(model, textbook_loader(photos, crop, batch_size, workers)))
    return torch.stack(passes[1:]).mean(0)


# ---------------------------------------------------------------- measuring


def input_rate(loader: DataLoader) -> float:
    """Photos per second of a loader, from its first batch on: without the start of its workers."""
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    photos = sum(len(labels) for _, labels in batches)
    return photos / (time.perf_counter() - start)


def seconds(call: Callable, *args) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


@contextlib.contextmanager
def watched(name: str) -> Iterator[list]:
    """The (start, end) of each call of train.py's function `name`, in seconds."""
    function = getattr(train, name)
    spans = []

    def watch(*args, **options):
        start = time.perf_counter()
        result = function(*args, **options)
        spans.append((start, time.perf_counter()))
        return result

    setattr(train, name, watch)
    try:
        yield spans
    finally:
        setattr(train, name, function)


def spread(values: list[float]) -> str:
    digits = 2
    if min(values) >= 100:
        digits = 0
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def print_row(what: str, resolution: int, ours: list[float], textbook: list[float]):
    ratio = statistics.median(ours) / statistics.median(textbook)
    cells = [what, str(resolution), spread(ours), spread(textbook), f"{ratio:.2f} ×"]
    print(f"| {' | '.join(cells)} |", flush=True)


def repeated(photos: datasets.Dataset, count: int) -> datasets.Dataset:
    """`count` photos: the first ones, or all of them again and again."""
    return photos.select([row % len(photos) for row in range(count)])


# ---------------------------------------------------------------- the rows


def input_rows(cars: dict, resolution: int, args: argparse.Namespace):
    """What a loader hands over, of both splits, with one worker and with two."""
    cars = {split: repeated(photos, args.input_photos) for split, photos in cars.items()}
    crops = {"train": train.random_crop, "test": train.center_crop}
    batch_size = 16
    for split, workers in itertools.product(cars, (1, 2)):
        ours = []
        textbook = []
        for repeat in range(args.repeats):
            rows = range(args.input_photos)
            keys = [(split, repeat, row) for row in rows]
            batches = [keys[start : start + batch_size] for start in rows[::batch_size]]
            photos = train.CarPhotos(cars, crops, resolution)
            ours.append(input_rate(train.make_loader(photos, batches, workers)))
            crop = textbook_crop(split, resolution)
            textbook.append(input_rate(textbook_loader(cars[split], crop, batch_size, workers)))
        print_row(f"{split} input, workers: {workers}", resolution, ours, textbook)


def run_rows(cars: dict, resolution: int, args: argparse.Namespace):
    """train.py for three epochs and eval.py --tta, beside the textbook's epoch and evaluations."""
    cuda = train.DEVICE.type == "cuda"
    count = args.photos or (8144 if cuda else int(64 * (224 / resolution) ** 2))
    batch_size = args.batch_size or int((128 if cuda else 8) * 224 / resolution)
    cars = {split: repeated(photos, count) for split, photos in cars.items()}
    model = resnet50(num_classes=cars["train"].features["label"].num_classes).to(train.DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9, weight_decay=1e-4)
    names = ("train epoch", "test evaluation", "eval.py --tta, with its start")
    ours = {name: [] for name in names}
    textbook = {name: [] for name in names}
    pauses = []
    waits = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        (Path(folder) / "data").mkdir()
        for split, photos in cars.items():
            photos = photos.cast_column("image", datasets.Image())
            photos.to_parquet(Path(folder) / "data" / f"{split}-0.parquet")
        common = ["--dataset", folder, "--output-dir", folder, "--workers", str(args.workers)]
        recipe = f"--weights none --resolution {resolution} --batch-size {batch_size} --lr 0.001"
        flags = [*common, *recipe.split(), "--epochs", "3", "--overwrite"]
        report = [*common, "--checkpoint", f"{folder}/best_model.pth", "--tta"]
        for _ in range(args.repeats):
            with watched("evaluate") as evaluations, watched("move_and_normalize") as steps:
                train.main(flags)
            with open(Path(folder) / "history.csv", newline="") as file:
                last = list(csv.DictReader(file))[-1]
            ours["train epoch"].append(float(last["photos_per_second"]))
            waits.append(float(last["input_wait"]))
            start, end = evaluations[-1]
            ours["test evaluation"].append(count / (end - start))
            for _, end in evaluations[:-1]:
                pauses.append(min(start for start, _ in steps if start > end) - end)
            tta = seconds(evaluation.main, [*report, "--num-gradcam", "0"])
            ours["eval.py --tta, with its start"].append(count / tta)

            loader = textbook_loader(
                cars["train"], textbook_crop("train", resolution), batch_size, args.workers
            )
            epoch = seconds(textbook_epoch, model, optimizer, loader)
            textbook["train epoch"].append(count / epoch)
            loader = textbook_loader(
                cars["test"], textbook_crop("test", resolution), batch_size, args.workers
            )
            textbook["test evaluation"].append(count / seconds(textbook_logits, model, loader))
            tta = seconds(textbook_tta, model, cars["test"], resolution, batch_size, args.workers)
            textbook["eval.py --tta, with its start"].append(count / tta)
    for name in names:
        print_row(name, resolution, ours[name], textbook[name])
    print(f"\n{resolution} px, batch {batch_size}, {count} photos an epoch:")
    print(f"waiting for photos {statistics.median(waits):.1%} of the third epoch's training")
    print(f"pause between epochs, seconds: {spread(pauses)}, the copy of the run in it")
    if cuda:
        print(f"GPU memory {torch.cuda.max_memory_reserved() / 1e9:.1f} GB, the textbook's too")
    print(flush=True)


def main(argv: list[str] | None = None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # fmt: off
    add = parser.add_argument
    add("--dataset", default=train.DEFAULT_DATASET, help="as for train.py (%(default)s)")
    add("--resolution", type=int, nargs="+", default=[224, 448],
        help="sides of the crops in pixels (224 448)")
    add("--photos", type=int, help="in an epoch (8144 on CUDA; else 64 at 224 px, 16 at 448)")
    add("--input-photos", type=int, default=640, help="for the rows of input (%(default)s)")
    add("--batch-size", type=int,
        help="(the recipe's on CUDA: 128 at 224 px, 64 at 448; else 8 and 4)")
    add("--workers", type=int, default=train.DEFAULT_WORKERS,
        help="processes that decode photos, but for the rows of input (%(default)s)")
    add("--repeats", type=int, default=3, help="measurements behind each median (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    cars = train.load_cars(args.dataset)
    print(
        f"{train.DEVICE.type}, {train.pick_precision(amp=True)} beside float32, {args.workers} workers"
    )
    print(f"torch {torch.__version__}, medians of {args.repeats} (lowest–highest)\n")
    for resolution in args.resolution:
        print("| photos/s | px | this program | textbook | ratio |\n|---|---|---|---|---|")
        input_rows(cars, resolution, args)
        run_rows(cars, resolution, args)


if __name__ == "__main__":
    main()
