"""The recipe, the steps of training, precision, compilation, flags, and that it learns.

Only the tests named test_recipe_… know the optimizer, its schedule and the loss.
"""

import copy
import functools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from draw_cars import draw_cars
from files import assert_same_run, encode, jpeg, load, read_history, rows, write_dataset
from PIL import Image
from scripts import SMALL, refusal, success
from small import small_resnet
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torchvision import transforms

import train

FLOAT16 = ["--amp", "--amp-dtype", "float16"]


# The functions of the recipe that tests call themselves. Their signatures stand here alone.


def lr_factor(args: SimpleNamespace, epochs_done: int) -> float:
    return train.lr_factor(args, epochs_done)


def build_optimizer(args: SimpleNamespace, network: torch.nn.Module) -> torch.optim.Optimizer:
    return train.build_optimizer(args, network)


def center_crop(args: SimpleNamespace, photo: torch.Tensor) -> torch.Tensor:
    return train.center_crop(args, photo)


def at_build(monkeypatch, change: Callable):
    """Call `change` with each network that train.py builds."""
    build = train.NETWORK.build

    def build_and_change(*args, **options):
        network = build(*args, **options)
        change(network)
        return network

    monkeypatch.setattr(train.NETWORK, "build", build_and_change)


def at_forward(monkeypatch, hook: Callable):
    """Call hook(network, inputs, logits) after each forward pass. It may return other logits."""
    at_build(monkeypatch, lambda network: network.register_forward_hook(hook))


def at_train_loss(monkeypatch, change: Callable):
    """Let `change` take (logits, targets, loss) of each train step, and return the loss."""

    def changed_loss(logits, targets, **options):
        loss = cross_entropy(logits, targets, **options)
        if torch.is_grad_enabled():
            loss = change(logits, targets, loss)
        return loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", changed_loss)


def stored_flags(folder: Path) -> dict:
    return load(folder / "last_checkpoint.pth")["settings"]


# ---------------------------------------------------------------- the recipe

DEFAULTS = {"step_size": 30, "momentum": 0.9, "weight_decay": 1e-4, "seed": 0, "val_split": 0}
DEFAULTS |= {"amp": True, "amp_dtype": None, "compile": None, "workers": None, "lr": 0.1 * 8 / 128}
# Those with which a test would take too long, as the help shows them.
LARGE_DEFAULTS = {"weights": "IMAGENET1K_V2", "resolution": "224", "batch-size": "128"}
LARGE_DEFAULTS |= {"epochs": "90", "dataset": "tanganke/stanford_cars"}


def test_recipe_defaults_and_a_learning_rate_that_follows_the_batch_size(
    run_train, cars, tmp_path, capfd
):
    flags = "--weights none --resolution 33 --batch-size 8 --epochs 1".split()
    train.main(["--dataset", str(cars), "--output-dir", str(tmp_path), *flags])
    stored = stored_flags(tmp_path)
    assert {name: stored[name] for name in DEFAULTS} == DEFAULTS
    assert (train.default_lr(128), train.default_lr(64)) == (0.1, 0.05)
    capfd.readouterr()
    words = " ".join(success(run_train("--help")).split())
    for flag, default in LARGE_DEFAULTS.items():
        assert re.search(rf"--{flag} [A-Z_]+ [^()]*\(default: (\S+)\)", words)[1] == default


@pytest.mark.parametrize("lr", [0.1, 0.05])
def test_recipe_learning_rates_of_90_epochs_are_those_of_the_reference(lr):
    args = SimpleNamespace(lr=lr, epochs=90, step_size=30)
    for epoch in range(90):
        # The formula of the reference's train.py, which counts epochs from 0.
        assert lr * lr_factor(args, epochs_done=epoch) == lr * (0.1 ** (epoch // 30))


def test_recipe_one_learning_rate_for_all_parameters_and_nothing_frozen(finished):
    last = load(finished / "last_checkpoint.pth")
    (group,) = last["optimizer"]["param_groups"]
    assert len(group["params"]) == len(list(small_resnet().parameters()))
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert [row["lr"] for row in read_history(finished)] == pytest.approx([0.01, 0.001])


def test_all_weights_change(finished):
    torch.manual_seed(0)
    start = small_resnet(num_classes=8).state_dict()
    for name, value in load(finished / "last_checkpoint.pth")["model"].items():
        assert not torch.equal(value, start[name]), f"{name} did not change"


def textbook_batch(photos: list[tuple[bytes, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The test crops of (bytes, label) rows at 64 px, normalized by torchvision, and labels."""
    to_tensor = transforms.ToTensor()
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    args = SimpleNamespace(resolution=64)
    crops = [center_crop(args, train.decode_photo(encoded)) for encoded, _ in photos]
    images = torch.stack([normalize(to_tensor(crop.numpy())) for crop in crops])
    return images, torch.tensor([label for _, label in photos])


@pytest.mark.cpu("the textbook loop runs on a CPU")
def test_recipe_two_epochs_equal_a_textbook_loop(run_train, tmp_path, monkeypatch):
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
    # The same crop in both epochs, so that the loop below needs no random numbers.
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


# ---------------------------------------------------------------- float16, as on a GPU


def overflow_at(monkeypatch, steps: set[int]):
    """Let the scaled loss overflow in these steps, counted from 1, of every GradScaler.

    As on a GPU, the forward pass is right, the gradients are not finite, and the step is skipped.
    """
    scale = torch.amp.GradScaler.scale
    taken = {}

    def scale_and_overflow(scaler, loss):
        taken[scaler] = taken.get(scaler, 0) + 1
        scaled = scale(scaler, loss)
        if taken[scaler] in steps:
            return scaled * math.inf
        return scaled

    monkeypatch.setattr(torch.amp.GradScaler, "scale", scale_and_overflow)


LR = 1e-4


def flat(state: dict, names) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in names if "running" not in name]).float()


def plain_float16_run(batches: list) -> tuple[dict, dict, dict]:
    """A loop with SGD that is not fused: the network's state dicts before and after, the scaler's."""
    torch.manual_seed(0)
    model = small_resnet(num_classes=8).to(train.DEVICE, memory_format=torch.channels_last)
    start = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=1e-4, fused=False)
    scaler = torch.amp.GradScaler(train.DEVICE.type)
    for images, targets in batches:
        with torch.autocast(train.DEVICE.type, torch.float16):
            loss = cross_entropy(model(images), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    end = {name: value.cpu() for name, value in model.state_dict().items()}
    return start, end, scaler.state_dict()


@pytest.mark.parametrize("steps", [{1, 4}, set()])
def test_recipe_a_float16_run_equals_a_plain_loop_with_overflows(
    run_train, tmp_path, monkeypatch, steps
):
    images = []
    targets = []

    def note_images(network, inputs, logits):
        if network.training:
            images.append(inputs[0])

    def note_targets(logits, batch_targets, loss):
        targets.append(batch_targets)
        return loss

    at_forward(monkeypatch, note_images)
    at_train_loss(monkeypatch, note_targets)
    overflow_at(monkeypatch, steps)
    success(run_train(*FLOAT16, "--epochs", 3, "--lr", LR, "--output-dir", tmp_path))
    last = load(tmp_path / "last_checkpoint.pth")
    assert len(images) == 6
    start, end, scaler = plain_float16_run(list(zip(images, targets, strict=True)))
    assert last["optimizer"]["param_groups"][0]["fused"]
    assert last["scaler"] == scaler
    assert scaler["scale"] <= 65536 / 2 ** len(steps)
    # Rounding differs where a vector is no multiple of the processor's.
    assert (flat(last["model"], end) - flat(end, end)).norm() < 0.01 * (
        flat(end, end) - flat(start, end)
    ).norm()


@pytest.mark.cpu("fused and foreach kernels round alike there")
def test_recipe_sgd_with_overflows_equals_sgd_that_is_not_fused():
    # Of sixteens, which are rounded alike in both.
    ours = torch.nn.Conv2d(16, 16, 3, bias=False)
    ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    fused = build_optimizer(SimpleNamespace(lr=0.1, momentum=0.9, weight_decay=1e-4), ours)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=1e-4, fused=False)
    sides = [(ours, fused, torch.amp.GradScaler("cpu"))]
    sides.append((theirs, plain, torch.amp.GradScaler("cpu")))
    for step in range(1, 7):
        gradient = torch.randn(ours.weight.shape)
        for model, optimizer, scaler in sides:
            optimizer.zero_grad()
            scaler.scale((model.weight * gradient).sum()).backward()
            if step in (1, 4):
                model.weight.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(ours.weight, theirs.weight), step
    assert ours.weight.isfinite().all()


def test_a_parameter_group_keeps_its_share_of_the_learning_rate(run_train, tmp_path, monkeypatch):
    # As in fine-tuning with a higher learning rate for the new layer.
    def two_groups(*args):
        (network,) = [value for value in args if isinstance(value, torch.nn.Module)]
        head = [{"params": network.fc.parameters(), "lr": 0.1}]
        rest = [value for name, value in network.named_parameters() if not name.startswith("fc.")]
        return torch.optim.SGD([{"params": rest}, *head], lr=0.01)

    monkeypatch.setattr(train, "build_optimizer", two_groups)
    monkeypatch.setattr(train, "lr_factor", lambda args, epochs_done: 0.1 ** int(epochs_done))
    flags = ["--output-dir", tmp_path, "--resume"]
    success(run_train(*flags, "--epochs", 2))
    success(run_train(*flags, "--epochs", 3))
    groups = load(tmp_path / "last_checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.0001, 0.001])
    assert [row["lr"] for row in read_history(tmp_path)] == pytest.approx([0.01, 0.001, 0.0001])


def test_a_train_loss_that_overflows_in_one_batch_does_not_end_the_run(
    run_train, tmp_path, monkeypatch
):
    factors = iter([math.inf])
    at_train_loss(monkeypatch, lambda logits, targets, loss: loss * next(factors, 1))
    success(run_train(*FLOAT16, "--epochs", 2, "--output-dir", tmp_path))
    first, second = read_history(tmp_path)
    assert first["train_loss"] == math.inf
    assert math.isfinite(first["test_loss"])
    assert math.isfinite(second["train_loss"])


def test_an_evaluation_that_overflows_is_recorded_and_does_not_end_the_run(
    run_train, tmp_path, monkeypatch
):
    # As in float16, where logits may overflow though weights and statistics are finite.
    def overflow(network, inputs, logits):
        return logits if network.training else logits * math.inf

    at_forward(monkeypatch, overflow)
    success(run_train("--epochs", 2, "--output-dir", tmp_path))
    assert [math.isfinite(row["test_loss"]) for row in read_history(tmp_path)] == [False, False]


def test_nan_in_a_running_variance_ends_the_run(run_train, tmp_path, monkeypatch):
    train_steps = []

    def spoil(network, inputs, logits):
        if network.training:
            train_steps.append(None)
            if len(train_steps) == 4:  # the last step of the second epoch
                network.bn1.running_var.data[0] = math.nan

    at_forward(monkeypatch, spoil)
    err = refusal(run_train("--epochs", 3, "--output-dir", tmp_path))
    assert "epoch 2" in err
    assert "NaN" in err
    assert len(read_history(tmp_path)) == 1


@pytest.mark.parametrize("flags", [["--lr", "1e30"], ["--weight-decay", "1e39"]])
def test_weights_that_are_not_finite_end_the_run_and_leave_no_files(run_train, tmp_path, flags):
    err = refusal(run_train(*flags, "--epochs", 5, "--output-dir", tmp_path))
    for words in ("epoch 1", "NaN", "--lr"):
        assert words in err
    assert not list(tmp_path.iterdir())


def test_an_optimizer_of_the_head_alone_trains_the_head_alone(run_train, tmp_path, monkeypatch):
    build = train.build_optimizer

    def build_for_head(args, network):
        return build(args, network.fc)

    monkeypatch.setattr(train, "build_optimizer", build_for_head)
    flags = ["--lr", 0.1, "--output-dir", tmp_path, "--resume", "--epochs"]
    success(run_train(*flags, 1))
    success(run_train(*flags, 2))
    torch.manual_seed(0)
    start = train.build_network("none", 8).state_dict()
    for name, value in load(tmp_path / "last_checkpoint.pth")["model"].items():
        is_trained = name.startswith("fc.") or "running" in name or "tracked" in name
        assert torch.equal(value, start[name]) is not is_trained, name


def test_the_learning_rate_may_change_in_each_step_and_a_resumed_run_takes_the_same(
    run_train, tmp_path, monkeypatch
):
    def adamw(args, network):
        return torch.optim.AdamW(network.parameters(), lr=args.lr)

    def warm_up_and_cosine(args, epochs_done):
        return min(1, 2 * epochs_done) * (1 + math.cos(math.pi * epochs_done / args.epochs)) / 2

    rates = []
    step = torch.optim.AdamW.step

    def noting_step(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(train, "build_optimizer", adamw)
    monkeypatch.setattr(train, "lr_factor", warm_up_and_cosine)
    monkeypatch.setattr(torch.optim.AdamW, "step", noting_step)
    flags = ["--lr", 0.001, "--epochs", 3, "--output-dir"]
    success(run_train(*flags, tmp_path / "unbroken"))
    # Two steps an epoch.
    args = SimpleNamespace(epochs=3)
    expected = [0.001 * warm_up_and_cosine(args, half / 2) for half in range(6)]
    assert rates == pytest.approx(expected)
    assert [row["lr"] for row in read_history(tmp_path / "unbroken")] == pytest.approx(
        expected[::2]
    )

    rates.clear()
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *args: 1 / 0 if len(rates) == 4 else noting_step(*args)
    )
    with pytest.raises(ZeroDivisionError):
        run_train(*flags, tmp_path / "resumed")
    monkeypatch.setattr(torch.optim.AdamW, "step", noting_step)
    rates.clear()
    success(run_train(*flags, tmp_path / "resumed", "--resume"))
    assert rates == pytest.approx(expected[4:])
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_weights_with_nan_name_the_remedies(run_train, tmp_path):
    flags = ["--lr", "1e30", "--epochs", 2, "--output-dir", tmp_path]
    err = refusal(run_train(*flags))
    assert "NaN or Inf" in err and "--lr" in err and "bfloat16" not in err
    err = refusal(run_train(*flags, "--amp", "--amp-dtype", "float16"))
    assert "--lr" in err and "--amp-dtype bfloat16" in err


# ---------------------------------------------------------------- the steps


@pytest.mark.cpu("cudnn.benchmark picks kernels by timing, so sums differ between runs")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_numbers_of_a_step_depend_on_seed_and_epoch_alone(
    run_train, tmp_path, monkeypatch, workers
):
    drawn = []
    stops = []

    def add_dropout(network):
        network.avgpool = torch.nn.Sequential(network.avgpool, torch.nn.Dropout(0.5))

    def draw(network, inputs, logits):
        if network.training:
            if stops == [len(drawn)]:
                stops.clear()
                raise train.InputError("stopped")
            # As mixup does.
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))

    at_build(monkeypatch, add_dropout)
    at_forward(monkeypatch, draw)
    flags = ["--resume", "--output-dir"]
    success(run_train("--epochs", 3, *flags, tmp_path / "unbroken"))
    expected = list(drawn)
    drawn.clear()
    flags = ["--epochs", 3, *flags, tmp_path / "resumed"]
    stops.append(4)  # in the third epoch
    assert "stopped" in refusal(run_train(*flags, "--workers", workers))
    success(run_train(*flags, "--workers", 1))
    assert len(set(expected)) == 6
    assert drawn == expected
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_gradients_are_freed_before_the_next_forward_pass(run_train, tmp_path, monkeypatch):
    freed = []

    def note(network, inputs, logits):
        if network.training:
            freed.append(all(parameter.grad is None for parameter in network.parameters()))

    at_forward(monkeypatch, note)
    success(run_train("--epochs", 2, "--output-dir", tmp_path))
    assert freed == [True] * 4


def storages(state) -> set[tuple[str, int]]:
    """Device and address of all tensors in a state dict of any depth."""
    if isinstance(state, torch.Tensor):
        return {(state.device.type, state.untyped_storage().data_ptr())}
    if isinstance(state, dict):
        return set().union(*map(storages, state.values()))
    if isinstance(state, list):
        return set().union(*map(storages, state))
    return set()


def test_files_are_written_from_copies_on_the_cpu(run_train, tmp_path, monkeypatch):
    # The next epoch changes the tensors of the run while they are written.
    live = []
    saved = []
    optimizer_of_train = train.build_optimizer
    save = torch.save

    def noting_build_optimizer(*args, **options):
        live.append(optimizer_of_train(*args, **options))
        return live[-1]

    def noting_save(state, *args, **options):
        saved.append(storages(state))
        save(state, *args, **options)

    at_build(monkeypatch, live.append)
    monkeypatch.setattr(train, "build_optimizer", noting_build_optimizer)
    monkeypatch.setattr(torch, "save", noting_save)
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    in_use = set().union(*(storages(part.state_dict()) for part in live))
    last_checkpoint, best_model = saved
    assert len(last_checkpoint) == len(in_use)
    assert best_model
    for copies in saved:
        assert not copies & in_use
        assert {device for device, _ in copies} == {"cpu"}


def test_the_optimizers_state_keeps_its_layout_in_a_checkpoint(run_train, tmp_path):
    # Fused optimizers take parameters and their states for arrays in the same order.
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    last = load(tmp_path / "last_checkpoint.pth")
    shapes = [value.shape for value in small_resnet(num_classes=8).parameters()]
    for shape, state in zip(shapes, last["optimizer"]["state"].values(), strict=True):
        expected = torch.empty(shape)
        if expected.ndim == 4:
            expected = expected.to(memory_format=torch.channels_last)
        moments = [value for value in state.values() if value.shape == shape]
        assert moments
        for moment in moments:
            assert moment.stride() == expected.stride()


def test_an_evaluation_stores_no_activations(run_train, tmp_path, monkeypatch):
    # The sums of the losses would keep those of all batches.
    noted = set()
    at_forward(
        monkeypatch,
        lambda network, inputs, logits: noted.add((network.training, logits.requires_grad)),
    )
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    assert noted == {(True, True), (False, False)}


def test_another_seed_draws_other_random_numbers_in_the_steps(run_train, tmp_path, monkeypatch):
    drawn = []

    def draw(network, inputs, logits):  # As mixup does.
        if network.training:
            drawn.extend((random.random(), np.random.rand(), torch.rand(1).item()))

    at_forward(monkeypatch, draw)
    for seed in (0, 1):
        success(run_train("--epochs", 1, "--seed", seed, "--output-dir", tmp_path / f"{seed}"))
    assert len(drawn) == len(set(drawn)) == 12  # three in each of two steps


# ---------------------------------------------------------------- precision and compilation


def set_native_bfloat16(monkeypatch, is_native: bool):
    capabilities = {"avx512_bf16": is_native}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


PRECISIONS = [
    (True, "--amp", "bfloat16"),
    (False, "--amp", "float32"),
    (True, "--no-amp", "float32"),
]


@pytest.mark.cpu("it is about CPUs")
@pytest.mark.parametrize("is_native, flag, precision", PRECISIONS)
def test_a_cpu_computes_in_bfloat16_if_that_is_native(
    run_train, tmp_path, monkeypatch, is_native, flag, precision
):
    set_native_bfloat16(monkeypatch, is_native)
    found = []
    at_forward(monkeypatch, lambda network, inputs, logits: found.append(logits.dtype))
    out = success(run_train(flag, "--epochs", 1, "--output-dir", tmp_path))
    assert set(found) == {getattr(torch, precision)}
    assert precision in out


@pytest.mark.cpu("a GPU computes in float16 by default")
def test_a_run_continues_in_the_precision_of_another_machine(run_train, tmp_path, monkeypatch):
    file = tmp_path / "last_checkpoint.pth"
    before = ""
    # The machines: a CPU, a GPU and a newer CPU. float16 is slow on a CPU, but right; it alone
    # needs the scaler.
    machines = [("float32", False, None), ("float16", False, "float16"), ("bfloat16", True, None)]
    for epochs, (precision, is_native, default_of_gpu) in enumerate(machines, 1):
        set_native_bfloat16(monkeypatch, is_native)
        if before:
            last = load(file)
            last["settings"]["amp_dtype"] = default_of_gpu
            torch.save(last, file)
        out = success(run_train("--amp", "--output-dir", tmp_path, "--epochs", epochs, "--resume"))
        assert precision in out
        assert before in out
        last = load(file)
        assert len(last["history"]) == epochs
        assert bool(last["scaler"]) is (precision == "float16")
        assert {value.dtype for value in last["model"].values()} == {torch.float32, torch.int64}
        before = precision


def noted_batch_sizes(monkeypatch) -> list[str]:
    """Compile with a backend that notes the batch size of each graph, without compiling C++."""
    noted = []

    def note_sizes(graph, inputs):
        images = [value for value in inputs if value.ndim == 4 and value.shape[1] == 3]
        # A graph for any size has a symbol in place of the number.
        noted.extend(str(value.shape[0]) for value in images if value.shape[2] > 7)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note_sizes))
    torch.compiler.reset()
    return noted


def test_full_batches_are_compiled_and_a_smaller_last_batch_is_not(
    run_train, tmp_path, monkeypatch
):
    networks = []
    at_build(monkeypatch, networks.append)
    compiled = noted_batch_sizes(monkeypatch)
    flags = ["--compile", "--output-dir", tmp_path]
    success(run_train(*flags, "--epochs", 2, "--batch-size", 6))
    # 16 train photos are batches of 6, 6 and 4; 8 test photos are batches of 6 and 2.
    assert compiled == ["6", "6"]
    # As in a notebook: a second batch size is compiled for this size, not for any.
    success(run_train(*flags, "--epochs", 1, "--batch-size", 8, "--overwrite"))
    assert compiled == ["6", "6", "8", "8"]

    # Checkpoints have the network's own names.
    small_resnet(num_classes=8).load_state_dict(load(tmp_path / "best_model.pth")["model"])
    # As for an exponential moving average: a copy computes with weights of its own.
    network = networks[-1].eval()
    average = copy.deepcopy(network)
    images = torch.ones(1, 3, 33, 33, device=train.DEVICE)
    with torch.no_grad():
        for value in average.parameters():
            value.zero_()
        assert (average(images) == 0).all()
        assert (network(images) != 0).any()


@pytest.mark.cpu("on a GPU, it needs another compiler")
@pytest.mark.slow
def test_compile_without_a_compiler_is_refused_in_one_line(fork, cars, tmp_path):
    # What was compiled before must not help.
    environment = {"PATH": tmp_path, "CXX": "", "TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    flags = [*SMALL, "--dataset", cars, "--epochs", 1, "--output-dir", tmp_path / "run"]
    err = refusal(fork("train.py", *flags, "--compile", **environment).end())
    assert "--compile" in err
    assert "compiler" in err


def test_flags_that_were_left_out_are_chosen_again_where_a_run_continues(
    cars, tmp_path, capfd, monkeypatch
):
    flags = ["--dataset", str(cars), "--output-dir", str(tmp_path), "--resume", "--no-amp"]
    flags += "--weights none --resolution 33 --batch-size 8".split()
    compiled = []

    def note(function, **options):
        compiled.append(function)
        return function

    def start(*more: str) -> tuple[str, dict]:
        compiled.clear()
        train.main([*flags, *more])
        return capfd.readouterr().out, stored_flags(tmp_path)

    monkeypatch.setattr(torch, "compile", note)
    monkeypatch.setattr(train, "DEFAULT_WORKERS", 0)
    out, stored = start("--epochs", "1")
    assert bool(compiled) is torch.cuda.is_available()
    assert stored["workers"] is stored["compile"] is stored["amp_dtype"] is None
    assert "0 workers" in out
    # As on a machine with more cores.
    monkeypatch.setattr(train, "DEFAULT_WORKERS", 1)
    out, stored = start("--epochs", "2", "--compile")
    assert compiled
    assert "1 worker " in out
    # What was given is the run's from then on.
    out, stored = start("--epochs", "3")
    assert compiled
    assert stored["compile"] is True


def failing_compile(*args, **options):
    raise RuntimeError("\nInvalidCxxCompiler:\nno working compiler")


def test_what_torch_compile_lacks_is_said_and_it_is_an_error_if_it_was_asked_for(
    run_train, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(torch, "compile", failing_compile)
    err = refusal(run_train("--epochs", 1, "--compile", "--output-dir", tmp_path))
    assert "--compile" in err and "InvalidCxxCompiler: no working compiler" in err
    # As on a GPU, where it is the default.
    monkeypatch.setattr(train, "DEVICE", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
    assert train.can_compile(SimpleNamespace(compile=None)) is False
    out = capfd.readouterr().out
    assert "warning" in out and "no working compiler" in out
    assert train.can_compile(SimpleNamespace(compile=False)) is False


@pytest.mark.cpu("there is a GPU")
def test_without_a_gpu_a_line_says_so_and_why(run_train, tmp_path, monkeypatch):
    flags = ["--epochs", 1, "--output-dir", tmp_path]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    out = success(run_train(*flags))
    assert "no GPU found" in out
    assert "build of torch" not in out
    assert "days" not in out  # That is for the full dataset alone.
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this build of torch, which has no CUDA" in success(run_train(*flags, "--overwrite"))


def test_more_processes_than_gpus_are_refused_with_both_numbers(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(train, "LOCAL_WORLD_SIZE", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    err = refusal(run_train("--epochs", 1, "--output-dir", tmp_path))
    assert "4 processes" in err and "3 GPUs" in err


# ---------------------------------------------------------------- flags

# Each number and its lowest value, then one that is too low.
LOWEST = {"resolution": 32, "batch-size": 1, "epochs": 1, "step-size": 1, "seed": 0, "workers": 0}
LOWEST |= {"momentum": 0, "weight-decay": 0, "lr": 1e-9, "val-split": 0}
TOO_LOW = {"lr": 1e-10, "momentum": -0.1, "weight-decay": -0.1, "val-split": -0.1}


def test_the_lowest_numbers_are_accepted(run_train, tmp_path):
    lowest = {**LOWEST, "batch-size": 2}  # Batch norm needs two photos.
    success(
        run_train(
            *(f"--{flag}={value}" for flag, value in lowest.items()), "--output-dir", tmp_path
        )
    )
    stored = stored_flags(tmp_path)
    assert {flag: stored[flag.replace("-", "_")] for flag in lowest} == lowest


@pytest.mark.parametrize("flag", LOWEST)
def test_a_flag_out_of_range_is_named_with_its_limit(run_train, flag):
    too_low = TOO_LOW.get(flag, LOWEST[flag] - 1)
    for value, reason in ((too_low, f"at least {LOWEST[flag]}"), ("nan", ""), ("many", "invalid")):
        status, _, err = run_train(f"--{flag}={value}")
        assert status == 2
        line = err.splitlines()[-1]
        for words in (f"--{flag}", str(value), reason):
            assert words in line


def test_a_tilde_is_expanded_in_every_path(run_train, run_eval, cars, tmp_path, monkeypatch):
    # A shell leaves it as it is after the "=" of a flag.
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cars").symlink_to(cars)
    torch.save(small_resnet().state_dict(), tmp_path / "start.pth")
    flags = ["--dataset=~/cars", "--weights=~/start.pth", "--output-dir=~/run", "--epochs", 1]
    success(run_train(*flags))
    assert (tmp_path / "run/best_model.pth").exists()
    flags = ["--dataset=~/cars", "--checkpoint=~/run/best_model.pth", "--output-dir=~/results"]
    success(run_eval(*flags, "--num-gradcam", 0))
    assert list((tmp_path / "results").iterdir())


def test_without_an_output_folder_a_run_is_written_to_the_current_one(
    run_train, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    success(run_train("--epochs", 1))
    assert (tmp_path / "best_model.pth").exists()


def test_a_batch_above_the_number_of_photos_is_refused_with_one_that_works(run_train, tmp_path):
    flags = ["--epochs", 1, "--output-dir", tmp_path]
    err = refusal(run_train(*flags, "--batch-size", 17))
    assert "--batch-size 17" in err and "16" in err
    suggested = re.search(r"try --batch-size (\d+)", err)[1]
    success(run_train(*flags, "--batch-size", suggested))


# ---------------------------------------------------------------- that it learns


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
def test_recipe_resnet50_learns_the_drawn_cars_from_scratch(
    real_network, run_train, tmp_path, one_thread
):
    draw_cars(tmp_path / "cars", train_per_class=40)
    flags = "--resolution 64 --batch-size 16 --lr 0.004 --epochs 9 --step-size 5 --workers 1"
    folders = ["--dataset", tmp_path / "cars", "--output-dir", tmp_path / "run"]
    success(run_train(*flags.split(), *folders))
    # Chance is 0.125.
    assert load(tmp_path / "run/best_model.pth")["test_accuracy"] >= 0.35
