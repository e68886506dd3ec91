"""Evaluate a checkpoint of train.py: accuracies, kinds of errors, six-view TTA, GradCAM.

    python eval.py                              # best_model.pth on the test split it was chosen on
    python eval.py --tta --num-gradcam 32       # also the average of six views; more GradCAM photos
    python eval.py --images car.jpg holidays    # the five likeliest classes of your own photos

TTA averages the logits of three scales, each as it is and mirrored. Reported by
github.com/patr1ckzhu/transfer-learning-stanford-cars, and not measured with this code, are 91.78 %
at 448 px, with TTA 91.93 %, and at 224 px 89.38 % and 90.32 %.
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

# pytorch_grad_cam imports pyplot, and a notebook sets this to a backend that may not be installed.
os.environ["MPLBACKEND"] = "agg"
if __name__ == "__main__":
    # Ctrl-C ends the process at once and without a traceback, as in train.py.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
    # GradCAM needs gradients at the last block alone. The rest then keeps no activations for them.
    model.requires_grad_(False)
    model.layer4[-1].requires_grad_(True)
    return model


def crop_views(photo: torch.Tensor, resolution: int, tta: bool) -> torch.Tensor:
    """Centre crops of a (3, H, W) uint8 photo: (V, R, R, 3) uint8.

    The first is the view that training is tested on (shorter side int(R·256/224)); with `tta`,
    one of shorter side R and one of int(R·288/224) follow.
    """
    sides_for_224 = (256, 224, 288) if tta else (256,)
    return torch.stack([train.center_crop(photo, resolution, side) for side in sides_for_224])


@torch.no_grad()
def predict(model, views: torch.Tensor, autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of (B, V, R, R, 3) uint8 views: (B, classes) float32 on the CPU, twice.

    The first are those of the first view, the second the mean over all views and their mirrors.
    With one view (no TTA) the two are the same. Raises InputError where logits are not finite.
    """
    crops = list(views.to(train.DEVICE, non_blocking=True).unbind(1))
    if len(crops) > 1:
        crops.extend([crop.flip(-2) for crop in crops])  # Mirrored left to right.
    with autocast:
        logits = torch.stack([model(move_and_normalize(crop)).float() for crop in crops]).cpu()
    if not logits.isfinite().all():
        raise InputError("the logits are not finite: try --no-amp, or another --checkpoint")
    return logits[0], logits.mean(0)


def predict_all(model, photos: CarPhotos, args, autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """`predict` for all test photos."""
    key_batches = train.test_batches(len(photos.cars["test"]), args.batch_size)
    loader = train.make_loader(photos, key_batches, args.workers)
    batches = train.next_batches(loader, len(key_batches), "test")
    logits = [predict(model, views, autocast) for views, _ in batches]
    single = torch.cat([first for first, _ in logits])
    mean = torch.cat([average for _, average in logits])
    return single, mean


def grad_cam(model, crops: torch.Tensor, targets: list[int], batch_size: int) -> np.ndarray:
    """GradCAM maps of (N, R, R, 3) uint8 crops: (N, R, R) float32 in 0…1, at layer4[-1].

    Each is for the class that `targets` has for its crop. It is computed in float32.
    """
    maps = []
    with GradCAM(model, [model.layer4[-1]]) as cam:
        for start in range(0, len(crops), batch_size):
            batch = slice(start, start + batch_size)
            outputs = [ClassifierOutputTarget(target) for target in targets[batch]]
            maps.append(cam(move_and_normalize(crops[batch]), outputs))
    return np.concatenate(maps)


# ---------------------------------------------------------------- report


def accuracy(correct: int, total: int) -> dict:
    """Accuracy (0…1) with the bounds of its 95 % Wilson score interval, of at least one photo."""
    # Only scipy's test of a proportion gives its interval.
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
    interval = f"95% CI {100 * measured['low']:.2f}–{100 * measured['high']:.2f}"
    return f"{measured['accuracy']:.2%} ({counts}, {interval})"


def count_confusion(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """(classes, classes) counts: rows are the true classes, columns the predicted ones."""
    num_classes = logits.shape[1]
    pairs = labels * num_classes + logits.argmax(1)
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes).numpy()


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
    """The make of a car, which is the first word of its class's name."""
    return name.partition(" ")[0]


def without_year(name: str) -> str:
    return re.sub(r" \d{4}$", "", name)


def have_years(classes: list[str]) -> bool:
    """Whether classes are named as Stanford Cars': some end in a year, and so begin with a make."""
    return any(without_year(name) != name for name in classes)


def error_kinds(confusion: np.ndarray, classes: list[str]) -> dict:
    """How many errors are in the year alone, stay within the make (another model), or leave it.

    Also the accuracy (0…1) that is left if only make and model, or only the make, have to be right.
    """
    makes = np.array([make_of(name) for name in classes])
    car_models = np.array([without_year(name) for name in classes])
    same_make = makes[:, None] == makes  # (classes, classes) bool
    same_model = car_models[:, None] == car_models
    total = int(confusion.sum())
    right = int(confusion.trace())
    right_model = int(confusion[same_model].sum())
    right_make = int(confusion[same_make].sum())
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


def compute_metrics(logits, confusion: np.ndarray, labels, classes: list[str]) -> dict:
    """Accuracies and errors of (N, classes) logits and (N,) int64 labels, and their confusion."""
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


def list_predictions(test, single: torch.Tensor, mean: torch.Tensor, tta: bool) -> list[dict]:
    """The lines of predictions.csv for predict_all's logits; confidences are softmax's (0…1)."""
    classes = test.features["label"].names
    labels = torch.tensor(test["label"])
    probabilities = single.softmax(1)

    def names(indices: torch.Tensor) -> list[str]:
        return [classes[index] for index in indices.tolist()]

    # Flattened to the columns image.bytes and image.path, so that no photo has to be read.
    paths = test.flatten()["image.path"]
    columns = {
        "row": range(len(test)),
        "file": [Path(path or "").name for path in paths],
        "true": names(labels),
        "predicted": names(single.argmax(1)),
        "confidence": probabilities.amax(1).tolist(),
        "true_confidence": probabilities.gather(1, labels[:, None]).flatten().tolist(),
    }
    if tta:
        columns["tta_predicted"] = names(mean.argmax(1))
        columns["tta_confidence"] = mean.softmax(1).amax(1).tolist()
    lines = zip(*columns.values(), strict=True)
    return [dict(zip(columns, line, strict=True)) for line in lines]


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
    packages = ("torch", "torchvision", "torchcodec", "datasets", "grad-cam", "numpy")
    versions = {name: version(name) for name in packages}
    versions["python"] = platform.python_version()
    contents = {**metrics, "settings": vars(args), "versions": versions}
    text = json.dumps(contents, indent=2, ensure_ascii=False, default=str)
    path = args.output_dir / "metrics.json"
    # A path that is not UTF-8 becomes an escape, which JSON has as well.
    train.atomic_write(path, text.encode(errors="backslashreplace"))
    print(f"wrote {path}")


# ---------------------------------------------------------------- figures


def use_fonts_for(text: str):
    """Let matplotlib take what its font lacks in `text`, as Chinese, from a font of the system."""
    own = get_font(findfont("DejaVu Sans")).get_charmap().keys()
    missing = set(map(ord, text)) - own - {ord("\n")}
    if not missing:
        return
    for font in fontManager.ttflist:
        if font.name.startswith("Last Resort"):  # matplotlib's own: a box for every character.
            continue
        with contextlib.suppress(OSError, RuntimeError):  # It may be gone, or damaged.
            if missing <= get_font(font.fname).get_charmap().keys():
                matplotlib.rcParams["font.family"] = ["DejaVu Sans", font.name]
                return
    characters = "".join(map(chr, sorted(missing)[:5]))
    print(f"no font of this system has all of {characters} …: figures show boxes instead")
    warnings.filterwarnings("ignore", "Glyph")  # matplotlib would warn of each of them.


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
    side = 0.16 * count + 0.07 * longest + 2  # inches: cells, names, the bar
    side = min(160, side)  # 16,000 pixels
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shown = np.ma.masked_equal(share, 0)  # What never occurs stays white.
    image = axes.imshow(shown, cmap="viridis_r", vmin=0, vmax=1)
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
class Panel:
    """A photo in a GradCAM figure: its (R, R, 3) uint8 crop, and the class to explain."""

    crop: torch.Tensor
    target: int
    title: str
    color: str


def plot_grad_cam(panels: list[Panel], maps: np.ndarray) -> Figure:
    """Each panel's title, its crop, and its (R, R) map of `maps` on the crop."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / 3)
    height = 2.75 * rows  # inches, of which each row's title takes 0.6
    figure = Figure(figsize=(4.4 * columns, height))
    figure.subplots_adjust(left=0.02, bottom=0.05 / height, right=0.99, top=1 - 0.6 / height)
    figure.subplots_adjust(wspace=0.04, hspace=0.3)
    for number, (panel, heat) in enumerate(zip(panels, maps, strict=True), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axis("off")
        image = panel.crop.numpy() / np.float32(255)  # show_cam_on_image takes float32 in 0…1.
        gap = np.ones((len(image), len(image) // 20, 3))
        overlay = show_cam_on_image(image, heat, use_rgb=True, image_weight=0.6) / 255
        axes.imshow(np.concatenate([image, gap, overlay], axis=1))
        axes.set_title(panel.title, fontsize=7, loc="left", color=panel.color, parse_math=False)
    return figure


def draw_grad_cam(path: Path, panels: list[Panel], model, batch_size: int):
    crops = torch.stack([panel.crop for panel in panels])
    maps = grad_cam(model, crops, [panel.target for panel in panels], batch_size)
    save_figure(plot_grad_cam(panels, maps), path)


def choose_errors(predictions: list[dict], class_rows: list[dict], rng) -> list[dict]:
    """One error, drawn by `rng`, of each of the five worst classes."""
    chosen = []
    for class_row in worst_first(class_rows)[:5]:
        of_class = [line for line in predictions if line["true"] == class_row["name"]]
        errors = [line for line in of_class if line["predicted"] != line["true"]]
        if errors:
            chosen.append(errors[rng.integers(len(errors))])
    return chosen


def panel_of(prediction: dict, photos: CarPhotos, classes: list[str]) -> Panel:
    """A test photo, titled with its true and its predicted class."""
    views, _ = photos["test", prediction["row"], 0]  # A test crop needs no seed, and so has 0.
    predicted = prediction["predicted"]
    right = predicted == prediction["true"]
    verdict = "right" if right else "WRONG"
    title = (
        f"true: {prediction['true']}\n"
        f"predicted: {predicted}\n"
        f"{verdict}, confidence {prediction['confidence']:.2%}"
    )
    color = "darkgreen" if right else "firebrick"
    return Panel(views[0], classes.index(predicted), title, color)


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
        help="of the choice of the photos with GradCAM (%(default)s)")
    add("--workers", type=train.number(int, 0, 256), default=train.DEFAULT_WORKERS,
        help="processes that decode photos (%(default)s)")
    add("--output-dir", type=Path, default=".", help="for what is written (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, default=True,
        help="float16 on CUDA, bfloat16 on a CPU that has it (on)")
    add("--images", nargs="+", metavar="PATH",
        help="classify these photos, and those in these folders, instead of the test split")
    # fmt: on
    return parser.parse_args(argv)


def find_images(names: list[str]) -> list[str]:
    """The files that --images names: a folder stands for its photos, a pattern for its matches."""
    paths = []
    for name in names:
        matches = [name]
        if not Path(name).exists():
            matches = sorted(glob.glob(name)) or [name]  # Windows leaves patterns to the program.
        for match in matches:
            if not Path(match).is_dir():
                paths.append(match)
                continue
            photos, _ = train.find_photos(Path(match))
            if not photos:
                raise InputError(f"--images {match}: there is no photo in this folder")
            paths += map(str, photos)
    return paths


def classify_images(args: argparse.Namespace, model, classes: list[str], autocast):
    """Print the five likeliest classes of each of --images, and draw the first ones' GradCAM.

    Raises InputError at the end, naming the files that could not be read.
    """
    paths = find_images(args.images)
    figure_path = args.output_dir / "gradcam_images.png"
    figure_path.unlink(missing_ok=True)  # An older one is not of these photos.
    panels = []
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
        printable = Path(path).name.encode(errors="replace").decode()  # It may not be UTF-8.
        title = f"{printable[-60:]}\n{classes[guess]}, {confidence[0]:.2%}"
        if len(panels) < args.num_gradcam:
            panels.append(Panel(views[0], guess, title, color="black"))
    if panels:
        use_fonts_for("".join(panel.title for panel in panels))
        draw_grad_cam(figure_path, panels, model, args.batch_size)
    if unreadable:
        names = "; ".join(unreadable)
        raise InputError(f"{len(unreadable)} of {len(paths)} photos cannot be read: {names}")


def load_test_split(args: argparse.Namespace, checkpoint: dict):
    """The test split, its labels in the order of the checkpoint's classes."""
    known_classes = checkpoint.get("classes")
    test = train.load_cars(args.dataset, ("test",), known_classes)["test"]
    num_classes = test.features["label"].num_classes
    outputs = len(checkpoint["model"]["fc.bias"])
    print(f"test        {args.dataset}: {len(test)} photos, {num_classes} classes")
    if known_classes is None:
        if num_classes != outputs:
            raise InputError(
                f"{args.checkpoint} has {outputs} classes: name the --dataset it was trained on"
            )
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
    if args.resolution == 32 and args.num_gradcam:  # The smallest, which layer4 divides by 32.
        print("            no GradCAM: at 32 px, its map would be a single pixel")
        args.num_gradcam = 0
    train.start_process()
    precision = train.pick_precision(args.amp)
    autocast = train.autocast_to(precision)
    print(f"device      {train.DEVICE.type}, {precision}")
    model = load_model(checkpoint)
    if args.images:
        numbered = [f"class {index}" for index in range(model.fc.out_features)]
        classify_images(args, model, checkpoint.get("classes", numbered), autocast)
        return

    settings = checkpoint.get("settings", {})
    args.dataset = args.dataset or settings.get("dataset", train.DEFAULT_DATASET)
    test = load_test_split(args, checkpoint)
    classes = test.features["label"].names
    crop = functools.partial(crop_views, tta=args.tta)
    photos = CarPhotos({"test": test}, {"test": crop}, args.resolution)
    single, mean = predict_all(model, photos, args, autocast)
    labels = torch.tensor(test["label"])
    confusion = count_confusion(single, labels)
    metrics = compute_metrics(single, confusion, labels, classes)
    if args.tta:
        six_views = compute_metrics(mean, count_confusion(mean, labels), labels, classes)
        accuracy_of_six = six_views.pop("test")
        metrics["tta"] = {**accuracy_of_six, **six_views}  # tta.accuracy, and not tta.test.accuracy
    print_metrics(metrics)

    confusion_path = args.output_dir / "confusion_matrix.png"
    samples_path = args.output_dir / "gradcam_samples.png"
    worst_path = args.output_dir / "gradcam_worst.png"
    for path in (confusion_path, samples_path, worst_path):
        path.unlink(missing_ok=True)  # An older one is not of this evaluation.
    print()
    write_metrics(metrics, args)  # Before the figures: if one fails, the numbers are there.
    predictions = list_predictions(test, single, mean, args.tta)
    predictions_path = args.output_dir / "predictions.csv"
    train.write_csv(predictions, predictions_path)
    print(f"wrote {predictions_path}")
    use_fonts_for("".join(classes))
    save_figure(plot_confusion(confusion, classes), confusion_path)
    if args.num_gradcam == 0:
        return
    rng = np.random.default_rng(args.seed)
    rows = rng.permutation(len(test))[: args.num_gradcam]
    samples = [panel_of(predictions[row], photos, classes) for row in rows]
    draw_grad_cam(samples_path, samples, model, args.batch_size)
    errors = choose_errors(predictions, metrics["per_class"], rng)
    if not errors:
        print(f"no photo is misclassified: no {worst_path.name}")
        return
    worst = [panel_of(prediction, photos, classes) for prediction in errors]
    draw_grad_cam(worst_path, worst, model, args.batch_size)


if __name__ == "__main__":
    sys.exit(train.run_command(main))
