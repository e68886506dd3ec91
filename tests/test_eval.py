"""eval.py: its figures beside plain ones, its report, its pictures and somebody's own photos."""

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from files import encode, jpeg, load, rows, write_dataset
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scripts import ROOT, refusal, success
from small import small_resnet
from torchvision import transforms

import eval as evaluation
import train

NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def model(trained):
    network = small_resnet(num_classes=8)
    network.load_state_dict(load(trained.run / "best_model.pth")["model"])
    return network.eval()


@pytest.fixture(scope="module")
def photos(trained) -> list[tuple[bytes, int]]:
    split = train.load_cars(str(trained.cars))["test"]
    return [(item["image"]["bytes"], item["label"]) for item in split]


@pytest.fixture(scope="module")
def plain_logits(photos, model) -> torch.Tensor:
    """Of each test photo, the logits of the six views, one forward pass each: (32, 6, 8)."""
    logits = []
    with torch.no_grad():
        for encoded, _ in photos:
            photo = train.decode_photo(encoded)
            for side in (256, 224, 288):
                crop = train.center_crop(photo, 64, side)
                for view in (crop, crop.flip(1)):
                    image = NORMALIZE(view.movedim(-1, 0).float() / 255)
                    logits.append(model(image[None]))
    return torch.stack(logits).view(32, 6, 8)


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    """Folder, output and metrics of `eval.py --tta --num-gradcam 4` on the trained checkpoint."""
    folder = tmp_path_factory.mktemp("report")
    out = io.StringIO()
    flags = ["--checkpoint", str(trained.run / "best_model.pth"), "--output-dir", str(folder)]
    with contextlib.redirect_stdout(out):
        evaluation.main([*flags, *"--tta --num-gradcam 4 --no-amp --workers 1".split()])
    return folder, out.getvalue(), json.loads((folder / "metrics.json").read_text())


# ---------------------------------------------------------------- right


def test_metrics_equal_plain_counts(report, plain_logits, photos):
    metrics = report[2]
    labels = [label for _, label in photos]
    predicted = plain_logits[:, 0].argmax(1).tolist()
    names = [row["name"] for row in metrics["per_class"]]
    right = [label for label, guess in zip(labels, predicted, strict=True) if label == guess]
    assert metrics["test"]["total"] == 32
    assert metrics["test"]["correct"] == len(right)
    assert [row["correct"] for row in metrics["per_class"]] == [right.count(i) for i in range(8)]
    assert [row["total"] for row in metrics["per_class"]] == [4] * 8

    errors = {}
    for label, guess in zip(labels, predicted, strict=True):
        if label != guess:
            errors[label, guess] = errors.get((label, guess), 0) + 1
    for pair in metrics["confused_pairs"]:
        assert pair["count"] == errors[names.index(pair["true"]), names.index(pair["predicted"])]
        assert pair["share"] == pair["count"] / 4
    counts = [pair["count"] for pair in metrics["confused_pairs"]]
    assert counts == sorted(errors.values(), reverse=True)[:10]

    with_tta = plain_logits.mean(1).argmax(1).tolist()
    assert metrics["tta"]["correct"] == sum(map(int.__eq__, labels, with_tta))
    top5 = plain_logits[:, 0].topk(5).indices.tolist()
    assert metrics["top5"]["correct"] == sum(map(list.__contains__, top5, labels))


@pytest.mark.parametrize("tta", [False, True])
def test_shares_of_single_photos_are_those_of_one_view_or_of_six(
    run_eval, trained, photos, plain_logits, tmp_path, tta
):
    logits = plain_logits.mean(1) if tta else plain_logits[:, 0]
    classes = load(trained.run / "best_model.pth")["classes"]
    paths = []
    expected = []
    for row in range(8):
        paths.append(tmp_path / f"{row}.jpg")
        paths[-1].write_bytes(photos[row][0])
        expected += logits[row].softmax(0).topk(5).values.tolist()
    flags = ["--checkpoint", trained.run / "best_model.pth", "--output-dir", tmp_path]
    flags += ["--tta"] if tta else []
    out = success(run_eval(*flags, "--num-gradcam", 0, "--images", *paths))
    printed = re.findall(r"^ *([\d.]+)%  (\w+)$", out, re.MULTILINE)
    assert [float(share) for share, _ in printed] == pytest.approx(
        [100 * share for share in expected], abs=0.02
    )
    likeliest = [name for _, name in printed[::5]]
    assert likeliest == [classes[index] for index in logits[:8].argmax(1)]


@pytest.mark.parametrize("correct, total", [(0, 50), (50, 50), (7380, 8041), (1, 1)])
def test_the_interval_is_wilsons(correct, total):
    z = 1.959963984540054
    share = correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    root = math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    half = z / (1 + z**2 / total) * root
    found = evaluation.accuracy(correct, total)
    assert found["low"] == pytest.approx(middle - half, abs=1e-9)
    assert found["high"] == pytest.approx(middle + half)


def test_an_accuracy_is_printed_with_its_interval():
    found = evaluation.with_interval(evaluation.accuracy(7380, 8041))
    assert found == "91.78% (7380/8041, 95% CI 91.16–92.36)"


def test_a_training_run_and_its_evaluation_agree(report, trained):
    best = load(trained.run / "best_model.pth")
    assert report[2]["test"]["accuracy"] == pytest.approx(best["test_accuracy"])


def test_maps_equal_pytorch_grad_cam_on_one_photo(photos, model):
    decoded = [train.decode_photo(encoded) for encoded, _ in photos[:5]]
    crops = torch.stack([train.center_crop(photo, 64) for photo in decoded])
    maps = evaluation.grad_cam(model=model, crops=crops, targets=[0, 1, 2, 3, 4], batch_size=2)
    with GradCAM(model, [model.layer4[-1]]) as cam:
        image = NORMALIZE(crops[3:4].movedim(-1, 1).float() / 255)
        expected = cam(image, [ClassifierOutputTarget(3)])
    assert maps.shape == (5, 64, 64)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps[3:4], expected, atol=2e-3)
    assert not any(module._forward_hooks for module in model.modules())


def test_grad_cam_keeps_no_activations_of_the_early_layers(trained, model):
    checkpoint = train.read_checkpoint(trained.run / "best_model.pth")
    loaded = evaluation.load_model(checkpoint)
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))
    settings = {"crops": crops, "targets": [0, 1, 2], "batch_size": 3}
    saved = []

    def note(value):
        saved.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        maps = evaluation.grad_cam(model=loaded, **settings)
    # The last block's weights are the largest; an early feature map has 64 channels at 32 px.
    assert max(saved) <= 3 * 2048 * 512
    assert 3 * 64 * 32 * 32 not in saved
    np.testing.assert_allclose(maps, evaluation.grad_cam(model=model, **settings), atol=1e-5)


# ---------------------------------------------------------------- the report


PARTS = [
    "checkpoint",
    "64 px",
    "32 photos",
    "accuracy per class",
    "ten worst classes",
    "ten best classes",
    "ten worst classes of the six views",
    "most confused pairs",
    "test accuracy",
    "95% CI",
    "top-5 accuracy",
    "six views  ",
    "points to the single view",
    "metrics.json",
    "predictions.csv",
    "confusion_matrix.png",
    "gradcam_samples.png",
    "gradcam_worst.png",
]


def test_the_report_is_complete_and_in_order(report, trained):
    _, out, metrics = report
    places = [out.index(part) for part in PARTS]
    assert places == sorted(places)
    assert f"{metrics['test']['correct']}/32" in out
    gain = 100 * (metrics["tta"]["accuracy"] - metrics["test"]["accuracy"])
    assert f"{gain:+.2f} points" in out
    assert metrics["settings"]["dataset"] == str(trained.cars)
    assert metrics["versions"]["torch"] == torch.__version__.split("+")[0]
    # The drawn classes have no years.
    assert "how the errors" not in out
    assert "errors" not in metrics


def read_predictions(folder) -> list[dict]:
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_of_plain_logits(report, photos, plain_logits, trained):
    lines = read_predictions(report[0])
    classes = load(trained.run / "best_model.pth")["classes"]
    labels = torch.tensor([label for _, label in photos])
    assert [int(line["row"]) for line in lines] == list(range(32))
    assert [line["true"] for line in lines] == [classes[label] for label in labels]
    shares = plain_logits[:, 0].softmax(1)
    true_shares = shares[torch.arange(32), labels]
    tta_shares = plain_logits.mean(1).softmax(1)
    for name, expected in (("", shares), ("tta_", tta_shares)):
        predicted = [line[f"{name}predicted"] for line in lines]
        assert predicted == [classes[index] for index in expected.argmax(1)]
        confidence = [float(line[f"{name}confidence"]) for line in lines]
        assert confidence == pytest.approx(expected.amax(1).tolist(), abs=1e-3)
    true_confidence = [float(line["true_confidence"]) for line in lines]
    assert true_confidence == pytest.approx(true_shares.tolist(), abs=1e-3)


@pytest.mark.parametrize("count", [1, 5, 16, 32])
def test_gradcam_figure_has_a_cell_a_photo(count):
    maps = np.zeros((count, 64, 64), np.float32)
    maps[:, 10:20, 10:20] = 1
    title = "true: Rolls-Royce Phantom Drophead Coupe Convertible 2012\npredicted: Van\nright"
    crop = torch.zeros(64, 64, 3, dtype=torch.uint8)
    panels = [evaluation.Panel(crop, target=0, title=title, color="black")] * count
    figure = evaluation.plot_grad_cam(panels=panels, maps=maps)
    assert len(figure.axes) == count
    assert figure.get_size_inches()[0] < 13.3
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0, "cut off"
        assert box.x1 <= figure.bbox.x1, "cut off"
        assert box.y1 <= figure.bbox.y1, "cut off"
        assert not any(box.overlaps(other) for other in boxes[:index]), "a title lies over another"


@pytest.mark.parametrize("count", [1, 8, 196])
def test_confusion_matrix_names_every_class(count):
    names = [f"Chevrolet Silverado 1500 Classic Extended Cab {i}" for i in range(count)]
    confusion = np.eye(count, dtype=int) * 40
    figure = evaluation.plot_confusion(confusion=confusion, classes=names)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = axes.get_tightbbox()
    assert min(box.x0, box.y0) >= 0, "a name is cut off"
    assert box.y1 <= figure.bbox.y1, "a name is cut off"
    if count > 1:
        pixels = np.asarray(canvas.buffer_rgba())
        x, y = axes.transData.transform((count - 1 + 0.2, 0.2))
        assert (pixels[int(pixels.shape[0] - y), int(x)] == 255).all(), "an empty cell is not white"


def test_metrics_are_there_when_a_figure_fails(trained, tmp_path, run_eval, monkeypatch):
    def fail(*args, **names):
        raise MemoryError

    monkeypatch.setattr(evaluation, "plot_confusion", fail)
    with pytest.raises(MemoryError):
        run_eval("--checkpoint", trained.run / "best_model.pth", "--output-dir", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["total"] == 32


def test_the_readmes_lines_name_a_photos_class(
    trained, photos, plain_logits, tmp_path, monkeypatch, capsys
):
    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    classes = load(trained.run / "best_model.pth")["classes"]
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained.run / "best_model.pth", tmp_path)
    for row in range(8):
        (tmp_path / "car.jpg").write_bytes(photos[row][0])
        exec(source, {})
        assert capsys.readouterr().out == f"{classes[plain_logits[row, 0].argmax()]}\n"


# ---------------------------------------------------------------- odd data sets


def write_untrained(path: Path, classes: list[str]) -> Path:
    """Write a checkpoint of an untrained network that takes any photo for the second class."""
    torch.manual_seed(0)
    network = small_resnet(num_classes=len(classes))
    network.fc.bias.data = torch.full([len(classes)], -100.0)
    network.fc.bias.data[1] = 100
    checkpoint = {"model": network.state_dict(), "classes": classes, "resolution": 33}
    torch.save({**checkpoint, "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return write_untrained(tmp_path_factory.mktemp("untrained") / "best_model.pth", ["$x_{$", "b$"])


def two_classes(folder, label: int):
    """A data set with one test photo."""
    return write_dataset(folder / "cars", rows(2), [(jpeg(0), label)], ["$x_{$", "b$"])


def width(path) -> int:
    with Image.open(path) as picture:
        return picture.size[0]


def test_one_test_photo_all_right(run_eval, untrained, tmp_path):
    (tmp_path / "gradcam_worst.png").write_bytes(b"of an older run")
    flags = ["--checkpoint", untrained, "--output-dir", tmp_path]
    out = success(run_eval(*flags, "--dataset", two_classes(tmp_path, label=1)))
    assert "(1/1, " in out
    # The other class has none.
    assert "no photo " in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["per_class"][0]["accuracy"] is None
    assert metrics["confused_pairs"] == []
    assert not (tmp_path / "gradcam_worst.png").exists()
    assert "no photo is misclassified" in out
    # One cell, of the sixteen asked for.
    assert width(tmp_path / "gradcam_samples.png") == 440


def test_one_test_photo_all_wrong(run_eval, untrained, tmp_path):
    flags = ["--checkpoint", untrained, "--output-dir", tmp_path]
    out = success(run_eval(*flags, "--dataset", two_classes(tmp_path, label=0)))
    assert "(0/1, " in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (pair,) = metrics["confused_pairs"]
    assert (pair["true"], pair["predicted"]) == ("$x_{$", "b$")
    assert width(tmp_path / "gradcam_worst.png") == 440


def test_no_gradcam_and_another_resolution(run_eval, untrained, tmp_path):
    flags = ["--checkpoint", untrained, "--dataset", two_classes(tmp_path, label=0)]
    flags += ["--output-dir", tmp_path / "out", "--num-gradcam", 0, "--resolution", 40]
    (tmp_path / "out").mkdir()
    for name in ("gradcam_samples.png", "gradcam_worst.png"):
        (tmp_path / "out" / name).write_bytes(b"of an older run")
    assert "33 px); evaluated at 40 px" in success(run_eval(*flags))
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["confusion_matrix.png", "metrics.json", "predictions.csv"]


def test_a_folder_that_is_not_named_in_utf8_is_written_to(run_eval, untrained, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/cit\xe9")
    flags = ["--checkpoint", untrained, "--dataset", two_classes(tmp_path, label=0)]
    success(run_eval(*flags, "--num-gradcam", 0, "--output-dir", folder))
    with open(f"{folder}/metrics.json", encoding="utf-8") as file:
        assert json.load(file)["settings"]["output_dir"] == folder


def test_at_32_px_there_is_no_gradcam_and_a_word(run_eval, untrained, tmp_path):
    flags = ["--checkpoint", untrained, "--dataset", two_classes(tmp_path, label=0)]
    flags += ["--output-dir", tmp_path / "out", "--resolution", 32]
    assert "no GradCAM: at 32 px" in success(run_eval(*flags))
    assert not list((tmp_path / "out").glob("gradcam*"))
    (tmp_path / "car.jpg").write_bytes(jpeg(0))
    assert "no GradCAM: at 32 px" in success(run_eval(*flags, "--images", tmp_path / "car.jpg"))
    assert not list((tmp_path / "out").glob("gradcam*"))


def test_classes_in_another_order_are_those_of_the_checkpoint(report, trained, run_eval, tmp_path):
    test = train.load_cars(str(trained.cars), ("test",))["test"]
    names = test.features["label"].names
    turned_around = [(item["image"]["bytes"], len(names) - 1 - item["label"]) for item in test]
    folder = write_dataset(tmp_path / "cars", turned_around, turned_around, names[::-1])
    flags = ["--checkpoint", trained.run / "best_model.pth", "--dataset", folder]
    success(run_eval(*flags, "--num-gradcam", 0, "--output-dir", tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"] == report[2]["test"]
    assert metrics["per_class"] == report[2]["per_class"]
    assert metrics["confused_pairs"] == report[2]["confused_pairs"]


# ---------------------------------------------------------------- classes with makes and years

MAKES = [
    "AM General Hummer SUV 2000",
    "Audi S4 Sedan 2007",
    "Audi S4 Sedan 2012",
    "Audi TT RS 2012",
]


@pytest.fixture
def years(run_eval, tmp_path):
    """Evaluate photos of MAKES, all taken for the second: the output, and the folder written to."""
    for name, count in zip(MAKES, (1, 4, 2, 3), strict=True):
        for number in range(count):
            path = tmp_path / "cars/test" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))
    checkpoint = write_untrained(tmp_path / "best_model.pth", MAKES)
    flags = ["--checkpoint", checkpoint, "--dataset", tmp_path / "cars", "--output-dir", tmp_path]
    return success(run_eval(*flags, "--tta", "--num-gradcam", 1)), tmp_path


def test_errors_are_told_apart_by_year_and_make(years):
    out, folder = years
    expected = {"year_only": 2, "same_make": 3, "other_make": 1}
    expected.update(model_accuracy=0.6, make_accuracy=0.9)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["errors"] == expected
    assert metrics["tta"]["errors"] == expected
    lines = out.splitlines()
    for views in ("", "of the six views "):
        start = lines.index(f"how the errors {views}differ")
        assert re.findall(r"\d+", lines[start + 1]) == ["2", "3", "1"]
        assert re.findall(r"[\d.]+%", lines[start + 2]) == ["60.00%", "90.00%"]
    assert out.index("most confused pairs") < out.index("how the errors")
    assert out.index("how the errors of the six views") < out.index("test accuracy")


def test_predictions_name_the_files(years):
    lines = read_predictions(years[1])
    assert [line["file"] for line in lines] == [
        f"{number}.jpg" for number in (0, 0, 1, 2, 3, 0, 1, 0, 1, 2)
    ]
    assert [line["true"] for line in lines[:6]] == [MAKES[0], *[MAKES[1]] * 4, MAKES[2]]
    assert {line["predicted"] for line in lines} == {MAKES[1]}


def test_the_confusion_matrix_has_a_line_where_the_make_changes():
    figure = evaluation.plot_confusion(confusion=np.eye(4, dtype=int), classes=MAKES)
    plain = evaluation.plot_confusion(confusion=np.eye(4, dtype=int), classes=["a", "b", "c", "d"])
    added = figure.axes[0].collections[len(plain.axes[0].collections) :]
    across, down = [lines.get_segments() for lines in added]
    assert [segment[:, 1].tolist() for segment in across] == [[0.5, 0.5]]
    assert [segment[:, 0].tolist() for segment in down] == [[0.5, 0.5]]


# ---------------------------------------------------------------- large figures, rare signs


def test_717_classes_are_not_too_many_for_a_figure():
    names = [f"Chevrolet Silverado 1500 Classic Extended Cab {i}" for i in range(717)]
    figure = evaluation.plot_confusion(confusion=np.eye(717, dtype=int), classes=names)
    assert max(figure.get_size_inches()) * 100 < 2**16  # pixels, the limit of matplotlib 3.9


def test_matplotlib_draws_a_figure_as_high_as_of_1000_photos():
    # As high as plot_grad_cam makes it for the largest --num-gradcam.
    figure = Figure(figsize=(0.5, 2.75 * math.ceil(1000 / 3)))
    figure.savefig(io.BytesIO(), format="png", dpi=100)


CHINESE = ["大众高尔夫", "比亚迪汉"]


@pytest.fixture
def chinese(run_eval, untrained, tmp_path, recwarn):
    """Evaluate classes with Chinese names: the output, and what matplotlib says of their signs."""

    def run() -> tuple[str, list[str]]:
        checkpoint = {**load(untrained), "classes": CHINESE}
        torch.save(checkpoint, tmp_path / "chinese.pth")
        folder = write_dataset(tmp_path / "cars", rows(2), rows(2), CHINESE)
        flags = ["--checkpoint", tmp_path / "chinese.pth", "--dataset", folder]
        out = success(run_eval(*flags, "--output-dir", tmp_path))
        messages = [str(warning.message) for warning in recwarn]
        return out, [message for message in messages if "Glyph" in message]

    with matplotlib.rc_context():
        yield run


@pytest.fixture
def own_fonts(monkeypatch) -> list:
    """Only the fonts that come with matplotlib are installed, which have no Chinese signs."""
    fonts = [font for font in fontManager.ttflist if matplotlib.get_data_path() in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", fonts)
    return fonts


def test_signs_that_no_font_has_are_said_in_one_line(chinese, own_fonts):
    out, glyphs = chinese()
    assert out.count("no font of this system has") == 1
    assert glyphs == []


def write_font(path, signs: str):
    """A font of one square for all `signs`."""
    pen = TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (0, 800), (800, 800), (800, 0)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(sign): "square" for sign in signs})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_a_font_of_the_system_that_has_the_signs_is_used(chinese, own_fonts, tmp_path):
    write_font(tmp_path / "squares.ttf", "".join(CHINESE))
    own_fonts.append(FontEntry(fname=str(tmp_path / "squares.ttf"), name="Squares"))
    out, glyphs = chinese()
    assert "no font" not in out
    assert "Squares" in matplotlib.rcParams["font.family"]
    assert glyphs == []


# ---------------------------------------------------------------- somebody's own photos


def test_own_photos_are_named_and_unreadable_ones_do_not_stop_the_others(
    run_eval, untrained, tmp_path
):
    car, text, gone, fifo, second = (
        tmp_path / name for name in ("car.jpg", "text.jpg", "gone.jpg", "fifo.jpg", "second.png")
    )
    car.write_bytes(jpeg(0))
    text.write_text("no photo")
    os.mkfifo(fifo)
    second.write_bytes(encode(Image.new("LA", (50, 40)), format="PNG"))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/ph\xf8to $5.jpg")
    with open(odd, "wb") as file:
        file.write(jpeg(0))
    images = [car, text, gone, fifo, second, odd]
    flags = ["--checkpoint", untrained, "--output-dir", tmp_path, "--images"]
    status, out, err = run_eval(*flags, *images)
    assert "3 of 6" in refusal((status, out, err))
    for unreadable in ("text.jpg (", "gone.jpg (no file)", "fifo.jpg (no file)"):
        assert unreadable in err
    assert "car.jpg (" not in err
    assert out.index("car.jpg") < out.index("second.png") < out.index("gradcam_images.png")
    lines = out.splitlines()
    assert lines[lines.index(str(car)) + 1].endswith("b$")
    assert width(tmp_path / "gradcam_images.png") == 1320
    success(run_eval(*flags, car))


@pytest.fixture
def name_images(run_eval, untrained, tmp_path):
    """Run eval.py with --images; its figure, if there is one, is in `tmp_path`."""

    def run(*images) -> tuple[int, str, str]:
        flags = ["--checkpoint", untrained, "--output-dir", tmp_path]
        return run_eval(*flags, "--images", *images)

    return run


@pytest.fixture
def holidays(tmp_path):
    """A folder of two photos, another file, and what a Mac and a notebook add."""
    folder = tmp_path / "holidays"
    for name in ("1.jpg", "spain/2.jpg", ".ipynb_checkpoints/1.jpg", "._1.jpg", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(0))
    return folder


def test_a_folder_among_the_images_is_its_photos(name_images, holidays):
    out = success(name_images(holidays))
    found = [line for line in out.splitlines() if line.startswith(str(holidays))]
    assert found == [str(holidays / "1.jpg"), str(holidays / "spain/2.jpg")]


def test_a_folder_without_photos_is_named(name_images, tmp_path):
    (tmp_path / "empty").mkdir()
    err = refusal(name_images(tmp_path / "empty"))
    assert f"{tmp_path / 'empty'}: there is no photo" in err


def test_a_pattern_that_the_shell_left_to_the_program_is_its_matches(name_images, holidays):
    out = success(name_images(holidays / "*.jpg"))
    assert f"\n{holidays / '1.jpg'}\n" in out
    out = success(name_images(holidays.parent / "holi*"))
    assert f"\n{holidays / 'spain/2.jpg'}\n" in out


def test_urls_are_not_downloaded(name_images):
    err = refusal(name_images("https://example.org/car.jpg"))
    assert "https://example.org/car.jpg (URLs are not downloaded)" in err


def test_the_figure_of_older_photos_does_not_stay(name_images, tmp_path):
    (tmp_path / "gradcam_images.png").write_bytes(b"of an older run")
    refusal(name_images(tmp_path / "gone.jpg"))
    assert not (tmp_path / "gradcam_images.png").exists()


@pytest.mark.parametrize(
    "flags", [("--batch-size", 0), ("--num-gradcam", -1), ("--resolution", 3), ("--images",)]
)
def test_usage_errors_are_one_line_and_status_2(run_eval, flags):
    status, out, err = run_eval(*flags)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert flags[0] in err
