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
from collections.abc import Callable, Iterator
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
from sklearn.metrics import ConfusionMatrixDisplay, precision_recall_fscore_support

import train

# center_crop's resize_at_224 for each view. Training evaluates the first one; TTA adds the others.
VIEW_SIDES = (256, 224, 288)
DEFAULT_BATCH_SIZE = 64 if train.DEVICE.type == "cuda" else 16
MAKE_MODEL_YEAR = re.compile(r"\S+ .* (19|20)\d\d")
# Titles of the kinds of errors in the report, by their names in metrics.json.
ERROR_KINDS = {
    "year_only": "wrong year, right model",
    "same_make": "wrong model or body, right make",
    "other_make": "wrong make",
}

# ---------------------------------------------------------------- flags


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=train.path_type, default=Path("best_model.pth"),
        help="checkpoint of train.py, or a state dict of its network (default: %(default)s)")
    add("--dataset", type=train.dataset_type,
        help="name of a Hub dataset, or path of a folder (default: the run's)")
    add("--split", default="test",
        help="split to evaluate, such as val (default: %(default)s)")
    add("--images", nargs="+", type=train.path_type, metavar="PATH",
        help="classify these photos, and those in these folders, instead of a split")
    add("--tta", action="store_true",
        help="also evaluate the mean logits of six views; with --images, only these")
    add("--num-gradcam", type=train.number(int, 0, 100), default=16,
        help="random photos to draw GradCAM maps of, and of the worst errors at most 5; 0 draws "
        "none and deletes older GradCAM pictures (default: %(default)s)")
    add("--seed", type=train.number(int, 0, 2**32 - 1), default=42,
        help="seed that picks the photos for GradCAM (default: %(default)s)")
    add("--resolution", type=train.number(int, 32),
        help="side of the crops in pixels (default: the run's, else 224)")
    add("--batch-size", type=train.number(int, 1), default=DEFAULT_BATCH_SIZE,
        help="photos per batch (default: %(default)s)")
    add("--workers", type=train.number(int, 0), default=train.DEFAULT_WORKERS,
        help="processes that load photos (default: %(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="use mixed precision (default: as in the run)")
    add("--output-dir", type=train.path_type,
        help="folder for all files (default: that of the checkpoint)")
    # fmt: on
    return parser.parse_args(argv)


# ---------------------------------------------------------------- network and predictions


def load_network(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return train.NETWORK with the weights `state` on DEVICE, in evaluation mode.

    Only the layer of GradCAM needs gradients, so the layers before it keep no activations. Raises
    ValueError or RuntimeError for the weights of another network.
    """
    bias = f"{train.NETWORK.head}.bias"
    if bias not in state:
        raise ValueError(f"it has no {bias}: these are the weights of another network, or no head")
    network = train.build_network("none", num_classes=len(state[bias]))
    network.load_state_dict(state)
    network.to(train.DEVICE, memory_format=torch.channels_last).eval()
    network.requires_grad_(False)
    gradcam_layer(network).requires_grad_(True)
    return network


def gradcam_layer(network: torch.nn.Module) -> torch.nn.Module:
    return network.get_submodule(train.NETWORK.gradcam_layer)


def crop_views(photo: torch.Tensor, resolution: int, tta: bool) -> torch.Tensor:
    """Return center crops of a (3, H, W) uint8 photo: (1, R, R, 3) uint8, with TTA (3, R, R, 3)."""
    sides = VIEW_SIDES if tta else VIEW_SIDES[:1]
    return torch.stack([train.center_crop(photo, resolution, side) for side in sides])


def view_dataset(photos: datasets.Dataset, args: argparse.Namespace) -> train.CroppedPhotos:
    """Return a dataset whose items are the views of a photo and its label."""
    crop = functools.partial(crop_views, tta=args.tta)
    return train.CroppedPhotos({args.split: photos}, {args.split: crop}, args.resolution)


class OwnPhotos(train.CroppedPhotos):
    """Views of photos without labels, for --images.

    In place of a label, an item has the reason why its photo cannot be decoded, or "".
    """

    def __getitems__(self, indices: list[tuple[str, int, int]]) -> list[tuple[torch.Tensor, str]]:
        items = []
        for index in indices:
            try:
                views, _ = super().__getitems__([index])[0]
                reason = ""
            except train.InputError as error:
                split = index[0]
                black = torch.zeros(3, self.resolution, self.resolution, dtype=torch.uint8)
                views = self.crops[split](black, self.resolution)
                reason = str(error)
            items.append((views, reason))
        return items


@torch.no_grad()
def predict(network, photos: train.CroppedPhotos, args, autocast) -> Iterator[tuple]:
    """Yield the views of each batch, their logits, and the labels (for OwnPhotos: the reasons).

    Views are (B, 1, R, R, 3) uint8, with TTA (B, 3, R, R, 3). Logits are (1, B, classes) float32 on
    the CPU, with TTA (6, B, classes): the three views, then the same mirrored. Raises InputError if
    logits are NaN or Inf.
    """
    split = next(iter(photos.splits))
    index_batches = train.eval_batches(split, len(photos.splits[split]), args.batch_size)
    with train.open_loader(photos, index_batches, args.workers) as batches:
        for views, labels in train.take_batches(batches, len(index_batches), f"{split} photos"):
            crops = list(views.to(train.DEVICE, non_blocking=True).unbind(1))  # (B, R, R, 3) each
            if args.tta:
                crops += [crop.flip(2) for crop in crops]
            with autocast:
                logits = [network(train.move_and_normalize(crop)).float() for crop in crops]
            logits = torch.stack(logits).cpu()
            if not logits.isfinite().all():
                raise train.InputError("the logits contain NaN or Inf: try --no-amp")
            yield views, logits, labels


def grad_cam(network: torch.nn.Module, crop: torch.Tensor, target: int) -> np.ndarray:
    """Return the GradCAM map of (R, R, 3) uint8 for a class: (R, R) float32 in 0…1."""
    images = train.move_and_normalize(crop[None])
    cam = GradCAM(network, [gradcam_layer(network)])  # As a context, it would hide an IndexError.
    return cam(images, [ClassifierOutputTarget(target)])[0]


# ---------------------------------------------------------------- metrics


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
    table = DataFrame({"row": rows, "file": train.photo_paths(photos), "true": classes[labels]})
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


def print_classes(per_class: DataFrame):
    """Print the worst and the best classes, or all of them if there are at most 20."""
    tested = per_class.query("support > 0").sort_values("recall", kind="stable")
    if len(tested) <= 20:
        print_table("Classes, one view", tested)
    else:
        print_table("Ten worst classes, one view", tested.head(10))
        print_table("Ten best classes, one view", tested.tail(10).iloc[::-1])


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
    summary["loss"] = f"{metrics['loss']:.4f}"
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


def print_report(metrics: dict, split: str):
    """Print classes and confused pairs of one view, and the summary of one view and of six."""
    print_classes(DataFrame(metrics[split]["per_class"]))
    pairs = DataFrame(metrics[split]["confused_pairs"])
    if len(pairs):
        print_table("Most confused pairs, one view", pairs)
    columns = {"one view": summarize(metrics[split])}
    if "tta" in metrics:
        columns["six views"] = summarize(metrics["tta"])
    print(f"\n{'Summary':<36}" + "".join(f"{title:<46}" for title in columns).rstrip())
    for name in columns["one view"]:
        texts = "".join(f"{column[name]:<46}" for column in columns.values())
        print(f"{name:<36}{texts}".rstrip())
    if "tta" in metrics:
        change = (
            "six views fixed {fixed} photos and broke {broke} (McNemar's test: p = {p_value:.2g})"
        )
        print(change.format(**metrics["tta_change"]))
    print(f"{metrics['run']['photos_per_second']:.1f} photos/s\n")


def save(path: Path, write: Callable, **options):
    """Write a file atomically with `write(file, **options)`, and print its path."""
    train.atomic_write(path, functools.partial(write, **options))
    print(f"wrote {path}")


def save_table(path: Path, table: DataFrame):
    # Without a byte order mark, Excel misreads non-ASCII text.
    save(path, table.to_csv, index=False, encoding="utf-8-sig")


def save_figure(path: Path, figure: Figure):
    save(path, figure.savefig, format="png", dpi=100)


# ---------------------------------------------------------------- pictures


@matplotlib.rc_context({"text.parse_math": False})  # A name with two $ is not a formula.
def plot_confusion(predictions: DataFrame, classes: list[str], title: str) -> Figure:
    """Plot how the photos of each true class are predicted, as shares (0…1); 0 is white."""
    side = 0.16 * len(classes) + 6.5  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay.from_predictions(
        predictions["true"],
        predictions["predicted"],
        labels=classes,
        normalize="true",
        include_values=len(classes) <= 20,
        values_format=".2f",
        xticks_rotation="vertical",
        cmap=matplotlib.colormaps["viridis_r"].with_extremes(under="white"),
        im_kw={"vmin": 1e-9, "vmax": 1},  # Only 0 is under vmin.
        text_kw={"fontsize": 7},
        colorbar=False,
        ax=axes,
    )
    axes.set_title(title)
    axes.tick_params(labelsize=7)
    figure.colorbar(display.im_, ax=axes, label="share of the true class", shrink=0.8)
    return figure


@matplotlib.rc_context({"text.parse_math": False})
def plot_grad_cam(crops: list, maps: list, panels: DataFrame) -> Figure:
    """Plot each (R, R, 3) uint8 crop beside its (R, R) float32 map, four to a row.

    `panels` has the columns "title" and "color".
    """
    columns = min(4, len(crops))
    rows = math.ceil(len(crops) / 4)
    figure = Figure(figsize=(4.4 * columns, 2.85 * rows + 0.4), layout="constrained")  # inches
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, crop, heat, panel in zip(
        grid[: len(crops)], crops, maps, panels.itertuples(), strict=True
    ):
        image = crop.numpy() / np.float32(255)
        overlay = show_cam_on_image(image, heat, use_rgb=True, image_weight=0.6)
        axes.imshow(np.concatenate([image, overlay / 255], axis=1))
        axes.set_title(panel.title, fontsize=7, loc="left", color=panel.color)
    resolution = len(crops[0])
    cells = math.ceil(resolution / 32)
    note = f"GradCAM of the predicted class: {cells} × {cells} cells, enlarged to {resolution} px"
    figure.suptitle(note, fontsize=8, x=0.01, ha="left")
    return figure


def draw_grad_cam(path: Path, network: torch.nn.Module, crops: list, panels: DataFrame):
    """Draw the maps of `crops` for the classes in the column "target" of `panels`."""
    if not crops:
        path.unlink(missing_ok=True)  # It shows the photos of an older evaluation.
        return
    targets = panels["target"]
    maps = [grad_cam(network, crop, target) for crop, target in zip(crops, targets, strict=True)]
    save_figure(path, plot_grad_cam(crops, maps, panels))


def split_panels(predictions: DataFrame, classes: list[str]) -> DataFrame:
    """Return `predictions` with the columns of GradCAM panels: title, color and target."""
    titles = []
    colors = []
    for photo in predictions.itertuples():
        is_correct = photo.true == photo.predicted
        verdict = "correct" if is_correct else "WRONG"
        names = f"true: {photo.true}\npredicted: {photo.predicted}"
        titles.append(f"{names}\n{verdict}, confidence {photo.confidence:.1%}")
        colors.append("black" if is_correct else "red")
    targets = predictions["predicted"].map(classes.index)
    return predictions.assign(title=titles, color=colors, target=targets)


# ---------------------------------------------------------------- the evaluation of a split


def load_evaluated_split(args: argparse.Namespace, checkpoint: dict) -> datasets.Dataset:
    """Return the photos of --split, with labels that are indices into the checkpoint's classes.

    If the run held out a part of the train split (--val-split), "val" and "train" are the parts.
    Raises InputError.
    """
    classes = checkpoint.get("classes")
    fraction = checkpoint.get("settings", {}).get("val_split", 0)
    with train.reported_as(f"cannot load --dataset {args.dataset}"):
        wanted = [args.split, "train"] if fraction and args.split == "val" else [args.split]
        sources = train.find_splits(args.dataset, wanted)
        if fraction and args.split in ("train", "val") and "val" not in sources:
            parts = train.hold_out(train.load_split(sources, "train", classes), fraction)
            if train.fingerprint(parts["val"]) != checkpoint.get("val_fingerprint"):
                raise ValueError("other photos than in the run would be held out")
            return parts[args.split]
        if args.split not in sources and "val" in sources:
            raise ValueError(
                f"it has no {args.split} split: evaluate its val split with --split val"
            )
        return train.load_split(sources, args.split, classes)


def evaluate_split(args, photos: datasets.Dataset, network, autocast, info: dict):
    """Print the report on a split, and write its metrics, tables and pictures."""
    classes = photos.features["label"].names
    labels = torch.tensor(photos["label"][:])
    views = view_dataset(photos, args)
    start = time.perf_counter()
    batches = predict(network, views, args, autocast)
    logits = torch.cat([logits for _, logits, _ in batches], dim=1)
    info["photos_per_second"] = len(photos) / (time.perf_counter() - start)

    one_view = logits[0]
    six_views = None
    metrics = {"run": info, args.split: compute_metrics(one_view, labels, classes)}
    if args.tta:
        six_views = logits.mean(0)
        metrics["tta"] = compute_metrics(six_views, labels, classes)
        metrics["tta_change"] = compare_views(one_view, six_views, labels)
    per_class = DataFrame(metrics[args.split]["per_class"])
    predictions = list_predictions(photos, one_view, six_views)
    folder = args.output_dir
    text = json.dumps(metrics, indent=2, ensure_ascii=False).encode()
    save(folder / "metrics.json", lambda file: file.write(text))
    save_table(folder / "predictions.csv", predictions)
    save_table(folder / "classes.csv", per_class)
    print_report(metrics, args.split)

    title = f"{args.split} split, one view: accuracy {metrics[args.split]['accuracy']:.2%}"
    save_figure(folder / "confusion_matrix.png", plot_confusion(predictions, classes, title))
    count = min(args.num_gradcam, len(photos))
    pictures = {
        "gradcam_samples.png": predictions.sample(count, random_state=args.seed),
        "gradcam_worst.png": most_confident_errors(predictions, per_class).head(count),
    }
    for name, shown in pictures.items():
        items = [views[args.split, row, 0] for row in shown["row"]]
        crops = [photo_views[0] for photo_views, _ in items]  # the first view
        draw_grad_cam(folder / name, network, crops, split_panels(shown, classes))


# ---------------------------------------------------------------- your own photos


def find_images(paths: list[Path]) -> tuple[list[str], list[str]]:
    """Return the photos that --images names, and what is wrong with the other paths.

    A folder stands for the photos in it. Raises InputError for a folder that cannot be read.
    """
    photos = []
    problems = []
    for path in paths:
        if path.is_dir():
            with train.reported_as(f"cannot read --images {path}"):
                found, left_out = train.find_photos(path)
            counts = "".join(f", {count} {reason}" for reason, count in left_out.items())
            print(f"{path}: {len(found)} photos{counts}")
            photos.extend(str(photo) for photo in found)
            if not found:
                problems.append(f"{path} (a folder without photos)")
        elif path.is_file():
            photos.append(str(path))
        else:
            problems.append(f"{path} (not a file or folder)")
    return photos, problems


def classify_images(args, paths: list[str], network, classes: list[str], autocast) -> list[str]:
    """Print and write the five most likely classes of each photo, and draw GradCAM maps.

    Returns what is wrong with the photos that cannot be decoded.
    """
    images = [{"bytes": None, "path": path} for path in paths]
    photos = datasets.Dataset.from_dict({"image": images, "label": [0] * len(paths)})
    crop = functools.partial(crop_views, tta=args.tta)
    own_photos = OwnPhotos({"own": photos}, {"own": crop}, args.resolution)
    first_views = []
    all_logits = []
    reasons = []
    for views, logits, batch_reasons in predict(network, own_photos, args, autocast):
        for view, reason in zip(views[:, 0], batch_reasons, strict=True):
            if len(first_views) < args.num_gradcam and not reason:
                first_views.append(view)
        all_logits.append(logits.mean(0))
        reasons.extend(batch_reasons)
    problems = [reason for reason in reasons if reason]
    decoded = [row for row, reason in enumerate(reasons) if not reason]
    if not decoded:
        return problems

    probabilities = torch.cat(all_logits)[decoded].softmax(1)
    top = probabilities.topk(min(5, len(classes)))
    table = DataFrame({"path": [paths[row] for row in decoded]})
    for place in range(top.indices.shape[1]):
        table[f"class_{place + 1}"] = [classes[index] for index in top.indices[:, place]]
        table[f"confidence_{place + 1}"] = top.values[:, place].numpy()
    for path, indices, values in zip(table["path"], top.indices, top.values, strict=True):
        print(f"\n{path}")
        for index, value in zip(indices, values, strict=True):
            print(f"{value:>9.2%}  {classes[index]}")
    print()
    save_table(args.output_dir / "images.csv", table)

    panels = table.head(len(first_views))
    confidences = panels["confidence_1"].map("{:.1%}".format)
    titles = panels["path"].str[-60:] + "\n" + panels["class_1"] + "\nconfidence " + confidences
    targets = top.indices[: len(panels), 0].tolist()
    panels = panels.assign(title=titles, color="black", target=targets)
    draw_grad_cam(args.output_dir / "gradcam_images.png", network, first_views, panels)
    print(f"GradCAM of {len(panels)} of {len(table)} photos (--num-gradcam)")
    return problems


# ---------------------------------------------------------------- main


def checkpoint_line(path: Path, checkpoint: dict, chosen_on: str | None) -> str:
    """Format the path of a checkpoint, its epoch, and how that was chosen."""
    line = f"checkpoint  {path}"
    if "epoch" in checkpoint:
        line += f": epoch {checkpoint['epoch']}"
    if "resolution" in checkpoint:
        line += f", trained at {checkpoint['resolution']} px"
    if chosen_on:
        line += f", chosen on the {chosen_on} split ({checkpoint[f'{chosen_on}_accuracy']:.2%})"
    return line


def split_of_choice(checkpoint: dict) -> str | None:
    """Return the split on which train.py chose the epoch; None for other checkpoints."""
    for split in ("test", "val"):
        if f"{split}_accuracy" in checkpoint:
            return split
    return None


def main(argv: list[str] | None = None):
    """Evaluate as the flags in `argv` say. Raises InputError for a mistake the user can fix."""
    args = parse_args(argv)
    if train.WORLD_SIZE > 1:
        raise train.InputError("start eval.py without torchrun: it uses one GPU")
    if args.output_dir is None:
        args.output_dir = args.checkpoint.parent
    train.make_output_dir(args.output_dir)
    checkpoint = train.read_checkpoint(args.checkpoint)
    if "settings" not in checkpoint:
        # Of another program's checkpoint, only the weights are known to mean the same.
        checkpoint = {"model": checkpoint["model"]}
    settings = checkpoint.get("settings", {})
    chosen_on = split_of_choice(checkpoint)
    if args.resolution is None:
        args.resolution = checkpoint.get("resolution", 224)
    if args.dataset is None:
        args.dataset = settings.get("dataset", train.DEFAULT_DATASET)
    if args.amp is None:
        args.amp = settings.get("amp", True)
    print(checkpoint_line(args.checkpoint, checkpoint, chosen_on))
    train.set_up()
    train.log_without_gpu("evaluating on the CPU")
    precision = train.pick_precision(args.amp, settings.get("amp_dtype"))
    autocast = train.autocast_to(precision)
    print(f"device      {train.device_name()}, {train.precision_name(precision)}")
    print(f"resolution  {args.resolution} px")
    with train.reported_as(f"cannot load the network of {args.checkpoint}"):
        network = load_network(checkpoint["model"])
    num_outputs = len(checkpoint["model"][f"{train.NETWORK.head}.bias"])

    if args.images:
        paths, problems = find_images(args.images)
        classes = checkpoint.get("classes", [f"class {index}" for index in range(num_outputs)])
        if paths:
            problems += classify_images(args, paths, network, classes, autocast)
        if problems:
            raise train.InputError(f"not classified: {'; '.join(problems)}")
        return

    photos = load_evaluated_split(args, checkpoint)
    num_classes = photos.features["label"].num_classes
    print(f"data        {args.dataset}: {len(photos)} {args.split} photos, {num_classes} classes")
    if num_classes != num_outputs:
        counts = f"the checkpoint has {num_outputs} classes, and the dataset {num_classes}"
        raise train.InputError(f"{counts}: pass the right --dataset")
    if "classes" not in checkpoint:
        print("warning     the checkpoint names no classes: assumed to be in the dataset's order")
    if chosen_on == args.split and args.dataset == settings.get("dataset"):
        print("note        the epoch was chosen on this split: its accuracy is a little optimistic")
    flags = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    info = {
        "checkpoint": str(args.checkpoint),
        "epoch": checkpoint.get("epoch"),
        "chosen_on": chosen_on,
        "split": args.split,
        "device": train.DEVICE.type,
        "precision": str(precision),
        "torch": torch.__version__,
        "flags": flags,
    }
    evaluate_split(args, photos, network, autocast, info)


if __name__ == "__main__":
    train.run_command(main)
