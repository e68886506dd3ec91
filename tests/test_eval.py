"""eval.py: its figures against scikit-learn, PIL and pytorch_grad_cam, its report, its pictures and its refusals."""

import contextlib
import functools
import io
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import encode, write_dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from pytorch_grad_cam import GradCAM
from sklearn.metrics import confusion_matrix
from torchvision import transforms
from torchvision.models import resnet50
from torchvision.models.resnet import resnet18

import eval as evaluation
import train

FP32 = torch.autocast("cpu", torch.bfloat16, enabled=False)
NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def run_eval(capfd):
    """Run eval.py in this process; returns exit status, standard output and standard error."""

    def run(*flags: object) -> tuple[int, str, str]:
        argv = ["--workers", "0", "--no-amp", *map(str, flags)]
        try:
            status = train.run_command(lambda: evaluation.main(argv))
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def model(trained):
    network = resnet50(num_classes=8)
    network.load_state_dict(torch.load(trained[1] / "best_model.pth", weights_only=True)["model"])
    return network.eval()


@pytest.fixture(scope="module")
def plain_logits(trained, model):
    """Of each test photo, the logits of the six views by PIL, one forward pass each: (32, 6, 8); and the labels."""
    logits, labels = [], []
    photos = train.load_cars(str(trained[0]))["test"].cast_column("image", train.datasets.Image())
    with torch.no_grad():
        for item in photos:
            views = []
            for side in (73, 64, 82):  # int(64 · 256/224), 64, int(64 · 288/224)
                crop = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(64)])(
                    item["image"]
                )
                views += [crop, transforms.functional.hflip(crop)]
            tensors = [NORMALIZE(transforms.functional.to_tensor(view)) for view in views]
            logits.append(torch.cat([model(tensor[None]) for tensor in tensors]))
            labels.append(item["label"])
    return torch.stack(logits), np.array(labels)


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    """Folder, output and metrics of `eval.py --tta --num-gradcam 4` on the trained checkpoint."""
    folder, out = tmp_path_factory.mktemp("report"), io.StringIO()
    paths = ["--checkpoint", str(trained[1] / "best_model.pth"), "--output-dir", str(folder)]
    with contextlib.redirect_stdout(out):
        evaluation.main([*paths, *"--tta --num-gradcam 4 --no-amp --workers 1".split()])
    return folder, out.getvalue(), json.loads((folder / "metrics.json").read_text())


# ---------------------------------------------------------------- right


def test_metrics_equal_scikit_learns(report, plain_logits):
    folder, out, metrics = report
    logits, labels = plain_logits
    expected = confusion_matrix(labels, logits[:, 0].argmax(1), labels=range(8))
    assert metrics["test"]["correct"] == expected.trace() and metrics["test"]["total"] == 32
    assert [row["correct"] for row in metrics["per_class"]] == expected.diagonal().tolist()
    assert [row["total"] for row in metrics["per_class"]] == [4] * 8
    names = [row["name"] for row in metrics["per_class"]]
    pairs = {
        (names.index(pair["true"]), names.index(pair["predicted"])): pair
        for pair in metrics["confused_pairs"]
    }
    np.fill_diagonal(expected, 0)
    assert all(
        expected[pair] == found["count"] == round(4 * found["share"])
        for pair, found in pairs.items()
    )
    counts = [pair["count"] for pair in metrics["confused_pairs"]]
    assert counts == sorted(expected.ravel().tolist(), reverse=True)[: len(counts)]
    tta = confusion_matrix(labels, logits.mean(1).argmax(1), labels=range(8))
    assert metrics["tta"]["correct"] == tta.trace()
    assert metrics["top5"]["correct"] == sum(
        labels[i] in logits[i, 0].topk(5).indices for i in range(32)
    )


def test_views_give_the_logits_of_six_pil_transforms(trained, model, plain_logits):
    crop_views = functools.partial(evaluation.crop_views, tta=True)
    photos = train.CarPhotos(train.load_cars(str(trained[0]))["test"], crop_views, 64)
    views = torch.stack([photos[0, row][0] for row in range(32)])
    single, mean = evaluation.predict(model, views, FP32)
    for ours, theirs in ((single, plain_logits[0][:, 0]), (mean, plain_logits[0].mean(1))):
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()
        assert torch.equal(ours.argmax(1), theirs.argmax(1))
    crops = [
        train.center_crop(train.decode_photo(row["image"]["bytes"]), 64) for row in photos.photos
    ]
    assert torch.equal(views[:, 0], torch.stack(crops))
    again, same = evaluation.predict(model, views[:, :1], FP32)
    assert torch.equal(again, same) and (again - single).norm() < 1e-4 * single.norm()


@pytest.mark.parametrize("correct, total", [(0, 50), (50, 50), (7380, 8041), (1, 1)])
def test_the_interval_is_wilsons(correct, total):
    z, p = 1.959963984540054, correct / total
    middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    found = evaluation.accuracy(correct, total)
    assert (found["low"], found["high"]) == (
        pytest.approx(middle - half, abs=1e-9),
        pytest.approx(middle + half),
    )
    if total == 8041:
        assert evaluation.with_interval(found) == "91.78 % (7380/8041, 95 % CI 91.16–92.36)"


def test_maps_equal_pytorch_grad_cam_on_one_photo(trained, model):
    photos = train.CarPhotos(train.load_cars(str(trained[0]))["test"], train.center_crop, 64)
    crops = torch.stack([photos[0, row][0] for row in range(5)])
    maps = evaluation.grad_cam(model, crops, [0, 1, 2, 3, 4], batch_size=2)
    with GradCAM(model, [model.layer4[-1]]) as cam:
        targets = [evaluation.ClassifierOutputTarget(3)]
        expected = cam(NORMALIZE(crops[3:4].movedim(-1, 1).float() / 255), targets)
    assert maps.shape == (5, 64, 64) and maps.dtype == np.float32
    np.testing.assert_allclose(maps[3:4], expected, atol=2e-3)
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- the report


def test_the_report_is_complete_and_in_order(report, trained):
    folder, out, metrics = report
    parts = [
        "checkpoint",
        "64 px",
        "32 photos",
        "test accuracy",
        "95 % CI",
        "top-5 accuracy",
        "accuracy per class",
    ]
    parts += ["ten worst classes", "ten best classes", "six views", "points to the single view"]
    parts += [
        "ten worst classes of the single view",
        "ten worst classes of the six views",
        "most confused pairs",
    ]
    parts += ["metrics.json", "confusion_matrix.png", "gradcam_samples.png", "gradcam_worst.png"]
    places = [out.index(part) for part in parts]
    assert places == sorted(places)
    assert f"{metrics['test']['correct']}/32" in out
    gain = 100 * (metrics["tta"]["accuracy"] - metrics["test"]["accuracy"])
    assert f"{gain:+.2f} points" in out
    assert (
        metrics["settings"]["dataset"] == str(trained[0])
        and metrics["versions"]["torch"] == torch.__version__.split("+")[0]
    )


def test_a_training_run_and_its_evaluation_agree(report, trained):
    best = torch.load(trained[1] / "best_model.pth", weights_only=True)
    assert report[2]["test"]["accuracy"] == pytest.approx(best["test_accuracy"])


@pytest.mark.parametrize("count", [1, 5, 16, 32])
def test_gradcam_figure_has_a_cell_a_photo(count):
    crops, maps = (
        torch.zeros(count, 64, 64, 3, dtype=torch.uint8),
        np.zeros((count, 64, 64), np.float32),
    )
    maps[:, 10:20, 10:20] = 1
    title = "true: Rolls-Royce Phantom Drophead Coupe Convertible 2012\npredicted: Van\nright"
    figure = evaluation.plot_grad_cam(crops, maps, [title] * count, ["black"] * count)
    assert len(figure.axes) == count and figure.get_size_inches()[0] < 13.3
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert (
            box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        ), "cut off"
        assert not any(box.overlaps(other) for other in boxes[:index]), (
            "one title lies over another"
        )


@pytest.mark.parametrize("count", [1, 8, 196])
def test_confusion_matrix_names_every_class(count):
    names = [f"Chevrolet Silverado 1500 Classic Extended Cab {i}" for i in range(count)]
    confusion = np.eye(count, dtype=int) * 40
    figure = evaluation.plot_confusion(confusion, names)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = axes.get_tightbbox()
    assert box.x0 >= 0 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, "a name is cut off"
    if count > 1:
        pixels = np.asarray(canvas.buffer_rgba())
        x, y = axes.transData.transform((count - 1 + 0.2, 0.2))
        assert (pixels[int(pixels.shape[0] - y), int(x)] == 255).all(), "an empty cell is not white"


# ---------------------------------------------------------------- odd data sets


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A checkpoint of two classes, of an untrained model, and the class it predicts for `photo`."""
    torch.manual_seed(0)
    network, folder = resnet50(num_classes=2), tmp_path_factory.mktemp("untrained")
    checkpoint = {
        "model": network.state_dict(),
        "classes": ["a", "b"],
        "resolution": 33,
        "epoch": 1,
        "test_accuracy": 0.5,
    }
    torch.save(
        {**checkpoint, "settings": {"resolution": 33, "dataset": "nowhere"}},
        folder / "best_model.pth",
    )
    views = evaluation.crop_views(train.decode_photo(photo()), 33, tta=False)[None]
    return folder / "best_model.pth", evaluation.predict(network.eval(), views, FP32)[
        0
    ].argmax().item()


def photo() -> bytes:
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)))


@pytest.mark.parametrize("right", [True, False])
def test_one_test_photo_all_right_or_all_wrong(run_eval, untrained, tmp_path, right):
    checkpoint, predicted = untrained
    label = predicted if right else 1 - predicted
    write_dataset(tmp_path / "cars", [(photo(), 0), (photo(), 1)], [(photo(), label)], ["a", "b"])
    (tmp_path / "gradcam_worst.png").write_bytes(b"of an older run")
    status, out, err = run_eval(
        "--checkpoint", checkpoint, "--dataset", tmp_path / "cars", "--output-dir", tmp_path
    )
    assert status == 0, err
    assert f"{int(right)}/1" in out and "no photo" in out  # the other class has none
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["per_class"][1 - label]["accuracy"] is None
    assert len(metrics["confused_pairs"]) == (0 if right else 1)
    if right:
        assert not (tmp_path / "gradcam_worst.png").exists() and "no photo is misclassified" in out
    else:
        assert Image.open(tmp_path / "gradcam_worst.png").size[0] == 440
    assert (
        Image.open(tmp_path / "gradcam_samples.png").size[0] == 440
    )  # one cell, of the sixteen asked for


def test_no_gradcam_and_another_resolution(run_eval, untrained, tmp_path):
    write_dataset(
        tmp_path / "cars", [(photo(), 0), (photo(), 1)], [(photo(), 0), (photo(), 1)], ["a", "b"]
    )
    flags = [
        "--checkpoint",
        untrained[0],
        "--dataset",
        tmp_path / "cars",
        "--output-dir",
        tmp_path / "out",
    ]
    status, out, err = run_eval(*flags, "--num-gradcam", 0, "--resolution", 40)
    assert status == 0, err
    assert "33 px); evaluated at 40 px" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "confusion_matrix.png",
        "metrics.json",
    ]


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_bare_state_dicts(run_eval, untrained, tmp_path, prefix):
    state = torch.load(untrained[0], weights_only=True)["model"]
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "bare.pth")
    write_dataset(tmp_path / "cars", [(photo(), 0), (photo(), 1)], [(photo(), 0)], ["a", "b"])
    flags = [
        "--checkpoint",
        tmp_path / "bare.pth",
        "--dataset",
        tmp_path / "cars",
        "--output-dir",
        tmp_path,
    ]
    status, out, err = run_eval(*flags, "--num-gradcam", 0, "--resolution", 33)
    assert status == 0, err
    assert f"{int(untrained[1] == 0)}/1" in out


# ---------------------------------------------------------------- someone's own photos


@pytest.mark.parametrize("tta", [[], ["--tta"]])
def test_own_photos_are_named_and_unreadable_ones_do_not_stop_the_others(
    run_eval, untrained, tmp_path, tta
):
    (tmp_path / "car.jpg").write_bytes(photo())
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "second.png").write_bytes(encode(Image.new("LA", (50, 40)), format="PNG"))
    images = [tmp_path / name for name in ("car.jpg", "text.jpg", "gone.jpg", "second.png")]
    status, out, err = run_eval(
        "--checkpoint", untrained[0], "--output-dir", tmp_path, *tta, "--images", *images
    )
    assert status == 1 and err.count("\n") == 1 and "2 of 4" in err
    assert "text.jpg" in err and "gone.jpg" in err and "car.jpg (" not in err
    assert out.index("car.jpg") < out.index("second.png") < out.index("gradcam_images.png")
    lines = out.splitlines()
    first = lines[lines.index(str(images[0])) + 1]
    if not tta:
        assert first.endswith("ab"[untrained[1]])
    with Image.open(tmp_path / "gradcam_images.png") as figure:
        assert figure.size[0] == 880
    assert (
        run_eval("--checkpoint", untrained[0], "--output-dir", tmp_path, "--images", images[0])[0]
        == 0
    )


# ---------------------------------------------------------------- refusals


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def cut_off(path, good):
    path.write_bytes(good.read_bytes()[:100_000])


def pickle_with_code(path, good):
    torch.save({"model": Code()}, path)


def bare_pickle_with_code(path, good):
    path.write_bytes(pickle.dumps(Code()))


def another_architecture(path, good):
    torch.save({"model": resnet18(num_classes=2).state_dict()}, path)


def not_finite(path, good):
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["model"]["conv1.weight"][0] = math.nan
    torch.save(checkpoint, path)


def a_list(path, good):
    torch.save([1, 2, 3], path)


def other_names(path, good):
    torch.save({**torch.load(good, weights_only=True), "classes": ["a", "c"]}, path)


def other_count(path, good):
    torch.save(resnet50(num_classes=3).state_dict(), path)


def missing(path, good):
    pass


@pytest.mark.parametrize(
    "damage",
    [
        missing,
        cut_off,
        pickle_with_code,
        bare_pickle_with_code,
        another_architecture,
        not_finite,
        a_list,
        other_names,
        other_count,
    ],
    ids=lambda damage: damage.__name__,
)
def test_other_checkpoints_are_refused_in_one_line(
    run_eval, untrained, tmp_path, monkeypatch, damage
):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "cars", [(photo(), 0), (photo(), 1)], [(photo(), 0)], ["a", "b"])
    damage(tmp_path / "bad.pth", untrained[0])
    status, out, err = run_eval(
        "--checkpoint", "bad.pth", "--dataset", "cars", "--output-dir", tmp_path / "out"
    )
    assert status == 1 and err.count("\n") == 1 and "bad.pth" in err and "Traceback" not in err, err
    assert not (tmp_path / "ran").exists(), "code in the checkpoint was run"
    assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.parametrize(
    "flags", [("--batch-size", 0), ("--num-gradcam", -1), ("--resolution", 3), ("--images",)]
)
def test_usage_errors_are_one_line_and_status_2(run_eval, flags):
    status, out, err = run_eval(*flags)
    assert status == 2 and out == "" and err.count("\n") == 1 and flags[0] in err
