"""train.py: the recipe, the data, one step, what a run writes, resuming, bad input, and that it learns."""

import csv
import functools
import os
import shutil
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, encode, write_dataset
from draw_cars import draw_cars
from PIL import Image
from stand_in_hub import stand_in_hub
from torchvision import transforms
from torchvision.models.resnet import resnet18, resnet50

import train

CPU = torch.device("cpu")
FP32 = torch.autocast("cpu", torch.bfloat16, enabled=False)


def history(folder) -> list[dict]:
    with open(folder / "history.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def jpeg(seed: int, width: int = 60, height: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return encode(Image.fromarray(pixels).resize((width, height)))


# ---------------------------------------------------------------- the recipe


def test_defaults_are_the_recipe():
    args = train.parse_args([], {})
    assert (args.dataset, args.weights, args.resolution) == (
        "tanganke/stanford_cars",
        "IMAGENET1K_V2",
        224,
    )
    assert (args.epochs, args.batch_size, args.momentum, args.weight_decay, args.step_size) == (
        90,
        128,
        0.9,
        1e-4,
        30,
    )
    assert args.amp and args.compile == torch.cuda.is_available() and args.lr == 0.1


@pytest.mark.parametrize("batch_size, lr", [(8, 0.00625), (16, 0.0125)])
def test_lr_scales_with_the_batch_where_it_is_left_out(cars, tmp_path, capfd, batch_size, lr):
    flags = f"--dataset {cars} --weights none --resolution 33 --workers 0 --epochs 1 --batch-size {batch_size}"
    assert (
        train.run_command(lambda: train.main([*flags.split(), "--output-dir", str(tmp_path)])) == 0
    )
    assert history(tmp_path)[0]["lr"] == lr
    assert f" lr={lr} " in capfd.readouterr().out


def test_one_learning_rate_for_all_parameters_and_nothing_frozen(run_train, tmp_path):
    torch.manual_seed(0)
    start = train.build_model("none", 8).state_dict()
    assert run_train("--output-dir", tmp_path, "--epochs", 1)[0] == 0
    last = load(tmp_path / "last_checkpoint.pth")
    (group,) = last["optimizer"]["param_groups"]
    assert len(group["params"]) == len(list(train.resnet50().parameters()))
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    for name, value in last["model"].items():
        assert not torch.equal(value, start[name]), f"{name} did not change"


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("size", [(60, 40), (640, 427), (333, 500)])
@pytest.mark.parametrize("resolution", [64, 224])
def test_crops_equal_the_pil_path_within_one(size, resolution):
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )
    tensor = train.v2.functional.pil_to_tensor(photo)
    pil_train = transforms.Compose(
        [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip()]
    )
    side = int(resolution * 256 / 224)
    pil_test = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(resolution)])
    pairs = [(train.random_crop, pil_train)] * 3 + [(train.center_crop, pil_test)]
    for seed, (ours, theirs) in enumerate(pairs):
        torch.manual_seed(seed)
        ours = ours(tensor, resolution)
        torch.manual_seed(seed)
        theirs = transforms.functional.pil_to_tensor(theirs(photo))
        assert ours.dtype == torch.uint8 and ours.shape == (resolution, resolution, 3)
        assert (ours.movedim(-1, 0).int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (64, 73), (73, 73), (37, 640), (500, 11)])
@pytest.mark.parametrize("resolution", [64, 301])
def test_center_crops_are_torchvisions(size, resolution):
    photo = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).movedim(-1, 0)
    for side in (256, 224, 288):
        steps = [
            train.v2.Resize(int(resolution * side / 224), antialias=True),
            train.v2.CenterCrop(resolution),
        ]
        expected = train.v2.Compose(steps)(photo).movedim(0, -1)
        assert torch.equal(train.center_crop(photo, resolution, side), expected)


@pytest.mark.parametrize("resolution", [64, 300])
def test_random_crops_are_torchvisions(resolution):
    photo = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8).movedim(-1, 0)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = train.random_crop(photo, resolution)
        torch.manual_seed(seed)
        steps = [
            train.v2.RandomResizedCrop(resolution, antialias=True),
            train.v2.RandomHorizontalFlip(),
        ]
        assert torch.equal(ours, train.v2.Compose(steps)(photo).movedim(0, -1))


def test_normalised_crops_equal_to_tensor_and_normalize():
    crop = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    steps = [
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    ours = train.normalize(torch.from_numpy(np.array(crop))[None], CPU)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours[0], transforms.Compose(steps)(crop), rtol=1e-5, atol=1e-5)


def test_draws_depend_on_seed_epoch_and_photo_alone(cars):
    split = train.load_cars(str(cars))["train"]
    photos = train.CarPhotos(split, train.random_crop, 32, seed=1)
    torch.manual_seed(123)
    first = photos[3, 5][0]
    state = torch.get_rng_state()
    photos[1, 2]
    assert torch.equal(photos[3, 5][0], first)
    assert torch.equal(torch.get_rng_state(), state), (
        "loading a photo changed the random state of the process"
    )
    assert not torch.equal(photos[4, 5][0], first)
    draws = train.CarPhotos(split, lambda photo, resolution: torch.rand(9), 32)
    assert not torch.equal(draws[3, 5][0], draws[3, 6][0])
    assert not torch.equal(train.CarPhotos(split, train.random_crop, 32, seed=2)[3, 5][0], first)


def test_each_epoch_has_every_photo_once_in_its_own_order():
    batches = list(train.shuffled_batches(10, 4, range(1, 3), seed=0))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    orders = [
        [row for batch in batches[:3] for _, row in batch],
        [row for batch in batches[3:] for _, row in batch],
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]


def test_an_image_folder_gives_the_same_photos_and_classes(cars, tmp_path):
    for split, photos in train.load_cars(str(cars)).items():
        names = photos.features["label"].names
        for row, item in enumerate(photos):
            folder = tmp_path / split / names[item["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row:03}.jpg").write_bytes(item["image"]["bytes"])
    found = train.load_cars(str(tmp_path))
    assert found["train"].features["label"].names == names
    assert np.bincount(found["train"]["label"]).tolist() == [2] * 8 and len(found["test"]) == 8
    crop, label = train.CarPhotos(found["test"], train.center_crop, 32)[0, 3]
    assert crop.shape == (32, 32, 3) and names[label] in found["test"][3]["image"]["path"]


def test_a_local_folder_that_changes_is_read_anew(tmp_path):
    for width in (30, 60):
        shutil.rmtree(tmp_path / "cars", ignore_errors=True)
        rows = [(jpeg(0, width), 0), (jpeg(1, width), 1)]
        folder = write_dataset(tmp_path / "cars", rows, rows, ["a", "b"])
        item = train.load_cars(str(folder))["test"][0]
        assert train.decode_photo(item["image"]["bytes"]).shape[2] == width


# ---------------------------------------------------------------- one step, one evaluation


def test_a_step_equals_a_plain_reference_step():
    torch.manual_seed(0)
    model, reference = resnet50(num_classes=8), resnet50(num_classes=8)
    for block in (
        model.modules()
    ):  # weaker branches, as after training: a fresh network magnifies rounding a thousandfold
        if hasattr(block, "bn3"):
            block.bn3.weight.data.fill_(0.2)
    reference.load_state_dict(model.state_dict())
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    model = model.to(memory_format=torch.channels_last)
    images, targets = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8), torch.arange(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = [(images, targets)]
    trained = train.train_one_epoch(model, batches, [6], CPU, FP32, optimizer, scaler)

    plain = torch.optim.SGD(reference.parameters(), 0.1, 0.9, weight_decay=1e-4)
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    logits = reference(normalize(images.movedim(-1, 1).float() / 255))
    expected = torch.nn.functional.cross_entropy(logits, targets)
    expected.backward()
    plain.step()
    assert trained["train_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert trained["train_accuracy"] == pytest.approx(
        (logits.argmax(1) == targets).float().mean().item()
    )
    assert 0 <= trained["input_wait"] <= 1 and trained["photos_per_second"] > 0
    ours, theirs = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, reference)
    )
    assert (ours - theirs).norm() < 1e-2 * (
        theirs - start
    ).norm()  # rounding in another memory layout: 0.5 % seen


def test_evaluation_counts_each_photo_once(monkeypatch):
    monkeypatch.setattr(train, "normalize", lambda images, device: images)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    batches = [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([0]))]
    tested = train.evaluate(lambda images: images, batches, CPU, FP32)
    assert tested["test_accuracy"] == pytest.approx(2 / 3)
    assert tested["test_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.zeros(3, dtype=int)).item()
    )


def test_test_photos_are_decoded_once_while_memory_allows(run_train, tmp_path, monkeypatch):
    decode, tested = train.decode_photo, []
    for limit, decoded_in_two_epochs in ((2e9, 2 * 16 + 8), (0, 2 * 16 + 2 * 8)):
        decoded = []
        monkeypatch.setattr(train, "CACHED_CROPS_LIMIT", limit)
        monkeypatch.setattr(
            train, "decode_photo", lambda data, decoded=decoded: decoded.append(1) or decode(data)
        )
        status, out, err = run_train(
            "--epochs", 2, "--output-dir", tmp_path / str(limit), "--batch-size", 3
        )
        assert status == 0, err
        assert len(decoded) == decoded_in_two_epochs
        tested.append(
            [(row["test_loss"], row["test_accuracy"]) for row in history(tmp_path / str(limit))]
        )
    assert tested[0] == tested[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_keeps_float32_weights_and_resumes(
    run_train, tmp_path, monkeypatch, dtype
):
    monkeypatch.setattr(
        train, "pick_precision", lambda *args: dtype
    )  # slow where the CPU has to emulate it, but right
    for epochs, resume in ((1, []), (2, ["--resume"])):
        status, out, err = run_train("--output-dir", tmp_path, "--epochs", epochs, *resume)
        assert status == 0 and str(dtype)[6:] in out, err
    last = load(tmp_path / "last_checkpoint.pth")
    assert {value.dtype for value in last["model"].values()} == {torch.float32, torch.int64}
    assert bool(last["scaler"]) is (dtype == torch.float16) and len(last["history"]) == 2


def test_without_amp_all_is_float32():
    assert (
        train.pick_precision(CPU, False)
        == train.pick_precision(torch.device("cuda"), False)
        == torch.float32
    )


# ---------------------------------------------------------------- what a run writes


@pytest.fixture(scope="session")
def finished(cars, tmp_path_factory):
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--dataset", str(cars), *SMALL, "--epochs", "2", "--step-size", "1"]
    argv += ["--output-dir", str(folder)]
    assert train.run_command(lambda: train.main(argv)) == 0
    return folder


def test_best_model_is_a_plain_state_dict_with_what_eval_needs(finished):
    best = load(finished / "best_model.pth")
    assert set(best) == {"model", "classes", "resolution", "epoch", "test_accuracy", "settings"}
    train.resnet50(num_classes=8).load_state_dict(best["model"], strict=True)
    assert all(value.is_contiguous() for value in best["model"].values())
    assert {value.dtype for value in best["model"].values()} == {torch.float32, torch.int64}
    assert (
        len(best["classes"]) == 8
        and best["resolution"] == 33
        and best["settings"]["batch_size"] == 8
    )
    rows = history(finished)
    assert best["test_accuracy"] == max(row["test_accuracy"] for row in rows)
    assert rows[best["epoch"] - 1]["test_accuracy"] == best["test_accuracy"]


def test_history_and_curves(finished):
    rows = history(finished)
    assert [row["epoch"] for row in rows] == [1, 2] and [
        row["lr"] for row in rows
    ] == pytest.approx([0.01, 0.001])
    assert all(0 <= row[f"{split}_accuracy"] <= 1 for row in rows for split in ("train", "test"))
    with Image.open(finished / "training_curves.png") as picture:
        assert picture.size == (1100, 450)
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        [".lock", "best_model.pth", "history.csv", "last_checkpoint.pth", "training_curves.png"]
    )


def test_the_summary_names_best_and_last(run_train, tmp_path):
    status, out, _ = run_train("--output-dir", tmp_path, "--epochs", 2)
    rows = history(tmp_path)
    best = max(rows, key=lambda row: row["test_accuracy"])
    assert f"best test accuracy {best['test_accuracy']:.2%} in epoch {best['epoch']:.0f}" in out
    assert f"last epoch {rows[-1]['test_accuracy']:.2%}" in out
    assert "16 train and 8 test photos, 8 classes" in out and "\r" not in out


def test_a_finished_run_is_not_written_over(run_train, finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    status, _, err = run_train("--output-dir", finished)
    assert status == 1 and err.count("\n") == 1
    assert all(
        word in err for word in ("last_checkpoint.pth", "--resume", "--overwrite", "--output-dir")
    )
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_overwrite_replaces_the_run(run_train, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert run_train("--output-dir", folder, "--epochs", 1, "--overwrite")[0] == 0
    assert len(history(folder)) == 1 and load(folder / "best_model.pth")["epoch"] == 1


def test_a_compiled_run_saves_a_plain_state_dict(run_train, tmp_path, monkeypatch):
    # The eager backend runs torch.compile's capture and wrapping without two minutes of C++ compilation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    status, out, err = run_train(
        "--output-dir", tmp_path, "--epochs", 1, "--compile", "--batch-size", 6
    )
    assert status == 0, err
    assert "compile=True" in out
    train.resnet50(num_classes=8).load_state_dict(
        load(tmp_path / "best_model.pth")["model"], strict=True
    )


# ---------------------------------------------------------------- resuming


def assert_same_run(one, other):
    one, other = load(one / "last_checkpoint.pth"), load(other / "last_checkpoint.pth")
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for number, state in one["optimizer"]["state"].items():
        assert torch.equal(
            state["momentum_buffer"], other["optimizer"]["state"][number]["momentum_buffer"]
        )
    times = dict(seconds=0, photos_per_second=0, input_wait=0)
    timeless = [[{**row, **times} for row in run["history"]] for run in (one, other)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(run_train, tmp_path, workers):
    flags = ["--workers", workers, "--step-size", 2, "--batch-size", 6]
    assert run_train("--output-dir", tmp_path / "unbroken", "--epochs", 3, *flags)[0] == 0
    assert run_train("--output-dir", tmp_path / "resumed", "--epochs", 1, *flags)[0] == 0
    status, out, err = run_train(
        "--output-dir", tmp_path / "resumed", "--epochs", 3, *flags, "--resume"
    )
    assert status == 0 and "resumed after epoch 1" in out, err
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_resume_takes_the_settings_of_the_run(finished, tmp_path, capfd):
    folder = shutil.copytree(finished, tmp_path / "run")
    flags = ["--resume", "--epochs", "3", "--workers", "0", "--output-dir", str(folder)]
    assert train.run_command(lambda: train.main(flags)) == 0
    assert "resolution=33 batch_size=8 epochs=3" in capfd.readouterr().out
    assert len(history(folder)) == 3


@pytest.mark.parametrize(
    "flag, value", [("--lr", "0.5"), ("--resolution", "64"), ("--seed", "7"), ("--epochs", "1")]
)
def test_resume_refuses_other_settings_by_name(run_train, finished, flag, value):
    before = (finished / "last_checkpoint.pth").read_bytes()
    status, _, err = run_train(
        "--resume", "--step-size", 1, "--output-dir", finished, "--epochs", 2, flag, value
    )
    assert status == 1 and err.count("\n") == 1 and f"{flag} {value}" in err
    assert (finished / "last_checkpoint.pth").read_bytes() == before


def test_resume_refuses_a_data_set_that_changed(run_train, finished, tmp_path):
    draw_cars(tmp_path / "cars", train_per_class=3, test_per_class=1, width=80)
    folder = shutil.copytree(finished, tmp_path / "run")
    last = load(folder / "last_checkpoint.pth")
    last["settings"]["dataset"] = str(tmp_path / "cars")
    torch.save(last, folder / "last_checkpoint.pth")
    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", folder]
    status, _, err = run_train(*flags, "--dataset", tmp_path / "cars")
    assert status == 1 and "has changed" in err and str(tmp_path / "cars") in err


def test_resume_mends_what_a_kill_left_behind(run_train, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.copy(folder / "last_checkpoint.pth", folder / ".partial-last_checkpoint.pth")
    last = load(folder / "last_checkpoint.pth")
    last["history"][-1]["test_accuracy"] = 1.0
    torch.save(last, folder / "last_checkpoint.pth")
    for name in ("best_model.pth", "history.csv", "training_curves.png"):
        (folder / name).unlink()
    assert run_train("--resume", "--step-size", 1, "--epochs", 2, "--output-dir", folder)[0] == 0
    assert load(folder / "best_model.pth")["epoch"] == 2 and len(history(folder)) == 2


def test_ctrl_c_ends_at_once_and_how_to_go_on_was_said(cars, tmp_path):
    command = [sys.executable, str(ROOT / "tests/small.py"), str(ROOT / "train.py")]
    command += ["--dataset", str(cars), *SMALL, "--workers", "2", "--epochs", "500"]
    process = subprocess.Popen(
        [*command, "--output-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored, where the tests run behind a "&"
    )
    lines = [process.stdout.readline()]
    while not lines[-1].startswith("epoch 2/500"):
        assert process.poll() is None
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    assert "Ctrl-C is safe: --resume goes on after the last finished epoch\n" in lines
    assert load(tmp_path / "last_checkpoint.pth")["epoch"] >= 2


# ---------------------------------------------------------------- the Hub and pretrained weights


def test_the_default_data_set_and_weights(cars, tmp_path, run_script):
    shutil.copytree(cars, tmp_path / "hub")
    for name in ("contrast", "motion_blur"):
        shutil.copy(
            tmp_path / "hub/data/test-00000-of-00001.parquet",
            tmp_path / f"hub/data/{name}-00000-of-00001.parquet",
        )
    pretrained = resnet50().state_dict()
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    weights = tmp_path / "torch/hub/checkpoints/resnet50-11ad3fa6.pth"
    torch.save(pretrained, weights)
    home = {
        "HF_HOME": str(tmp_path / "home"),
        "TORCH_HOME": str(tmp_path / "torch"),
        "HF_HUB_OFFLINE": "0",
    }
    flags = ["--resolution", 33, "--batch-size", 8, "--epochs", 1, "--lr", 1e-9, "--workers", 0]
    with stand_in_hub(tmp_path / "hub", train.DEFAULT_DATASET, train.DATASET_REVISION) as (
        endpoint,
        fetched,
    ):
        done = run_script(
            "train.py", *flags, "--output-dir", tmp_path / "one", HF_ENDPOINT=endpoint, **home
        )
        assert done.returncode == 0, done.stderr
        files = [
            "README.md",
            "data/test-00000-of-00001.parquet",
            "data/train-00000-of-00001.parquet",
        ]
        assert sorted(fetched) == files
    saved = load(tmp_path / "one/best_model.pth")["model"]
    assert saved["fc.weight"].shape == (8, 2048)
    assert torch.allclose(saved["conv1.weight"], pretrained["conv1.weight"], atol=1e-5)
    # Without a network, what was downloaded is enough; without that, the last line says so.
    gone = {**home, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run_script("train.py", *flags, "--output-dir", tmp_path / "two", **gone).returncode == 0
    gone["HF_HOME"] = str(tmp_path / "elsewhere")
    gone["HF_HUB_OFFLINE"] = "1"
    done = run_script("train.py", *flags, "--output-dir", tmp_path / "three", **gone)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert train.DEFAULT_DATASET in done.stderr
    # A download that was cut off.
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = run_script(
        "train.py", *flags, "--output-dir", tmp_path / "four", "--dataset", cars, **home
    )
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and str(weights.parent) in done.stderr
    )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags",
    [
        ("--resolution", 0),
        ("--resolution", 31),
        ("--batch-size", 0),
        ("--batch-size", "many"),
        ("--epochs", -1),
        ("--epochs", 1.5),
        ("--workers", -1),
        ("--workers", 100000),
        ("--lr", "nan"),
        ("--lr", "-0.1"),
        ("--seed", -1),
        ("--no-such-flag",),
        ("--resume", "--overwrite"),
    ],
    ids=lambda flags: "=".join(map(str, flags)),
)
def test_usage_errors_are_one_line_and_status_2(run_train, tmp_path, flags):
    status, out, err = run_train("--output-dir", tmp_path, *flags)
    assert status == 2 and out == "" and err.count("\n") == 1 and str(flags[0]) in err
    assert not list(tmp_path.iterdir())


def good_rows(count: int = 8) -> list:
    return [(jpeg(seed), seed % 2) for seed in range(count)]


def no_such_folder(folder):
    return ["--dataset", folder / "nowhere"], "nowhere"


def no_test_split(folder):
    write_dataset(folder, good_rows(), good_rows(), ["a", "b"])
    (folder / "data/test-0.parquet").unlink()
    return ["--dataset", folder], "test split"


def no_label_column(folder):
    write_dataset(folder, good_rows(), good_rows(), ["a", "b"])
    for split in ("train", "test"):
        path = folder / "data" / f"{split}-0.parquet"
        datasets.Dataset.from_parquet(str(path), cache_dir=str(folder)).remove_columns(
            "label"
        ).to_parquet(path)
    return ["--dataset", folder], "'label'"


def no_image_column(folder):
    write_dataset(folder, good_rows(), good_rows(), ["a", "b"])
    for split in ("train", "test"):
        path = folder / "data" / f"{split}-0.parquet"
        data = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder)).rename_column(
            "image", "picture"
        )
        data.to_parquet(path)
    return ["--dataset", folder], "'image'"


def empty_test_split(folder):
    write_dataset(folder, good_rows(), [], ["a", "b"])
    return ["--dataset", folder], "test split"


def other_class_names(folder):
    write_dataset(folder, good_rows(), good_rows(), ["a", "b"])
    write_dataset(folder / "other", good_rows(), good_rows(), ["a", "c"])
    shutil.move(folder / "other/data/test-0.parquet", folder / "data/test-0.parquet")
    shutil.rmtree(folder / "other")
    return ["--dataset", folder], "classes"


def label_out_of_range(folder):
    write_dataset(folder, [*good_rows(7), (jpeg(0), -1)], good_rows(), ["a", "b"])
    return ["--dataset", folder], "row 7"


def damaged_train_photo(folder):
    rows = good_rows()
    rows[3] = (rows[3][0][:200], 1)
    return [
        "--dataset",
        write_dataset(folder, rows, good_rows(), ["a", "b"]),
    ], "train photo in row 3"


def text_for_a_test_photo(folder):
    rows = good_rows()
    rows[5] = (b"this is no photo", 1)
    flags = ["--dataset", write_dataset(folder, good_rows(), rows, ["a", "b"]), "--workers", 2]
    return flags, "test photo in row 5"


def missing_weights(folder):
    return ["--weights", folder / "none.pth"], "none.pth"


def damaged_weights(folder):
    folder.mkdir()
    (folder / "damaged.pth").write_bytes(b"PK\x03\x04 cut off")
    return ["--weights", folder / "damaged.pth"], "damaged.pth"


def another_architecture(folder):
    folder.mkdir()
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    return ["--weights", folder / "resnet18.pth"], "another architecture"


def batch_larger_than_the_split(folder):
    return ["--batch-size", 17], "--batch-size 17"


def one_photo_left_at_32_px(folder):
    return ["--batch-size", 5, "--resolution", 32], "--resolution 32"


def output_folder_is_a_file(folder):
    folder.write_text("")
    return ["--output-dir", folder], "--output-dir"


def loss_that_is_not_finite(folder):
    return ["--lr", 1000, "--epochs", 5], "epoch"


@pytest.mark.parametrize(
    "case",
    [
        no_such_folder,
        no_test_split,
        no_label_column,
        no_image_column,
        empty_test_split,
        other_class_names,
        label_out_of_range,
        damaged_train_photo,
        text_for_a_test_photo,
        missing_weights,
        damaged_weights,
        another_architecture,
        batch_larger_than_the_split,
        one_photo_left_at_32_px,
        output_folder_is_a_file,
        loss_that_is_not_finite,
    ],
    ids=lambda case: case.__name__,
)
def test_bad_input_is_one_line_and_status_1(run_train, tmp_path, case):
    flags, words = case(tmp_path / "input")
    status, _, err = run_train("--output-dir", tmp_path / "run", *flags)
    assert status == 1 and err.count("\n") == 1 and words in err, err
    assert "Traceback" not in err


def test_a_full_disk_leaves_the_old_files(run_train, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(value, path):
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", folder]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        status, _, err = run_train(*flags)
    assert status == 1 and err.count("\n") == 1 and "No space left" in err
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (
        after.keys() == before.keys()
        and after["last_checkpoint.pth"] == before["last_checkpoint.pth"]
    )
    assert run_train(*flags)[0] == 0 and len(history(folder)) == 3


# ---------------------------------------------------------------- it learns


@pytest.mark.slow
def test_resnet50_learns_the_drawn_cars_from_scratch(real_network, run_train, tmp_path):
    draw_cars(tmp_path / "cars")
    flags = "--resolution 64 --batch-size 16 --lr 0.004 --epochs 9 --step-size 5 --workers 1 --amp".split()
    status, _, err = run_train(
        "--dataset", tmp_path / "cars", *flags, "--output-dir", tmp_path / "run"
    )
    rows = history(tmp_path / "run")
    assert status == 0 and rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"], err
    assert load(tmp_path / "run/best_model.pth")["test_accuracy"] >= 0.35, "chance is 0.125"


def test_the_loss_falls_within_four_epochs(trained):
    rows = history(trained[1])
    assert rows[-1]["train_loss"] < 0.95 * rows[0]["train_loss"]
