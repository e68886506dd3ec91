"""Compare this program with the reference, part by part, on the same photos and random numbers.

    git clone https://github.com/patr1ckzhu/transfer-learning-stanford-cars reference
    git -C reference checkout d0ed592
    python tests/compare_with_reference.py reference DATASET

DATASET is whatever train.py's --dataset takes. The reference's train.py and eval.py are imported
from its folder, and its functions are called; nothing of them is copied. Everything runs in float32
on the CPU, with ResNet-50 and random weights. Prints a line for each part, and exits with status 1
if one differs.
"""

import argparse
import functools
import importlib.util
import os
import random
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Before torch is imported: everything runs on the CPU.

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402
import train  # noqa: E402

PARTS = []


def report(part: str, expected: str, found: str, is_equal: bool):
    """Print the line of a part, and remember whether it is as expected."""
    PARTS.append(is_equal)
    verdict = "ok" if is_equal else "DIFFERS"
    print(f"{part:<44} {expected:<20} {found:<24} {verdict}", flush=True)


def import_file(path: Path, name: str):
    """Import the reference's script under another name than ours."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_loaders(reference, splits: dict, resolution: int, batch_size: int) -> tuple:
    """Let the reference build its loaders from `splits`, in place of the Hub's."""
    decoded = {name: split.cast_column("image", datasets.Image()) for name, split in splits.items()}

    def one_process(dataset, *args, persistent_workers=False, **options):
        options |= {"num_workers": 0, "pin_memory": False}
        return DataLoader(dataset, *args, **options)

    with (
        mock.patch.object(reference, "load_dataset", lambda name: decoded),
        mock.patch.object(reference, "DataLoader", one_process),
    ):
        return reference.get_dataloaders(batch_size, resolution)


def normalize(crop: torch.Tensor) -> torch.Tensor:
    """(R, R, 3) uint8, normalized as train.py does: (3, R, R) float32."""
    return train.move_and_normalize(crop[None])[0].cpu()


def compare_pixels(reference, splits: dict, resolution: int):
    """Train crops with the same random numbers, and test crops, both normalized.

    torchvision resizes tensors and PIL images with other roundings. How many values differ depends
    on the sizes: of the photos of Stanford Cars 0.02 to 1% in all, but 14% of one train crop. With
    synthetic photos of 40 to 900 pixels a side, the worst pair of sizes had 23%, 0.01% by 2/255.
    """
    std = torch.tensor(train.IMAGENET_STD).view(3, 1, 1)
    loaders = reference_loaders(reference, splits, resolution, 2)
    for split, loader in zip(("train", "test"), loaders, strict=True):
        largest = 0.0
        num_different = 0
        num_beyond_one = 0
        crop = {"train": train.random_crop, "test": train.center_crop}[split]
        crop = functools.partial(crop, argparse.Namespace(resolution=resolution))
        photos = train.CroppedPhotos(splits[split], split, crop)
        for row in range(len(photos)):
            torch.manual_seed(row)
            theirs, _ = loader.dataset[row]
            ours, _ = photos[row, row]  # with the same seed
            ours = normalize(ours)
            gaps = ((ours - theirs) * std).abs() * 255
            largest = max(largest, gaps.max().item())
            # float32 rounds the normalized values: 0.001/255 is no difference.
            num_different += (gaps > 0.001).sum().item()
            num_beyond_one += (gaps > 1.001).sum().item()

        num_photos = len(photos)
        num_values = num_photos * 3 * resolution**2
        crops = f"{split} crops at {resolution} px"
        found = f"{largest:.2f}/255, {num_photos} photos"
        report(f"{crops}, difference", "at most 3/255", found, largest <= 3.001)
        found = f"{num_different / num_values:.3%} of {num_values / 1e6:.1f} million"
        report(
            f"{crops}, values that differ", "at most 25%", found, num_different <= num_values / 4
        )
        found = f"{num_beyond_one} values"
        report(
            f"{crops}, by over 1/255", "at most 0.1%", found, num_beyond_one <= num_values / 1000
        )


def compare_learning_rates(reference):
    """The learning rates of 90 epochs, which the reference counts from 0."""
    differing = 0
    for initial in (0.1, 0.05):
        args = train.parse_args(["--lr", str(initial)])
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=initial)
        for epoch in range(90):
            theirs = reference.adjust_learning_rate(optimizer, epoch, initial)
            differing += args.lr * train.lr_factor(args, epoch) != theirs
    report(
        "learning rates of 90 epochs, from 0.1, 0.05", "equal", f"{differing} differ", not differing
    )


def batches_of(splits: dict, split: str, resolution: int, batch_size: int) -> list[tuple]:
    """Test crops of `split` in batches: (B, R, R, 3) uint8 and (B,) labels."""
    crop = functools.partial(train.center_crop, argparse.Namespace(resolution=resolution))
    photos = train.CroppedPhotos(splits[split], split, crop)
    return list(train.make_loader(photos, train.eval_index_batches(len(photos), batch_size), 0))


def normalized(batches: list[tuple]) -> list[tuple]:
    return [(train.move_and_normalize(images), targets) for images, targets in batches]


def compare_training(reference, splits: dict, resolution: int, batch_size: int):
    """The loss and all weights after an epoch of the same batches, and an evaluation."""
    num_classes = splits["train"].features["label"].num_classes
    train_batches = batches_of(splits, "train", resolution, batch_size)
    test_batches = batches_of(splits, "test", resolution, batch_size)
    args = train.parse_args(["--lr", "0.01", "--no-amp", "--batch-size", str(batch_size)])
    torch.manual_seed(0)
    ours = train.build_network("none", num_classes).to(memory_format=torch.channels_last)
    theirs = train.build_network("none", num_classes).to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = train.build_optimizer(args, ours)
    optimizer.param_groups[0]["initial_lr"] = args.lr
    row = train.train_one_epoch(args, 1, ours, train_batches, optimizer, scaler)
    # The reference's own settings, which its main function gives to SGD; fused as ours, because
    # fused and other kernels round differently.
    optimizer = torch.optim.SGD(
        theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True
    )
    criterion = torch.nn.CrossEntropyLoss()
    loss, accuracy = reference.train_one_epoch(
        theirs, normalized(train_batches), criterion, optimizer, "cpu", scaler
    )
    difference = abs(row["train_loss"] - loss)
    report("train loss of an epoch", "within 1e-6", f"{difference:.1e}", difference < 1e-6)
    their_state = theirs.state_dict()
    gaps = [
        (value - their_state[name]).abs().max().item() for name, value in ours.state_dict().items()
    ]
    report("weights after an epoch", "equal", f"difference {max(gaps):g}", max(gaps) == 0)

    loss, accuracy = reference.evaluate(theirs, normalized(test_batches), criterion, "cpu")
    our_loss, our_accuracy = train.evaluate(args, ours, test_batches, "test")
    difference = abs(our_loss - loss) / loss
    report(
        "loss of an evaluation (relative)", "within 1e-6", f"{difference:.1e}", difference < 1e-6
    )
    difference = abs(100 * our_accuracy - accuracy)
    report("accuracy of an evaluation", "equal", f"difference {difference:.1e}", difference < 1e-9)
    return ours


def compare_predictions(folder: Path, splits: dict, network, resolution: int):
    """Accuracies of one view and of six, which the reference's eval.py prints, and ours."""
    reference_eval = import_file(folder / "eval.py", "reference_eval")
    test = splits["test"]
    num_classes = test.features["label"].num_classes
    # It takes 196 names from the train split, and nothing else.
    names = test.features["label"].names + [""] * (196 - num_classes)
    train_split = SimpleNamespace(features={"label": SimpleNamespace(names=names)})
    decoded = {"train": train_split, "test": test.cast_column("image", datasets.Image())}
    printed = []
    stacked = []
    stack = torch.stack

    def noting_stack(tensors, *args, **options):
        result = stack(tensors, *args, **options)
        if result.shape == (6, len(test), num_classes):
            stacked.append(result)
        return result

    def one_process(dataset, *args, **options):
        options |= {"num_workers": 0, "pin_memory": False}
        return DataLoader(dataset, *args, **options)

    build_model = reference_eval.build_model
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "best_model.pth"
        torch.save(network.state_dict(), checkpoint)
        flags = ["eval.py", "--checkpoint", str(checkpoint), "--tta", "--num-gradcam", "0"]
        flags += ["--resolution", str(resolution), "--batch-size", "16"]
        with (
            mock.patch.object(sys, "argv", flags),
            mock.patch.object(torch.cuda, "is_available", lambda: False),
            mock.patch.object(torch, "stack", noting_stack),
            mock.patch.object(reference_eval, "load_dataset", lambda name: decoded),
            mock.patch.object(reference_eval, "DataLoader", one_process),
            mock.patch.object(reference_eval, "build_model", lambda n: build_model(num_classes)),
            mock.patch("builtins.print", lambda *texts, **options: printed.append(str(texts[0]))),
        ):
            reference_eval.main()
    text = "\n".join(printed)
    theirs = {
        "one view": float(re.search(r"Overall test accuracy: ([\d.]+)%", text)[1]),
        "six views": float(re.search(r"TTA accuracy: ([\d.]+)%", text)[1]),
    }

    flags = ["--tta", "--resolution", str(resolution), "--batch-size", "16", "--workers", "0"]
    args = evaluation.parse_args([*flags, "--no-amp"])
    views = train.CroppedPhotos(test, "test", functools.partial(evaluation.crop_views, args))
    logits = evaluation.predict(args, network.eval(), views)
    labels = torch.tensor(test["label"][:])
    ours = {"one view": logits[0], "six views": logits.mean(0)}
    for name, view_logits in ours.items():
        accuracy = 100 * (view_logits.argmax(1) == labels).double().mean().item()
        found = f"{accuracy:.2f}%, {theirs[name]:.2f}%"
        report(f"eval.py: accuracy of {name}", "equal", found, round(accuracy, 2) == theirs[name])
    theirs_mean = stacked[0].mean(0)
    ours_mean = ours["six views"]
    # Compared with how much the logits of different photos differ.
    spread = (ours_mean - ours_mean.mean(0)).norm()
    gap = ((theirs_mean - ours_mean).norm() / spread).item()
    report("eval.py: logits of six views (relative)", "within 0.05", f"{gap:.4f}", gap < 0.05)
    agree = (theirs_mean.argmax(1) == ours_mean.argmax(1)).sum().item()
    found = f"{agree} of {len(test)} agree"
    report("eval.py: predictions of six views", "97% agree", found, agree >= 0.97 * len(test))


def main(argv: list[str] | None = None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("reference", type=Path, help="folder of the reference, at commit d0ed592")
    parser.add_argument("dataset", type=train.path_or_name, help="as for train.py's --dataset")
    parser.add_argument("--photos", type=int, default=32, help="photos of each split (%(default)s)")
    parser.add_argument("--resolution", type=int, nargs="+", default=[224, 448])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)

    sources = train.find_splits(args.dataset)
    splits = {}
    for split in ("train", "test"):
        photos = train.load_split(sources, split)
        splits[split] = photos.select(range(min(args.photos, len(photos))))
    reference = import_file(args.reference / "train.py", "reference_train")
    print(f"{'part':<44} {'expected':<20} found")
    for resolution in args.resolution:
        compare_pixels(reference, splits, resolution)
    compare_learning_rates(reference)
    network = compare_training(reference, splits, args.resolution[0], batch_size=8)
    with mock.patch.dict(sys.modules, {"train": reference}):  # Its eval.py imports it as `train`.
        compare_predictions(args.reference, splits, network, args.resolution[0])
    if not all(PARTS):
        sys.exit(f"{PARTS.count(False)} parts differ from the reference")
    print(f"all {len(PARTS)} parts are as expected")


if __name__ == "__main__":
    main()
