"""How fast train.py and eval.py are, beside a plain reference in this file: one table, one run.

    python tests/draw_cars.py large --width 608 --train 20 --test 20    # photos as large as those of Stanford Cars
    python tests/benchmark.py --dataset large
    python tests/benchmark.py --dataset large --resolution 448 --device cuda

The reference is the textbook loop: PIL photos from `datasets`, torchvision's v1 transforms, ToTensor and Normalize in
the workers, float32, `.item()` in each step; its TTA evaluates once for the single view and once for each of the six.
Both sides are measured in turn, --repeats times; the table has medians, with the lowest and the highest in brackets.
"""

import argparse
import contextlib
import functools
import itertools
import os
import statistics
import subprocess
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import train  # noqa: E402

GMAC = 4.09  # of a forward pass of ResNet-50 for one photo at 224 px: torchvision's documentation of its weights

# ---------------------------------------------------------------- the reference


class TextbookPhotos(torch.utils.data.Dataset):
    def __init__(self, photos: datasets.Dataset, transform: Callable):
        self.photos, self.transform = photos.cast_column("image", datasets.Image()), transform

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        item = self.photos[row]
        return self.transform(item["image"].convert("RGB")), item["label"]


def textbook_loader(
    photos, steps: list, batch_size: int, workers: int, shuffle: bool = False
) -> DataLoader:
    steps = [
        *steps,
        transforms.ToTensor(),
        transforms.Normalize(train.IMAGENET_MEAN, train.IMAGENET_STD),
    ]
    return DataLoader(
        TextbookPhotos(photos, transforms.Compose(steps)), batch_size, shuffle, num_workers=workers
    )


def textbook_train_steps(resolution: int) -> list:
    return [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip()]


def textbook_test_steps(resolution: int, of_224: int = 256, mirrored: bool = False) -> list:
    steps = [transforms.Resize(int(resolution * of_224 / 224)), transforms.CenterCrop(resolution)]
    return [*steps, transforms.RandomHorizontalFlip(1.0)] if mirrored else steps


def textbook_epoch(model, optimizer, batches, device: torch.device) -> tuple[float, float]:
    model.train()
    loss_sum, correct, photos = 0.0, 0, 0
    for images, targets in batches:
        images, targets = images.to(device), targets.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(targets)
        correct += (logits.argmax(1) == targets).sum().item()
        photos += len(targets)
    return loss_sum / photos, correct / photos


@torch.no_grad()
def textbook_logits(model, batches, device: torch.device) -> torch.Tensor:
    model.eval()
    return torch.cat([model(images.to(device)).cpu() for images, _ in batches])


def textbook_tta(
    model, photos, resolution: int, batch_size: int, workers: int, device: torch.device
) -> torch.Tensor:
    """Seven passes over `photos`: the single view, then the six, whose mean logits are returned."""
    views = [(256, False), *itertools.product((224, 256, 288), (False, True))]
    passes = []
    for of_224, mirrored in views:
        steps = textbook_test_steps(resolution, of_224, mirrored)
        passes.append(
            textbook_logits(model, textbook_loader(photos, steps, batch_size, workers), device)
        )
    return torch.stack(passes[1:]).mean(0)


# ---------------------------------------------------------------- measuring


def input_rate(loader: DataLoader) -> float:
    """Photos per second of a loader, from its first batch on: without the start of its workers."""
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def timed(device: torch.device, call: Callable, *args) -> tuple[float, object]:
    """Seconds that `call` takes on `device`, and what it returns."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = call(*args)
    synchronize()
    return time.perf_counter() - start, result


def spread(values: list[float]) -> str:
    digits = 0 if min(values) >= 100 else 1 if min(values) >= 10 else 2
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


class Table:
    """Prints a Markdown row as soon as it is measured: ours, the reference's, and the ratio of their medians."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        print(
            "| photos/s | resolution | this program | reference | ratio |\n|---|---|---|---|---|",
            flush=True,
        )

    def row(self, what: str, resolution: int | str, ours: list[float], reference: list[float] = ()):
        ratio = (
            f"{statistics.median(ours) / statistics.median(reference):.2f} ×" if reference else ""
        )
        cells = [what, str(resolution), spread(ours), spread(reference) if reference else "", ratio]
        print(f"| {' | '.join(cells)} |", flush=True)

    def compare(
        self,
        what: str,
        resolution: int | str,
        ours: Callable[[], float],
        reference: Callable[[], float],
    ):
        """Measure both, which return photos/s, in turn."""
        pairs = [(ours(), reference()) for _ in range(self.repeats)]
        self.row(what, resolution, *map(list, zip(*pairs, strict=True)))


@contextlib.contextmanager
def watched(name: str, device: torch.device) -> Iterator[list]:
    """A list of (seconds, result) of each call of train.py's function `name`."""
    function, calls = getattr(train, name), []

    def watch(*args):
        calls.append(timed(device, function, *args))
        return calls[-1][1]

    setattr(train, name, watch)
    try:
        yield calls
    finally:
        setattr(train, name, function)


def repeated(photos: datasets.Dataset, count: int) -> datasets.Dataset:
    """`count` photos: the first ones, or all of them again and again."""
    return photos.select([row % len(photos) for row in range(count)])


def write_cars(cars: dict[str, datasets.Dataset], folder: Path) -> str:
    """Write both splits to `folder`, for train.py and eval.py to load."""
    (folder / "data").mkdir(parents=True)
    for split, photos in cars.items():
        photos.cast_column("image", datasets.Image()).to_parquet(
            folder / "data" / f"{split}-0.parquet"
        )
    return str(folder)


# ---------------------------------------------------------------- the rows


def input_rows(table: Table, cars: dict[str, datasets.Dataset], resolutions: list[int], count: int):
    """One core decoding, and one worker loading `count` photos."""
    photos = {split: repeated(cars[split], count) for split in ("train", "test")}
    by_pil, cpu = photos["test"].cast_column("image", datasets.Image()), torch.device("cpu")
    batch_size = min(16, count // 2)

    def rate(decode: Callable[[int], object]) -> float:
        return count / timed(cpu, lambda: [decode(row) for row in range(count)])[0]

    def ours(split: str, crop: Callable, resolution: int) -> float:
        cars = train.CarPhotos(photos[split], crop, resolution)
        return input_rate(
            train.make_loader(
                cars, list(train.split_into_batches(range(count), batch_size)), 1, False
            )
        )

    def reference(split: str, steps: list) -> float:
        return input_rate(textbook_loader(photos[split], steps, batch_size, 1))

    whole = train.CarPhotos(photos["test"], lambda photo, _: photo, 0)
    decoders = lambda row: whole[0, row], lambda row: by_pil[row]["image"].convert("RGB")
    table.compare(
        "decode only, one core", "", *(functools.partial(rate, decode) for decode in decoders)
    )
    for size in resolutions:
        for split, crop, steps in (
            ("train", train.random_crop, textbook_train_steps(size)),
            ("test", train.center_crop, textbook_test_steps(size)),
        ):
            sides = (
                functools.partial(ours, split, crop, size),
                functools.partial(reference, split, steps),
            )
            table.compare(f"{split} input, one worker", size, *sides)


def step_rows(
    table: Table, resolution: int, batch_size: int, steps: int, compiled: bool, device: torch.device
):
    """Train steps on a batch that is on the device already."""
    images = torch.randint(
        0, 256, (batch_size, resolution, resolution, 3), dtype=torch.uint8, device=device
    )
    targets = torch.randint(0, 196, (batch_size,), device=device)
    dtype = train.pick_precision(device, amp=True)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def ours(compile_model: bool) -> tuple[Callable[[], float], float]:
        model = train.build_model("none", 196).to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(
            model.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=device.type == "cuda"
        )
        network = torch.compile(model) if compile_model else model

        def epoch():
            batches = [(images, targets)] * steps
            sizes = [batch_size] * steps
            return train.train_one_epoch(
                network, batches, sizes, device, autocast, optimizer, scaler
            )

        first_epoch = timed(device, epoch)[0]  # warms up
        return lambda: batch_size * steps / timed(device, epoch)[0], first_epoch

    model = resnet50(num_classes=196).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9, weight_decay=1e-4)
    batches = [(train.normalize(images, device).contiguous(), targets)] * steps

    def reference() -> float:
        return (
            batch_size * steps / timed(device, textbook_epoch, model, optimizer, batches, device)[0]
        )

    reference()  # warms up
    table.compare("train step, batch on the device, eager", resolution, ours(False)[0], reference)
    if compiled:
        rate, first_epoch = ours(True)
        what = f"train step, batch on the device, compiled (first epoch {first_epoch:.0f} s)"
        table.compare(what, resolution, rate, reference)


def epoch_rows(
    table: Table,
    cars: dict,
    resolution: int,
    batch_size: int,
    count: int,
    args,
    device: torch.device,
):
    """train.py for two epochs and eval.py --tta, from start to end, beside the textbook's epoch and evaluations."""
    photos = {split: repeated(cars[split], count) for split in ("train", "test")}
    model = resnet50(num_classes=cars["train"].features["label"].num_classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9, weight_decay=1e-4)
    waits, rates = (
        [],
        {name: [] for name in "train first later tta plain_train plain_test plain_tta".split()},
    )

    def note(name: str, seconds: float):
        rates[name].append(count / seconds)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        common = ["--dataset", write_cars(photos, Path(folder, "cars")), "--output-dir", folder]
        common += ["--batch-size", str(batch_size), "--workers", str(args.workers)]
        recipe = (
            f"--weights none --resolution {resolution} --lr 0.001 --epochs 2 --overwrite".split()
        )
        report = ["--checkpoint", f"{folder}/best_model.pth", "--tta", "--num-gradcam", "0"]
        for _ in range(args.repeats):
            torch.compiler.reset()  # compile anew, as a new process would
            if device.type == "cuda":
                torch.cuda.empty_cache()  # of what the reference took
                torch.cuda.reset_peak_memory_stats()
            with (
                watched("train_one_epoch", device) as epochs,
                watched("evaluate", device) as evaluations,
            ):
                train.main([*common, *recipe])
            memory = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
            note("train", epochs[1][0])
            note("first", evaluations[0][0])
            note("later", evaluations[1][0])
            waits.append(epochs[1][1]["input_wait"])
            note("tta", timed(device, evaluation.main, [*common, *report])[0])

            batches = textbook_loader(
                photos["train"], textbook_train_steps(resolution), batch_size, args.workers, True
            )
            note("plain_train", timed(device, textbook_epoch, model, optimizer, batches, device)[0])
            batches = textbook_loader(
                photos["test"], textbook_test_steps(resolution), batch_size, args.workers
            )
            note("plain_test", timed(device, textbook_logits, model, batches, device)[0])
            views = model, photos["test"], resolution, batch_size, args.workers, device
            note("plain_tta", timed(device, textbook_tta, *views)[0])
    waiting = f"train epoch end to end, {statistics.median(waits):.1%} of it waiting for photos"
    table.row(waiting, resolution, rates["train"], rates["plain_train"])
    table.row("test evaluation, first epoch", resolution, rates["first"], rates["plain_test"])
    table.row("test evaluation, later epochs", resolution, rates["later"], rates["plain_test"])
    table.row("eval.py --tta end to end", resolution, rates["tta"], rates["plain_tta"])
    if device.type == "cuda":
        flops = (
            3 * 2e9 * GMAC * (resolution / 224) ** 2 * statistics.median(rates["train"])
        )  # backward: 2 × forward
        print(
            f"\n{resolution} px, batch {batch_size}: {memory / 1e9:.1f} GB of GPU memory; {flops / 1e12:.0f} TFLOP/s "
            f"in the train epoch, {matmul_flops(device) / 1e12:.0f} TFLOP/s in a bfloat16 matrix product\n"
        )


def matmul_flops(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a bfloat16 product of two (size, size) matrices: the median of twenty."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / statistics.median(timed(device, torch.matmul, a, b)[0] for _ in range(20))


def seconds_to_first_step(dataset: str, resolution: int, batch_size: int) -> float:
    """Seconds from `python train.py` to its first batch, with weights from a file, before its first step."""
    code = """if True:
        import sys, torch, train
        def first_batch(forward, batches, *rest):
            next(iter(batches))
            raise SystemExit
        train.train_one_epoch = first_batch
        train.main(sys.argv[1:])"""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.pth")
        torch.save(resnet50().state_dict(), weights)
        flags = ["--dataset", dataset, "--weights", str(weights), "--resolution", str(resolution)]
        flags += ["--batch-size", str(batch_size), "--output-dir", folder]
        command = [sys.executable, "-c", code, *flags]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default=train.DEFAULT_DATASET, help="as for train.py (%(default)s)")
    add(
        "--resolution",
        type=int,
        nargs="+",
        default=[224, 448],
        help="sides of the crops in pixels (224 448)",
    )
    add("--device", choices=["cpu", "cuda"], help="(cuda, where there is one)")
    add("--photos", type=int, help="in an epoch (8144 on CUDA; else 64 at 224 px, 16 at 448)")
    add(
        "--batch-size",
        type=int,
        help="(the recipe's on CUDA: 128 at 224 px, 64 at 448; else 8 and 4)",
    )
    add(
        "--workers",
        type=int,
        default=train.WORKERS,
        help="processes that decode photos (%(default)s)",
    )
    add("--repeats", type=int, default=3, help="measurements behind each median (%(default)s)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure compiled steps too (on)",
    )
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for train.py, which takes a GPU where it sees one
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.compiler.config.force_disable_caches = (
        args.compile
    )  # a first step has all of its compilation in it
    cars = train.load_cars(args.dataset)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    precision, sizes = (
        str(train.pick_precision(device, amp=True))[6:],
        [len(photos) for photos in cars.values()],
    )
    print(
        f"{name}; this program in {precision}, the reference in float32; {args.workers} workers; "
        f"medians of {args.repeats} (lowest–highest); torch {torch.__version__}\n{args.dataset}: {sizes} photos\n"
    )
    table = Table(args.repeats)
    input_rows(table, cars, args.resolution, args.photos or 640)
    for resolution in args.resolution:
        count = args.photos or (8144 if cuda else int(64 * (224 / resolution) ** 2))
        batch_size = args.batch_size or max(
            2, min(count, int((128 if cuda else 8) * 224 / resolution))
        )
        step_rows(table, resolution, batch_size, 30 if cuda else 4, args.compile, device)
        epoch_rows(table, cars, resolution, batch_size, count, args, device)
    start = args.dataset, args.resolution[0], min(64, len(cars["train"]))
    starts = [seconds_to_first_step(*start) for _ in range(args.repeats)]
    print(f"\nstart of train.py to its first step, weights cached: {spread(starts)} s")


if __name__ == "__main__":
    main()
