"""Evaluate a checkpoint of train.py: accuracies, kinds of errors, six-view TTA, GradCAM.

    python eval.py                              # best_model.pth on the test split it was chosen on
    python eval.py --tta --num-gradcam 32       # also the average of six views; more GradCAM photos
    python eval.py --images car.jpg holidays    # the five likeliest classes of your own photos

TTA averages the logits of three scales, each as it is and mirrored. Reported by
github.com/patr1ckzhu/transfer-learning-stanford-cars, and not measured with this code, are 91.78 %
at 448 px, with TTA 91.93 %, and at 224 px 89.38 % and 90.32 %.
"""

import argparse
import functools
import json
import math
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# pytorch_grad_cam imports pyplot, and a notebook sets this to a backend that may not be installed.
os.environ["MPLBACKEND"] = "agg"
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Ctrl-C ends the process at once and without a traceback, as in train.py.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if os.path.expanduser("~") == "~":  # As in train.py.
    os.environ["HOME"] = tempfile.gettempdir()

import datasets
import numpy as np
import pandas
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torchvision.models import resnet50

import train

# With a byte order mark, without which Excel garbles what is not ASCII.
AS_CSV = {"index": False, "encoding": "utf-8-sig"}
AS_PNG = {"format": "png", "dpi": 100}

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


def views_of(photos: datasets.Dataset, args: argparse.Namespace) -> train.CarPhotos:
    """The items are the views of each photo; their keys are of the split "test"."""
    crop = functools.partial(crop_views, tta=args.tta)
    return train.CarPhotos({"test": photos}, {"test": crop}, args.resolution)


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
        outputs = [model(train.move_and_normalize(crop)).float() for crop in crops]
    logits = torch.stack(outputs).cpu()
    if not logits.isfinite().all():
        raise train.InputError("the logits are not finite: try --no-amp, or another --checkpoint")
    return logits[0], logits.mean(0)


def predict_all(model, photos: train.CarPhotos, args, autocast) -> tuple:
    """`predict` for all photos."""
    key_batches = train.test_batches(len(photos.cars["test"]), args.batch_size)
    batches = iter(train.make_loader(photos, key_batches, args.workers))
    first_views = []
    means = []
    for views, _ in train.next_batches(batches, len(key_batches), "photos"):
        first_view, mean = predict(model, views, autocast)
        first_views.append(first_view)
        means.append(mean)
    return torch.cat(first_views), torch.cat(means)


def grad_cam(model, crops: torch.Tensor, targets: list[int], batch_size: int) -> np.ndarray:
    """GradCAM maps of (N, R, R, 3) uint8 crops: (N, R, R) float32 in 0…1, at layer4[-1].

    Each is for the class that `targets` has for its crop. It is computed in float32.
    """
    maps = []
    with GradCAM(model, [model.layer4[-1]]) as cam:
        for start in range(0, len(crops), batch_size):
            batch = slice(start, start + batch_size)
            outputs = [ClassifierOutputTarget(target) for target in targets[batch]]
            maps.append(cam(train.move_and_normalize(crops[batch]), outputs))
    return np.concatenate(maps)


# ---------------------------------------------------------------- numbers


def proportion(right: torch.Tensor) -> dict:
    """Accuracy (0…1) of (N,) bool, with the bounds of its 95 % Wilson score interval."""
    correct = int(right.sum())
    total = len(right)
    low, high = binomtest(correct, total).proportion_ci(0.95, "wilson")
    bounds = {"low": float(low), "high": float(high)}
    return {"accuracy": correct / total, "correct": correct, "total": total, **bounds}


def calibration_error(confidences: torch.Tensor, right: torch.Tensor) -> float:
    """Expected calibration error (0…1) with 15 bins of equal width (Guo et al., 2017).

    It is the mean gap, over the photos, between the mean confidence (0…1) of a photo's bin and the
    accuracy of that bin.
    """
    bins = (15 * confidences).ceil().long().clamp(1, 15) - 1
    gaps = confidences.double() - right.double()
    sums = torch.zeros(15, dtype=torch.float64).index_add(0, bins, gaps)
    return sums.abs().sum().item() / len(gaps)


def describe_classes(predicted, labels, classes: list[str]) -> pandas.DataFrame:
    """Precision, recall and F1 (0…1) of each class, and its number of photos, as in scikit-learn.

    Recall is the accuracy of the class. All three are 0 where there is nothing to divide by.
    """
    indices = range(len(classes))
    scores = precision_recall_fscore_support(labels, predicted, labels=indices, zero_division=0)
    names = ("precision", "recall", "f1-score", "support")
    return pandas.DataFrame({**dict(zip(names, scores, strict=True)), "class": classes})


def worst_first(per_class: pandas.DataFrame) -> pandas.DataFrame:
    tested = per_class[per_class["support"] > 0]
    return tested.sort_values("recall", kind="stable")


def confused_pairs(errors: pandas.DataFrame, support: pandas.Series) -> pandas.DataFrame:
    """The ten most frequent of `errors`: classes, count, share (0…1) of the true class's photos."""
    pairs = errors.value_counts().head(10).reset_index()
    pairs["share"] = pairs["count"] / pairs["true"].map(support).astype(float)
    return pairs


def have_years(classes: list[str]) -> bool:
    """Whether classes are named as Stanford Cars' are: make, model and body, year."""
    return all(re.search(r"^\S+ .* (19|20)\d\d$", name) for name in classes)


def error_kinds(names: pandas.DataFrame) -> dict:
    """How many errors are in the year alone, stay within the make, or leave it.

    Also the accuracy (0…1) that is left if all but the year, or only the make, has to be right.
    `names` has the columns true and predicted.
    """
    right = names["true"] == names["predicted"]
    # Without the year, which is the last word; and the make, as far as it is the first word.
    right_model = names["true"].str[:-5] == names["predicted"].str[:-5]
    right_make = names["true"].str.split().str[0] == names["predicted"].str.split().str[0]
    return {
        "year_only": int((right_model & ~right).sum()),
        "same_make": int((right_make & ~right_model).sum()),
        "other_make": int((~right_make).sum()),
        "model_accuracy": float(right_model.mean()),
        "make_accuracy": float(right_make.mean()),
    }


def compute_metrics(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """All figures of (N, classes) float32 logits and (N,) int64 labels."""
    confidences = logits.softmax(1).amax(1)
    predicted = logits.argmax(1)
    right = predicted == labels
    in_top5 = logits.topk(min(5, len(classes))).indices == labels[:, None]
    per_class = describe_classes(predicted, labels, classes)
    names = pandas.DataFrame({"true": labels, "predicted": predicted}).map(classes.__getitem__)
    errors = names[names["true"] != names["predicted"]]
    pairs = confused_pairs(errors, per_class.set_index("class")["support"])
    metrics = proportion(right)
    metrics["top5"] = proportion(in_top5.any(1))
    metrics["mean_class_accuracy"] = float(worst_first(per_class)["recall"].mean())
    metrics["loss"] = F.cross_entropy(logits.double(), labels).item()
    metrics["calibration_error"] = calibration_error(confidences, right)
    metrics["per_class"] = per_class.to_dict("records")
    metrics["confused_pairs"] = pairs.to_dict("records")
    if have_years(classes):
        metrics["errors"] = error_kinds(names)
    return metrics


def compare_views(first_view: torch.Tensor, all_views: torch.Tensor, labels) -> dict:
    """How many photos the six views mended and broke, and McNemar's exact p for that difference."""
    right_before = first_view.argmax(1) == labels
    right_after = all_views.argmax(1) == labels
    mended = int((right_after & ~right_before).sum())
    broken = int((right_before & ~right_after).sum())
    # binomtest needs a photo: where there is none, chance explains it all.
    p_value = float(binomtest(mended, mended + broken).pvalue) if mended + broken else 1.0
    return {"mended": mended, "broken": broken, "p_value": p_value}


def list_predictions(test: datasets.Dataset, logits: dict[str, torch.Tensor]) -> pandas.DataFrame:
    """Path, true and predicted class of each photo, and softmax's confidences (0…1).

    The names of the last columns begin with the keys of `logits`, each (N, classes).
    """
    classes = np.array(test.features["label"].names)
    labels = np.array(test["label"])
    rows = range(len(test))
    # Flattened to the columns image.bytes and image.path, so that no photo has to be read.
    columns = {"row": rows, "file": test.flatten()["image.path"], "true": classes[labels]}
    for prefix, of_photos in logits.items():
        probabilities = of_photos.softmax(1)
        columns[f"{prefix}predicted"] = classes[of_photos.argmax(1).numpy()]
        columns[f"{prefix}confidence"] = probabilities.amax(1).numpy()
        columns[f"{prefix}true_confidence"] = probabilities[rows, labels].numpy()
    return pandas.DataFrame(columns)


def surest_errors(predictions: pandas.DataFrame, per_class: pandas.DataFrame) -> pandas.DataFrame:
    """The error with the highest confidence of each of the five worst classes."""
    errors = predictions[predictions["true"] != predictions["predicted"]]
    surest = errors.sort_values("confidence").groupby("true").tail(1)
    places = {name: place for place, name in enumerate(worst_first(per_class)["class"])}
    return surest.sort_values("true", key=lambda names: names.map(places))[:5]


# ---------------------------------------------------------------- what is printed and drawn


def print_table(title: str, table: pandas.DataFrame):
    shares = {name: "{:.2%}".format for name in table.select_dtypes("float")}
    print(f"\n{title}\n{table.to_string(formatters=shares, index=False)}")


def summarize(metrics: dict) -> dict[str, str]:
    """What is printed of the metrics of one view, or of six."""
    summary = {
        "accuracy": f"{metrics['accuracy']:.2%}",
        "95 % interval": f"{100 * metrics['low']:.2f}–{metrics['high']:.2%}",
        "photos right": f"{metrics['correct']}/{metrics['total']}",
        "top-5 accuracy": f"{metrics['top5']['accuracy']:.2%}",
        "mean of the classes": f"{metrics['mean_class_accuracy']:.2%}",
        "loss (cross-entropy)": f"{metrics['loss']:.4f}",
        "calibration error": f"{metrics['calibration_error']:.2%}",
    }
    if "errors" in metrics:
        errors = metrics["errors"]
        summary["wrong in the year alone"] = errors["year_only"]
        summary["another model or body"] = errors["same_make"]
        summary["another make"] = errors["other_make"]
        summary["right but for the year"] = f"{errors['model_accuracy']:.2%}"
        summary["right make"] = f"{errors['make_accuracy']:.2%}"
    return summary


def print_report(metrics: dict):
    per_class = pandas.DataFrame(metrics["test"]["per_class"])
    print_table("classes, whose accuracy is their recall", per_class)
    if len(per_class) > 10:
        print_table("ten worst classes", worst_first(per_class)[:10])
    if metrics["test"]["confused_pairs"]:
        print_table("most confused pairs", pandas.DataFrame(metrics["test"]["confused_pairs"]))
    columns = {"one view": summarize(metrics["test"])}
    if "tta" in metrics:
        columns["six views"] = summarize(metrics["tta"])
    print(f"\n{pandas.DataFrame(columns).to_string()}")
    if "tta" in metrics:
        change = metrics["tta_change"]
        counts = f"{change['mended']} photos and broke {change['broken']}"
        print(f"six views mended {counts} (by chance alone: p = {change['p_value']:.2g})")
    print(f"{metrics['run']['photos_per_second']:.1f} photos/s, with loading\n")


def save(path: Path, write: Callable):
    train.atomic_write(path, write)
    print(f"wrote {path}")


def plot_confusion(confusion: np.ndarray, classes: list[str]) -> Figure:
    """The (classes, classes) counts, coloured by their share of the true class."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    count = len(classes)
    longest = max(len(name) for name in classes)
    side = min(160, 0.16 * count + 0.07 * longest + 2)  # inches: cells, names, the bar
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shown = np.ma.masked_equal(share, 0)  # What never occurs stays white.
    image = axes.imshow(shown, cmap="viridis_r", vmin=0, vmax=1)
    axes.set_xticks(range(count), classes, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(count), classes, fontsize=7, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    edges = np.arange(count + 1) - 0.5
    axes.hlines(edges, -0.5, count - 0.5, color="0.9", linewidth=0.5)
    axes.vlines(edges, -0.5, count - 0.5, color="0.9", linewidth=0.5)
    figure.colorbar(image, ax=axes, shrink=0.5, label="share of the true class")
    return figure


def plot_grad_cam(crops: torch.Tensor, titles: list[str], maps: np.ndarray) -> Figure:
    """Of each of (N, R, R, 3) uint8 crops the title, the crop, and its (R, R) map on the crop."""
    columns = min(3, len(crops))
    rows = math.ceil(len(crops) / 3)
    figure = Figure(figsize=(4.4 * columns, 2.75 * rows), layout="constrained")  # inches
    for number, (crop, title, heat) in enumerate(zip(crops, titles, maps, strict=True), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axis("off")
        image = crop.numpy() / np.float32(255)  # show_cam_on_image takes float32 in 0…1.
        gap = np.ones((len(image), len(image) // 20, 3))
        overlay = show_cam_on_image(image, heat, use_rgb=True, image_weight=0.6) / 255
        axes.imshow(np.concatenate([image, gap, overlay], axis=1))
        color = "firebrick" if "\nWRONG" in title else "black"
        axes.set_title(title, fontsize=7, loc="left", color=color, parse_math=False)
    return figure


def draw_grad_cam(path: Path, photos: train.CarPhotos, panels: pandas.DataFrame, model, args):
    """Draw a figure of `panels`, with the columns row (of `photos`), title and target (a class)."""
    # A test crop needs no seed, and so has 0; the first view is the one that was predicted.
    crops = torch.stack([photos["test", row, 0][0][0] for row in panels["row"]])
    maps = grad_cam(model, crops, list(panels["target"]), args.batch_size)
    figure = plot_grad_cam(crops, list(panels["title"]), maps)
    save(path, functools.partial(figure.savefig, **AS_PNG))


def panels_of(predictions: pandas.DataFrame, classes: list[str]) -> pandas.DataFrame:
    """The panels of a GradCAM figure, which explain the predicted classes."""
    titles = []
    for line in predictions.itertuples():
        verdict = "right" if line.true == line.predicted else "WRONG"
        names = f"true: {line.true}\npredicted: {line.predicted}"
        titles.append(f"{names}\n{verdict}, confidence {line.confidence:.2%}")
    targets = predictions["predicted"].map(classes.index)
    return pandas.DataFrame({"row": predictions["row"], "target": targets, "title": titles})


# ---------------------------------------------------------------- somebody's own photos


def find_images(names: list[str]) -> tuple[list[str], list[str]]:
    """The photos that --images names, a folder standing for those in it, and what is wrong."""
    paths = []
    for path in map(Path, names):
        photos = train.find_photos(path)[0] if path.is_dir() else []
        paths += photos or [path]
    readable = []
    problems = []
    for path in paths:
        try:
            if not path.is_file():  # Reading a pipe would never end.
                raise ValueError("no file, and no folder with photos")
            train.decode_photo(path.read_bytes())
            readable.append(str(path))
        except Exception as error:
            problems.append(f"{path} ({error})")
    return readable, problems


def classify_images(args: argparse.Namespace, model, classes: list[str], autocast):
    """Print and write the five likeliest classes of each of --images, and draw GradCAM maps.

    Raises InputError at the end, naming the files that could not be read.
    """
    paths, problems = find_images(args.images)
    figure_path = args.output_dir / "gradcam_images.png"
    figure_path.unlink(missing_ok=True)  # An older one is not of these photos.
    unread = f"{len(problems)} of {len(paths) + len(problems)} photos of --images cannot be read"
    if not paths:
        raise train.InputError(f"{unread}; {'; '.join(problems)}")

    features = {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
    columns = {"image": paths, "label": [0] * len(paths)}  # No label is known, or used.
    own = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    photos = views_of(own, args)
    _, logits = predict_all(model, photos, args, autocast)
    confidences, likeliest = logits.softmax(1).topk(min(5, len(classes)))
    table = pandas.DataFrame({"path": paths})
    for place in range(likeliest.shape[1]):
        table[f"class_{place + 1}"] = np.array(classes)[likeliest[:, place].numpy()]
        table[f"confidence_{place + 1}"] = confidences[:, place].numpy()
    for row, path in enumerate(paths):
        print(f"\n{path}")
        for confidence, index in zip(confidences[row], likeliest[row], strict=True):
            print(f"{confidence:>9.2%}  {classes[index]}")
    print()
    save(args.output_dir / "images.csv", functools.partial(table.to_csv, **AS_CSV))
    shown = table[: args.num_gradcam]
    if len(shown):
        titles = shown["path"].str[-60:] + "\n" + shown["class_1"]
        targets = likeliest[: len(shown), 0]
        panels = pandas.DataFrame({"row": shown.index, "target": targets, "title": titles})
        draw_grad_cam(figure_path, photos, panels, model, args)
    print(f"GradCAM maps of {len(shown)} of {len(paths)} photos (--num-gradcam)")
    if problems:
        raise train.InputError(f"{unread}: {'; '.join(problems)}")


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    batch_size = 64 if torch.cuda.is_available() else 16  # What a CPU's caches like.
    # fmt: off
    add("--checkpoint", type=Path, default="best_model.pth",
        help="what train.py saved, or a state dict (%(default)s)")
    add("--dataset", help="Hub data set or local folder (what the checkpoint was trained on)")
    add("--resolution", type=int, help="side of the crops in pixels (the checkpoint's)")
    add("--batch-size", type=int, default=batch_size, help="photos evaluated at once (%(default)s)")
    add("--tta", action="store_true",
        help="also average the logits of six views: three scales, mirrored or not")
    add("--num-gradcam", type=int, default=16,
        help="photos in gradcam_samples.png, 100 at most; 0 for no GradCAM (%(default)s)")
    add("--seed", type=int, default=42, help="of the photos with GradCAM (%(default)s)")
    add("--workers", type=int, default=train.DEFAULT_WORKERS,
        help="processes that decode photos (%(default)s)")
    add("--output-dir", type=Path, default=".", help="for what is written (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (as in training)")
    add("--images", nargs="+", metavar="PATH",
        help="classify these photos, and those in these folders, instead of the test split")
    # fmt: on
    args = parser.parse_args(argv)
    train.check_lowest(parser, args)
    if args.num_gradcam > 100:
        parser.error("argument --num-gradcam: 100 photos fill a figure")
    return args


def load_test_split(args: argparse.Namespace, checkpoint: dict, num_outputs: int):
    """The test split, its labels in the order of the checkpoint's classes."""
    known_classes = checkpoint.get("classes")
    test = train.load_cars(args.dataset, ("test",), known_classes)["test"]
    num_classes = test.features["label"].num_classes
    print(f"test        {args.dataset}: {len(test)} photos, {num_classes} classes")
    if num_classes != num_outputs:
        has = f"{args.checkpoint} has {num_outputs} classes"
        raise train.InputError(f"{has}: name the --dataset that it was trained on")
    if known_classes is None:
        print(f"            {args.checkpoint} names no classes: those of the data set are assumed,")
        print("            in its order; in another order, all that follows is wrong")
    return test


def evaluate_test_split(args: argparse.Namespace, model, checkpoint: dict, autocast, run: dict):
    """Print the report on the test split, and write its figures, tables and pictures."""
    test = load_test_split(args, checkpoint, model.fc.out_features)
    classes = test.features["label"].names
    labels = torch.tensor(test["label"])
    photos = views_of(test, args)
    start = time.perf_counter()
    first_view, all_views = predict_all(model, photos, args, autocast)
    run["photos_per_second"] = len(test) / (time.perf_counter() - start)

    metrics = {"run": run, "test": compute_metrics(first_view, labels, classes)}
    logits = {"": first_view}
    if args.tta:
        metrics["tta"] = compute_metrics(all_views, labels, classes)
        metrics["tta_change"] = compare_views(first_view, all_views, labels)
        logits["tta_"] = all_views
    print_report(metrics)
    text = json.dumps(metrics, indent=2, ensure_ascii=False, default=str).encode()
    save(args.output_dir / "metrics.json", lambda file: file.write(text))
    predictions = list_predictions(test, logits)
    save(args.output_dir / "predictions.csv", functools.partial(predictions.to_csv, **AS_CSV))
    per_class = pandas.DataFrame(metrics["test"]["per_class"])
    save(args.output_dir / "classes.csv", functools.partial(per_class.to_csv, **AS_CSV))

    names = ("confusion_matrix.png", "gradcam_samples.png", "gradcam_worst.png")
    confusion_path, samples_path, worst_path = [args.output_dir / name for name in names]
    for path in (confusion_path, samples_path, worst_path):
        path.unlink(missing_ok=True)  # An older one is not of this evaluation.
    confusion = confusion_matrix(labels, first_view.argmax(1), labels=range(len(classes)))
    figure = plot_confusion(confusion, classes)
    save(confusion_path, functools.partial(figure.savefig, **AS_PNG))
    if args.num_gradcam == 0:
        return
    samples = predictions.sample(min(args.num_gradcam, len(test)), random_state=args.seed)
    draw_grad_cam(samples_path, photos, panels_of(samples, classes), model, args)
    worst = surest_errors(predictions, per_class)
    if len(worst):
        draw_grad_cam(worst_path, photos, panels_of(worst, classes), model, args)
    else:
        print(f"no photo is misclassified: no {worst_path.name}")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if train.WORLD_SIZE > 1:
        raise train.InputError("eval.py is one process: start it without torchrun")
    train.make_output_dir(args.output_dir)
    checkpoint = train.read_checkpoint(args.checkpoint)
    trained_at = checkpoint.get("resolution", 224)
    args.resolution = args.resolution or trained_at
    settings = checkpoint.get("settings", {})
    args.dataset = args.dataset or settings.get("dataset", train.DEFAULT_DATASET)
    epoch = checkpoint.get("epoch", "unknown")
    trained = f"epoch {epoch}, {trained_at} px"
    print(f"checkpoint  {args.checkpoint} ({trained}); evaluated at {args.resolution} px")
    train.start_process()
    amp = settings.get("amp", True) if args.amp is None else args.amp
    precision = train.pick_precision(amp, settings.get("amp_dtype"))
    autocast = train.autocast_to(precision)
    print(f"device      {train.DEVICE.type}, {precision}")
    with train.reported_as(f"{args.checkpoint} is of no ResNet-50 with an fc"):
        model = load_model(checkpoint)
    if args.images:
        numbered = [f"class {index}" for index in range(model.fc.out_features)]
        classify_images(args, model, checkpoint.get("classes", numbered), autocast)
        return
    packages = ("torch", "torchvision", "datasets", "grad-cam", "numpy")
    run = {
        "epoch": epoch,
        "device": train.DEVICE.type,
        "precision": str(precision),
        "settings": vars(args),
        "versions": {name: version(name) for name in packages},
    }
    evaluate_test_split(args, model, checkpoint, autocast, run)


if __name__ == "__main__":
    train.run_command(main)
