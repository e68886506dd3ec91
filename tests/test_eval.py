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
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas
import pytest
import torch
import torchvision
from files import jpeg, load, read_history, rows, write_dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scripts import ROOT, children, is_running, refusal, success
from sklearn.metrics import balanced_accuracy_score, classification_report, log_loss
from small import small_resnet
from torchvision.transforms import v2

import eval as evaluation
import train

# In an order that is not that of their folders.
NAMES = [f"Škoda Citigo{number} Van 2012" for number in (3, 1, 2, 0, 7, 6, 5, 4)]
NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory) -> SimpleNamespace:
    """Photos in folders, and a trained network; six views fix photos 16–19 and break 0–2."""
    folder = tmp_path_factory.mktemp("plain")
    cars = train.load_split(train.find_splits(str(trained.cars), ["test"]), "test")
    cars = sorted(cars, key=lambda item: NAMES[item["label"]])
    labels = torch.tensor([item["label"] for item in cars])
    paths = [folder / f"test/{NAMES[label]}/{row % 4}.jpg" for row, label in enumerate(labels)]
    views = []
    for path, item in zip(paths, cars, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item["image"]["bytes"])
        for side in (256, 224, 288):
            resized = v2.Resize(int(64 * side / 224))(train.decode_photo(path.read_bytes()))
            crop = NORMALIZE(v2.CenterCrop(64)(resized).float() / 255)
            views += [crop, crop.flip(-1)]
    saved = load(trained.run / "best_model.pth")
    model = small_resnet(num_classes=8).eval()
    model.load_state_dict(saved["model"])
    with torch.no_grad():
        features = torch.nn.Sequential(*list(model.children())[:-1])(torch.stack(views))
        features = features.view(32, 6, 2048)
        known = torch.cat([features[:20, 0], features[:20].mean(1)])
        taken_for = labels[:20].repeat(2)
        taken_for[16:23] = (taken_for[16:23] + 1) % 8
        weight = torch.linalg.pinv(known - known.mean(0)) @ torch.eye(8)[taken_for] * 5
        model.fc.weight[:] = weight.T
        model.fc.bias[:] = torch.linspace(0, 1, 8) - known.mean(0) @ weight
        logits = model.fc(features)
    saved.update(model=model.state_dict(), classes=NAMES, settings={"dataset": str(folder)})
    checkpoint = folder / "best_model.pth"
    torch.save(saved, checkpoint)
    return SimpleNamespace(**locals())


def read_metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def read_table(path) -> pandas.DataFrame:
    assert path.read_bytes().startswith(b"\xef\xbb\xbf"), "Excel would garble it"
    return pandas.read_csv(path)


def test_metrics_equal_plain_counts():
    cars = list(itertools.product(("AM", "Audi", "VW"), ("S Sedan", "S Van"), ("1999", "2012")))
    names = [" ".join(car) for car in cars]
    rng = np.random.default_rng(0)
    # Calibrated but for chance; the last class has no photo, and no photo is taken for the first.
    labels = rng.integers(0, 11, 500).tolist()
    logits = 2 * rng.normal(size=(500, 12)) + 4 * np.eye(12)[labels] - 20 * np.eye(12)[0]
    logits = torch.from_numpy(logits).float()
    found = evaluation.compute_metrics(logits, torch.tensor(labels), names)
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
    calibration_error = 0
    for low in range(15):
        photos = [row for row in range(500) if low < 15 * shares[row].max() <= low + 1]
        gap = sum(shares[row].max() - right[row] for row in photos)
        calibration_error += abs(gap) / 500
    assert found["calibration_error"] == close(calibration_error)
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
        renamed = evaluation.compute_metrics(logits, torch.tensor(labels), [*names[:11], name])
        assert "errors" not in renamed
    noisy = logits + torch.from_numpy(rng.normal(size=(500, 12)))
    changes = Counter(zip(right, (noisy.argmax(1).numpy() == labels).tolist(), strict=True))
    fixed, broke = changes[False, True], changes[True, False]
    tail = sum(math.comb(fixed + broke, k) for k in range(min(fixed, broke) + 1))
    change = evaluation.compare_views(logits, noisy, torch.tensor(labels))
    mcnemar = {"fixed": fixed, "broke": broke, "p_value": 2 * tail / 2 ** (fixed + broke)}
    assert change == close(mcnemar)


def test_the_calibration_error_has_bins_from_0_to_1():
    # Of more than 15 classes, the highest confidence may be below 1/15, in the first bin.
    confidences = torch.linspace(0.02, 1, 50)
    correct = torch.arange(50) // 3 % 2 == 0
    gaps = []
    for low in range(15):
        in_bin = (15 * confidences > low) & (15 * confidences <= low + 1)
        gap = confidences[in_bin].double().mean() - correct[in_bin].double().mean()
        gaps.append(gap.item() * in_bin.sum().item() / 50)
    assert gaps[0] < 0 < gaps[1]  # In one bin, they would cancel out.
    expected = sum(abs(gap) for gap in gaps)
    assert evaluation.calibration_error(confidences, correct) == pytest.approx(expected)


def test_training_and_evaluation_agree_and_0_draws_no_gradcam(run_eval, trained, tmp_path):
    best = trained.run / "best_model.pth"
    success(run_eval("--checkpoint", best, "--num-gradcam", 0, "--output-dir", tmp_path))
    metrics = read_metrics(tmp_path)["test"]
    row = read_history(trained.run)[load(best)["epoch"] - 1]
    found = [metrics["accuracy"], metrics["loss"]]
    assert found == pytest.approx([row["test_accuracy"], row["test_loss"]], abs=1e-5)
    assert not list(tmp_path.glob("gradcam*"))


def test_the_most_confident_error_of_each_of_the_five_worst_classes_is_shown():
    per_class = pandas.DataFrame({"class": [*"abcdefgh"], "support": [3] * 7 + [0]})
    per_class["recall"] = [0.5, 0.1, 0.6, 0.2, 0.9, 0, 0.3, 0]
    predictions = pandas.DataFrame({"true": [*"abcdefg" * 3, "b"], "predicted": [*"h" * 21, "b"]})
    predictions["confidence"] = [0.3] * 7 + [0.8] * 7 + [0.7] * 7 + [0.99]
    shown = evaluation.most_confident_errors(predictions, per_class)
    assert list(shown["true"]) == [*"fbdga"]
    assert set(shown["confidence"]) == {0.8}


def test_maps_equal_pytorch_grad_cam_and_keep_no_early_activations(plain):
    loaded = evaluation.load_network(train.read_checkpoint(plain.checkpoint)["model"])
    photo = train.decode_photo(plain.paths[3].read_bytes())
    saved = []
    hooks = (lambda value: saved.append(value.numel()) or value, lambda value: value)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        evaluation.grad_cam(loaded, train.center_crop(photo, 96), 0)
    # The last block's weights are the largest; an early feature map has 64 channels at 48 px.
    assert 0 < max(saved) <= 2048 * 1024
    assert 64 * 48 * 48 not in saved
    found = evaluation.grad_cam(loaded, train.center_crop(photo, 64), 3)
    with GradCAM(plain.model, [plain.model.layer4[-1]]) as cam:
        of_3, of_4 = [cam(plain.views[18][None], [ClassifierOutputTarget(i)])[0] for i in (3, 4)]
    np.testing.assert_allclose(found, of_3, atol=2e-3)
    assert np.abs(of_3 - of_4).max() > 0.02, "the bound could not fail"


def draw(figure, parts: list) -> np.ndarray:
    """The pixels, once none of `parts` is found to be cut off or to lie over another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [each.get_tightbbox() for each in parts]
    for index, box in enumerate(boxes):
        assert all(figure.bbox.contains(*corner) for corner in (box.min, box.max))
        assert not any(box.overlaps(other) for other in boxes[:index])
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("count", [1, 5, 16, pytest.param(100, marks=pytest.mark.slow)])
def test_gradcam_titles_are_whole_and_apart(count):
    title = "true: $x_{$ Rolls-Royce Phantom Drophead Coupe Convertible 2012\npredicted: a\nright"
    crops = torch.zeros(count, 40, 40, 3, dtype=torch.uint8)
    panels = pandas.DataFrame({"title": [title] * count, "color": "red"})
    figure = evaluation.plot_grad_cam(crops, np.zeros((count, 40, 40), np.float32), panels)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == count
    columns = {round(axes.get_position().x0, 3) for axes in drawn}
    assert len(columns) == min(count, 4)
    texts = [text for text in figure.findobj(Text) if text.get_text() == title]
    assert [text.get_color() for text in texts] == ["red"] * count
    assert figure.get_suptitle() == "GradCAM of the predicted class: 2 × 2 cells, enlarged to 40 px"
    draw(figure, [*drawn, figure._suptitle])


@pytest.mark.parametrize("count", [2, 8, pytest.param(196, marks=pytest.mark.slow)])
def test_the_confusion_matrix_names_every_class_and_leaves_empty_cells_white(count):
    names = [f"$x_{{$ Chevrolet Silverado 1500 Classic Extended Cab {i}" for i in range(count)]
    predictions = pandas.DataFrame({"true": names, "predicted": names[::-1]})
    figure = evaluation.plot_confusion(predictions, names, "test split, one view: accuracy 0.00%")
    axes, bar = figure.axes
    labels = [*axes.get_yticklabels(), *axes.get_xticklabels()]
    assert [label.get_text() for label in labels] == names * 2
    assert bar.get_ylabel() == "share of the true class"
    numbers = [text.get_text() for text in axes.texts]
    assert len(numbers) == (count**2 if count <= 20 else 0)
    assert numbers[:count] == (["0.00"] * (count - 1) + ["1.00"] if count <= 20 else [])
    pixels = draw(figure, [*labels, axes.title, axes.xaxis.label, axes.yaxis.label, bar])
    for predicted, is_white in ((0, True), (count - 1, False)):
        x, y = axes.transData.transform((predicted + 0.4, 0.4))
        assert (pixels[int(len(pixels) - y), int(x)] == 255).all() == is_white


@pytest.mark.parametrize("failing", ["plot_confusion", "an older figure"])
def test_a_figure_that_fails_costs_no_metrics(run_eval, plain, tmp_path, monkeypatch, failing):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path]
    if failing == "an older figure":
        (tmp_path / "confusion_matrix.png/that cannot be removed").mkdir(parents=True)
        assert "confusion_matrix.png: [Errno 21]" in refusal(run_eval(*flags))
    else:
        monkeypatch.setattr(evaluation, "plot_confusion", mock.Mock(side_effect=OSError))
        with pytest.raises(OSError):
            run_eval(*flags)
    assert read_metrics(tmp_path)["test"]["total"] == 32
    tables = [read_table(tmp_path / name) for name in ("predictions.csv", "classes.csv")]
    assert list(map(len, tables)) == [32, 8]


def test_the_report_is_in_order_and_its_tables_are_those_of_plain_logits(run_eval, plain, tmp_path):
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--workers", 1]
    out = success(run_eval(*flags, "--tta", "--num-gradcam", 4))
    best = plain.saved
    first = (
        f"checkpoint  {plain.checkpoint}: epoch {best['epoch']}, trained at 64 px, chosen on the "
    )
    assert out.startswith(f"{first}test split ({best['test_accuracy']:.2%})\n")
    parts = (
        "device |64 px|32 test photos|metrics.|predictions.|classes.|Classes, one view|precision|"
    )
    parts += "Most confused pairs, one view|share|Summary|one view|six views|accuracy|top-5|"
    parts += "mean class|loss|calibration|wrong year|wrong model or body|year may be wrong|"
    parts += "of the make|McNemar's test: p = |photos/s|confusion_matrix.|gradcam_samples.|worst."
    start = 0
    for part in parts.split("|"):
        start = out.index(part, start)
    table = read_table(tmp_path / "predictions.csv")
    assert list(table["file"]) == list(map(str, plain.paths))
    assert list(table["true"]) == [NAMES[label] for label in plain.labels]
    metrics = read_metrics(tmp_path)
    classes = read_table(tmp_path / "classes.csv")
    pandas.testing.assert_frame_equal(classes, pandas.DataFrame(metrics["test"]["per_class"]))
    first_view, all_views = plain.logits[:, 0], plain.logits.mean(1)
    for part, prefix, logits in (("test", "", first_view), ("tta", "tta_", all_views)):
        shares = logits.softmax(1)
        assert list(table[f"{prefix}predicted"]) == [NAMES[i] for i in shares.argmax(1)]
        found = table[[f"{prefix}confidence", f"{prefix}true_confidence"]]
        expected = torch.stack([shares.amax(1), shares[range(32), plain.labels]], dim=1)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        expected = evaluation.compute_metrics(logits, plain.labels, NAMES)
        for name in ("loss", "calibration_error"):
            assert metrics[part].pop(name) == pytest.approx(expected.pop(name), abs=1e-5)
        assert metrics[part] == expected
    change = evaluation.compare_views(first_view, all_views, plain.labels)
    assert metrics["tta_change"] == change
    assert f"six views fixed {change['fixed']} photos and broke {change['broke']} " in out
    assert min(change["fixed"], change["broke"]) >= 3
    headline = re.search(r"^accuracy +(\S+) \((\d+) of 32, 95% CI ([\d.]+)–([\d.]+)\)", out, re.M)
    one = metrics["test"]
    texts = [f"{one['accuracy']:.2%}", str(one["correct"])]
    texts += [f"{100 * one[name]:.1f}" for name in ("ci95_low", "ci95_high")]
    assert list(headline.groups()) == texts
    assert metrics["run"]["device"] == train.DEVICE.type
    assert metrics["run"]["epoch"] == plain.saved["epoch"]
    assert metrics["run"]["chosen_on"] == metrics["run"]["split"] == "test"
    assert metrics["run"]["photos_per_second"] > 0


def test_one_photo_all_right_at_another_resolution(run_eval, plain, tmp_path, monkeypatch):
    # As on a CPU that has bfloat16, which the --no-amp of run_eval forbids.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    fc_bias = {"fc.bias": 1000 * torch.eye(8)[1]}
    torch.save({**plain.saved, "model": {**plain.saved["model"], **fc_bias}}, tmp_path / "1.pth")
    cars = write_dataset(tmp_path / "cars", rows(2), [(jpeg(0), 1)], NAMES)
    (tmp_path / "gradcam_worst.png").write_bytes(b"of an older run")
    flags = ["--checkpoint", tmp_path / "1.pth", "--dataset", cars, "--output-dir", tmp_path]
    out = success(run_eval(*flags, "--resolution", 40, "--tta"))
    assert f"epoch {plain.saved['epoch']}, trained at 64 px" in out
    assert ", float32\nresolution  40 px\n" in out
    assert "7 of 8 classes have no test photos" in out
    assert not (tmp_path / "gradcam_worst.png").exists()
    metrics = read_metrics(tmp_path)
    assert metrics["run"]["precision"] == "torch.float32"
    assert metrics["test"]["mean_class_accuracy"] == metrics["test"]["ci95_high"] == 1
    assert metrics["test"]["confused_pairs"] == []
    assert metrics["tta_change"]["p_value"] == 1


@pytest.mark.skipif(train.decode_image is None, reason="torchcodec cannot be loaded")
def test_the_readmes_lines_name_a_photos_class(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.models, "resnet50", small_resnet)
    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copy(plain.checkpoint, tmp_path)
    for row in range(3, 9):
        shutil.copy(plain.paths[row], "car.jpg")
        exec(source, {})
        assert NAMES[plain.logits[row, 0].argmax()] in capsys.readouterr().out


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_own_photos_are_decoded_once_in_batches_and_unreadable_ones_named_at_the_end(
    run_eval, plain, tmp_path, monkeypatch, tta, workers
):
    decode_photo = train.decode_photo
    log = tmp_path / "decoded"
    log.touch()

    def noting_decode_photo(encoded):
        with open(log, "a") as file:  # A worker is another process.
            file.write(f"{hash(encoded)}\n")
        return decode_photo(encoded)

    monkeypatch.setattr(train, "decode_photo", noting_decode_photo)
    text, fifo, empty, odd = [tmp_path / name for name in ("text.jpg", "fifo", "empty", "$_{.jpg")]
    text.write_text("not a photo")
    os.mkfifo(fifo)
    empty.mkdir()
    shutil.copy(plain.paths[20], odd)
    bad = [text, fifo, empty, tmp_path / "missing.jpg"]
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--batch-size", 4]
    flags += [*["--tta"] * tta, "--num-gradcam", 2, "--workers", workers, "--images", *bad]
    lines = [refusal(run_eval(*flags))]
    log.write_text("")
    outcome = run_eval(*flags, odd, *plain.paths[21:24], plain.paths[24].parent)
    for line in (*lines, refusal(outcome)):
        assert all(str(path) in line for path in bad)
        assert "cannot be decoded" in line
    decoded = log.read_text().splitlines()
    assert len(decoded) == len(set(decoded)) == 9
    top = (plain.logits.mean(1) if tta else plain.logits[:, 0])[20:28].softmax(1).topk(5)
    names = np.array(NAMES)[top.indices]
    table = read_table(tmp_path / "images.csv")
    assert list(table["path"]) == list(map(str, [odd, *plain.paths[21:28]]))
    np.testing.assert_array_equal(table.filter(like="class_"), names)
    np.testing.assert_allclose(table.filter(like="confidence_"), top.values, atol=1e-4)
    assert re.findall(r"^ *[\d.]+%  (.+)$", outcome[1], re.MULTILINE) == names.flatten().tolist()
    assert "GradCAM of 2 of 8 photos" in outcome[1]
    assert (tmp_path / "gradcam_images.png").is_file()


def test_a_folder_that_cannot_be_read_is_one_line(run_eval, plain, tmp_path, monkeypatch):
    error = PermissionError(13, "Permission denied")
    monkeypatch.setattr(train, "find_photos", mock.Mock(side_effect=error))
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path]
    err = refusal(run_eval(*flags, "--images", tmp_path))
    assert f"cannot read --images {tmp_path}: " in err


def test_maps_are_of_the_predicted_class_and_wrong_ones_are_red(
    run_eval, plain, tmp_path, monkeypatch
):
    targets = []
    colors = []
    grad_cam = evaluation.grad_cam
    plot_grad_cam = evaluation.plot_grad_cam

    def noting_grad_cam(network, crop, target):
        targets.append(target)
        return grad_cam(network, crop, target)

    def noting_plot(crops, maps, panels):
        colors.extend(panels["color"])
        return plot_grad_cam(crops, maps, panels)

    monkeypatch.setattr(evaluation, "grad_cam", noting_grad_cam)
    monkeypatch.setattr(evaluation, "plot_grad_cam", noting_plot)
    flags = ["--checkpoint", plain.checkpoint, "--output-dir", tmp_path, "--num-gradcam", 32]
    success(run_eval(*flags))
    table = read_table(tmp_path / "predictions.csv")
    rows = pandas.Series(range(32)).sample(32, random_state=42)
    shown = table.loc[rows]
    assert targets[:32] == shown["predicted"].map(NAMES.index).tolist()
    assert (shown["predicted"] != shown["true"]).sum() >= 3
    wrong = (shown["predicted"] != shown["true"]).tolist()
    assert [color == "red" for color in colors[:32]] == wrong


@pytest.mark.parametrize("count, titles", [(20, ["Classes"]), (21, ["Ten worst", "Ten best"])])
def test_more_than_twenty_classes_are_shown_in_part(capsys, count, titles):
    names = [f"class {index}" for index in range(count)]
    table = {"class": names, "precision": 0.5, "recall": np.arange(count) / count, "f1-score": 0.5}
    evaluation.print_classes(pandas.DataFrame({**table, "support": 3}))
    out = capsys.readouterr().out
    shown = re.findall(r"^(class \d+|Classes|Ten worst|Ten best)", out, re.MULTILINE)
    expected = ["Classes", *names]
    if count > 20:
        expected = ["Ten worst", *names[:10], "Ten best", *names[:-11:-1]]
    assert shown == expected
    assert f"{0.5:.1%}" in out
    assert out.count(", one view\n") == len(titles)


def test_top_5_needs_more_than_five_classes():
    logits = torch.eye(5)
    metrics = evaluation.compute_metrics(logits, torch.arange(5), [*"abcde"])
    assert "top5" not in metrics
    assert "top-5 accuracy" not in evaluation.summarize(metrics)


@pytest.mark.parametrize("flags", ["--resolution 31", "--num-gradcam 101", "--images"])
def test_usage_errors_end_with_a_line_and_status_2(run_eval, flags):
    status, out, err = run_eval(*flags.split())
    assert (status, out) == (2, "")
    assert flags.split()[0] in err.splitlines()[-1]


@pytest.mark.parametrize("flags", ["--seed 4294967296", "--batch-size 0"])
def test_a_flag_is_checked_before_the_work(run_eval, plain, tmp_path, flags):
    name, value = flags.split()
    status, out, err = run_eval("--checkpoint", plain.checkpoint, name, value)
    assert (status, out) == (2, "")
    assert f"argument {name}: {value} is not an integer of at least " in err


def test_evaluations_use_no_kernels_picked_by_timing(run_eval, plain, tmp_path, monkeypatch):
    # With cudnn.benchmark, two evaluations of a checkpoint differ in some photos.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    success(run_eval("--checkpoint", plain.checkpoint, "--output-dir", tmp_path))
    assert torch.backends.cudnn.benchmark is False


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


def test_photos_in_folders_and_in_parquet_files_get_the_same_predictions(
    run_eval, plain, trained, tmp_path
):
    # The classes stand in another order there, and the rows too.
    folders = load(plain.checkpoint)
    parquet = {**folders, "settings": {}}
    names = train.load_split(train.find_splits(str(trained.cars), ["test"]), "test")
    names = names.features["label"].names
    parquet["classes"] = [names[NAMES.index(name)] for name in NAMES]
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
