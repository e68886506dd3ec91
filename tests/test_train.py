"""The recipe, the steps of training, precision, compilation, flags, and that it learns.

Only the tests named test_recipe_… know the optimizer, its schedule and the loss.
"""

import copy
import functools
import importlib.util
import math
import os
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from draw_cars import draw_cars
from files import assert_same_run, encode, jpeg, load, read_history, rows, write_dataset
from PIL import Image
from scripts import refusal, success
from small import SMALL_NETWORK, small_resnet
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torchvision import transforms

import eval as evaluation
import train

FLOAT16 = ["--amp", "--amp-dtype", "float16"]

# ---------------------------------------------------------------- the recipe

DEFAULTS = dict(dataset="tanganke/stanford_cars", weights="IMAGENET1K_V2", resolution=224)
DEFAULTS |= dict(batch_size=128, epochs=90, lr=0.1, step_size=30, momentum=0.9, weight_decay=1e-4)
DEFAULTS |= dict(seed=0, amp=True, amp_dtype=None, compile=None, workers=None, val_split=0)


def test_recipe_defaults_and_a_learning_rate_that_follows_the_batch_size():
    args = vars(train.parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert train.parse_args(["--batch-size", "64"]).lr == 0.05


@pytest.mark.parametrize("lr", [0.1, 0.05])
def test_recipe_learning_rates_of_90_epochs_are_those_of_the_reference(lr):
    args = train.parse_args(["--lr", str(lr)])
    for epoch in range(90):
        # The formula of the reference's train.py, which counts epochs from 0.
        assert args.lr * train.lr_factor(args, epoch + 1) == lr * (0.1 ** (epoch // 30))


def test_recipe_one_learning_rate_for_all_parameters_and_nothing_frozen(finished):
    last = load(finished / "last_checkpoint.pth")
    (group,) = last["optimizer"]["param_groups"]
    assert len(group["params"]) == len(list(small_resnet().parameters()))
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert [row["lr"] for row in read_history(finished)] == pytest.approx([0.01, 0.001])


def test_all_weights_change(finished):
    torch.manual_seed(0)
    start = train.build_network("none", 8).state_dict()
    for name, value in load(finished / "last_checkpoint.pth")["model"].items():
        assert not torch.equal(value, start[name]), f"{name} did not change"


def textbook_batch(photos: list[tuple[bytes, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The test crops of (bytes, label) rows at 64 px, normalized by torchvision, and labels."""
    to_tensor = transforms.ToTensor()
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crops = [train.center_crop(train.decode_photo(encoded), 64) for encoded, _ in photos]
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


def plain_float16_run(cars, epochs: int) -> tuple[dict, dict, dict]:
    """A loop with SGD that is not fused: the network's state dicts before and after, the scaler's."""
    torch.manual_seed(0)
    model = small_resnet(num_classes=8).to(train.DEVICE, memory_format=torch.channels_last)
    start = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=1e-4, fused=False)
    scaler = torch.amp.GradScaler(train.DEVICE.type)
    train_split = train.load_split(train.find_splits(str(cars), ["train"]), "train")
    photos = train.CroppedPhotos({"train": train_split}, {"train": train.random_crop}, 33)
    for epoch in range(1, epochs + 1):
        for indices in train.train_batches(16, [8, 8], 0, epoch):
            images, targets = torch.utils.data.default_collate(photos.__getitems__(indices))
            with torch.autocast(train.DEVICE.type, torch.float16):
                logits = model(train.move_and_normalize(images))
                loss = cross_entropy(logits, targets.to(train.DEVICE), reduction="sum") / 8
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    end = {name: value.cpu() for name, value in model.state_dict().items()}
    return start, end, scaler.state_dict()


@pytest.mark.parametrize("steps", [{1}, {1, 4}, set()])
def test_recipe_a_float16_run_equals_a_plain_loop_with_overflows(
    run_train, cars, tmp_path, monkeypatch, steps
):
    overflow_at(monkeypatch, steps)
    success(run_train(*FLOAT16, "--epochs", 3, "--lr", LR, "--output-dir", tmp_path))
    last = load(tmp_path / "last_checkpoint.pth")
    start, end, scaler = plain_float16_run(cars, epochs=3)
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
    args = train.parse_args(["--lr", "0.1"])
    fused = train.build_optimizer(ours, args)
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
    def two_groups(network, args):
        head = [{"params": network.fc.parameters(), "lr": 10 * args.lr}]
        rest = [value for name, value in network.named_parameters() if not name.startswith("fc.")]
        return torch.optim.SGD([{"params": rest}, *head], lr=args.lr)

    monkeypatch.setattr(train, "build_optimizer", two_groups)
    monkeypatch.setattr(train, "lr_factor", lambda args, epoch: 0.5**epoch)
    flags = ["--lr", 0.01, "--output-dir", tmp_path, "--resume"]
    success(run_train(*flags, "--epochs", 1))
    success(run_train(*flags, "--epochs", 2))
    groups = load(tmp_path / "last_checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.0025, 0.025]
    assert [row["lr"] for row in read_history(tmp_path)] == [0.005, 0.0025]


def test_a_train_loss_that_overflows_in_one_batch_does_not_end_the_run(
    run_train, tmp_path, monkeypatch
):
    calls = []
    training_loss_sum = train.training_loss_sum

    def overflow_once(*args):
        calls.append(None)
        loss_sum, num_correct = training_loss_sum(*args)
        return loss_sum * (math.inf if len(calls) == 1 else 1), num_correct

    monkeypatch.setattr(train, "training_loss_sum", overflow_once)
    success(run_train(*FLOAT16, "--epochs", 2, "--output-dir", tmp_path))
    first, second = read_history(tmp_path)
    assert first["train_loss"] == math.inf
    assert math.isfinite(first["test_loss"])
    assert math.isfinite(second["train_loss"])


def test_an_evaluation_that_overflows_is_recorded_and_does_not_end_the_run(
    run_train, tmp_path, monkeypatch
):
    # As in float16, where logits may overflow though weights and statistics are finite.
    evaluate = train.evaluate

    def overflow(network, *args):
        hook = network.register_forward_hook(lambda module, inputs, logits: logits * math.inf)
        result = evaluate(network, *args)
        hook.remove()
        return result

    monkeypatch.setattr(train, "evaluate", overflow)
    success(run_train("--epochs", 2, "--output-dir", tmp_path))
    assert [math.isfinite(row["test_loss"]) for row in read_history(tmp_path)] == [False, False]


def test_nan_in_a_running_variance_ends_the_run(run_train, tmp_path, monkeypatch):
    train_one_epoch = train.train_one_epoch

    def spoil(network, *args):
        row = train_one_epoch(network, *args)
        if spoil.epochs:
            network.bn1.running_var[0] = math.nan
        spoil.epochs += 1
        return row

    spoil.epochs = 0
    monkeypatch.setattr(train, "train_one_epoch", spoil)
    err = refusal(run_train("--epochs", 3, "--output-dir", tmp_path))
    assert "epoch 2: the weights contain NaN or Inf" in err
    assert len(read_history(tmp_path)) == 1


@pytest.mark.parametrize("flags", [["--lr", "1e30"], ["--weight-decay", "1e39"]])
def test_weights_that_are_not_finite_end_the_run_and_leave_no_files(run_train, tmp_path, flags):
    err = refusal(run_train(*flags, "--epochs", 5, "--output-dir", tmp_path))
    assert "epoch 1: the weights contain NaN or Inf: start again with a lower --lr" in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the steps


class SmallWithDropout(torch.nn.Sequential):
    def __init__(self, num_classes: int):
        network = small_resnet(num_classes)
        network.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), network.fc)
        super().__init__(network)


@pytest.mark.cpu("cudnn.benchmark picks kernels by timing, so sums differ between runs")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_numbers_of_a_step_depend_on_seed_and_epoch_alone(
    run_train, tmp_path, monkeypatch, workers
):
    network = SimpleNamespace(
        **{**vars(SMALL_NETWORK), "build": SmallWithDropout, "head": "0.fc.1"}
    )
    monkeypatch.setattr(train, "NETWORK", network)
    training_loss_sum = train.training_loss_sum
    drawn = []
    stops = []

    def drawing_loss(*args):
        if stops == [len(drawn)]:
            stops.clear()
            raise train.InputError("stopped")
        drawn.append((np.random.rand(), torch.rand(1).item()))  # as mixup does
        return training_loss_sum(*args)

    monkeypatch.setattr(train, "training_loss_sum", drawing_loss)
    flags = ["--resume", "--output-dir"]
    success(run_train("--epochs", 3, *flags, tmp_path / "unbroken"))
    expected = list(drawn)
    drawn.clear()
    flags = ["--epochs", 3, *flags, tmp_path / "resumed"]
    stops.append(4)  # in the third epoch
    refusal(run_train(*flags, "--workers", workers))
    success(run_train(*flags, "--workers", 1))
    assert len(set(expected)) == 6
    assert drawn == expected
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_gradients_are_freed_before_the_next_forward_pass(run_train, tmp_path, monkeypatch):
    training_loss_sum = train.training_loss_sum

    def check(network, *args):
        assert all(parameter.grad is None for parameter in network.parameters())
        return training_loss_sum(network, *args)

    monkeypatch.setattr(train, "training_loss_sum", check)
    success(run_train("--epochs", 1, "--output-dir", tmp_path))


def storages(state) -> set[tuple[str, int]]:
    """Device and address of all tensors in a state dict of any depth."""
    if isinstance(state, torch.Tensor):
        return {(state.device.type, state.untyped_storage().data_ptr())}
    if isinstance(state, dict):
        return set().union(*map(storages, state.values()))
    if isinstance(state, list):
        return set().union(*map(storages, state))
    return set()


def test_the_thread_that_writes_gets_copies_on_the_cpu(run_train, tmp_path, monkeypatch):
    live = {}
    handed_over = []
    build_training = train.build_training
    write_run = train.write_run

    def noting_build_training(*args):
        live["parts"] = build_training(*args)
        return live["parts"]

    def noting_write_run(run, *args):
        handed_over.append(storages(run))
        write_run(run, *args)

    monkeypatch.setattr(train, "build_training", noting_build_training)
    monkeypatch.setattr(train, "write_run", noting_write_run)
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    in_use = storages(train.states_of(*live["parts"]))
    (copies,) = handed_over
    assert len(copies) == len(in_use)
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


# ---------------------------------------------------------------- precision and compilation


@pytest.mark.cpu("it is about CPUs")
@pytest.mark.parametrize("native, precision", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_if_that_is_native(monkeypatch, native, precision):
    capabilities = {"avx512_bf16": native}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert train.pick_precision(True, None) == precision
    assert train.pick_precision(False, None) == torch.float32


def test_a_run_continues_in_the_precision_of_another_machine(run_train, tmp_path, monkeypatch):
    # float16 is slow on a CPU, but right; it alone needs the scaler.
    for epoch, precision in enumerate((torch.float32, torch.float16, torch.bfloat16), 1):
        monkeypatch.setattr(train, "pick_precision", lambda amp, given, now=precision: given or now)
        out = success(run_train("--output-dir", tmp_path, "--epochs", epoch, "--resume"))
        assert str(precision).removeprefix("torch.") in out
        assert ("continues with" in out) is (epoch > 1)
        last = load(tmp_path / "last_checkpoint.pth")
        assert len(last["history"]) == epoch
        assert bool(last["scaler"]) is (precision == torch.float16)
        assert {value.dtype for value in last["model"].values()} == {torch.float32, torch.int64}


def noted_batch_sizes(monkeypatch) -> list[list]:
    """Compile with a backend that notes the batch size of each graph, without compiling C++."""
    noted = []

    def note_sizes(graph, inputs):
        images = [value for value in inputs if value.ndim == 4 and value.shape[1] == 3]
        noted.extend(value.shape[0] for value in images if value.shape[2] > 7)
        return graph

    compile_with_torch = torch.compile
    eager = functools.partial(compile_with_torch, backend=note_sizes)
    monkeypatch.setattr(torch, "compile", eager)
    torch.compiler.reset()
    return noted


def test_full_batches_are_compiled_and_a_smaller_last_batch_is_not(
    run_train, tmp_path, monkeypatch
):
    compiled = noted_batch_sizes(monkeypatch)
    flags = ["--epochs", 2, "--compile", "--batch-size", 6, "--output-dir", tmp_path]
    out = success(run_train(*flags))
    assert ", torch.compile, " in out
    # 16 train photos are batches of 6, 6 and 4; 8 test photos are batches of 6 and 2.
    assert compiled == [6, 6]
    small_resnet(num_classes=8).load_state_dict(load(tmp_path / "best_model.pth")["model"])


def test_a_second_batch_size_is_not_compiled_for_any_size(monkeypatch):
    compiled = noted_batch_sizes(monkeypatch)
    for batch_size in (2, 3):
        network = train.CompiledForFullBatches(small_resnet(num_classes=8), batch_size).eval()
        network(torch.zeros(batch_size, 3, 33, 33))
        network(torch.zeros(1, 3, 33, 33))
    assert compiled == [2, 3]


def test_a_copy_of_a_network_in_training_has_weights_of_its_own():
    # As for an exponential moving average of the weights.
    network = small_resnet(num_classes=8).eval()
    train.CompiledForFullBatches(network, batch_size=2)
    average = copy.deepcopy(network)
    with torch.no_grad():
        for value in average.parameters():
            value.zero_()
        assert (average(torch.ones(1, 3, 33, 33)) == 0).all()
        assert (network(torch.ones(1, 3, 33, 33)) != 0).any()


@pytest.fixture
def fake_cuda(monkeypatch, tmp_path):
    """A machine with a GPU on which everything is there that torch.compile needs."""
    monkeypatch.setattr(train, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", sys.executable)
    (tmp_path / "Python.h").touch()


@pytest.mark.parametrize("missing", ["gcc", "python3-dev", "triton", "capability"])
def test_without_what_torch_compile_needs_a_gpu_trains_uncompiled_and_says_what_is_missing(
    fake_cuda, monkeypatch, capsys, tmp_path, missing
):
    assert train.use_compile(None) is True
    assert capsys.readouterr().out == ""
    if missing == "gcc":
        monkeypatch.delenv("CC")
    elif missing == "python3-dev":
        os.remove(tmp_path / "Python.h")
    elif missing == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert train.use_compile(None) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert "warning" in line
    assert missing in line
    assert train.use_compile(False) is False
    with pytest.raises(train.InputError, match=f"--compile needs .*{missing}"):
        train.use_compile(True)


def test_without_a_cpp_compiler_compile_on_a_cpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "DEVICE", torch.device("cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert train.use_compile(None) is False
    with pytest.raises(train.InputError, match="--compile needs a compiler .package g++"):
        train.use_compile(True)


def test_what_was_left_out_is_chosen_again_where_a_run_continues(
    cars, tmp_path, capfd, monkeypatch
):
    flags = ["--dataset", str(cars), "--output-dir", str(tmp_path), "--resume", "--no-amp"]
    flags += "--weights none --resolution 33 --batch-size 8".split()
    compiled = []

    def start(*more: str) -> tuple[str, dict]:
        compiled.clear()
        train.main([*flags, *more])
        return capfd.readouterr().out, load(tmp_path / "last_checkpoint.pth")["settings"]

    def note(network, batch_size):
        compiled.append(batch_size)
        return network

    monkeypatch.setattr(train, "CompiledForFullBatches", note)
    monkeypatch.setattr(train, "DEFAULT_WORKERS", 0)
    out, settings = start("--epochs", "1")
    assert bool(compiled) is torch.cuda.is_available()
    assert settings["workers"] is settings["compile"] is settings["amp_dtype"] is None
    assert ", 0 workers" in out
    # As on a machine with more cores.
    monkeypatch.setattr(train, "DEFAULT_WORKERS", 1)
    out, settings = start("--epochs", "2", "--compile")
    assert len(compiled) == 1
    assert ", 1 workers" in out
    # What was given is the run's from then on.
    out, settings = start("--epochs", "3")
    assert len(compiled) == 1
    assert settings["compile"] is True


@pytest.mark.cpu("there is a GPU")
@pytest.mark.parametrize(
    "error, is_said",
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", True),
        ("Found no NVIDIA driver on your system.", False),
        ("No CUDA GPUs are available", False),
        (None, False),
    ],
)
def test_without_a_gpu_one_line_says_so_and_torchs_reason_where_a_driver_failed(
    run_train, tmp_path, monkeypatch, error, is_said
):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: error is not None)
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError(error)))
    out = success(run_train("--epochs", 1, "--output-dir", tmp_path)).splitlines()
    assert out[0] == "no GPU found: training on the CPU (the full recipe would take days)"
    assert (out[1] == f"warning     {error}") is is_said


# ---------------------------------------------------------------- flags

# Each number, its lowest value, and one that is too low.
LOWEST = [("resolution", 32, 31), ("batch-size", 1, 0), ("epochs", 1, 0), ("step-size", 1, 0)]
LOWEST += [("seed", 0, -1), ("workers", 0, -1), ("momentum", 0, -0.1), ("weight-decay", 0, -0.1)]
LOWEST += [("lr", 1e-9, 1e-10), ("val-split", 0, -0.1)]


@pytest.mark.parametrize("flag, lowest, too_low", LOWEST)
def test_a_flag_out_of_range_is_named_with_its_limit(capsys, flag, lowest, too_low):
    assert vars(train.parse_args([f"--{flag}={lowest}"]))[flag.replace("-", "_")] == lowest
    for value in ("nan", "-inf", "many", too_low):
        with pytest.raises(SystemExit, match="2"):
            train.parse_args([f"--{flag}={value}"])
        line = capsys.readouterr().err.splitlines()[-1]
        assert f" error: argument --{flag}: {value} is not a" in line
        assert f" of at least {lowest}" in line


@pytest.mark.parametrize("flag", ["lr", "weight-decay"])
def test_a_number_has_to_be_finite(capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args([f"--{flag}=inf"])
    assert f"argument --{flag}: inf is not a number" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [f"--seed={2**32}", "--val-split=1", "--momentum=2"])
def test_a_flag_that_is_too_large_is_refused(capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args([flag])
    assert f"argument {flag.partition('=')[0]}: " in capsys.readouterr().err


def test_a_tilde_is_expanded_in_every_path(monkeypatch, tmp_path):
    (tmp_path / "cars").mkdir()
    (tmp_path / "w.pth").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train.parse_args(["--output-dir=~/run", "--dataset=~/cars", "--weights=~/w.pth"])
    assert args.output_dir == tmp_path / "run"
    assert args.dataset == str(tmp_path / "cars")
    assert args.weights == str(tmp_path / "w.pth")
    assert evaluation.parse_args(["--output-dir=~/run"]).output_dir == tmp_path / "run"
    assert train.parse_args([]).output_dir == Path(".")


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
    draw_cars(tmp_path / "cars")
    flags = "--resolution 64 --batch-size 16 --lr 0.004 --epochs 9 --step-size 5 --workers 1"
    folders = ["--dataset", tmp_path / "cars", "--output-dir", tmp_path / "run"]
    success(run_train(*flags.split(), *folders))
    # Chance is 0.125.
    assert load(tmp_path / "run/best_model.pth")["test_accuracy"] >= 0.35
