"""Evaluate a checkpoint of train.py: accuracies, kinds of errors, six-view TTA, GradCAM.

    python eval.py                              # best_model.pth on the test split it was chosen on
    python eval.py --tta --num-gradcam 32       # also the average of six views; more GradCAM photos
    python eval.py --images car.jpg holidays    # the five likeliest classes of your own photos

TTA is the mean of the logits of three scales, each as it is and mirrored. The figures reported by
github.com/patr1ckzhu/transfer-learning-stanford-cars: at 448 px 91.78 %, with TTA 91.93 %; at
224 px 89.38 % and 90.32 %.
"""

import argparse
import contextlib
import functools
import glob
import io
import json
import math
import os
import platform
import re
import signal
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Set before pytorch_grad_cam imports pyplot, since a notebook's backend may be missing.
os.environ["MPLBACKEND"] = "agg"
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # As in train.py.

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import binomtest
from torchvision.models import resnet50

import train
from train import CarPhotos, InputError, move_and_normalize

# ---------------------------------------------------------------- model


def load_model(checkpoint: dict) -> torch.nn.Module:
    """The ResNet-50 of `checkpoint`, on the GPU if there is one."""
    model = resnet50(num_classes=len(checkpoint["model"]["fc.bias"]))
    model.load_state_dict(checkpoint["model"])
    model.to(train.DEVICE, memory_format=torch.channels_last).eval()
    # GradCAM takes gradients at the last block: through the rest, they would keep all activations.
    model.requires_grad_(False)
    model.layer4[-1].requires_grad_(True)
    return model


def crop_views(photo: torch.Tensor, resolution: int, tta: bool) -> torch.Tensor:
    """Centre crops of a (3, H, W) uint8 photo: (V, R, R, 3) uint8.

    The first is the view that training is tested on (shorter side int(R·256/224)); with `tta`,
    one of shorter side R and one of int(R·288/224) follow.
    """
    sides = (256, 224, 288) if tta else (256,)
    return torch.stack([train.center_crop(photo, resolution, side) for side in sides])


@torch.no_grad()
def predict(model, views: torch.Tensor, autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of (B, V, R, R, 3) uint8 views: of the first, and the mean of all and their mirrors.

    Both are (B, classes) float32 on the CPU. With one view (no TTA), the second is the first.
    """
    crops = list(views.to(train.DEVICE, non_blocking=True).unbind(1))
    if len(crops) > 1:
        crops.extend([crop.flip(-2) for crop in crops])  # Mirrored left to right.
    with autocast:
        logits = torch.stack([model(move_and_normalize(crop)).float() for crop in crops])
    return logits[0].cpu(), logits.mean(0).cpu()


def predict_all(model, photos: CarPhotos, args, autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """`predict` for all photos; raises InputError where logits are not finite."""
    batches = train.test_batches(len(photos.cars["test"]), args.batch_size)
    loader = train.make_loader(photos, batches, args.workers)
    bar = train.next_batches(loader, len(batches), "test")
    logits = [predict(model, views, autocast) for views, _ in bar]
    single = torch.cat([first for first, _ in logits])
    mean = torch.cat([average for _, average in logits])
    if not (single.isfinite().all() and mean.isfinite().all()):
        raise InputError(f"{args.checkpoint} gives logits that are not finite: try --no-amp")
    return single, mean


def grad_cam(model, crops: torch.Tensor, classes: list[int], batch_size: int) -> np.ndarray:
    """GradCAM maps of (N, R, R, 3) uint8 crops for `classes`, at layer4[-1]: (N, R, R) in 0…1."""
    maps = []
    with GradCAM(model, [model.layer4[-1]]) as cam:
        for start in range(0, len(crops), batch_size):
            batch = slice(start, start + batch_size)
            targets = [ClassifierOutputTarget(index) for index in classes[batch]]
            maps.append(cam(move_and_normalize(crops[batch]), targets))
    return np.concatenate(maps)


# ---------------------------------------------------------------- report


def accuracy(correct: int, total: int) -> dict:
    """Accuracy (0…1) with the bounds of its 95 % Wilson score interval, of at least one photo."""
    low, high = binomtest(correct, total).proportion_ci(0.95, "wilson")
    return {
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "low": float(low),
        "high": float(high),
    }


def with_interval(measured: dict) -> str:
    counts = f"{measured['correct']}/{measured['total']}"
    interval = f"95 % CI {100 * measured['low']:.2f}–{100 * measured['high']:.2f}"
    return f"{100 * measured['accuracy']:.2f} % ({counts}, {interval})"


def count_confusion(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """(classes, classes) counts: rows are the true classes, columns the predicted ones."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    return pairs.bincount(minlength=classes**2).view(classes, classes).numpy()


def class_accuracies(confusion: np.ndarray, classes: list[str]) -> list[dict]:
    """Accuracy (0…1) of each class; None for a class without a test photo."""
    rows = []
    for index, name in enumerate(classes):
        correct = int(confusion[index, index])
        total = int(confusion[index].sum())
        row = {"index": index, "name": name, "correct": correct, "total": total}
        row["accuracy"] = correct / total if total else None
        rows.append(row)
    return rows


def confused_pairs(confusion: np.ndarray, classes: list[str]) -> list[dict]:
    """The ten most frequent errors: classes, count, share (0…1) of the true class's photos."""
    errors = Counter()
    for (true, predicted), count in np.ndenumerate(confusion):
        if count > 0 and true != predicted:
            errors[true, predicted] = int(count)
    pairs = []
    for (true, predicted), count in errors.most_common(10):
        pair = {"true": classes[true], "predicted": classes[predicted], "count": count}
        pair["share"] = count / int(confusion[true].sum())
        pairs.append(pair)
    return pairs


def make_of(name: str) -> str:
    return name.partition(" ")[0]


def without_year(name: str) -> str:
    return re.sub(r" \d{4}$", "", name)


def have_years(classes: list[str]) -> bool:
    """Whether classes are named as Stanford Cars': the make first, and the year last."""
    return any(without_year(name) != name for name in classes)


def error_kinds(confusion: np.ndarray, classes: list[str]) -> dict:
    """How many errors are in the year alone, stay within the make (another model), or leave it.

    Also the accuracy (0…1) that is left if only make and model, or only the make, have to be right.
    """
    makes = np.array([make_of(name) for name in classes])
    models = np.array([without_year(name) for name in classes])
    total = int(confusion.sum())
    right = int(confusion.trace())
    right_model = int(confusion[models[:, None] == models].sum())
    right_make = int(confusion[makes[:, None] == makes].sum())
    return {
        "year_only": right_model - right,
        "same_make": right_make - right_model,
        "other_make": total - right_make,
        "model_accuracy": right_model / total,
        "make_accuracy": right_make / total,
    }


def worst_first(class_rows: list[dict]) -> list[dict]:
    tested = [row for row in class_rows if row["total"]]
    return sorted(tested, key=lambda row: row["accuracy"])


def compute_metrics(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Accuracies and errors of (N, classes) logits, beside (N,) int64 labels."""
    confusion = count_confusion(logits, labels)
    in_top5 = logits.topk(min(5, len(classes))).indices == labels[:, None]
    metrics = {
        "test": accuracy(int(confusion.trace()), len(labels)),
        "top5": accuracy(int(in_top5.sum()), len(labels)),
        "per_class": class_accuracies(confusion, classes),
        "confused_pairs": confused_pairs(confusion, classes),
    }
    if have_years(classes):
        metrics["errors"] = error_kinds(confusion, classes)
    return metrics


def list_predictions(test, single, mean, tta: bool) -> list[dict]:
    """The lines of predictions.csv, one for each test photo; confidences are softmax's (0…1)."""
    classes = test.features["label"].names
    labels = torch.tensor(test["label"])
    shares = single.softmax(1)

    def names(indices: torch.Tensor) -> list[str]:
        return [classes[index] for index in indices.tolist()]

    columns = {
        "row": range(len(test)),
        # Flattened, or the photos would be read as well.
        "file": [Path(path or "").name for path in test.flatten()["image.path"]],
        "true": names(labels),
        "predicted": names(single.argmax(1)),
        "confidence": shares.amax(1).tolist(),
        "true_confidence": shares.gather(1, labels[:, None]).flatten().tolist(),
    }
    if tta:
        columns["tta_predicted"] = names(mean.argmax(1))
        columns["tta_confidence"] = mean.softmax(1).amax(1).tolist()
    return [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]


def print_classes(title: str, class_rows: list[dict]):
    print(f"\n{title}")
    for row in class_rows:
        share = f"{row['accuracy']:.2%}" if row["total"] else "no photo"
        counts = f"{row['correct']}/{row['total']}"
        print(f"{share:>8}  {counts:>7}  {row['index']:>4}  {row['name']}")


def print_errors(title: str, errors: dict):
    print(f"\n{title}")
    print(
        f"another year of the right model: {errors['year_only']}; another model of the right make: "
        f"{errors['same_make']}; another make: {errors['other_make']}"
    )
    print(
        f"right make and model: {errors['model_accuracy']:.2%} of all photos; "
        f"right make: {errors['make_accuracy']:.2%}"
    )


def print_metrics(metrics: dict):
    worst = worst_first(metrics["per_class"])
    tta = metrics.get("tta")
    print_classes("accuracy per class", metrics["per_class"])
    print_classes("ten worst classes", worst[:10])
    print_classes("ten best classes", worst[::-1][:10])
    if tta:
        print_classes("ten worst classes of the six views", worst_first(tta["per_class"])[:10])
    print("\nmost confused pairs: count, share of the true class, true → predicted")
    for pair in metrics["confused_pairs"]:
        names = f"{pair['true']} → {pair['predicted']}"
        print(f"{pair['count']:>4}  {pair['share']:>8.2%}  {names}")
    if "errors" in metrics:
        print_errors("how the errors differ", metrics["errors"])
        if tta:
            print_errors("how the errors of the six views differ", tta["errors"])
    print(f"\ntest accuracy   {with_interval(metrics['test'])}")
    print(f"top-5 accuracy  {with_interval(metrics['top5'])}")
    if tta:
        gain = 100 * (tta["accuracy"] - metrics["test"]["accuracy"])
        print(f"six views       {with_interval(tta)}")
        print(f"                {gain:+.2f} points to the single view")


def write_metrics(metrics: dict, args: argparse.Namespace):
    """Write metrics.json: what was printed, with the settings and versions behind it."""
    packages = ("torch", "torchvision", "datasets", "grad-cam", "numpy")
    versions = {name: version(name) for name in packages}
    versions["python"] = platform.python_version()
    contents = {**metrics, "settings": vars(args), "versions": versions}
    text = json.dumps(contents, indent=2, ensure_ascii=False, default=str)
    path = args.output_dir / "metrics.json"
    train.atomic_write(path, text.encode())
    print(f"wrote {path}")


# ---------------------------------------------------------------- figures


def use_fonts_for(text: str):
    """Have matplotlib take a font of the system for what its own lacks in `text`, as Chinese."""
    own = get_font(findfont("DejaVu Sans")).get_charmap().keys()
    missing = set(map(ord, text)) - own - {ord("\n")}
    if not missing:
        return
    for font in fontManager.ttflist:
        if font.name.startswith("Last Resort"):  # matplotlib's own, with a box for every sign.
            continue
        with contextlib.suppress(OSError, RuntimeError):  # It may be gone, or damaged.
            if missing <= get_font(font.fname).get_charmap().keys():
                matplotlib.rcParams["font.family"] = ["DejaVu Sans", font.name]
                return
    signs = "".join(map(chr, sorted(missing)[:5]))
    print(f"no font of this system has all of {signs} …: figures show boxes instead")
    warnings.filterwarnings("ignore", "Glyph")  # One of matplotlib's for each of these signs.


def save_figure(figure: Figure, path: Path):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    train.atomic_write(path, picture.getvalue())
    print(f"wrote {path}")


def plot_confusion(confusion: np.ndarray, classes: list[str]) -> Figure:
    """The (classes, classes) counts, coloured by their share of the true class."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    count = len(classes)
    longest = max(len(name) for name in classes)
    side = min(160, 0.16 * count + 0.07 * longest + 2)  # inches: cells, names, the bar
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_equal(share, 0), cmap="viridis_r", vmin=0, vmax=1)
    axes.set_xticks(range(count), classes, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(count), classes, fontsize=7, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    lines = np.arange(count + 1) - 0.5  # between the cells
    axes.hlines(lines, -0.5, count - 0.5, color="0.9", linewidth=0.5)
    axes.vlines(lines, -0.5, count - 0.5, color="0.9", linewidth=0.5)
    if have_years(classes):
        makes = [make_of(name) for name in classes]
        changes = [row - 0.5 for row in range(1, count) if makes[row] != makes[row - 1]]
        axes.hlines(changes, -0.5, count - 0.5, color="0.5", linewidth=0.5)
        axes.vlines(changes, -0.5, count - 0.5, color="0.5", linewidth=0.5)
    figure.colorbar(image, ax=axes, shrink=0.5, label="share of the true class")
    return figure


@dataclass
class Cell:
    """A photo in a GradCAM figure: its (R, R, 3) uint8 crop, and the class to explain."""

    crop: torch.Tensor
    target: int
    title: str
    color: str


def plot_grad_cam(cells: list[Cell], maps: np.ndarray) -> Figure:
    """Each cell's title, its crop, and its (R, R) map of `maps` on the crop."""
    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / 3)
    height = 2.75 * rows  # inches, of which each row's title takes 0.6
    figure = Figure(figsize=(4.4 * columns, height))
    top = 1 - 0.6 / height
    figure.subplots_adjust(0.02, 0.05 / height, 0.99, top, wspace=0.04, hspace=0.3)
    for number, (cell, heat) in enumerate(zip(cells, maps, strict=True), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axis("off")
        image = cell.crop.numpy() / np.float32(255)
        gap = np.ones((len(image), len(image) // 20, 3))
        overlay = show_cam_on_image(image, heat, use_rgb=True, image_weight=0.6) / 255
        axes.imshow(np.concatenate([image, gap, overlay], axis=1))
        axes.set_title(cell.title, fontsize=7, loc="left", color=cell.color, parse_math=False)
    return figure


def draw_grad_cam(path: Path, cells: list[Cell], model, batch_size: int):
    crops = torch.stack([cell.crop for cell in cells])
    maps = grad_cam(model, crops, [cell.target for cell in cells], batch_size)
    save_figure(plot_grad_cam(cells, maps), path)


def choose_errors(predictions: list[dict], class_rows: list[dict], random) -> list[dict]:
    """One error, drawn by `random`, of each of the five worst classes."""
    chosen = []
    for class_row in worst_first(class_rows)[:5]:
        of_class = [line for line in predictions if line["true"] == class_row["name"]]
        errors = [line for line in of_class if line["predicted"] != line["true"]]
        if errors:
            chosen.append(errors[random.integers(len(errors))])
    return chosen


def cell_of(prediction: dict, photos: CarPhotos, classes: list[str]) -> Cell:
    """A test photo, titled with its true and its predicted class."""
    views, _ = photos["test", prediction["row"], 0]
    predicted = prediction["predicted"]
    right = predicted == prediction["true"]
    verdict = "right" if right else "WRONG"
    title = (
        f"true: {prediction['true']}\n"
        f"predicted: {predicted}\n"
        f"{verdict}, confidence {prediction['confidence']:.2%}"
    )
    color = "darkgreen" if right else "firebrick"
    return Cell(views[0], classes.index(predicted), title, color)


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    # fmt: off
    formatter = argparse.RawDescriptionHelpFormatter
    parser = train.Parser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    batch_size = 64 if torch.cuda.is_available() else 16  # What a CPU's caches like.
    add("--checkpoint", type=Path, default="best_model.pth",
        help="what train.py saved, or a state dict (%(default)s)")
    add("--dataset", help="Hub data set or local folder (what the checkpoint was trained on)")
    add("--resolution", type=train.number(int, 32, 4096),
        help="side of the crops in pixels (the checkpoint's)")
    add("--batch-size", type=train.number(int, 1, 65536), default=batch_size,
        help="photos evaluated at once (64 on CUDA, else 16)")
    add("--tta", action="store_true",
        help="also average the logits of six views: three scales, mirrored or not")
    add("--num-gradcam", type=train.number(int, 0, 1000), default=16,
        help="photos in gradcam_samples.png; 0 for no GradCAM (%(default)s)")
    add("--seed", type=train.number(int, 0, 2**32), default=42,
        help="of the choice of photos (%(default)s)")
    add("--workers", type=train.number(int, 0, 256), default=train.DEFAULT_WORKERS,
        help="processes that decode photos (%(default)s)")
    add("--output-dir", type=Path, default=".", help="for figures and metrics.json (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, default=True,
        help="mixed precision, where it is native (on)")
    add("--images", nargs="+", metavar="PATH",
        help="name the classes of these photos, and of those in these folders, instead")
    # fmt: on
    return parser.parse_args(argv)


def find_images(names: list[str]) -> list[str]:
    """The files that --images names: a folder stands for its photos, a pattern for its matches."""
    paths = []
    for name in names:
        if Path(name).is_dir():
            photos, _ = train.find_photos(Path(name))
            if not photos:
                raise InputError(f"--images {name}: there is no photo in this folder")
            paths += map(str, photos)
        elif not Path(name).exists():
            paths += sorted(glob.glob(name)) or [name]  # Windows leaves patterns to the program.
        else:
            paths.append(name)
    return paths


def name_images(args: argparse.Namespace, model, classes: list[str], autocast):
    """Print the five likeliest classes of each of --images, and draw the first ones' GradCAM.

    Raises InputError at the end, naming the files that could not be read.
    """
    paths = find_images(args.images)
    figure_path = args.output_dir / "gradcam_images.png"
    figure_path.unlink(missing_ok=True)  # An older one is not of these photos.
    cells = []
    unreadable = []
    for path in paths:
        try:
            if "://" in path:
                raise ValueError("URLs are not downloaded")
            if not Path(path).is_file():
                raise ValueError("no file")
            photo = train.decode_photo(Path(path).read_bytes())
        except (ValueError, RuntimeError, OSError) as error:
            unreadable.append(f"{path} ({train.reason(error)})")
            continue
        views = crop_views(photo, args.resolution, args.tta)
        _, logits = predict(model, views[None], autocast)
        confidence, likeliest = logits[0].softmax(0).topk(min(5, len(classes)))
        print(f"\n{path}")
        for share, index in zip(confidence, likeliest, strict=True):
            print(f"{share:>9.2%}  {classes[index]}")
        guess = int(likeliest[0])
        printable = Path(path).name.encode(errors="replace").decode()
        title = f"{printable[-60:]}\n{classes[guess]}, {confidence[0]:.2%}"
        if len(cells) < args.num_gradcam:
            cells.append(Cell(views[0], guess, title, color="black"))
    if cells:
        use_fonts_for("".join(cell.title for cell in cells))
        draw_grad_cam(figure_path, cells, model, args.batch_size)
    if unreadable:
        names = "; ".join(unreadable)
        raise InputError(f"{len(unreadable)} of {len(paths)} photos cannot be read: {names}")


def load_test_split(args: argparse.Namespace, checkpoint: dict):
    """The test split, its labels in the order of the checkpoint's classes."""
    named = checkpoint.get("classes")
    test = train.load_cars(args.dataset, ("test",), named)["test"]
    classes = test.features["label"].names
    num_classes = len(checkpoint["model"]["fc.bias"])
    if len(classes) != num_classes:
        raise InputError(
            f"{args.checkpoint} has {num_classes} classes, and --dataset {args.dataset} "
            f"{len(classes)}: name the data set that it was trained on"
        )
    print(f"test        {args.dataset}: {len(test)} photos, {num_classes} classes")
    if named is None:
        print(f"            {args.checkpoint} names no classes: those of the data set are assumed,")
        print("            in its order; in another order, all that follows is wrong")
    return test


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if train.WORLD_SIZE > 1:
        raise InputError("eval.py runs as one process: start it without torchrun (WORLD_SIZE)")
    train.make_output_dir(args.output_dir)
    checkpoint = train.read_checkpoint(args.checkpoint)
    if "fc.bias" not in checkpoint["model"]:
        raise InputError(
            f"{args.checkpoint} has no fc: it is a backbone, to be trained with --weights"
        )
    trained_at = checkpoint.get("resolution", 224)
    args.resolution = args.resolution or trained_at
    epoch = checkpoint.get("epoch", "unknown")
    trained = f"epoch {epoch}, {trained_at} px"
    print(f"checkpoint  {args.checkpoint} ({trained}); evaluated at {args.resolution} px")
    if args.resolution == 32 and args.num_gradcam:
        print("            no GradCAM: at 32 px, its map would be a single pixel")
        args.num_gradcam = 0
    train.start_process()
    precision = train.pick_precision(args.amp)
    autocast = train.autocast_to(precision)
    print(f"device      {train.DEVICE.type}, {precision}")
    model = load_model(checkpoint)
    if args.images:
        num_classes = len(checkpoint["model"]["fc.bias"])
        numbered = [f"class {index}" for index in range(num_classes)]
        name_images(args, model, checkpoint.get("classes", numbered), autocast)
        return

    settings = checkpoint.get("settings", {})
    args.dataset = args.dataset or settings.get("dataset", train.DEFAULT_DATASET)
    test = load_test_split(args, checkpoint)
    classes = test.features["label"].names
    views = functools.partial(crop_views, tta=args.tta)
    photos = CarPhotos({"test": test}, {"test": views}, args.resolution)
    single, mean = predict_all(model, photos, args, autocast)
    labels = torch.tensor(test["label"])
    metrics = compute_metrics(single, labels, classes)
    if args.tta:
        of_six = compute_metrics(mean, labels, classes)
        metrics["tta"] = {**of_six.pop("test"), **of_six}
    print_metrics(metrics)

    names = ("confusion_matrix.png", "gradcam_samples.png", "gradcam_worst.png")
    figures = [args.output_dir / name for name in names]
    for path in figures:
        path.unlink(missing_ok=True)  # An older evaluation's figure is not this one's.
    print()
    write_metrics(metrics, args)  # Before the figures: if one fails, the numbers are there.
    predictions = list_predictions(test, single, mean, args.tta)
    path = args.output_dir / "predictions.csv"
    train.write_csv(predictions, path)
    print(f"wrote {path}")
    use_fonts_for("".join(classes))
    save_figure(plot_confusion(count_confusion(single, labels), classes), figures[0])
    if args.num_gradcam == 0:
        return
    random = np.random.default_rng(args.seed)
    rows = random.permutation(len(test))[: args.num_gradcam]
    samples = [predictions[row] for row in rows]
    errors = choose_errors(predictions, metrics["per_class"], random)
    for path, lines in zip(figures[1:], (samples, errors), strict=True):
        cells = [cell_of(prediction, photos, classes) for prediction in lines]
        if cells:
            draw_grad_cam(path, cells, model, args.batch_size)
        else:
            print(f"no photo is misclassified: no {path.name}")


if __name__ == "__main__":
    sys.exit(train.run_command(main))
