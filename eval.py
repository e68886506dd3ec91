"""Evaluate a checkpoint of train.py: per-class accuracy, confused pairs, six-view TTA and GradCAM.

    python eval.py                                  # best_model.pth on the test split it was chosen on
    python eval.py --tta --num-gradcam 32           # also the average of six views; more GradCAM photos
    python eval.py --images car.jpg truck.png       # the five likeliest classes of your own photos

On the reference's 448 px model: 91.78 %, with TTA 91.93 %; on its 224 px model: 89.38 %, with TTA 90.32 %.
"""

import argparse
import functools
import json
import platform
import sys
import textwrap
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import binomtest
from torchvision.models import resnet50
from tqdm import tqdm

import train
from train import CarPhotos, InputError, normalize, percent, whole_file


def crop_views(photo: torch.Tensor, resolution: int, tta: bool) -> torch.Tensor:
    """A photo's centre crops: (3, H, W) uint8 to (V, 3, R, R) uint8.

    The first is the view that training is tested on (shorter side int(R·256/224)); with `tta`, one of shorter side R
    and one of int(R·288/224) follow.
    """
    sides = (256, 224, 288) if tta else (256,)
    views = [train.center_crop(photo, resolution, side).movedim(-3, -1) for side in sides]
    return torch.stack(views).movedim(-1, -3)  # laid out with the channels last


@torch.no_grad()
def predict(model: torch.nn.Module, views: torch.Tensor, autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of (B, V, R, R, 3) uint8 views: of the first one, and the mean of all and of their mirror images.

    Both are (B, classes) float32 on the CPU. With one view (no TTA), the second is the first.
    """
    views = views.to(next(model.parameters()).device, non_blocking=True)
    crops = list(views.unbind(1))
    if len(crops) > 1:
        crops += [crop.flip(-2) for crop in crops]
    with autocast:
        logits = torch.stack([model(normalize(crop, views.device)).float() for crop in crops])
    return logits[0].cpu(), logits.mean(0).cpu()


def predict_all(model, batches: Iterable, count: int, autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """`predict` for all of `batches` of views and labels, with a progress bar of `count` batches."""
    logits = [predict(model, views, autocast) for views, _ in tqdm(batches, "test", count, leave=False, disable=None)]
    return torch.cat([single for single, _ in logits]), torch.cat([mean for _, mean in logits])


def grad_cam(model: torch.nn.Module, crops: torch.Tensor, classes: list[int], batch_size: int) -> np.ndarray:
    """GradCAM maps at layer4[-1] of (N, R, R, 3) uint8 crops for the given classes: (N, R, R) float32 in 0…1."""
    device, maps = next(model.parameters()).device, []
    with GradCAM(model, [model.layer4[-1]]) as cam:  # its hooks go with it
        for start in range(0, len(crops), batch_size):
            part = slice(start, start + batch_size)
            targets = [ClassifierOutputTarget(target) for target in classes[part]]
            maps.append(cam(normalize(crops[part], device), targets))
    model.zero_grad()
    return np.concatenate(maps)


# ---------------------------------------------------------------- figures


def plot_grad_cam(crops: torch.Tensor, maps: np.ndarray, titles: list[str], colors: list[str]) -> Figure:
    """A cell for each of (N, R, R, 3) uint8 crops: its title, the crop, and the crop under its (R, R) map."""
    columns, rows, width, text, photo = min(3, len(crops)), -(-len(crops) // 3), 4.4, 0.65, 2.05  # inches
    figure = Figure(figsize=(columns * width, rows * (photo + text) + 0.1))
    for cell, (crop, heat, title, color) in enumerate(zip(crops, maps, titles, colors, strict=True)):
        image = crop.numpy() / np.float32(255)
        gap = np.ones((len(image), len(image) // 20, 3))
        overlay = show_cam_on_image(image, heat, use_rgb=True, image_weight=0.6) / 255
        left, bottom = cell % 3 * width + 0.1, (rows - 1 - cell // 3) * (photo + text) + 0.1
        inches = np.array([left, bottom, photo * 2.05, photo])
        axes = figure.add_axes(inches / np.tile(figure.get_size_inches(), 2))
        axes.imshow(np.concatenate([image, gap, overlay], 1))
        axes.axis("off")
        axes.set_title(title, fontsize=8.5, loc="left", color=color)
    return figure


def plot_confusion(confusion: np.ndarray, classes: list[str]) -> Figure:
    """The (classes, classes) counts, rows true and columns predicted, coloured by their share of the true class."""
    count = len(classes)
    cell, font = (0.16, 7) if count > 30 else (0.45, 9)  # inches, points
    labels = 0.072 * font / 7 * max(map(len, classes))
    side = count * cell
    width, height = labels + side + 1.4, labels + side + 0.6
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(((labels + 0.4) / width, (labels + 0.4) / height, side / width, side / height))
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(np.ma.masked_equal(share, 0), cmap="viridis_r", vmin=0, vmax=1)
    axes.set_xticks(range(count), classes, rotation=90, fontsize=font)
    axes.set_yticks(range(count), classes, fontsize=font)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    for lines in (axes.hlines, axes.vlines):
        lines(np.arange(count + 1) - 0.5, -0.5, count - 0.5, color="0.9", linewidth=0.5)
    if count <= 30:
        for row, column in np.argwhere(confusion):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", color=color, fontsize=font)
    bar = figure.add_axes(
        ((labels + 0.55 + side) / width, (labels + 0.4) / height, 0.15 / width, min(side, 4) / height)
    )
    figure.colorbar(image, bar, label="share of the true class")
    return figure


def save_figure(figure: Figure, path: Path):
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", dpi=100)


# ---------------------------------------------------------------- the report


def accuracy(correct: int, total: int) -> dict:
    """Accuracy (0…1) with the bounds of its 95 % Wilson score interval; `correct` of at least one `total`."""
    low, high = binomtest(correct, total).proportion_ci(0.95, "wilson")
    return {"accuracy": correct / total, "correct": correct, "total": total, "low": float(low), "high": float(high)}


def say(measured: dict) -> str:
    low, high = 100 * measured["low"], 100 * measured["high"]
    counts = f"{measured['correct']}/{measured['total']}"
    return f"{percent(measured['accuracy'])} ({counts}, 95 % CI {low:.2f}–{high:.2f})"


def per_class(confusion: np.ndarray, classes: list[str]) -> list[dict]:
    """Accuracy of each class from the (true, predicted) counts; None for a class without a test photo."""
    rows = []
    for index, (name, correct, total) in enumerate(zip(classes, confusion.diagonal(), confusion.sum(1), strict=True)):
        share = float(correct / total) if total else None
        rows.append({"index": index, "name": name, "accuracy": share, "correct": int(correct), "total": int(total)})
    return rows


def ranked(rows: list[dict]) -> list[dict]:
    """The classes that have test photos, worst first."""
    return sorted((row for row in rows if row["total"]), key=lambda row: row["accuracy"])


def confused_pairs(confusion: np.ndarray, classes: list[str], most: int = 10) -> list[dict]:
    """The most frequent errors: true and predicted class, count, and share (0…1) of the true class."""
    errors = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    pairs = [(i, j, int(errors[i, j])) for i, j in zip(*np.unravel_index(order, errors.shape), strict=True)]
    return [
        {"true": classes[i], "predicted": classes[j], "count": count, "share": count / int(confusion[i].sum())}
        for i, j, count in pairs
        if count
    ]


def count_confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts of (true, predicted)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def print_classes(title: str, rows: list[dict], names: int):
    print(f"\n{title}")
    for row in rows:
        share = percent(row["accuracy"]) if row["total"] else "no photo"
        print(f"{row['index']:>4}  {row['name']:<{names}}  {share:>8}  {row['correct']}/{row['total']}")


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default="best_model.pth", help="what train.py saved, or a state dict (%(default)s)")
    add("--dataset", help="Hub data set or local folder (the one that the checkpoint was trained on)")
    add("--resolution", type=int, help="side of the crops in pixels (the checkpoint's)")
    add("--batch-size", type=int, default=64, help="photos evaluated at once (%(default)s)")
    add("--tta", action="store_true", help="also average the logits of six views: three scales, mirrored or not")
    add("--num-gradcam", type=int, default=16, help="photos in the GradCAM figure; 0 for no GradCAM (%(default)s)")
    add("--seed", type=int, default=42, help="seed of the choice of photos (%(default)s)")
    add("--workers", type=int, default=train.WORKERS, help="processes that decode photos (%(default)s)")
    add("--output-dir", type=Path, default=".", help="folder for figures and metrics.json (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="mixed precision where it is native (on)")
    add("--images", type=Path, nargs="+", metavar="PATH", help="name the classes of these photos instead")
    limits = dict(
        resolution=(32, 4096), batch_size=(1, 65536), num_gradcam=(0, 1000), seed=(0, 2**32), workers=(0, 256)
    )
    return train.parse_flags(parser, argv, **limits)


def name_images(args, model, classes: list[str], resolution: int, autocast):
    """Print the five likeliest classes of each of --images, and draw gradcam_images.png of the first of them."""
    views, paths, unreadable = [], [], []
    for path in args.images:
        try:
            views.append(crop_views(train.decode_photo(path.read_bytes()), resolution, args.tta).movedim(-3, -1))
            paths.append(path)
        except Exception as error:  # each decoder raises its own
            unreadable.append(f"{path} ({train.first_line(error)})")
    if views:
        views = torch.stack(views)
        confidence = torch.cat([predict(model, part, autocast)[1] for part in views.split(args.batch_size)]).softmax(1)
        for path, row in zip(paths, confidence, strict=True):
            print(f"\n{path}")
            for share, index in zip(*row.topk(min(5, len(classes))), strict=True):
                print(f"{percent(share):>9}  {classes[index]}")
        shown = range(min(args.num_gradcam, len(paths)))
        if shown:
            crops, best = views[: len(shown), 0], confidence.argmax(1)[: len(shown)].tolist()
            titles = [
                "\n".join(
                    [*textwrap.wrap(paths[i].name, 60)[-2:], f"{classes[best[i]]}, {percent(confidence[i, best[i]])}"]
                )
                for i in shown
            ]
            maps = grad_cam(model, crops, best, args.batch_size)
            save_figure(
                plot_grad_cam(crops, maps, titles, ["black"] * len(crops)), args.output_dir / "gradcam_images.png"
            )
            print(f"\nwrote {args.output_dir / 'gradcam_images.png'}")
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(args.images)} photos cannot be read: {'; '.join(unreadable)}")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if not args.checkpoint.is_file():
        raise InputError(f"--checkpoint {args.checkpoint} is not a file: train one with train.py, or name another")
    train.make_output_dir(args.output_dir)
    checkpoint = train.read_checkpoint(args.checkpoint)
    settings, count = checkpoint.get("settings", {}), len(checkpoint["model"]["fc.bias"])
    resolution = args.resolution or settings.get("resolution", 224)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = train.pick_precision(device, args.amp)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    model = resnet50(num_classes=count)
    model.load_state_dict(checkpoint["model"])
    model = model.to(device, memory_format=torch.channels_last).eval()
    trained = f"epoch {checkpoint['epoch']}, {settings['resolution']} px" if settings else "a state dict"
    print(f"checkpoint  {args.checkpoint} ({trained}); evaluated at {resolution} px")
    print(f"device      {device.type}, {str(dtype)[6:]}")
    if args.images:
        classes = checkpoint.get("classes", [f"class {index}" for index in range(count)])
        return name_images(args, model, classes, resolution, autocast)

    dataset = args.dataset or settings.get("dataset", train.DEFAULT_DATASET)
    photos = train.load_cars(dataset, ("test",))["test"]
    classes = photos.features["label"].names
    if len(classes) != count or checkpoint.get("classes", classes) != classes:
        names = [name for name in checkpoint.get("classes", []) if name not in classes][:3] or "in another order"
        raise InputError(
            f"{args.checkpoint} knows {count} classes and --dataset {dataset} has {len(classes)}, or others ({names}): "
            "name the data set that it was trained on"
        )
    print(f"test        {dataset}: {len(photos)} photos, {count} classes")

    cars = CarPhotos(photos, functools.partial(crop_views, tta=args.tta), resolution)
    keys = list(train.batch_keys(len(photos), args.batch_size))
    single, mean = predict_all(model, train.make_loader(cars, keys, args.workers, device), len(keys), autocast)
    labels, predicted = np.array(photos["label"]), single.argmax(1).numpy()
    confusion = count_confusion(labels, predicted, count)
    rows, names = per_class(confusion, classes), max(map(len, classes))
    in_top5 = single.topk(min(5, count)).indices.numpy() == labels[:, None]
    metrics = {
        "test": accuracy(int(confusion.trace()), len(labels)),
        "top5": accuracy(int(in_top5.sum()), len(labels)),
        "per_class": rows,
    }
    print(f"\ntest accuracy   {say(metrics['test'])}\ntop-5 accuracy  {say(metrics['top5'])}")
    print_classes("accuracy per class", rows, names)
    print_classes("ten worst classes", ranked(rows)[:10], names)
    print_classes("ten best classes", ranked(rows)[:-11:-1], names)
    if args.tta:
        tta_rows = per_class(count_confusion(labels, mean.argmax(1).numpy(), count), classes)
        metrics["tta"] = accuracy(sum(row["correct"] for row in tta_rows), len(labels)) | {"per_class": tta_rows}
        gain = metrics["tta"]["accuracy"] - metrics["test"]["accuracy"]
        print(f"\nsix views       {say(metrics['tta'])}, {100 * gain:+.2f} points to the single view")
        print_classes("ten worst classes of the single view", ranked(rows)[:10], names)
        print_classes("ten worst classes of the six views", ranked(tta_rows)[:10], names)
    metrics["confused_pairs"] = confused_pairs(confusion, classes)
    print("\nmost confused pairs: true → predicted, count, share of the true class")
    for pair in metrics["confused_pairs"]:
        print(f"{pair['count']:>4}  {percent(pair['share']):>8}  {pair['true']} → {pair['predicted']}")

    written = [args.output_dir / "confusion_matrix.png"]
    save_figure(plot_confusion(confusion, classes), written[0])
    random, wrong = np.random.default_rng(args.seed), predicted != labels
    worst = [row["index"] for row in ranked(rows) if row["accuracy"] < 1][:5]
    choices = {
        "gradcam_samples.png": random.permutation(len(labels))[: args.num_gradcam],
        "gradcam_worst.png": [random.choice(np.flatnonzero(wrong & (labels == index))) for index in worst],
    }
    for name, chosen in choices.items() if args.num_gradcam else ():
        if not len(chosen):
            (args.output_dir / name).unlink(missing_ok=True)  # an older run's is not this one's
            print(f"\nno photo is misclassified: no {name}")
            continue
        crops = torch.stack([cars[0, int(row)][0][0] for row in chosen])
        titles = [
            f"true: {classes[labels[row]]}\npredicted: {classes[predicted[row]]}\n"
            f"{'WRONG' if wrong[row] else 'right'}, confidence {percent(single[row].softmax(0).max())}"
            for row in chosen
        ]
        maps = grad_cam(model, crops, predicted[chosen], args.batch_size)
        colors = ["firebrick" if wrong[row] else "darkgreen" for row in chosen]
        save_figure(plot_grad_cam(crops, maps, titles, colors), args.output_dir / name)
        written.append(args.output_dir / name)
    metrics["settings"] = {
        "checkpoint": str(args.checkpoint), "dataset": dataset, "resolution": resolution, "seed": args.seed,
        "device": device.type, "precision": str(dtype)[6:], "batch_size": args.batch_size,
    }  # fmt: skip
    packages = ("torch", "torchvision", "datasets", "grad-cam", "numpy")
    metrics["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    written.append(args.output_dir / "metrics.json")
    with whole_file(written[-1]) as draft:
        draft.write_text(json.dumps(metrics, indent=2, ensure_ascii=False))
    print("\nwrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    sys.exit(train.run_command(main))
