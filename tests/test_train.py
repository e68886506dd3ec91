"""The recipe, its steps and evaluations, precision, compilation, flags, and that it learns."""

import functools

import numpy as np
import pytest
import torch
from draw_cars import draw_cars
from files import encode, jpeg, load, read_history, rows, write_dataset
from PIL import Image
from scripts import refusal, success
from small import small_resnet
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torchvision import transforms

import train

DEFAULTS = dict(dataset="tanganke/stanford_cars", weights="IMAGENET1K_V2", resolution=224)
DEFAULTS |= dict(batch_size=128, epochs=90, lr=0.1, step_size=30, momentum=0.9, weight_decay=1e-4)
DEFAULTS |= dict(seed=0, amp=True, amp_dtype=None, compile=None, workers=None)


def test_defaults_are_the_recipe_and_lr_follows_the_batch_size():
    args = vars(train.parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert train.parse_args(["--batch-size", "64"]).lr == 0.05


def test_one_learning_rate_for_all_parameters_and_nothing_frozen(finished):
    torch.manual_seed(0)
    start = train.build_model("none", 8).state_dict()
    last = load(finished / "last_checkpoint.pth")
    (group,) = last["optimizer"]["param_groups"]
    assert len(group["params"]) == len(list(small_resnet().parameters()))
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    for name, value in last["model"].items():
        assert not torch.equal(value, start[name]), f"{name} did not change"


def textbook_batch(photos: list[tuple[bytes, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The test crops of (bytes, label) rows at 64 px, normalised by torchvision, and labels."""
    to_tensor = transforms.ToTensor()
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crops = [train.center_crop(train.decode_photo(encoded), 64) for encoded, _ in photos]
    images = torch.stack([normalize(to_tensor(crop.numpy())) for crop in crops])
    return images, torch.tensor([label for _, label in photos])


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
    start = parameters_to_vector(model.parameters()).detach()
    # The same crop in both epochs, so that the loop below needs no random draws.
    monkeypatch.setattr(train, "random_crop", train.center_crop)
    flags = ["--dataset", folder, "--weights", tmp_path / "start.pth", "--resolution", 64]
    flags += ["--epochs", 2, "--lr", 0.1, "--step-size", 1, "--weight-decay", 0.1]
    success(run_train(*flags, "--output-dir", tmp_path / "run"))
    found = read_history(tmp_path / "run")

    images, targets = textbook_batch(train_photos)
    test_images, test_targets = textbook_batch(test_photos)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for lr, row in zip((0.1, 0.01), found, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        logits = model.train()(images)
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            test_logits = model.eval()(test_images)
        expected = {
            "lr": lr,
            "train_loss": loss.item(),
            "train_accuracy": (logits.argmax(1) == targets).float().mean().item(),
            "test_loss": cross_entropy(test_logits, test_targets).item(),
            "test_accuracy": (test_logits.argmax(1) == test_targets).float().mean().item(),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    state = load(tmp_path / "run/last_checkpoint.pth")["model"]
    ours = parameters_to_vector(state[name].contiguous() for name, _ in model.named_parameters())
    theirs = parameters_to_vector(model.parameters())
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("native, precision", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_where_it_is_native(monkeypatch, native, precision):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False
    )
    assert train.pick_precision(amp=True) == precision
    assert train.pick_precision(amp=False) == torch.float32


def test_a_run_goes_on_in_the_precision_of_another_machine(run_train, tmp_path, monkeypatch):
    # float16 is slow on a CPU, but right; it alone needs the scaler.
    for epoch, precision in enumerate((torch.float32, torch.float16, torch.bfloat16), 1):
        monkeypatch.setattr(train, "pick_precision", lambda amp, given, now=precision: given or now)
        out = success(run_train("--output-dir", tmp_path, "--epochs", epoch, "--resume"))
        assert str(precision) in out
        last = load(tmp_path / "last_checkpoint.pth")
        assert len(last["history"]) == epoch
        assert bool(last["scaler"]) is (precision == torch.float16)
        assert {value.dtype for value in last["model"].values()} == {torch.float32, torch.int64}


def test_a_compiled_run_saves_a_plain_state_dict(run_train, tmp_path, monkeypatch):
    # The eager backend captures and wraps without two minutes of C++ compilation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flags = ["--epochs", 1, "--compile", "--batch-size", 6, "--output-dir", tmp_path]
    assert ", compiled" in success(run_train(*flags))
    small_resnet(num_classes=8).load_state_dict(load(tmp_path / "best_model.pth")["model"])


# Each number, its lowest value, and one that is too low.
LOWEST = [("resolution", 32, 31), ("batch-size", 1, 0), ("epochs", 1, 0), ("step-size", 1, 0)]
LOWEST += [("seed", 0, -1), ("workers", 0, -1), ("momentum", 0, -0.1), ("weight-decay", 0, -0.1)]
LOWEST += [("lr", 1e-9, 1e-10)]


@pytest.mark.parametrize("flag, lowest, too_low", LOWEST)
def test_a_flag_out_of_range_is_named_with_its_limit(capsys, flag, lowest, too_low):
    assert vars(train.parse_args([f"--{flag}={lowest}"]))[flag.replace("-", "_")] == lowest
    for value in ("nan", "-inf", "many", too_low):
        with pytest.raises(SystemExit, match="2"):
            train.parse_args([f"--{flag}={value}"])
        line = capsys.readouterr().err.splitlines()[-1]
        assert f" error: argument --{flag}: " in line
        assert str(value) in line
    assert line.endswith(f": {too_low} is less than {lowest}")


@pytest.mark.parametrize("flags", [["--lr", 1000], ["--lr", "inf"], ["--weight-decay", "inf"]])
def test_a_test_loss_that_is_not_finite_ends_the_run_and_leaves_none(run_train, tmp_path, flags):
    err = refusal(run_train(*flags, "--epochs", 5, "--output-dir", tmp_path))
    assert "epoch 1: no finite test loss; start anew at a lower --lr" in err
    assert not list(tmp_path.iterdir())


def test_it_learns_to_tell_red_from_blue(run_train, tmp_path, one_thread):
    # Over seeds, one and two threads, float32 and bfloat16, the last train loss is at most 0.004.
    # With shuffled labels, no steps or an lr of nothing it is above 0.65; a guess has 0.69.
    rng = np.random.default_rng(0)
    photos = []
    for row in range(16):
        colour = [(200, 60, 60), (60, 60, 200)][row % 2]
        pixels = np.array(colour) + rng.normal(0, 40, (48, 64, 3))
        photos.append((encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))), row % 2))
    folder = write_dataset(tmp_path / "cars", photos, photos[:2], ["red", "blue"])
    flags = ["--dataset", folder, "--output-dir", tmp_path / "run", "--epochs", 8, "--lr", 0.003]
    success(run_train(*flags))
    assert read_history(tmp_path / "run")[-1]["train_loss"] < 0.2


@pytest.mark.slow
def test_resnet50_learns_the_drawn_cars_from_scratch(real_network, run_train, tmp_path, one_thread):
    draw_cars(tmp_path / "cars")
    flags = "--resolution 64 --batch-size 16 --lr 0.004 --epochs 9 --step-size 5 --workers 1"
    folders = ["--dataset", tmp_path / "cars", "--output-dir", tmp_path / "run"]
    success(run_train(*flags.split(), *folders))
    # Chance is 0.125.
    assert load(tmp_path / "run/best_model.pth")["test_accuracy"] >= 0.35
