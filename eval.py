"""Evaluate a checkpoint of train.py: accuracies, kinds of errors, six-view TTA, GradCAM.

    python eval.py                              # best_model.pth on the test split it was chosen on
    python eval.py --tta --num-gradcam 32       # also the average of six views; more GradCAM photos
    python eval.py --images car.jpg holidays    # the five likeliest classes of your own photos

TTA averages the logits of three scales, each as it is and mirrored. The reference reports 91.78 %
at 448 px, with TTA 91.93 %, and at 224 px 89.38 % and 90.32 %; this code has not been measured.
"""

import argparse
import functools
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import train

# pytorch_grad_cam imports pyplot, and a notebook may set a backend that is not installed here.
os.environ["MPLBACKEND"] = "agg"

import datasets
import numpy as np
import pandas
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rcParams
from matplotlib.figure import Figure
from pandas import DataFrame
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import binomtest
from sklearn.metrics import ConfusionMatrixDisplay, precision_recall_fscore_support
from torchvision.models import resnet50

# Without a byte order mark, Excel garbles what is not ASCII.
AS_CSV = {"index": False, "encoding": "utf-8-sig"}
AS_PNG = {"format": "png", "dpi": 100}
rcParams["text.parse_math"] = False  # Two $ in a name are no formula.
pandas.options.display.float_format = "{:.4f}".format
MAKE_MODEL_YEAR = re.compile(r"\S+ .* (19|20)\d\d")
# These are the printed names of the errors in metrics.json.
ERROR_KINDS = {
    "errors.year_only": "wrong in the year alone",
    "errors.same_make": "another model or body",
    "errors.other_make": "another make",
}

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
    """Centre crops of a (3, H, W) uint8 photo: (1 or 3, R, R, 3) uint8.

    The first is the view that training is tested on (shorter side int(R·256/224)); with `tta`,
    one of shorter side R and one of int(R·288/224) follow.
    """
    sides = (256, 224, 288) if tta else (256,)
    return torch.stack([train.center_crop(photo, resolution, side) for side in sides])


def views_of(cars, args) -> train.CarPhotos:
    """The photos `cars` as a split "test", whose items are views and labels."""
    crop = functools.partial(crop_views, tta=args.tta)
    return train.CarPhotos({"test": cars}, {"test": crop}, args.resolution)


@torch.no_grad()
def predict(model, photos: train.CarPhotos, args, autocast) -> torch.Tensor:
    """Finite logits of all views, with TTA also mirrored: (V, N, classes) float32 on the CPU."""
    key_batches = train.test_batches(len(photos.cars["test"]), args.batch_size)
    batches = iter(train.make_loader(photos, key_batches, args.workers))
    logits = []
    for views, _ in train.next_batches(batches, len(key_batches), "photos"):
        crops = list(views.to(train.DEVICE, non_blocking=True).unbind(1))
        if args.tta:
            crops += [crop.flip(-2) for crop in crops]
        with autocast:
            outputs = [model(train.move_and_normalize(crop)).float() for crop in crops]
        logits.append(torch.stack(outputs).cpu())
    logits = torch.cat(logits, dim=1)
    if not logits.isfinite().all():
        raise train.InputError("the logits are not finite: try --no-amp")
    return logits


def grad_cam(model, crop: torch.Tensor, target: int) -> np.ndarray:
    """GradCAM at layer4[-1], in float32, of (R, R, 3) uint8 for a class: (R, R) float32 in 0…1."""
    images = train.move_and_normalize(crop[None])
    with GradCAM(model, [model.layer4[-1]]) as cam:
        return cam(images, [ClassifierOutputTarget(target)])[0]


# ---------------------------------------------------------------- numbers


def proportion(right: torch.Tensor) -> dict:
    """Share (0…1) of (N,) bool, with its 95 % Wilson score interval."""
    correct = int(right.sum())
    total = len(right)
    interval = binomtest(correct, total).proportion_ci(0.95, "wilson")
    return {
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def calibration_error(confidences, right) -> float:
    """Expected calibration error (0…1; Guo et al., 2017) of (N,) confidences (0…1) and (N,) bool.

    It is the mean gap between the accuracy and the mean confidence of a photo's bin, one of 15.
    """
    bins = (15 * confidences).ceil().long().clamp(1, 15) - 1
    gaps = confidences.double() - right.double()
    sums = torch.zeros(15, dtype=torch.float64).index_add(0, bins, gaps)
    return sums.abs().sum().item() / len(gaps)


def describe_classes(names: DataFrame, classes: list[str]) -> DataFrame:
    """Each class's precision, recall, F1 (0…1) and photos, from columns true and predicted."""
    scores = precision_recall_fscore_support(
        names["true"], names["predicted"], labels=classes, zero_division=0
    )
    columns = ("class", "precision", "recall", "f1-score", "support")
    return DataFrame(dict(zip(columns, (classes, *scores), strict=True)))


def error_kinds(names: DataFrame) -> dict:
    """How many errors are in the year alone, stay within the make (of one word), or leave it.

    Also the accuracy (0…1) that is left if all but the year, or only the make, has to be right.
    """
    right = names["true"] == names["predicted"]
    without_year = names.map(lambda name: name[:-5])
    right_model = without_year["true"] == without_year["predicted"]
    make = names.map(lambda name: name.split()[0])
    right_make = make["true"] == make["predicted"]
    return {
        "year_only": int((right_model & ~right).sum()),
        "same_make": int((right_make & ~right_model).sum()),
        "other_make": int((~right_make).sum()),
        "model_accuracy": float(right_model.mean()),
        "make_accuracy": float(right_make.mean()),
    }


def compute_metrics(logits, labels, classes: list[str]) -> dict:
    """All figures of (N, classes) float32 logits and (N,) int64 labels; shares are in 0…1."""
    predicted = logits.argmax(1)
    right = predicted == labels
    in_top5 = logits.topk(min(5, len(classes))).indices == labels[:, None]
    indices = DataFrame({"true": labels.numpy(), "predicted": predicted.numpy()})
    names = indices.map(classes.__getitem__)
    per_class = describe_classes(names, classes)
    tested = per_class.query("support > 0")
    pairs = names[~right.numpy()].value_counts().head(10).reset_index()
    support = pairs["true"].map(names["true"].value_counts())
    pairs["share"] = pairs["count"] / support.astype(float)
    metrics = {
        **proportion(right),
        "top5": proportion(in_top5.any(1)),
        "mean_class_accuracy": float(tested["recall"].mean()),
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "calibration_error": calibration_error(logits.softmax(1).amax(1), right),
        "per_class": per_class.to_dict("records"),
        "confused_pairs": pairs.to_dict("records"),
    }
    if all(map(MAKE_MODEL_YEAR.fullmatch, classes)):
        metrics["errors"] = error_kinds(names)
    return metrics


def compare_views(first_view, all_views, labels) -> dict:
    """How many photos the six views mended and broke, and McNemar's exact p for that difference."""
    before = first_view.argmax(1) == labels
    after = all_views.argmax(1) == labels
    mended = int((after & ~before).sum())
    broken = int((before & ~after).sum())
    # binomtest refuses 0 of 0, which chance explains.
    p_value = binomtest(mended, mended + broken).pvalue if mended + broken else 1
    return {"mended": mended, "broken": broken, "p_value": float(p_value)}


def list_predictions(test, logits: dict[str, torch.Tensor]) -> DataFrame:
    """Paths, true classes and, by (N, classes) `logits`, predicted ones and confidences (0…1)."""
    classes = np.array(test.features["label"].names)
    labels = np.array(test["label"])
    rows = range(len(test))
    # flatten() gives the columns image.bytes and image.path: no photo is read.
    columns = {"row": rows, "file": test.flatten()["image.path"], "true": classes[labels]}
    for prefix, of_photos in logits.items():
        shares = of_photos.softmax(1).numpy()
        columns[f"{prefix}predicted"] = classes[of_photos.argmax(1).numpy()]
        columns[f"{prefix}confidence"] = shares.max(1)
        columns[f"{prefix}true_confidence"] = shares[rows, labels]
    return DataFrame(columns)


def surest_errors(predictions, per_class) -> DataFrame:
    """The error with the highest confidence of each of the five worst classes."""
    errors = predictions[predictions["true"] != predictions["predicted"]]
    recall = per_class.set_index("class")["recall"]
    errors = errors.assign(recall=errors["true"].map(recall))
    errors = errors.sort_values("confidence", ascending=False)
    surest = errors.drop_duplicates("true")
    return surest.sort_values("recall", kind="stable")[:5]


# ---------------------------------------------------------------- what is printed and drawn


def print_report(metrics: dict):
    """Print the classes, the worst last, the most confused pairs, and the figures of all photos."""
    tested = DataFrame(metrics["test"]["per_class"]).query("support > 0")
    worst_last = tested.sort_values("recall", ascending=False, kind="stable")
    print(f"\n{worst_last.to_string(index=False)}")
    pairs = DataFrame(metrics["test"]["confused_pairs"])
    if len(pairs):
        print(f"\n{pairs.to_string(index=False)}")
    columns = {"one view": metrics["test"]}
    if "tta" in metrics:
        columns["six views"] = metrics["tta"]
    figures = pandas.json_normalize(list(columns.values())).set_axis(list(columns))
    figures = figures.drop(columns=["per_class", "confused_pairs"])
    figures = figures.rename(columns=ERROR_KINDS).astype(object)
    print(f"\n{figures.T.to_string()}")
    if "tta" in metrics:
        change = "six views mended {mended} photos and broke {broken} (p = {p_value:.2g})"
        print(change.format(**metrics["tta_change"]))
    print(f"{metrics['run']['photos_per_second']:.1f} photos/s\n")


def save(path: Path, write: Callable, **options):
    """Write a file as train.py does, by `write(file, **options)`, and say so."""
    train.atomic_write(path, functools.partial(write, **options))
    print(f"wrote {path}")


def plot_confusion(names: DataFrame, classes: list[str]) -> Figure:
    """How the photos of each true class are predicted: shares (0…1), white where there are none."""
    side = 0.16 * len(classes) + 6  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        names["true"],
        names["predicted"],
        labels=classes,
        normalize="true",
        include_values=False,
        xticks_rotation="vertical",
        cmap=colormaps["viridis_r"].with_extremes(under="white"),
        im_kw={"vmin": 1e-9, "vmax": 1},
        ax=axes,
    )
    axes.tick_params(labelsize=7)
    return figure


def plot_grad_cam(crops, titles, maps) -> Figure:
    """Of each (R, R, 3) uint8 crop the title, the crop, and its (R, R) float32 map on the crop."""
    columns = min(3, len(crops))
    rows = math.ceil(len(crops) / 3)
    figure = Figure(figsize=(4.4 * columns, 2.75 * rows), layout="constrained")  # inches
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, crop, title, heat in zip(grid, crops, titles, maps, strict=False):
        image = crop.numpy() / np.float32(255)
        overlay = show_cam_on_image(image, heat, use_rgb=True, image_weight=0.6)
        axes.imshow(np.concatenate([image, overlay / 255], axis=1))
        axes.set_title(title, fontsize=7, loc="left")
    return figure


def draw_grad_cam(path: Path, photos, panels: DataFrame, model):
    """Draw `panels`, with the columns row (of `photos`), title and target (a class)."""
    if panels.empty:
        path.unlink(missing_ok=True)  # It shows older photos.
        return
    # The map is of the first view. A test crop needs no seed, and so has 0.
    keys = [("test", row, 0) for row in panels["row"]]
    crops = [views[0] for views, _ in photos.__getitems__(keys)]
    maps = map(functools.partial(grad_cam, model), crops, panels["target"])
    save(path, plot_grad_cam(crops, panels["title"], maps).savefig, **AS_PNG)


def panels_of(predictions: DataFrame, classes: list[str]) -> DataFrame:
    """The panels of a GradCAM figure, which explain the predicted classes."""
    titles = []
    for line in predictions.itertuples():
        verdict = "right" if line.true == line.predicted else "WRONG"
        names = f"true: {line.true}\npredicted: {line.predicted}"
        titles.append(f"{names}\n{verdict}, confidence {line.confidence:.2%}")
    targets = predictions["predicted"].map(classes.index)
    return predictions.assign(title=titles, target=targets)


# ---------------------------------------------------------------- somebody's own photos


def find_images(names: list[str]) -> tuple[list[str], list[str]]:
    """The photos that --images names, a folder standing for those in it, and what is wrong."""
    readable = []
    problems = []
    for name in map(Path, names):
        photos = []
        if name.is_dir():
            photos, others = train.find_photos(name)
            print(f"{name}: {len(photos)} photos, {others} other files or links")
        for path in photos or [name]:
            try:
                if not path.is_file():  # Reading a pipe would never end.
                    raise ValueError("no file, no folder of photos")
                train.decode_photo(path.read_bytes())
                readable.append(str(path))
            except Exception as error:
                problems.append(f"{path} ({error})")
    return readable, problems


def classify_images(args, paths: list[str], model, classes, autocast):
    """Print and write the five likeliest classes of each photo, and draw GradCAM maps."""
    images = [{"bytes": None, "path": path} for path in paths]
    # No label is known, or used.
    own = datasets.Dataset.from_dict({"image": images, "label": [0] * len(paths)})
    photos = views_of(own, args)
    logits = predict(model, photos, args, autocast).mean(0)
    top5 = logits.softmax(1).topk(min(5, logits.shape[1]))
    confidences = top5.values.numpy()
    likeliest = np.array(classes, str)[top5.indices.numpy()]
    table = DataFrame({"path": paths})
    for place in range(likeliest.shape[1]):
        table[f"class_{place + 1}"] = likeliest[:, place]
        table[f"confidence_{place + 1}"] = confidences[:, place]
    for row, path in enumerate(paths):
        print(f"\n{path}")
        for confidence, name in zip(confidences[row], likeliest[row], strict=True):
            print(f"{confidence:>9.2%}  {name}")
    save(args.output_dir / "images.csv", table.to_csv, **AS_CSV)
    panels = table[: args.num_gradcam].reset_index(names="row")
    panels["title"] = panels["path"].str[-60:] + "\n" + panels["class_1"]
    panels["target"] = top5.indices[: len(panels), 0].numpy()
    draw_grad_cam(args.output_dir / "gradcam_images.png", photos, panels, model)
    print(f"GradCAM of {len(panels)} of {len(paths)} photos (--num-gradcam)")


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    batch_size = 64 if torch.cuda.is_available() else 16
    # fmt: off
    add("--checkpoint", type=Path, default="best_model.pth", help="weights (%(default)s)")
    add("--dataset", help="Hub name or folder (the checkpoint's)")
    add("--resolution", type=int, help="in pixels (the checkpoint's)")
    add("--batch-size", type=int, default=batch_size, help="photos at once (%(default)s)")
    add("--tta", action="store_true", help="also average six views")
    add("--num-gradcam", type=int, default=16, help="GradCAM photos, 0 to 100 (%(default)s)")
    add("--seed", type=int, default=42, help="draws the photos (%(default)s)")
    add("--workers", type=int, default=train.DEFAULT_WORKERS, help="decoders (%(default)s)")
    add("--output-dir", type=Path, default=".", help="for all files (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (as trained)")
    add("--images", nargs="+", metavar="PATH",
        help="photos and folders, not the test split")
    # fmt: on
    args = parser.parse_args(argv)
    train.check_lowest(parser, args)
    if args.num_gradcam > 100:
        parser.error("--num-gradcam: at most 100")
    return args


def load_test_split(args, checkpoint: dict, num_outputs: int):
    """The test split, its labels in the order of the checkpoint's classes."""
    test = train.load_cars(args.dataset, ("test",), checkpoint.get("classes"))["test"]
    num_classes = test.features["label"].num_classes
    print(f"test        {args.dataset}: {len(test)} photos, {num_classes} classes")
    if num_classes != num_outputs:
        raise train.InputError(f"the checkpoint has {num_outputs} classes: name its --dataset")
    if "classes" not in checkpoint:
        print("warning     the checkpoint names no classes: assumed in the data set's order")
    return test


def evaluate_test_split(args, test, model, autocast, run: dict):
    """Print the report on the test split, and write its figures, tables and pictures."""
    classes = test.features["label"].names
    labels = torch.tensor(test["label"][:])
    photos = views_of(test, args)
    start = time.perf_counter()
    view_logits = predict(model, photos, args, autocast)
    run["photos_per_second"] = len(test) / (time.perf_counter() - start)

    logits = {"": view_logits[0]}
    metrics = {"run": run, "test": compute_metrics(logits[""], labels, classes)}
    if args.tta:
        logits["tta_"] = view_logits.mean(0)
        metrics["tta"] = compute_metrics(logits["tta_"], labels, classes)
        metrics["tta_change"] = compare_views(logits[""], logits["tta_"], labels)
    folder = args.output_dir
    text = json.dumps(metrics, indent=2, ensure_ascii=False, default=str).encode()
    save(folder / "metrics.json", lambda file: file.write(text))
    predictions = list_predictions(test, logits)
    save(folder / "predictions.csv", predictions.to_csv, **AS_CSV)
    per_class = DataFrame(metrics["test"]["per_class"])
    save(folder / "classes.csv", per_class.to_csv, **AS_CSV)
    print_report(metrics)

    figure = plot_confusion(predictions, classes)
    save(folder / "confusion_matrix.png", figure.savefig, **AS_PNG)
    count = min(args.num_gradcam, len(test))
    samples = panels_of(predictions.sample(count, random_state=args.seed), classes)
    draw_grad_cam(folder / "gradcam_samples.png", photos, samples, model)
    worst = surest_errors(predictions, per_class)
    worst = panels_of(worst[: args.num_gradcam], classes)
    draw_grad_cam(folder / "gradcam_worst.png", photos, worst, model)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if train.WORLD_SIZE > 1:
        raise train.InputError("start eval.py without torchrun")
    train.make_output_dir(args.output_dir)
    checkpoint = train.read_checkpoint(args.checkpoint)
    settings = checkpoint.get("settings", {})
    trained_at = checkpoint.get("resolution", "unknown")
    args.resolution = args.resolution or checkpoint.get("resolution", 224)
    args.dataset = args.dataset or settings.get("dataset", train.DEFAULT_DATASET)
    epoch = checkpoint.get("epoch", "unknown")
    print(f"checkpoint  {args.checkpoint}: epoch {epoch}, resolution {trained_at}")
    train.start_process()
    amp = settings.get("amp", True) if args.amp is None else args.amp
    precision = train.pick_precision(amp, settings.get("amp_dtype"))
    autocast = train.autocast_to(precision)
    print(f"device      {train.DEVICE.type}, {precision}, {args.resolution} px")
    with train.reported_as(f"cannot load the ResNet-50 of {args.checkpoint}"):
        model = load_model(checkpoint)
    if not args.images:
        test = load_test_split(args, checkpoint, model.fc.out_features)
        run = {"epoch": epoch, "device": train.DEVICE.type, "precision": str(precision)}
        run.update(settings=vars(args), torch=torch.__version__)
        evaluate_test_split(args, test, model, autocast, run)
        return
    paths, problems = find_images(args.images)
    if paths:
        classes = checkpoint.get("classes", range(model.fc.out_features))
        classify_images(args, paths, model, classes, autocast)
    if problems:
        raise train.InputError(f"--images cannot be read: {'; '.join(problems)}")


if __name__ == "__main__":
    train.run_command(main)
