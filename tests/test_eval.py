"""eval.py: its figures beside plain ones, its report, its pictures and somebody's own photos."""

import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas
import pytest
import torch
from files import jpeg, load, read_history, rows, write_dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scripts import ROOT, children, is_running, refusal, success
from sklearn.metrics import balanced_accuracy_score, classification_report, log_loss
from small import RESNET50, small_resnet
from torchvision.transforms import v2

import eval as evaluation
import train
from eval import compute_metrics

# In an order that is not that of their folders.
NAMES = [f"Škoda Citigo{number} Van 2012" for number in (3, 1, 2, 0, 7, 6, 5, 4)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Between two $, matplotlib would read it as a formula, and fail.
LONG_NAME = "$x_{$ Chevrolet Silverado 1500 Classic Extended Cab"


def plain_view(encoded: bytes, resolution: int, side: int = 256) -> torch.Tensor:
    """A photo's center crop, normalized, by torchvision's own transforms: (3, R, R) float32."""
    resized = v2.Resize(int(resolution * side / 224))(train.decode_photo(encoded))
    return v2.Normalize(MEAN, STD)(v2.CenterCrop(resolution)(resized).float() / 255)


def features_of(model: torch.nn.Module, views: list[torch.Tensor]) -> torch.Tensor:
    """What the last layer gets: (views, 2048)."""
    return torch.nn.Sequential(*list(model.children())[:-1])(torch.stack(views)).flatten(1)


def fit(model: torch.nn.Module, features: torch.Tensor, logits: torch.Tensor):
    """Set the last layer so that it turns `features` (N, 2048) into `logits` (N, classes)."""
    mean = features.mean(0)
    weight = torch.linalg.pinv(features - mean) @ (logits - logits.mean(0))
    model.fc.weight[:] = weight.T
    model.fc.bias[:] = logits.mean(0) - mean @ weight


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory) -> SimpleNamespace:
    """Photos in folders, and a trained network; six views fix photos 16–19 and break 0–2."""
    folder = tmp_path_factory.mktemp("plain")
    parquet = pandas.read_parquet(next((trained.cars / "data").glob("test-*")))
    cars = sorted(parquet.to_dict("records"), key=lambda car: NAMES[car["label"]])
    labels = torch.tensor([car["label"] for car in cars])
    paths = [folder / f"test/{NAMES[label]}/{row % 4}.jpg" for row, label in enumerate(labels)]
    views = []
    for path, car in zip(paths, cars, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(car["image"]["bytes"])
        for side in (256, 224, 288):
            crop = plain_view(car["image"]["bytes"], 64, side)
            views += [crop, crop.flip(-1)]
    saved = load(trained.run / "best_model.pth")
    model = small_resnet(num_classes=8).eval()
    model.load_state_dict(saved["model"])
    with torch.no_grad():
        features = features_of(model, views).view(32, 6, 2048)
        known = torch.cat([features[:20, 0], features[:20].mean(1)])
        taken_for = labels[:20].repeat(2)
        taken_for[16:23] = (taken_for[16:23] + 1) % 8
        fit(model, known, 5 * torch.eye(8)[taken_for] + torch.linspace(0, 1, 8))
        logits = model.fc(features)
    settings = {**saved["settings"], "dataset": str(folder)}
    saved.update(model=model.state_dict(), classes=NAMES, settings=settings)
    checkpoint = folder / "best_model.pth"
    torch.save(saved, checkpoint)
    return SimpleNamespace(**locals())


@pytest.fixture
def run_eval_on(run_eval, tmp_path):
    """Run eval.py on photos of these classes, with a network that gives them these logits.

    It takes the names of the classes, a label for each photo, and (photos, classes) logits of one
    view at 40 px. The files are in the test's folder.
    """

    def run(names: list[str], labels: list[int], logits: torch.Tensor, *flags):
        photos = [jpeg(seed) for seed in range(len(labels))]
        test_rows = list(zip(photos, labels, strict=True))
        cars = write_dataset(tmp_path / "cars", rows(2), test_rows, names)
        torch.manual_seed(0)
        model = small_resnet(num_classes=len(names)).eval()
        with torch.no_grad():
            fit(model, features_of(model, [plain_view(photo, 40) for photo in photos]), logits)
        torch.save(model.state_dict(), tmp_path / "fitted.pth")
        common = ["--checkpoint", tmp_path / "fitted.pth", "--dataset", cars, "--resolution", 40]
        outcome = run_eval(*common, *flags)
        table = read_table(tmp_path / "predictions.csv")
        assert list(table["predicted"]) == [names[index] for index in logits.argmax(1)]
        return outcome

    return run


@pytest.fixture
def gradcams(monkeypatch) -> list[SimpleNamespace]:
    """What pytorch_grad_cam is asked for, and what it returns, map by map."""
    noted = []
    forward = GradCAM.forward

    def noting_forward(cam, images, targets, *args, **options):
        maps = forward(cam, images, targets, *args, **options)
        cells = cam.activations_and_grads.activations[0]
        for heat, target, cell in zip(maps, targets, cells, strict=True):
            note = dict(heat=heat, target=target.category, cells=tuple(cell.shape))
            noted.append(SimpleNamespace(model=cam.model, layers=cam.target_layers, **note))
        return maps

    monkeypatch.setattr(GradCAM, "forward", noting_forward)
    return noted


def panels(figure: Figure) -> list[SimpleNamespace]:
    """The title, its color and the crop of each panel of a GradCAM picture."""
    found = []
    for axes in figure.axes:
        if axes.images:
            (title,) = [text for text in axes.findobj(Text) if "confidence" in text.get_text()]
            picture = np.asarray(axes.images[0].get_array())
            crop = picture[:, : picture.shape[1] // 2]
            found.append(SimpleNamespace(axes=axes, title=title, crop=crop))
    return found


def rows_shown(figure: Figure, plain: SimpleNamespace) -> list[int]:
    """Find out by the pixels which of the 32 plain photos the panels show."""
    first_views = torch.stack(plain.views[::6]).permute(0, 2, 3, 1) * torch.tensor(STD)
    crops = (first_views + torch.tensor(MEAN)).numpy()
    found = []
    for panel in panels(figure):
        distances = np.abs(crops - panel.crop).max((1, 2, 3))
        assert distances.min() < 0.01
        found.append(int(distances.argmin()))
    return found


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def read_table(path: Path) -> pandas.DataFrame:
    assert path.read_bytes().startswith(b"\xef\xbb\xbf"), "Excel would garble it"
    return pandas.read_csv(path)


# ---------------------------------------------------------------- figures


def test_metrics_equal_plain_counts():
    cars = list(itertools.product(("VW", "AM", "Audi"), ("S Sedan", "S Van"), ("1999", "2012")))
    names = [" ".join(car) for car in cars]
    rng = np.random.default_rng(0)
    # Calibrated but for chance; the last class has no photo, and no photo is taken for the first.
    labels = rng.integers(0, 11, 500).tolist()
    logits = 2 * rng.normal(size=(500, 12)) + 4 * np.eye(12)[labels] - 20 * np.eye(12)[0]
    logits = torch.from_numpy(logits).float()
    found = compute_metrics(logits, torch.tensor(labels), names)
    close = functools.partial(pytest.approx, abs=1e-6)
    shares = logits.double().softmax(1).numpy()
    predicted = shares.argmax(1).tolist()
    pairs = list(zip(labels, predicted, strict=True))
    right = [label == guess for label, guess in pairs]
    assert found["correct"] == sum(right)
    assert found["top5"]["correct"] == sum(map(np.isin, labels, shares.argsort(1)[:, -5:]))
    assert found["loss"] == close(log_loss(labels, shares, labels=range(12)))
    assert found["mean_class_accuracy"] == close(balanced_accuracy_score(labels, predicted))
    z = 1.959963984540054
    for part in (found, found["top5"]):  # Wilson's interval.
        share = part["correct"] / 500
        mid = (share + z**2 / 1000) / (1 + z**2 / 500)
        half = z / (1 + z**2 / 500) * math.sqrt(share * (1 - share) / 500 + z**2 / (4 * 500**2))
        expected = [share, mid - half, mid + half]
        assert [part["accuracy"], part["ci95_low"], part["ci95_high"]] == close(expected)
    options = dict(labels=range(12), target_names=names, output_dict=True, zero_division=0)
    theirs = classification_report(labels, predicted, **options)
    for index, row in enumerate(found["per_class"]):
        hits = pairs.count((index, index))
        counted = [hits / max(predicted.count(index), 1), hits / max(labels.count(index), 1)]
        counted.append(2 * hits / max(predicted.count(index) + labels.count(index), 1))
        assert list(row.values())[1:] == close([*counted, labels.count(index)])
        assert row == close({**theirs[names[index]], "class": names[index]})

    errors = Counter((names[label], names[guess]) for label, guess in pairs if label != guess)
    for pair, (_, count) in zip(found["confused_pairs"], errors.most_common(10), strict=True):
        assert pair["count"] == errors[pair["true"], pair["predicted"]] == count
        assert pair["share"] == pair["count"] / labels.count(names.index(pair["true"]))

    # How much is right: 0 nothing, 1 the make, 2 all but the year, 3 all.
    depths = Counter(len(os.path.commonprefix([cars[one], cars[other]])) for one, other in pairs)
    kinds = {"year_only": depths[2], "same_make": depths[1], "other_make": depths[0]}
    kinds.update(model_accuracy=(depths[3] + depths[2]) / 500, make_accuracy=1 - depths[0] / 500)
    assert found["errors"] == close(kinds)
    others = ("Beechcraft 1900", "Van", "Audi A4 Sedan 1850")
    for name in others:
        assert "errors" not in compute_metrics(logits, torch.tensor(labels), [*names[:11], name])


def test_the_calibration_error_has_15_bins_from_0_to_1():
    # Of more than 15 classes, the highest confidence may be below 1/15, in the first bin.
    confidences = np.linspace(0.021, 0.999, 50)
    is_correct = np.arange(50) // 3 % 2 == 0
    shares = np.repeat((1 - confidences[:, None]) / 59, 60, axis=1)
    shares[:, 7] = confidences
    labels = torch.from_numpy(np.where(is_correct, 7, 8))
    names = [f"class {index}" for index in range(60)]
    found = compute_metrics(torch.from_numpy(np.log(shares)).float(), labels, names)
    gaps = []
    for low in range(15):
        in_bin = (15 * confidences > low) & (15 * confidences <= low + 1)
        gaps.append((confidences[in_bin] - is_correct[in_bin]).sum() / 50)
    assert gaps[0] < 0 < gaps[1]  # In one bin, they would cancel out.
    assert found["calibration_error"] == pytest.approx(np.abs(gaps).sum(), abs=1e-6)


def test_training_and_evaluation_agree_and_0_draws_no_gradcam(run_eval, trained, tmp_path):
    for name in ("gradcam_samples.png", "gradcam_worst.png"):
        (tmp_path / name).write_bytes(b"of an older evaluation")
    best = trained.run / "best_model.pth"
    success(run_eval("--checkpoint", best, "--num-gradcam", 0, "--output-dir", tmp_path))
    metrics = read_metrics(tmp_path)["test"]
    row = read_history(trained.run)[load(best)["epoch"] - 1]
    found = [metrics["accuracy"], metrics["loss"]]
    assert found == pytest.approx([row["test_accuracy"], row["test_loss"]], abs=1e-5)
    assert not list(tmp_path.glob("gradcam*"))


def test_files_and_report_have_the_figures_of_plain_logits(run_eval, plain, tmp_path):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--workers", 1]
    out = success(run_eval(*flags, "--tta", "--num-gradcam", 4))
    table = read_table(tmp_path / "predictions.csv")
    assert list(table["file"]) == list(map(str, plain.paths))
    assert list(table["true"]) == [NAMES[label] for label in plain.labels]
    metrics = read_metrics(tmp_path)
    one, six = metrics["test"], metrics["tta"]
    classes = read_table(tmp_path / "classes.csv")
    per_class = pandas.DataFrame(one["per_class"])
    pandas.testing.assert_frame_equal(classes[per_class.columns], per_class)
    rights = []
    for part, prefix, logits in (
        (one, "", plain.logits[:, 0]),
        (six, "tta_", plain.logits.mean(1)),
    ):
        shares = logits.softmax(1)
        assert list(table[f"{prefix}predicted"]) == [NAMES[i] for i in shares.argmax(1)]
        found = table[[f"{prefix}confidence", f"{prefix}true_confidence"]]
        expected = torch.stack([shares.amax(1), shares[range(32), plain.labels]], dim=1)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        expected = compute_metrics(logits, plain.labels, NAMES)
        rounded = {
            name: pytest.approx(expected[name], abs=1e-5) for name in ("loss", "calibration_error")
        }
        assert part == {**expected, **rounded}
        rights.append((shares.argmax(1) == plain.labels).tolist())

    changes = Counter(zip(*rights, strict=True))
    fixed, broke = changes[False, True], changes[True, False]
    assert min(fixed, broke) >= 3
    # McNemar's exact test: as unequal as this, or more, in so many tosses of a coin.
    tail = sum(math.comb(fixed + broke, k) for k in range(min(fixed, broke) + 1))
    p_value = pytest.approx(min(1, 2 * tail / 2 ** (fixed + broke)))
    assert metrics["tta_change"] == {"fixed": fixed, "broke": broke, "p_value": p_value}

    run = metrics["run"]
    assert run["device"] == train.DEVICE.type
    assert run["epoch"] == plain.saved["epoch"]
    assert run["chosen_on"] == run["split"] == "test"
    assert run["photos_per_second"] > 0

    files = ("metrics.json", "predictions.csv", "classes.csv", "confusion_matrix.png")
    files += ("gradcam_samples.png", "gradcam_worst.png")
    for path in (plain.checkpoint, *(tmp_path / name for name in files)):
        assert str(path) in out
        assert path.is_file()
    words = f"epoch {plain.saved['epoch']}|{plain.saved['test_accuracy']:.2%}|64 px|32 test photos"
    words += "|precision|accuracy|confused pairs|one view|six views|mean class|calibration"
    words += f"|McNemar|fixed {fixed}|broke {broke}|photos/s"
    assert [word for word in words.split("|") if word not in out] == []
    assert all(out.count(name) >= 1 for name in NAMES)

    def assert_in_summary(title: str, *texts: str):
        (line,) = re.findall(rf"^{title} +(\d.*)", out, re.MULTILINE)
        start = 0
        for text in texts:  # One view stands before six.
            start = line.index(text, start) + len(text)

    for title, parts in (("accuracy", (one, six)), ("top-5.*?", (one["top5"], six["top5"]))):
        texts = []
        for part in parts:
            texts += [f"{part['accuracy']:.2%}", f"{part['correct']} of 32"]
            texts += [f"{100 * part['ci95_low']:.1f}", f"{100 * part['ci95_high']:.1f}"]
        assert_in_summary(title, *texts)
    assert_in_summary("loss.*?", *(f"{part['loss']:.4f}" for part in (one, six)))
    for title, name in (
        ("wrong year.*?", "year_only"),
        ("wrong model.*?", "same_make"),
        ("wrong make.*?", "other_make"),
    ):
        assert_in_summary(title, *(str(part["errors"][name]) for part in (one, six)))
    for title, name in (
        ("accuracy.*year.*?", "model_accuracy"),
        ("accuracy.*make", "make_accuracy"),
    ):
        assert_in_summary(title, *(f"{part['errors'][name]:.2%}" for part in (one, six)))


def test_with_tta_classes_and_pairs_have_a_column_for_six_views(run_eval, plain, tmp_path):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 0]
    out = success(run_eval(*flags, "--tta"))
    classes = read_table(tmp_path / "classes.csv")
    six = pandas.DataFrame(read_metrics(tmp_path)["tta"]["per_class"])["recall"]
    assert list(classes["tta_recall"]) == list(six)
    for row in classes.itertuples():
        assert re.search(
            rf"^{row[1]} +\d+ +{row.recall:.1%} +{row.tta_recall:.1%} ", out, re.MULTILINE
        )
    table = read_table(tmp_path / "predictions.csv")
    both = table.query("true != predicted").value_counts(["true", "predicted"])
    counts = table.value_counts(["true", "tta_predicted"])
    for pair, count in both.items():
        line = rf"^{pair[0]} +{pair[1]} +{count} +[\d.]+% +{counts.get(pair, 0)}$"
        assert re.search(line, out, re.MULTILINE)
    out = success(run_eval(*flags))
    assert "six views" not in out
    assert "tta_recall" not in read_table(tmp_path / "classes.csv")


def test_one_photo_all_right_at_another_resolution(run_eval, plain, tmp_path, monkeypatch):
    # As on a CPU that has bfloat16, which the --no-amp of run_eval forbids.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    fc_bias = {"fc.bias": 1000 * torch.eye(8)[1]}
    torch.save({**plain.saved, "model": {**plain.saved["model"], **fc_bias}}, tmp_path / "1.pth")
    cars = write_dataset(tmp_path / "cars", rows(2), [(jpeg(0), 1)], NAMES)
    (tmp_path / "gradcam_worst.png").write_bytes(b"of an older run")
    flags = ["--checkpoint", tmp_path / "1.pth", "--dataset", cars, "--output-dir", tmp_path]
    out = success(run_eval(*flags, "--resolution", 40, "--tta"))
    assert "trained at 64 px" in out
    assert "40 px" in out
    assert "float32" in out
    assert not (tmp_path / "gradcam_worst.png").exists()
    metrics = read_metrics(tmp_path)
    assert metrics["run"]["precision"] == "torch.float32"
    assert metrics["test"]["mean_class_accuracy"] == metrics["test"]["ci95_high"] == 1
    assert metrics["test"]["confused_pairs"] == []
    assert metrics["tta_change"]["p_value"] == 1


@pytest.mark.parametrize("count", [20, 21])
def test_of_more_than_twenty_classes_ten_at_each_end_are_listed(run_eval_on, count):
    # Photos that are recognized, of all: of ten classes few, of ten many, of one the half.
    counts = [(0, 1)] * 5 + [(1, 3)] * 5 + [(1, 2)] * (count - 20) + [(2, 3)] * 5 + [(1, 1)] * 5
    names = [f"class {index}" for index in range(count)]
    recall = {name: right / of for name, (right, of) in zip(names, counts, strict=True)}
    labels, taken_for = [], []
    order = np.random.default_rng(0).permutation(count)
    for label, index in enumerate(order):
        right, of = counts[index]
        labels += [label] * of
        taken_for += [label] * right + [(label + 1) % count] * (of - right)
    logits = 5 * torch.eye(count)[taken_for]
    in_order = [names[index] for index in order]
    out = success(run_eval_on(in_order, labels, logits, "--num-gradcam", 0))
    # Precision, recall and F1 stand beside a class, one share beside a confused pair.
    lines = re.findall(r"^(class \d+) (.*%.*%.*%.*)", out, re.MULTILINE)
    assert all(f" {recall[name]:.1%} " in line for name, line in lines)
    shown = [name for name, _ in lines]
    recalls = [recall[name] for name in shown]
    assert len(shown) == len(set(shown)) == 20
    if count == 20:
        assert recalls == sorted(recalls)
    else:
        assert set(shown[:10]) == set(names[:10])
        assert recalls[:10] == sorted(recalls[:10])
        assert recalls[10:] == sorted(recalls[10:], reverse=True)
        assert min(recalls[10:]) > 0.5
    assert ("of the lowest" in out, "of the highest" in out) == (count > 20, count > 20)


def test_top_5_needs_more_than_five_classes(run_eval_on, tmp_path):
    labels = list(range(5))
    out = success(run_eval_on([*"abcde"], labels, torch.eye(5), "--num-gradcam", 0))
    assert "top5" not in read_metrics(tmp_path)["test"]
    assert "top-5" not in out


def test_photos_in_folders_and_in_parquet_files_get_the_same_predictions(
    run_eval, plain, trained, tmp_path
):
    # The classes stand in another order there, and the rows too.
    parquet = {**plain.saved, "classes": load(trained.run / "best_model.pth")["classes"]}
    torch.save(parquet, tmp_path / "parquet.pth")
    shares = []
    for checkpoint, cars in (
        (plain.checkpoint, plain.folder),
        (tmp_path / "parquet.pth", trained.cars),
    ):
        flags = ["--checkpoint", checkpoint, "--dataset", cars, "--num-gradcam", 0]
        success(run_eval(*flags, "--output-dir", tmp_path))
        table = read_table(tmp_path / "predictions.csv")
        shares.append(sorted(zip(table["confidence"], table["true_confidence"], strict=True)))
    np.testing.assert_allclose(shares[0], shares[1], atol=1e-5)


PRECISIONS = [(False, None, "float32"), (True, None, "bfloat16"), (True, "float16", "float16")]


@pytest.mark.cpu("a GPU computes in float16 by default")
@pytest.mark.parametrize("amp, amp_dtype, precision", PRECISIONS)
def test_a_checkpoint_is_evaluated_in_the_precision_of_its_run(
    plain,
    tmp_path,
    monkeypatch,
    amp,
    amp_dtype,
    precision,
):
    # As on a CPU that has bfloat16.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    settings = {**plain.saved["settings"], "amp": amp, "amp_dtype": amp_dtype}
    torch.save({**plain.saved, "settings": settings}, tmp_path / "run.pth")
    # The fixture run_eval passes --no-amp.
    flags = ["--checkpoint", str(tmp_path / "run.pth"), "--workers", "0", "--num-gradcam", "0"]
    evaluation.main(flags)
    assert read_metrics(tmp_path)["run"]["precision"] == f"torch.{precision}"


def test_evaluations_use_no_kernels_picked_by_timing(run_eval, plain, tmp_path, monkeypatch):
    # With cudnn.benchmark, two evaluations of a checkpoint differ in some photos.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 0]
    success(run_eval(*flags))
    assert torch.backends.cudnn.benchmark is False


# ---------------------------------------------------------------- pictures


def test_the_layer_of_the_maps_is_the_last_block_of_resnet50(
    run_eval, real_network, gradcams, figures, tmp_path
):
    torch.save(RESNET50(num_classes=2).state_dict(), tmp_path / "resnet50.pth")
    cars = write_dataset(tmp_path / "cars", rows(2), rows(1), [*"ab"])
    flags = ["--checkpoint", tmp_path / "resnet50.pth", "--dataset", cars, "--num-gradcam", 1]
    success(run_eval(*flags))
    assert gradcams
    for note in gradcams:
        assert note.layers == [note.model.layer4[2]]
        assert note.layers[0] is list(note.model.layer4)[-1]
        assert note.cells == (2048, 7, 7)
        assert note.heat.shape == (224, 224)
    assert "7 × 7 cells" in figures[1].get_suptitle()


def test_maps_equal_pytorch_grad_cam_of_the_predicted_class_and_wrong_titles_are_red(
    run_eval, plain, gradcams, figures, tmp_path
):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 32]
    success(run_eval(*flags))
    predicted = plain.logits[:, 0].argmax(1).tolist()
    assert sum(guess != label for guess, label in zip(predicted, plain.labels, strict=True)) >= 3
    shown = rows_shown(figures[1], plain)
    assert sorted(shown) == list(range(32))
    assert len(gradcams) == 32 + len(panels(figures[2]))
    for figure, notes in ((figures[1], gradcams[:32]), (figures[2], gradcams[32:])):
        shown = rows_shown(figure, plain)
        for panel, note, row in zip(panels(figure), notes, shown, strict=True):
            is_right = predicted[row] == plain.labels[row]
            assert note.target == predicted[row]
            assert NAMES[plain.labels[row]] in panel.title.get_text()
            assert NAMES[predicted[row]] in panel.title.get_text()
            assert (panel.title.get_color() == "red") == (not is_right)
            assert ("WRONG" in panel.title.get_text()) == (not is_right)
    for note, row in zip(gradcams[:3], rows_shown(figures[1], plain), strict=False):
        view = plain.views[6 * row][None]
        cam = GradCAM(plain.model, [plain.model.layer4[-1]])
        classes = [note.target, (note.target + 1) % 8]
        theirs, of_another = [cam(view, [ClassifierOutputTarget(index)])[0] for index in classes]
        np.testing.assert_allclose(note.heat, theirs, atol=2e-3)
        assert np.abs(theirs - of_another).max() > 0.02, "the bound could not fail"


def test_maps_keep_no_activations_of_early_layers(run_eval, plain, gradcams, tmp_path):
    # At 448 px, those of ResNet-50 would fill the memory.
    saved = []
    hooks = (lambda value: saved.append(value.numel()) or value, lambda value: value)
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 1]
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        success(run_eval(*flags, "--resolution", 96))
    assert gradcams
    # The largest weights of the last block. Feature maps of the first two stages have more values.
    assert 0 < max(saved) <= 2048 * 32 < 512 * 12 * 12


def test_the_most_confident_error_of_each_of_the_five_worst_classes_is_shown(run_eval_on, figures):
    # Class: photos that are recognized, and the logits of those that are taken for h.
    classes = {
        "a": (1, [5]),
        "b": (1, [2, 3, 4, 1]),
        "c": (2, [5]),
        "d": (1, [3, 6, 2]),
        "e": (3, [7]),
        "f": (0, [1, 2]),
        "g": (1, [4, 3]),
    }
    names = [*"abcdefgh"]
    labels, logits = [], []
    for label, (right, errors) in enumerate(classes.values()):
        labels += [label] * (right + len(errors))
        logits += [value * torch.eye(8)[7] for value in errors] + [8 * torch.eye(8)[label]] * right
    success(run_eval_on(names, labels, torch.stack(logits), "--num-gradcam", 8))
    titles = [panel.title.get_text() for panel in panels(figures[2])]
    assert [re.search("true: (.)", title)[1] for title in titles] == [*"fbdga"]
    for title, logit in zip(titles, (2, 4, 6, 4, 5), strict=True):
        share = 100 * math.exp(logit) / (math.exp(logit) + 7)
        assert float(re.search(r"([\d.]+)%", title)[1]) == pytest.approx(share, abs=0.1)


def test_the_seed_picks_the_photos_of_the_maps(run_eval, plain, figures, tmp_path):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 3]
    shown = []
    for seed in (1, 1, 2):
        figures.clear()
        success(run_eval(*flags, "--seed", seed))
        shown.append(rows_shown(figures[1], plain))
    assert shown[0] == shown[1]
    assert set(shown[0]) != set(shown[2])
    assert all(len(set(picked)) == 3 for picked in shown)


def draw(figure: Figure, parts: list) -> np.ndarray:
    """The pixels, once none of `parts` is found to be cut off or to lie over another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [each.get_tightbbox() for each in parts]
    for index, box in enumerate(boxes):
        assert all(figure.bbox.contains(*corner) for corner in (box.min, box.max))
        assert not any(box.overlaps(other) for other in boxes[:index])
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("count", [1, 5, 16, pytest.param(100, marks=pytest.mark.slow)])
def test_gradcam_titles_are_whole_and_apart(run_eval_on, figures, count):
    names = [f"{LONG_NAME} {year}" for year in (2011, 2012)]
    logits = torch.eye(2)[[1, 0] * count][:count]
    success(run_eval_on(names, [0] * count, logits, "--num-gradcam", count))
    figure = figures[1]
    shown = panels(figure)
    assert len(shown) == count
    columns = {round(panel.axes.get_position().x0, 3) for panel in shown}
    assert len(columns) == min(count, 4)
    assert all(panel.title.get_text().count(LONG_NAME) == 2 for panel in shown)
    note = figure.get_suptitle()
    assert "GradCAM" in note
    assert "2 × 2 cells" in note
    assert "40 px" in note
    # The box of a panel's axes holds its title.
    draw(figure, [*(panel.axes for panel in shown), figure._suptitle])


@pytest.mark.parametrize("count", [2, 8, pytest.param(196, marks=pytest.mark.slow)])
def test_the_confusion_matrix_names_every_class_and_leaves_empty_cells_white(
    run_eval_on, figures, count
):
    names = [f"{LONG_NAME} {index}" for index in range(count)]
    # Each photo is taken for the next class, but for a second one of the first class.
    labels = [*range(count), 0]
    taken_for = [*np.arange(1, count + 1) % count, 0]
    success(run_eval_on(names, labels, 5 * torch.eye(count)[taken_for], "--num-gradcam", 0))
    matrix = np.eye(count)[taken_for[:-1]]
    matrix[0, :2] = 0.5
    axes, bar = figures[0].axes
    tick_labels = [*axes.get_yticklabels(), *axes.get_xticklabels()]
    assert [label.get_text() for label in tick_labels] == names * 2
    assert "true" in axes.get_ylabel().lower()
    assert "predicted" in axes.get_xlabel().lower()
    assert "share" in bar.get_ylabel()
    assert f"{1 / (count + 1):.2%}" in axes.get_title()
    # The number of photos stands in each cell that has some.
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == {(column, row): "1" for row, column in np.argwhere(matrix)}
    parts = [*tick_labels, axes.title, axes.xaxis.label, axes.yaxis.label, bar]
    pixels = draw(figures[0], parts)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (count - 1, 0)):
        # Beside the number of the cell.
        x, y = axes.transData.transform((column + 0.4, row + 0.4))
        is_white = (pixels[int(len(pixels) - y), int(x)] == 255).all()
        assert is_white == (matrix[row, column] == 0)


@pytest.mark.parametrize("resolution, is_coarse", [(96, True), (97, False)])
def test_panels_name_their_photos_and_the_heading_tells_what_maps_of_few_cells_are_worth(
    run_eval, plain, figures, tmp_path, resolution, is_coarse
):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 3]
    success(run_eval(*flags, "--resolution", resolution))
    table = read_table(tmp_path / "predictions.csv")
    for figure in figures[1:]:
        assert ("too coarse" in figure.get_suptitle()) is is_coarse
        assert "red" in figure.get_suptitle()
        for panel in panels(figure):
            title = panel.title.get_text()
            photo = table.loc[int(re.search(r"row (\d+)", title)[1])]
            assert photo["file"][-20:] in title
            assert f"true: {photo['true']}" in title


def test_the_colours_of_the_confusion_matrix_are_shares_of_the_true_class(run_eval_on, figures):
    labels = [0, 0, 0, 0, 1, 1, 2]
    taken_for = [0, 0, 0, 1, 1, 2, 1]
    success(run_eval_on([*"abc"], labels, 5 * torch.eye(3)[taken_for], "--num-gradcam", 0))
    axes, _ = figures[0].axes
    shares = [[0.75, 0.25, 0], [0, 0.5, 0.5], [0, 1, 0]]
    np.testing.assert_allclose(axes.images[0].get_array(), shares)


def test_the_confusion_matrix_of_hundreds_of_classes_keeps_its_size(run_eval_on, figures, tmp_path):
    names = [f"class {index}" for index in range(400)]
    labels = [0, 1, 399]
    logits = 5 * torch.eye(400)[[0, 399, 1]]
    success(run_eval_on(names, labels, logits, "--num-gradcam", 0))
    axes, _ = figures[0].axes
    assert max(figures[0].get_size_inches()) <= 62.5  # that of 350 classes
    assert axes.get_xticklabels() == axes.get_yticklabels() == list(axes.texts) == []


@pytest.mark.parametrize("failing", ["a drawing", "an older figure"])
def test_a_figure_that_fails_costs_no_metrics(run_eval, plain, tmp_path, monkeypatch, failing):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path]
    if failing == "an older figure":
        (tmp_path / "confusion_matrix.png/that cannot be removed").mkdir(parents=True)
        assert str(tmp_path / "confusion_matrix.png") in refusal(run_eval(*flags))
    else:
        monkeypatch.setattr(Figure, "savefig", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            run_eval(*flags)
        assert not list(tmp_path.glob("*.png"))
    assert read_metrics(tmp_path)["test"]["total"] == 32
    tables = [read_table(tmp_path / name) for name in ("predictions.csv", "classes.csv")]
    assert list(map(len, tables)) == [32, 8]


# ---------------------------------------------------------------- somebody's own photos


@pytest.mark.skipif(train.decode_image is None, reason="torchcodec cannot be loaded")
def test_the_readmes_lines_name_a_photos_class(plain, tmp_path, monkeypatch, capsys):
    # torchvision.models.resnet50, which the lines import, is the small network.
    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copy(plain.checkpoint, tmp_path)
    for row in range(3, 9):
        shutil.copy(plain.paths[row], "car.jpg")
        exec(source, {})
        assert NAMES[plain.logits[row, 0].argmax()] in capsys.readouterr().out


@pytest.mark.parametrize("tta, workers", [(False, 1), (True, 0)])
def test_own_photos_and_folders_are_classified_in_batches(
    run_eval, plain, figures, tmp_path, tta, workers
):
    odd = tmp_path / "$x_{$.jpg"
    shutil.copy(plain.paths[20], odd)
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--batch-size", 3]
    flags += [*["--tta"] * tta, "--num-gradcam", 2, "--workers", workers]
    photos = [odd, *plain.paths[21:24], plain.paths[24].parent]
    out = success(run_eval(*flags, "--images", *photos))
    top = (plain.logits.mean(1) if tta else plain.logits[:, 0])[20:28].softmax(1).topk(5)
    names = np.array(NAMES)[top.indices]
    table = read_table(tmp_path / "images.csv")
    assert list(table["path"]) == list(map(str, [odd, *plain.paths[21:28]]))
    np.testing.assert_array_equal(table.filter(like="class_"), names)
    np.testing.assert_allclose(table.filter(like="confidence_"), top.values, atol=1e-4)
    # The names in their order, beside their shares.
    printed = re.findall(r"([\d.]+)% +(.+)$", out, re.MULTILINE)
    assert [name for _, name in printed] == names.flatten().tolist()
    shares = [float(share) for share, _ in printed]
    np.testing.assert_allclose(shares, 100 * top.values.flatten(), atol=0.02)
    (figure,) = figures
    assert rows_shown(figure, plain) == [20, 21]
    for panel, path, name in zip(panels(figure), (odd, plain.paths[21]), names[:2, 0], strict=True):
        title = panel.title.get_text()
        assert name in title
        assert path.name in title
    draw(figure, [panel.axes for panel in panels(figure)])
    assert (tmp_path / "gradcam_images.png").is_file()


def test_own_photos_without_gradcam_get_their_classes_and_no_picture(
    run_eval, plain, figures, tmp_path
):
    (tmp_path / "gradcam_images.png").write_bytes(b"of older photos")
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 0]
    out = success(run_eval(*flags, "--images", *plain.paths[3:5]))
    top = plain.logits[3:5, 0].topk(5).indices
    names = np.array(NAMES)[top]
    table = read_table(tmp_path / "images.csv")
    np.testing.assert_array_equal(table.filter(like="class_"), names)
    printed = re.findall(r"[\d.]+% +(.+)$", out, re.MULTILINE)
    assert printed == names.flatten().tolist()
    assert not (tmp_path / "gradcam_images.png").exists()
    assert figures == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_cannot_be_decoded_ends_with_its_name(run_eval, plain, tmp_path, workers):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not a photo")
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--workers", workers]
    err = refusal(run_eval(*flags, "--images", plain.paths[0], bad, plain.paths[1]))
    assert str(bad) in err and "cannot be decoded" in err
    assert not (tmp_path / "images.csv").exists()


@pytest.mark.parametrize("kind", ["not there", "an empty folder", "a damaged photo", "unreadable"])
def test_a_path_that_cannot_be_classified_is_named(run_eval, plain, tmp_path, monkeypatch, kind):
    path = tmp_path / "own.jpg"
    scandir = os.scandir

    def refusing_scandir(folder="."):
        if Path(folder) == path:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(folder)

    if kind == "a damaged photo":
        path.write_bytes(plain.paths[0].read_bytes()[:300])
    elif kind != "not there":
        path.mkdir()
    if kind == "unreadable":  # The superuser may read any folder.
        monkeypatch.setattr(os, "scandir", refusing_scandir)
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path]
    assert str(path) in refusal(run_eval(*flags, "--images", path))
    assert not list(tmp_path.glob("images.csv"))


# ---------------------------------------------------------------- flags and Ctrl-C


@pytest.mark.parametrize(
    "flags", ["--resolution 31", "--batch-size 0", "--seed -1", "--num-gradcam -1", "--images"]
)
def test_usage_errors_end_with_a_line_and_status_2(run_eval, plain, flags):
    name, *value = flags.split()
    status, out, err = run_eval("--checkpoint", plain.checkpoint, name, *value)
    assert (status, out) == (2, "")
    assert all(text in err.splitlines()[-1] for text in (name, *value))


def test_under_torchrun_it_says_how_to_start_it(fork, plain, tmp_path):
    environment = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path / "report"]
    assert "without torchrun" in refusal(fork("eval.py", *flags, **environment).end())
    assert not (tmp_path / "report").exists()


def test_a_misspelt_checkpoint_creates_no_folder_and_a_file_as_folder_is_refused_at_once(
    run_eval, plain, tmp_path
):
    err = refusal(run_eval("--checkpoint", tmp_path / "typo/best_model.pth"))
    assert str(tmp_path / "typo/best_model.pth") in err
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").touch()
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path / "file"]
    status, out, err = run_eval(*flags)
    assert (status, out) == (1, "")
    assert "--output-dir" in err


def test_ctrl_c_is_quiet(fork, plain, tmp_path):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--workers", 2]
    process = fork("eval.py", *flags, "--images", *plain.paths * 100)
    while len(children(process.pid)) < 2:
        assert process.is_alive(), process.err.read_text()
    time.sleep(0.5)  # until both have begun
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = process.end()
    assert (status, err) == (130, "")
    assert not any(is_running(worker) for worker in workers)
