"""The recipe, its steps and evaluations, precision, compilation, flags, and that it learns."""

import functools
import shutil

import numpy as np
import pytest
import torch
from draw_cars import draw_cars
from files import encode, jpeg, load, read_history, rows, write_dataset
from PIL import Image
from scripts import refusal, success
from small import small_resnet
from torch.nn.functional import cross_entropy
from torchvision import transforms

import train

# ---------------------------------------------------------------- the recipe

DEFAULTS = {
    "dataset": "tanganke/stanford_cars",
    "weights": "IMAGENET1K_V2",
    "resolution": 224,
    "batch_size": 128,
    "epochs": 90,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "step_size": 30,
    "amp": True,
    "compile": None,
    "amp_dtype": None,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_recipe(name):
    assert getattr(train.parse_args([]), name) == DEFAULTS[name]


@pytest.mark.parametrize("batch_size, lr", [(8, 0.00625), (16, 0.0125)])
def test_lr_scales_with_the_batch_where_it_is_left_out(cars, tmp_path, capfd, batch_size, lr):
    flags = f"--weights none --resolution 33 --workers 0 --epochs 1 --batch-size {batch_size}"
    train.main(["--dataset", str(cars), *flags.split(), "--output-dir", str(tmp_path)])
    assert read_history(tmp_path)[0]["lr"] == lr
    assert f" lr={lr} " in capfd.readouterr().out


def test_one_learning_rate_for_all_parameters_and_nothing_frozen(run_train, tmp_path):
    torch.manual_seed(0)
    start = train.build_model("none", 8).state_dict()
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    last = load(tmp_path / "last_checkpoint.pth")
    (group,) = last["optimizer"]["param_groups"]
    assert len(group["params"]) == len(list(small_resnet().parameters()))
    assert group["momentum"] == 0.9
    assert group["weight_decay"] == 1e-4
    assert group["nesterov"] is False
    for name, value in last["model"].items():
        assert not torch.equal(value, start[name]), f"{name} did not change"


# ---------------------------------------------------------------- steps and evaluations


def textbook_batch(photos: list[tuple[bytes, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The test crops of (bytes, label) rows at 64 px, normalised by torchvision, and labels."""
    to_tensor = transforms.ToTensor()
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crops = [train.center_crop(train.decode_photo(encoded), 64) for encoded, _ in photos]
    images = torch.stack([normalize(to_tensor(crop.numpy())) for crop in crops])
    return images, torch.tensor([label for _, label in photos])


def flat(parameters) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def test_two_epochs_equal_a_textbook_loop(run_train, tmp_path, monkeypatch):
    train_photos = rows(8, classes=4)
    test_photos = [(jpeg(seed), seed % 4) for seed in range(20, 32)]
    folder = write_dataset(tmp_path / "cars", train_photos, test_photos, ["a", "b", "c", "d"])
    torch.manual_seed(0)
    model = small_resnet(num_classes=4)
    for block in model.modules():
        # Weaker branches, as after training: a fresh network magnifies rounding a thousandfold.
        if hasattr(block, "bn3"):
            block.bn3.weight.data.fill_(0.2)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    start = flat(model.parameters())

    # The same crop in both epochs, so that the loop below needs no random draws.
    monkeypatch.setattr(train, "random_crop", train.center_crop)
    flags = ["--dataset", folder, "--weights", tmp_path / "start.pth", "--resolution", 64]
    flags += ["--epochs", 2, "--lr", 0.1, "--step-size", 1, "--weight-decay", 0.1]
    success(run_train(*flags, "--output-dir", tmp_path / "run"))
    found = read_history(tmp_path / "run")

    images, targets = textbook_batch(train_photos)
    test_images, test_targets = textbook_batch(test_photos)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for epoch, lr in enumerate((0.1, 0.01)):
        optimizer.param_groups[0]["lr"] = lr
        logits = model.train()(images)
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            test_logits = model.eval()(test_images)
        row = found[epoch]
        assert row["lr"] == pytest.approx(lr)
        assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert row["train_accuracy"] == (logits.argmax(1) == targets).float().mean()
        test_loss = cross_entropy(test_logits, test_targets).item()
        assert row["test_loss"] == pytest.approx(test_loss, rel=1e-3)
        test_accuracy = (test_logits.argmax(1) == test_targets).float().mean().item()
        assert row["test_accuracy"] == pytest.approx(test_accuracy)
        assert row["photos_per_second"] > 0
        assert 0 <= row["input_wait"] <= 1
    state = load(tmp_path / "run/last_checkpoint.pth")["model"]
    ours = flat(state[name] for name, _ in model.named_parameters())
    theirs = flat(model.parameters())
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


# ---------------------------------------------------------------- precision and torch.compile


@pytest.mark.parametrize(
    "flag, native, precision",
    [("--amp", True, "bfloat16"), ("--amp", False, "float32"), ("--no-amp", True, "float32")],
)
def test_a_cpu_computes_in_bfloat16_where_it_is_native(
    run_train, tmp_path, monkeypatch, flag, native, precision
):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    out = success(run_train(flag, "--epochs", 1, "--output-dir", tmp_path))
    assert f"torch.{precision}," in out


def test_a_run_goes_on_in_any_precision(run_train, tmp_path, monkeypatch):
    # float16 is slow on a CPU, but right; it alone needs the scaler.
    precisions = [torch.float32, torch.float16, torch.bfloat16]
    for epoch, precision in enumerate(precisions, 1):
        monkeypatch.setattr(train, "pick_precision", lambda *args, now=precision, **names: now)
        out = success(run_train("--output-dir", tmp_path, "--epochs", epoch, "--resume"))
        assert str(precision) in out
        last = load(tmp_path / "last_checkpoint.pth")
        assert len(last["history"]) == epoch
        assert bool(last["scaler"]) is (precision == torch.float16)
        assert {value.dtype for value in last["model"].values()} == {torch.float32, torch.int64}


def test_a_compiled_run_saves_a_plain_state_dict(run_train, tmp_path, monkeypatch):
    # The eager backend captures and wraps without two minutes of C++ compilation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flags = ["--epochs", 1, "--compile", "--batch-size", 6]
    assert "compile=True" in success(run_train(*flags, "--output-dir", tmp_path))
    state = load(tmp_path / "best_model.pth")["model"]
    small_resnet(num_classes=8).load_state_dict(state, strict=True)


def test_a_machine_that_cannot_compile_is_told_of_no_compile(run_train, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise FileNotFoundError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    torch.compiler.reset()
    err = refusal(run_train("--output-dir", tmp_path, "--epochs", 1, "--compile"))
    assert "--no-compile" in err


# ---------------------------------------------------------------- flags

# Of each number: values that are taken, and values that are refused.
NUMBERS = {
    "resolution": ((32, 4096), (-64, 0, 31, 4097)),
    "batch-size": ((2, 65536), (-1, 0, 1, 65537)),
    "epochs": ((1, 100_000), (-1, 0, 100_001)),
    "step-size": ((1, 100_000), (-1, 0, 100_001)),
    "seed": ((0, 2**32), (-1, 2**32 + 1)),
    "workers": ((0, 256), (-1, 257, 10**30)),
    "lr": ((1e-9, 0.1, 1000), (-0.1, 0, 1e-10, 1001)),
    "momentum": ((0, 0.9, 1), (-0.1, 1.1)),
    "weight-decay": ((0, 1e-4, 1), (-1e-4, 1.1)),
}
WHOLE = ("resolution", "batch-size", "epochs", "step-size", "seed", "workers")
NO_NUMBERS = ("", " ", "many", "nan", "inf", "-inf", "1e400", "0x20", "1,5")


@pytest.mark.parametrize("flag", NUMBERS)
def test_a_number_is_taken_or_refused_in_one_line(flag, capsys):
    taken, refused = NUMBERS[flag]
    for value in taken:
        args = train.parse_args([f"--{flag}={value}"])
        assert getattr(args, flag.replace("-", "_")) == value
    fractions = (1.5, "1e2", "64.0") if flag in WHOLE else ()
    for value in (*refused, *NO_NUMBERS, *fractions):
        with pytest.raises(SystemExit) as stop:
            train.parse_args([f"--{flag}={value}"])
        assert stop.value.code == 2, value
        err = capsys.readouterr().err
        assert err.count("\n") == 1, value
        assert f"--{flag}" in err


@pytest.mark.parametrize(
    "flags", [("--resolution", 31), ("--no-such-flag",), ("--resume", "--overwrite")]
)
def test_usage_errors_are_one_line_and_status_2(run_train, tmp_path, flags):
    status, out, err = run_train("--output-dir", tmp_path, *flags)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert flags[0] in err
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run_and_what_it_advises_works(
    run_train, finished, tmp_path
):
    old = shutil.copytree(finished, tmp_path / "old")
    last = load(old / "last_checkpoint.pth")
    # The next epoch's test loss is no number then.
    last["model"]["bn1.running_var"].fill_(-1)
    torch.save(last, old / "last_checkpoint.pth")
    err = refusal(run_train("--output-dir", old, "--epochs", 3, "--step-size", 1, "--resume"))
    assert "the test loss is not finite in epoch 3" in err
    assert "a new --output-dir with --weights OLD/best_model.pth" in err
    assert "--lr and --overwrite" in err

    flags = ["--epochs", 1, "--lr", 0.001, "--output-dir"]
    success(run_train(*flags, tmp_path / "new", "--weights", old / "best_model.pth"))
    success(run_train(*flags, old, "--overwrite"))


def test_a_loss_that_is_not_finite_at_once_leaves_no_run(run_train, tmp_path):
    flags = ["--epochs", 5, "--output-dir", tmp_path]
    assert "the test loss is not finite in epoch 1" in refusal(run_train(*flags, "--lr", 1000))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# ---------------------------------------------------------------- it learns


def test_it_learns_to_tell_red_from_blue(run_train, tmp_path, one_thread):
    # Over seeds, one and two threads, float32 and bfloat16, the last train loss is at most 0.004.
    # With shuffled labels, no steps or an lr of nothing it is above 0.65; a guess has 0.69.
    rng = np.random.default_rng(0)
    photos = []
    for row in range(16):
        colour = [(200, 60, 60), (60, 60, 200)][row % 2]
        pixels = np.array(colour) + rng.normal(0, 40, (48, 64, 3))
        photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        photos.append((encode(photo), row % 2))
    folder = write_dataset(tmp_path / "cars", photos, photos[:2], ["red", "blue"])
    flags = ["--dataset", folder, "--output-dir", tmp_path / "run", "--epochs", 8, "--lr", 0.003]
    success(run_train(*flags))
    last = read_history(tmp_path / "run")[-1]
    assert last["train_loss"] < 0.2
    assert last["train_accuracy"] == 1


@pytest.mark.slow
def test_resnet50_learns_the_drawn_cars_from_scratch(real_network, run_train, tmp_path, one_thread):
    draw_cars(tmp_path / "cars")
    flags = (
        "--resolution 64 --batch-size 16 --lr 0.004 --epochs 9 --step-size 5 --workers 1".split()
    )
    flags += ["--dataset", tmp_path / "cars", "--output-dir", tmp_path / "run"]
    success(run_train(*flags))
    history = read_history(tmp_path / "run")
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    # Chance is 0.125.
    assert load(tmp_path / "run/best_model.pth")["test_accuracy"] >= 0.35
