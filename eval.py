"""Evaluate a checkpoint of train.py: accuracy, kinds of errors, six-view TTA and GradCAM.

    python eval.py                              # best_model.pth on the test split
    python eval.py --tta --num-gradcam 32       # also average six views; draw more GradCAM maps
    python eval.py --images car.jpg holidays    # classify photos and folders of your own

TTA (test-time augmentation) averages the logits of three scales, each as it is and mirrored. This
program has not been measured on a GPU yet; the reference reports 91.78% at 448 px (91.93% with TTA)
and 89.38% at 224 px (90.32% with TTA).
"""

import argparse
import functools
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pandas import DataFrame
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import binomtest
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    confusion_matrix,
    precision_recall_fscore_support,
)

import train

# center_crop's resize_at_224 for each view. Training evaluates the first one; TTA adds the others.
VIEW_SIDES = (256, 224, 288)
DEFAULT_BATCH_SIZE = 64 if train.DEVICE.type == "cuda" else 16

# ---------------------------------------------------------------- flags


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=train.user_path, default=Path("best_model.pth"),
        help="checkpoint of train.py, or a state dict of its network (default: %(default)s)")
    add("--dataset", type=train.path_or_name,
        help="name of a Hub dataset, or path of a folder (default: the run's)")
    add("--split", default="test",
        help="split to evaluate, such as val (default: %(default)s)")
    add("--images", nargs="+", type=train.user_path, metavar="PATH",
        help="classify these photos, and those in these folders, instead of a split")
    add("--tta", action="store_true",
        help="also evaluate the mean logits of six views; with --images, use only that mean")
    add("--num-gradcam", type=train.at_least(0), default=16,
        help="number of random photos to draw GradCAM maps of, plus up to 5 of the worst errors; "
        "0 draws none and deletes older GradCAM pictures (default: %(default)s)")
    add("--seed", type=train.at_least(0), default=42,
        help="seed that picks the photos for GradCAM (default: %(default)s)")
    add("--resolution", type=train.at_least(32),
        help="side of the crops in pixels (default: the run's, else 224)")
    add("--batch-size", type=train.at_least(1), default=DEFAULT_BATCH_SIZE,
        help="photos per batch (default: %(default)s)")
    add("--workers", type=train.at_least(0), default=train.DEFAULT_WORKERS,
        help="processes that load photos (default: %(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="use mixed precision (default: as in the run)")
    add("--output-dir", type=train.user_path,
        help="folder for all files, which replace older ones (default: that of the checkpoint)")
    # fmt: on
    return parser.parse_args(argv)


# ---------------------------------------------------------------- network and predictions


def load_network(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return train.NETWORK with the weights `state` on DEVICE, in evaluation mode.

    Only the layer of GradCAM needs gradients, so autograd stores no activations of earlier layers.
    Raises ValueError or RuntimeError for the weights of another network.
    """
    bias = f"{train.NETWORK.head}.bias"
    if bias not in state:
        raise ValueError(f"it has no {bias}: these are the weights of another network, or no head")
    network = train.build_network("none", num_classes=len(state[bias]))
    network.load_state_dict(state)
    network.to(train.DEVICE, memory_format=torch.channels_last).eval()
    network.requires_grad_(False)
    network.get_submodule(train.NETWORK.gradcam_layer).requires_grad_(True)
    return network


def crop_views(args: argparse.Namespace, photo: torch.Tensor) -> torch.Tensor:
    """Return center crops of a (3, H, W) uint8 photo: (1, R, R, 3) uint8, with TTA (3, R, R, 3)."""
    sides = VIEW_SIDES if args.tta else VIEW_SIDES[:1]
    return torch.stack([train.center_crop(args, photo, side) for side in sides])


@torch.no_grad()
def predict(args, network: torch.nn.Module, views: train.CroppedPhotos) -> torch.Tensor:
    """Return the logits of all photos: (1, N, classes) float32 on the CPU.

    An item of `views` is what crop_views returns. With TTA, the logits are (6, N, classes): those
    of the three views, then of the same mirrored. Raises InputError for NaN or Inf.
    """
    all_logits = []
    index_batches = train.eval_index_batches(len(views), args.batch_size)
    loader = train.make_loader(views, index_batches, args.workers)
    for batch, _ in train.show_progress(loader, f"{views.split} photos"):
        crops = list(batch.to(train.DEVICE, non_blocking=True).unbind(1))  # (B, R, R, 3) each
        if args.tta:
            crops += [crop.flip(2) for crop in crops]
        with train.mixed_precision(args):
            logits = [network(train.move_and_normalize(crop)).float() for crop in crops]
        all_logits.append(torch.stack(logits).cpu())
    all_logits = torch.cat(all_logits, dim=1)
    if not all_logits.isfinite().all():
        raise train.InputError("the logits contain NaN or Inf: try --no-amp")
    return all_logits


# ---------------------------------------------------------------- metrics


MAKE_MODEL_YEAR = re.compile(r"\S+ .* (19|20)\d\d")  # such as "Audi TT Hatchback 2011"


def proportion(correct: torch.Tensor) -> dict:
    """Return the share (0…1) of True in (N,) bool, with its 95% Wilson score interval."""
    num_correct = int(correct.sum())
    interval = binomtest(num_correct, len(correct)).proportion_ci(0.95, "wilson")
    return {
        "accuracy": num_correct / len(correct),
        "correct": num_correct,
        "total": len(correct),
        "ci95_low": float(interval.low),
        "ci95_high": float(interval.high),
    }


def calibration_error(confidences: torch.Tensor, correct: torch.Tensor) -> float:
    """Return the expected calibration error (0…1; Guo et al., 2017) with 15 bins.

    It is the difference between the mean confidence and the accuracy of the photos in a bin,
    averaged over all photos. Confidences are (N,) float in 0…1; `correct` is (N,) bool.
    """
    bins = (15 * confidences).ceil().long().clamp(1, 15) - 1
    gaps = confidences.double() - correct.double()
    gap_sums = torch.zeros(15, dtype=torch.float64).index_add(0, bins, gaps)
    return gap_sums.abs().sum().item() / len(gaps)


def class_table(predictions: DataFrame, classes: list[str]) -> DataFrame:
    """Return precision, recall, F1 (0…1) and the number of photos ("support") of each class.

    `predictions` has the columns "true" and "predicted", of class names.
    """
    scores = precision_recall_fscore_support(
        predictions["true"], predictions["predicted"], labels=classes, zero_division=0
    )
    columns = ("precision", "recall", "f1-score", "support")
    return DataFrame({"class": classes, **dict(zip(columns, scores, strict=True))})


def confused_pairs(predictions: DataFrame) -> DataFrame:
    """Return the ten most frequent pairs of true and predicted class that differ.

    "share" (0…1) is the share of the true class's photos.
    """
    errors = predictions[predictions["true"] != predictions["predicted"]]
    pairs = errors.value_counts().head(10).reset_index()
    support = pairs["true"].map(predictions["true"].value_counts())
    pairs["share"] = pairs["count"] / support.astype(float)
    return pairs


def error_kinds(predictions: DataFrame) -> dict:
    """Count the errors of names like "Audi TT Hatchback 2011" by what is wrong.

    Also returns the accuracy (0…1) if the year may be wrong, and if only the make (the first word)
    has to be right.
    """
    correct = predictions["true"] == predictions["predicted"]
    models = predictions.map(lambda name: name.rpartition(" ")[0])  # without the year
    correct_model = models["true"] == models["predicted"]
    makes = predictions.map(lambda name: name.partition(" ")[0])
    correct_make = makes["true"] == makes["predicted"]
    return {
        "year_only": int((correct_model & ~correct).sum()),
        "same_make": int((correct_make & ~correct_model).sum()),
        "other_make": int((~correct_make).sum()),
        "model_accuracy": float(correct_model.mean()),
        "make_accuracy": float(correct_make.mean()),
    }


def compute_metrics(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Return the metrics of (N, classes) float32 logits and (N,) int64 labels; shares in 0…1."""
    predicted = logits.argmax(1)
    correct = predicted == labels
    indices = DataFrame({"true": labels.numpy(), "predicted": predicted.numpy()})
    predictions = indices.map(classes.__getitem__)
    per_class = class_table(predictions, classes)
    metrics = proportion(correct)
    if len(classes) > 5:
        in_top5 = (logits.topk(5).indices == labels[:, None]).any(1)
        metrics["top5"] = proportion(in_top5)
    metrics["mean_class_accuracy"] = float(per_class.query("support > 0")["recall"].mean())
    metrics["loss"] = F.cross_entropy(logits.double(), labels).item()
    metrics["calibration_error"] = calibration_error(logits.softmax(1).amax(1), correct)
    metrics["per_class"] = per_class.to_dict("records")
    metrics["confused_pairs"] = confused_pairs(predictions).to_dict("records")
    if all(MAKE_MODEL_YEAR.fullmatch(name) for name in classes):
        metrics["errors"] = error_kinds(predictions)
    return metrics


def compare_views(one_view: torch.Tensor, six_views: torch.Tensor, labels: torch.Tensor) -> dict:
    """Return how many photos six views fixed and broke, and the exact p value of McNemar's test.

    That is the probability of such a difference, or a larger one, if both were equally good. Both
    logits are (N, classes).
    """
    before = one_view.argmax(1) == labels
    after = six_views.argmax(1) == labels
    fixed = int((after & ~before).sum())
    broke = int((before & ~after).sum())
    p_value = 1.0
    if fixed + broke > 0:
        p_value = float(binomtest(fixed, fixed + broke).pvalue)
    return {"fixed": fixed, "broke": broke, "p_value": p_value}


def list_predictions(
    photos: datasets.Dataset, one_view: torch.Tensor, six_views: torch.Tensor | None
) -> DataFrame:
    """Return a table with a row for each photo.

    The columns are row and file (the path) of the photo, true and predicted class, and the
    probabilities (0…1) of the predicted class (confidence) and of the true one (true_confidence).
    Columns of `six_views` begin with "tta_". Both logits are (N, classes).
    """
    classes = np.array(photos.features["label"].names)
    labels = np.array(photos["label"][:])
    rows = np.arange(len(labels))
    # The paths alone: photos["image"] would read all photos.
    files = photos.flatten().select_columns("image.path").with_format("arrow")[:][0].to_pylist()
    table = DataFrame({"row": rows, "file": files, "true": classes[labels]})
    for prefix, logits in (("", one_view), ("tta_", six_views)):
        if logits is not None:
            confidences = logits.softmax(1).numpy()
            table[f"{prefix}predicted"] = classes[logits.argmax(1).numpy()]
            table[f"{prefix}confidence"] = confidences.max(1)
            table[f"{prefix}true_confidence"] = confidences[rows, labels]
    return table


def most_confident_errors(predictions: DataFrame, per_class: DataFrame) -> DataFrame:
    """Return the most confident error of each of the five classes with the lowest recall."""
    errors = predictions[predictions["true"] != predictions["predicted"]]
    recall = per_class.set_index("class")["recall"]
    errors = errors.assign(recall=errors["true"].map(recall))
    errors = errors.sort_values("confidence", ascending=False).drop_duplicates("true")
    return errors.sort_values("recall", kind="stable").head(5)


# ---------------------------------------------------------------- report


# Titles of the kinds of errors in the report, by their names in metrics.json.
ERROR_KINDS = {
    "year_only": "wrong year, right model",
    "same_make": "wrong model or body, right make",
    "other_make": "wrong make",
}


def print_classes(classes: DataFrame):
    """Print classes.csv: the worst and the best classes, or all if there are at most 20."""
    names = {"recall": "accuracy", "tta_recall": "six views", "support": "photos"}
    tested = classes.query("support > 0").sort_values("recall", kind="stable").rename(columns=names)
    columns = ["class", "photos", "accuracy", "six views", "precision", "f1-score"]
    tested = tested[[name for name in columns if name in tested]]
    if len(tested) <= 20:
        print_table("Classes, the lowest accuracy first (one view)", tested)
    else:
        print_table("Ten classes of the lowest accuracy (one view)", tested.head(10))
        print_table("Ten classes of the highest accuracy (one view)", tested.tail(10).iloc[::-1])


def print_table(title: str, table: DataFrame):
    """Print a table under its title: names left-aligned, shares in per cent."""
    table = table.copy()
    for name in table.columns:
        if table[name].dtype.kind == "f":
            table[name] = table[name].map("{:.1%}".format)
        elif table[name].dtype.kind != "i":
            width = table[name].str.len().max()
            table[name] = table[name].str.ljust(width)
            table = table.rename(columns={name: name.ljust(width)})
    print(f"\n{title}\n{table.to_string(index=False)}")


def summarize(metrics: dict) -> dict[str, str]:
    """Return the titles and texts of the metrics that the summary shows."""
    summary = {"accuracy": format_proportion(metrics)}
    if "top5" in metrics:
        summary["top-5 accuracy"] = format_proportion(metrics["top5"])
    summary["mean class accuracy"] = f"{metrics['mean_class_accuracy']:.2%}"
    summary["loss (cross-entropy)"] = f"{metrics['loss']:.4f}"
    summary["calibration error"] = f"{metrics['calibration_error']:.2%}"
    if "errors" in metrics:
        errors = metrics["errors"]
        for name, title in ERROR_KINDS.items():
            summary[title] = str(errors[name])
        summary["accuracy if the year may be wrong"] = f"{errors['model_accuracy']:.2%}"
        summary["accuracy of the make"] = f"{errors['make_accuracy']:.2%}"
    return summary


def format_proportion(metrics: dict) -> str:
    """Return "91.78% (7380 of 8041, 95% CI 91.2–92.4)"."""
    counts = f"{metrics['correct']} of {metrics['total']}"
    interval = f"{100 * metrics['ci95_low']:.1f}–{100 * metrics['ci95_high']:.1f}"
    return f"{metrics['accuracy']:.2%} ({counts}, 95% CI {interval})"


def print_summary(metrics: dict, split: str):
    """Print the figures of one view beside those of six, and what they mean."""
    columns = {"one view": summarize(metrics[split])}
    if "tta" in metrics:
        columns["six views"] = summarize(metrics["tta"])
    print(f"\n{'Summary':<36}" + "".join(f"{title:<46}" for title in columns).rstrip())
    for name in columns["one view"]:
        texts = "".join(f"{column[name]:<46}" for column in columns.values())
        print(f"{name:<36}{texts}".rstrip())
    print("95% CI: Wilson interval; 95% of intervals built this way contain the true accuracy")
    print("calibration error: mean difference between confidence and accuracy; 0% is the best")
    if "tta" in metrics:
        change = metrics["tta_change"]
        print("six views: mean logits of center crops at three scales, each also mirrored")
        print(
            f"six views fixed {train.plural(change['fixed'], 'photo')} and broke {change['broke']} "
            f"(McNemar's exact test: p = {change['p_value']:.2g} for such a difference by chance)"
        )
    print(f"{metrics['run']['photos_per_second']:.1f} photos/s, loaded and evaluated\n")


def save(file: Path, write: Callable, **options):
    """Write a file atomically with `write(output, **options)`, and print its path."""
    train.atomic_write(file, functools.partial(write, **options))
    print(f"wrote {file}")


def save_table(file: Path, table: DataFrame):
    # Without a byte order mark, Excel misreads non-ASCII text.
    save(file, table.to_csv, index=False, encoding="utf-8-sig")


# ---------------------------------------------------------------- pictures


@matplotlib.rc_context({"text.parse_math": False})  # A name with two $ is not a formula.
def plot_confusion(predictions: DataFrame, classes: list[str], title: str) -> Figure:
    """Plot how the photos of each true class are predicted: colours are shares, numbers photos.

    Cells without a photo are white. Above 350 classes, there is no room for names and numbers.
    """
    counts = confusion_matrix(predictions["true"], predictions["predicted"], labels=classes)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    has_room = len(classes) <= 350
    side = 0.16 * len(classes) + 6.5 if has_room else 40  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=classes if has_room else None)
    display.plot(
        include_values=False,
        xticks_rotation="vertical",
        cmap=matplotlib.colormaps["viridis_r"].with_extremes(under="white"),
        im_kw={"vmin": 1e-9, "vmax": 1},  # Only 0 is under vmin.
        colorbar=False,
        ax=axes,
    )
    if has_room:
        size = 10 if len(classes) <= 30 else 6  # points
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, counts[row, column], color=color, size=size, ha="center", va="center"
            )
    else:
        axes.set(xticks=[], yticks=[])
    axes.set_title(title)
    axes.tick_params(labelsize=7)
    figure.colorbar(display.im_, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def grad_cam(network: torch.nn.Module, crop: torch.Tensor, target: int) -> np.ndarray:
    """Return the GradCAM map of (R, R, 3) uint8 for a class: (R, R) float32 in 0…1."""
    layer = network.get_submodule(train.NETWORK.gradcam_layer)
    cam = GradCAM(network, [layer])  # As a context, it would hide an IndexError.
    return cam(train.move_and_normalize(crop[None]), [ClassifierOutputTarget(target)])[0]


@matplotlib.rc_context({"text.parse_math": False})
def plot_grad_cam(crops: list, maps: list, panels: list[dict]) -> Figure:
    """Plot each (R, R, 3) uint8 crop beside its (R, R) float32 map, four to a row.

    A panel has a "title" and its "color".
    """
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / 4)
    figure = Figure(figsize=(4.4 * columns, 3 * rows + 0.6), layout="constrained")  # inches
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, crop, heat, panel in zip(grid[: len(panels)], crops, maps, panels, strict=True):
        image = crop.numpy() / np.float32(255)
        overlay = show_cam_on_image(image, heat, use_rgb=True, image_weight=0.6)
        axes.imshow(np.concatenate([image, overlay / 255], axis=1))
        axes.set_title(panel["title"], fontsize=7, loc="left", color=panel["color"])
    resolution = len(crops[0])
    cells = math.ceil(resolution / 32)
    lines = [
        "GradCAM: from blue to red, how strongly a region",
        "supports the predicted class. Titles of errors are red.",
        f"{cells} × {cells} cells, enlarged to {resolution} px",
    ]
    if cells < 4:
        lines[-1] += ": too coarse to explain anything"
    figure.suptitle("\n".join(lines), fontsize=8, x=0.01, ha="left")
    return figure


def draw_grad_cam(
    file: Path, network: torch.nn.Module, views: train.CroppedPhotos, panels: list[dict]
):
    """Draw the maps of the first view of some photos.

    A panel is a dict of the "row" of a photo in `views`, its "target" class, a "title" and its
    "color". Without any, an older picture is deleted: it shows the photos of another evaluation.
    """
    if not panels:
        file.unlink(missing_ok=True)
        return
    crops = []
    for panel in panels:
        views_of_photo, _ = views[panel["row"], 0]
        crops.append(views_of_photo[0])
    maps = [
        grad_cam(network, crop, panel["target"]) for crop, panel in zip(crops, panels, strict=True)
    ]
    save(file, plot_grad_cam(crops, maps, panels).savefig, format="png", dpi=100)


def photo_name(row: int, file: str | None) -> str:
    """Return "row 12" and the end of the photo's path, if it has one."""
    return f"row {row}, {file[-40:]}" if isinstance(file, str) else f"row {row}"


# ---------------------------------------------------------------- the evaluation of a split


def load_evaluated_split(args: argparse.Namespace, checkpoint: dict) -> datasets.Dataset:
    """Return the photos of --split, with labels that are indices into the checkpoint's classes.

    If the run held out a part of the train split (--val-split), "val" and "train" are the parts.
    Raises InputError.
    """
    classes = checkpoint.get("classes")
    fraction = checkpoint.get("settings", {}).get("val_split", 0)
    with train.reported_as(f"cannot load --dataset {args.dataset}"):
        sources = train.find_splits(args.dataset)
        if fraction and args.split in ("train", "val") and "val" not in sources:
            train_split = train.load_split(sources, "train", classes)
            parts = train.hold_out(train_split, fraction)
            checksums = {name: train.label_checksum(part) for name, part in parts.items()}
            if checksums != checkpoint.get("label_checksums"):
                raise ValueError("other photos than in the run would be held out")
            return parts[args.split]
        if args.split not in sources and ("val" in sources or fraction):
            raise ValueError(
                f"it has no {args.split} split: evaluate its val split with --split val"
            )
        return train.load_split(sources, args.split, classes)


def evaluate_split(args, photos: datasets.Dataset, network: torch.nn.Module, checkpoint: dict):
    """Print the report on a split, and write its metrics, tables and pictures."""
    classes = photos.features["label"].names
    labels = torch.tensor(photos["label"][:])
    views = train.CroppedPhotos(photos, args.split, functools.partial(crop_views, args))
    start = time.perf_counter()
    logits = predict(args, network, views)
    seconds = time.perf_counter() - start
    run = {
        "checkpoint": str(args.checkpoint),
        "epoch": checkpoint.get("epoch"),
        "chosen_on": checkpoint["chosen_on"],
        "split": args.split,
        "device": train.DEVICE.type,
        "precision": str(train.amp_dtype(args)),
        "torch": torch.__version__,
        "flags": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "photos_per_second": len(photos) / seconds,
    }

    one_view = logits[0]
    six_views = None
    metrics = {"run": run, args.split: compute_metrics(one_view, labels, classes)}
    per_class = DataFrame(metrics[args.split]["per_class"])
    pairs = DataFrame(metrics[args.split]["confused_pairs"])
    if args.tta:
        six_views = logits.mean(0)
        metrics["tta"] = compute_metrics(six_views, labels, classes)
        metrics["tta_change"] = compare_views(one_view, six_views, labels)
        per_class["tta_recall"] = DataFrame(metrics["tta"]["per_class"])["recall"]
    predictions = list_predictions(photos, one_view, six_views)
    if args.tta:
        tta_counts = predictions.value_counts(["true", "tta_predicted"])
        pairs["six views"] = [
            tta_counts.get((pair.true, pair.predicted), 0) for pair in pairs.itertuples()
        ]
    folder = args.output_dir
    text = json.dumps(metrics, indent=2, ensure_ascii=False).encode()
    save(folder / "metrics.json", lambda output: output.write(text))
    save_table(folder / "predictions.csv", predictions)
    save_table(folder / "classes.csv", per_class)
    print_classes(per_class)
    if len(pairs):
        print_table("Most confused pairs (one view)", pairs)
    print_summary(metrics, args.split)

    title = f"{args.split} split, one view: accuracy {metrics[args.split]['accuracy']:.2%}"
    figure = plot_confusion(predictions, classes, title)
    # "tight" cuts the empty bands beside the square matrix.
    save(
        folder / "confusion_matrix.png", figure.savefig, format="png", dpi=100, bbox_inches="tight"
    )
    num_maps = min(args.num_gradcam, len(photos))
    pictures = {
        "gradcam_samples.png": predictions.sample(num_maps, random_state=args.seed),
        "gradcam_worst.png": most_confident_errors(predictions, per_class).head(num_maps),
    }
    for name, shown in pictures.items():
        panels = [panel_of(photo, classes) for photo in shown.itertuples()]
        draw_grad_cam(folder / name, network, views, panels)


def panel_of(photo, classes: list[str]) -> dict:
    """Return the panel of draw_grad_cam for a row of predictions.csv."""
    is_correct = photo.true == photo.predicted
    lines = [
        photo_name(photo.row, photo.file),
        f"true: {photo.true}",
        f"predicted: {photo.predicted}",
        f"{'correct' if is_correct else 'WRONG'}, confidence {photo.confidence:.1%}",
    ]
    return {
        "row": photo.row,
        "target": classes.index(photo.predicted),
        "title": "\n".join(lines),
        "color": "black" if is_correct else "red",
    }


# ---------------------------------------------------------------- your own photos


def find_images(paths: list[Path]) -> list[str]:
    """Return the photos that --images names; a folder stands for the photos in it.

    Raises InputError for a path that is not there, and for a folder without photos.
    """
    images = []
    for path in paths:
        found = [path]
        if path.is_dir():
            with train.reported_as(f"cannot read --images {path}"):
                found = train.find_photos(path)
            print(f"{path}: {train.plural(len(found), 'photo')}")
        if not found or not path.exists():
            raise train.InputError(f"--images {path}: no photo is there")
        images.extend(str(image) for image in found)
    return images


def classify_images(args, images: list[str], network: torch.nn.Module, classes: list[str]):
    """Print and write the five most likely classes of each photo, and draw GradCAM maps.

    Raises InputError, which names the photo, for one that cannot be decoded.
    """
    columns = {
        "image": [{"bytes": None, "path": path} for path in images],
        "label": [0] * len(images),
    }
    photos = datasets.Dataset.from_dict(columns)
    views = train.CroppedPhotos(photos, "--images", functools.partial(crop_views, args))
    probabilities = predict(args, network, views).mean(0).softmax(1)
    top = probabilities.topk(min(5, len(classes)))
    table = DataFrame({"path": images})
    panels = []
    for place in range(top.indices.shape[1]):
        table[f"class_{place + 1}"] = [classes[index] for index in top.indices[:, place]]
        table[f"confidence_{place + 1}"] = top.values[:, place].numpy()
    for row, path in enumerate(images):
        print(f"\n{path}")
        for index, confidence in zip(top.indices[row], top.values[row], strict=True):
            print(f"{confidence:>9.2%}  {classes[index]}")
        if row < args.num_gradcam:
            best = top.indices[row, 0].item()
            title = f"{photo_name(row, path)}\n{classes[best]}\nconfidence {top.values[row, 0]:.1%}"
            panels.append({"row": row, "target": best, "title": title, "color": "black"})
    print()
    save_table(args.output_dir / "images.csv", table)
    draw_grad_cam(args.output_dir / "gradcam_images.png", network, views, panels)


# ---------------------------------------------------------------- main


def open_checkpoint(args: argparse.Namespace) -> dict:
    """Read and describe --checkpoint, and take flags that were not given from its run.

    Adds "chosen_on" to it: the split on which train.py chose the epoch, or None.
    """
    checkpoint = train.read_checkpoint(args.checkpoint)
    if "settings" not in checkpoint:
        # From other programs' checkpoints, use the weights only.
        checkpoint = {"model": checkpoint["model"]}
    settings = checkpoint.get("settings", {})
    if args.output_dir is None:
        args.output_dir = args.checkpoint.parent
    train.make_output_dir(args.output_dir)
    if args.resolution is None:
        args.resolution = checkpoint.get("resolution", 224)
    if args.dataset is None:
        args.dataset = settings.get("dataset", train.DEFAULT_DATASET)
    if args.amp is None:
        args.amp = settings.get("amp", True)
    args.amp_dtype = settings.get("amp_dtype")

    print(f"checkpoint  {args.checkpoint}")
    checkpoint["chosen_on"] = None  # as for last_checkpoint.pth
    for split in ("test", "val"):
        if f"{split}_accuracy" in checkpoint:
            checkpoint["chosen_on"] = split
            accuracy = checkpoint[f"{split}_accuracy"]
            epoch = f"epoch {checkpoint['epoch']}, trained at {checkpoint['resolution']} px"
            print(f"            {epoch}, chosen on the {split} split (in training: {accuracy:.2%})")
    return checkpoint


def main(argv: list[str] | None = None):
    """Evaluate as the flags in `argv` say. Raises InputError for a mistake the user can fix."""
    args = parse_args(argv)
    if train.WORLD_SIZE > 1:
        raise train.InputError("start eval.py without torchrun: it uses one GPU")
    checkpoint = open_checkpoint(args)
    train.set_up()
    print(f"device      {train.device_name()}, {train.amp_dtype(args)}")
    print(f"resolution  {args.resolution} px")
    with train.reported_as(f"cannot load the network of {args.checkpoint}"):
        network = load_network(checkpoint["model"])
    num_outputs = len(checkpoint["model"][f"{train.NETWORK.head}.bias"])

    if args.images:
        classes = checkpoint.get("classes", [f"class {index}" for index in range(num_outputs)])
        classify_images(args, find_images(args.images), network, classes)
        return

    photos = load_evaluated_split(args, checkpoint)
    num_classes = photos.features["label"].num_classes
    counts = train.plural(len(photos), f"{args.split} photo")
    print(f"data        {args.dataset}: {counts}, {num_classes} classes")
    if num_classes != num_outputs:
        counts = f"the checkpoint has {num_outputs} classes, and the dataset {num_classes}"
        raise train.InputError(f"{counts}: pass the right --dataset")
    if "classes" not in checkpoint:
        print(
            "warning     the checkpoint names no classes: assumed to be in the dataset's order; "
            "if they are not, the accuracy is about that of guessing"
        )
    if checkpoint["chosen_on"] == args.split:
        print("note        the epoch was chosen on this split: its accuracy is a little optimistic")
    evaluate_split(args, photos, network, checkpoint)


if __name__ == "__main__":
    train.run_command(main)
