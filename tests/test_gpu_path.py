"""What a GPU takes and a CPU need not, walked on a CPU: float16, GradScaler, fused SGD, states.

The overflows are forced in the scaled loss: as on a GPU, the forward pass is right, the gradients
are not finite, and GradScaler skips the step.
"""

import copy
import math
import signal

import pytest
import torch
from files import assert_same_run, assert_same_weights, jpeg, load, read_history
from scripts import SMALL, refusal, run, success
from small import small_resnet
from torch.nn.functional import cross_entropy

import train

FLOAT16 = ["--amp", "--amp-dtype", "float16"]


def overflow_at(monkeypatch, steps: set[int]):
    """Let the scaled loss overflow in these steps, which are counted from 1, of every GradScaler."""
    scale = torch.amp.GradScaler.scale
    taken = {}

    def scale_and_overflow(scaler, loss):
        taken[scaler] = taken.get(scaler, 0) + 1
        scaled = scale(scaler, loss)
        if taken[scaler] in steps:
            return scaled * math.inf
        return scaled

    monkeypatch.setattr(torch.amp.GradScaler, "scale", scale_and_overflow)


# ---------------------------------------------------------------- float16, GradScaler, fused SGD


LR = 1e-4


def flat(state: dict, names) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in names if "running" not in name]).float()


def plain_float16_run(cars, epochs: int) -> tuple[dict, dict, dict]:
    """A loop with SGD that is not fused: the network's state dicts before and after it, and the
    scaler's.
    """
    torch.manual_seed(0)
    model = small_resnet(num_classes=8).to(train.DEVICE, memory_format=torch.channels_last)
    start = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=1e-4, fused=False)
    scaler = torch.amp.GradScaler(train.DEVICE.type)
    photos = train.CarPhotos(train.load_cars(str(cars)), {"train": train.random_crop}, 33)
    for epoch in range(1, epochs + 1):
        for keys in train.all_batches(16, [8, 8], [], [epoch], seed=0):
            images, targets = torch.utils.data.default_collate(photos.__getitems__(keys))
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
def test_a_float16_run_equals_a_plain_loop_with_overflows(
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


def test_sgd_with_overflows_equals_sgd_that_is_not_fused(monkeypatch):
    # Of sixteens, which are rounded alike in both.
    ours = torch.nn.Conv2d(16, 16, 3, bias=False, device=train.DEVICE)
    ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    monkeypatch.setattr(train, "build_model", lambda *args: ours)
    args = train.parse_args(["--lr", "0.1"])
    states = train.build_states(args, {}, 16, torch.float16)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=1e-4, fused=False)
    sides = [(ours, states["optimizer"], states["scaler"])]
    sides.append((theirs, plain, torch.amp.GradScaler(train.DEVICE.type)))
    for step in range(1, 7):
        gradient = torch.randn(ours.weight.shape, device=train.DEVICE)
        for model, optimizer, scaler in sides:
            optimizer.zero_grad()
            scaler.scale((model.weight * gradient).sum()).backward()
            if step in (1, 4):
                model.weight.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(ours.weight, theirs.weight), step
    assert ours.weight.isfinite().all()


def test_a_loss_that_overflows_in_one_batch_does_not_end_the_run(run_train, tmp_path, monkeypatch):
    calls = []

    def overflow_once(*args, **options):
        calls.append(None)
        loss = cross_entropy(*args, **options)
        if len(calls) == 2:
            return loss * math.inf
        return loss

    monkeypatch.setattr(train.F, "cross_entropy", overflow_once)
    success(run_train(*FLOAT16, "--epochs", 2, "--output-dir", tmp_path))
    first, second = read_history(tmp_path)
    assert first["train_loss"] == math.inf
    assert math.isfinite(first["test_loss"])
    assert math.isfinite(second["train_loss"])


def test_a_float16_run_that_was_killed_goes_on_as_if_it_had_not_been(fork, cars, tmp_path):
    flags = ["--dataset", cars, *SMALL, *FLOAT16, "--epochs", 3, "--resume", "--output-dir"]
    success(fork("train.py", *flags, tmp_path / "unbroken").end())
    # While it writes the second epoch; the third is training then.
    status, _, err = fork("tests/spy.py", *flags, tmp_path / "killed", SPY_KILLED_AT=7).end()
    assert status == -signal.SIGKILL, err
    assert "1 of 3 epochs are done" in success(fork("train.py", *flags, tmp_path / "killed").end())
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")
    scalers = [
        load(tmp_path / name / "last_checkpoint.pth")["scaler"] for name in ("unbroken", "killed")
    ]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] > 0


def test_an_overflow_in_one_of_two_processes_skips_the_step_in_both(ranks, tmp_path):
    flags = [*FLOAT16, "--epochs", 1, "--output-dir", tmp_path / "run"]
    for outcome in ranks(2, *flags, SPY_NOTES=tmp_path, SPY_OVERFLOWS_AT=2):
        success(outcome)
    last = load(tmp_path / "run/last_checkpoint.pth")
    assert_same_weights(last["model"], load(tmp_path / "rank1.pth"))
    assert all(value.isfinite().all() for value in last["model"].values())
    assert last["scaler"]["_growth_tracker"] == 0


# ---------------------------------------------------------------- states, in the writer's thread


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
    build_states = train.build_states
    write_run = train.write_run

    def noting_build_states(*args):
        live.update(build_states(*args))
        return live

    def noting_write_run(run, *args):
        handed_over.append(storages(run))
        write_run(run, *args)

    monkeypatch.setattr(train, "build_states", noting_build_states)
    monkeypatch.setattr(train, "write_run", noting_write_run)
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    in_use = storages({name: part.state_dict() for name, part in live.items()})
    (copies,) = handed_over
    assert len(copies) == len(in_use)
    assert not copies & in_use
    assert {device for device, _ in copies} == {"cpu"}


def test_momentum_keeps_its_layout_in_a_checkpoint(run_train, tmp_path):
    # The fused kernels take parameters and momentum for arrays of the same order.
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    last = load(tmp_path / "last_checkpoint.pth")
    shapes = [value.shape for value in small_resnet(num_classes=8).parameters()]
    for shape, state in zip(shapes, last["optimizer"]["state"].values(), strict=True):
        expected = torch.empty(shape)
        if expected.ndim == 4:
            expected = expected.to(memory_format=torch.channels_last)
        assert state["momentum_buffer"].stride() == expected.stride()


# ---------------------------------------------------------------- what a machine has


def test_what_was_left_out_is_decided_anew_where_a_run_goes_on(cars, tmp_path, capfd, monkeypatch):
    flags = ["--dataset", str(cars), "--output-dir", str(tmp_path), "--resume", "--no-amp"]
    flags += "--weights none --resolution 33 --batch-size 8".split()
    compiled = []

    def note(network, **options):
        compiled.append(network)
        return network

    def start(*more: str) -> tuple[str, dict]:
        compiled.clear()
        train.main([*flags, *more])
        return capfd.readouterr().out, load(tmp_path / "last_checkpoint.pth")["settings"]

    monkeypatch.setattr(torch, "compile", note)
    monkeypatch.setattr(train, "DEFAULT_WORKERS", 0)
    out, settings = start("--epochs", "1")
    assert bool(compiled) is torch.cuda.is_available()
    assert settings["workers"] is settings["compile"] is settings["amp_dtype"] is None
    assert "workers=0" in out
    # As on a machine with more cores.
    monkeypatch.setattr(train, "DEFAULT_WORKERS", 1)
    out, settings = start("--epochs", "2", "--compile")
    assert len(compiled) == 2
    assert "workers=1" in out
    # What was given is the run's from then on.
    out, settings = start("--epochs", "3")
    assert len(compiled) == 2
    assert settings["compile"] is True


def test_each_batch_size_is_compiled_for_itself(monkeypatch):
    sizes = []

    def note_sizes(graph, inputs):
        sizes.append(
            [value.shape[0] for value in inputs if value.ndim == 4 and value.shape[1] == 3]
        )
        return graph

    compile_with_torch = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *args, **options: compile_with_torch(*args, **options, backend=note_sizes),
    )
    torch.compiler.reset()
    network = small_resnet(num_classes=8).eval()
    for batch_size in (2, 3):
        train.compile_full_batches(network, batch_size)(torch.zeros(batch_size, 3, 33, 33))
    found = [
        size for graph in sizes for size in graph if size in (2, 3) or not isinstance(size, int)
    ]
    assert all(isinstance(size, int) for size in found)
    assert {2, 3} <= set(found)


def test_a_gpu_that_torch_cannot_use_is_said_with_torchs_reason(run_train, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    out = success(run_train("--epochs", 1, "--output-dir", tmp_path))
    assert "driver on your system is too old (found version 11040)" in out.splitlines()[0]


@pytest.mark.slow
def test_a_torchcodec_of_another_torch_lets_pillow_decode(cars, tmp_path):
    (tmp_path / "torchcodec").mkdir()
    stub = "raise OSError('libcudart.so.13: cannot open shared object file')"
    (tmp_path / "torchcodec/__init__.py").write_text(stub)
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path / "run"]
    out = success(run("train.py", *flags, environment={"PYTHONPATH": f"{tmp_path}:tests"}))
    assert "same index as torch: libcudart.so.13" in out
    assert "Pillow decodes" in out
    report = ["--checkpoint", tmp_path / "run/best_model.pth", "--output-dir", tmp_path]
    success(run("eval.py", *report, environment={"PYTHONPATH": f"{tmp_path}:tests"}))


@pytest.mark.skipif(train.decode_image is None, reason="torchcodec cannot be loaded")
def test_pillow_decodes_a_jpeg_as_torchcodec_does(monkeypatch):
    for seed in range(3):
        expected = train.decode_photo(jpeg(seed, 300, 200))
        with monkeypatch.context() as patch:
            patch.setattr(train, "decode_image", None)
            photo = train.decode_photo(jpeg(seed, 300, 200))
        assert photo.stride() == expected.stride()
        assert (photo.int() - expected.int()).abs().max() <= 1


# ---------------------------------------------------------------- several processes


def test_a_refusal_ends_all_processes_without_another_word(ranks, tmp_path):
    for outcome in ranks(2, "--batch-size", 7, "--output-dir", tmp_path):
        assert "--batch-size 7" in refusal(outcome)


def test_one_process_loads_the_weights_and_hands_them_to_the_others(ranks, tmp_path):
    torch.save(small_resnet().state_dict(), tmp_path / "weights.pth")
    flags = ["--weights", tmp_path / "weights.pth", "--epochs", 1, "--lr", 1e-9]
    flags += ["--output-dir", tmp_path / "run"]
    for outcome in ranks(2, *flags, SPY_NOTES=tmp_path, SPY_LACKS=1):
        success(outcome)
    for rank in range(2):
        found = load(tmp_path / f"rank{rank}.pth")["conv1.weight"]
        expected = load(tmp_path / "weights.pth")["conv1.weight"]
        assert torch.allclose(found, expected, atol=1e-5)
