"""train.py in several processes: equal weights, exact counts, one set of files, and deaths."""

import contextlib
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.models
from files import assert_same_weights, load, read_history, rows, write_dataset
from scripts import HANGS, ROOT, SMALL, children, refusal, success
from small import small_resnet

# ---------------------------------------------------------------- what the ranks run in


def own_rank() -> int:
    return int(os.environ["RANK"])


def at_build(change: Callable):
    """A context within which `change` is called with each network that the script builds."""

    build = torchvision.models.resnet50

    def build_and_change(*args, **options):
        network = build(*args, **options)
        change(network)
        return network

    return mock.patch.object(torchvision.models, "resnet50", build_and_change)


@contextlib.contextmanager
def noted_weights(folder: Path):
    """Each rank leaves the weights that it ends with in `folder`, as load_weights reads them."""
    networks = []
    with at_build(networks.append):
        yield
    torch.save(networks[-1].state_dict(), folder / f"weights{own_rank()}.pth")


def load_weights(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load(folder / f"weights{number}.pth")


def still_batch_norm(layer, images):
    return images * layer.weight[:, None, None] + layer.bias[:, None, None]


@contextlib.contextmanager
def noted_photos(folder: Path):
    """Each rank leaves the checksums of the photos that it decoded in `folder`."""
    decoded = []

    def noting(decode: Callable) -> Callable:
        def note_and_decode(source, *args, **options):
            encoded = source if isinstance(source, bytes) else source.getvalue()
            decoded.append(zlib.crc32(encoded))
            return decode(source, *args, **options)

        return note_and_decode

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(PIL.Image, "open", noting(PIL.Image.open)))
        with contextlib.suppress(Exception):  # It may not load: then Pillow decodes.
            from torchcodec import decoders

            noting_decode = noting(decoders.decode_image)
            patches.enter_context(mock.patch.object(decoders, "decode_image", noting_decode))
        yield
    (folder / f"photos{own_rank()}.json").write_text(json.dumps(decoded))


@contextlib.contextmanager
def still_and_noted(folder: Path):
    still = mock.patch.object(torch.nn.BatchNorm2d, "forward", still_batch_norm)
    with still, noted_photos(folder), noted_weights(folder):
        yield


@pytest.mark.cpu("the processes run on CPUs, and so must the one they are compared with")
def test_recipe_three_processes_train_the_weights_that_one_trains_and_end_without_a_warning(
    ranks, run_train, tmp_path, monkeypatch
):
    # Batch norm sees a process's own photos, so that it is held still here. The last batch has six
    # photos. Of the test photos, the processes have three, three and two.
    photos = rows(23)
    cars = write_dataset(tmp_path / "cars", photos[:15], photos[15:], ["Audi", "BMW"])
    flags = ["--dataset", cars, "--batch-size", 9, "--epochs", 2, "--lr", 1e-6, "--output-dir"]
    inside = functools.partial(still_and_noted, tmp_path)
    first, *others = ranks(3, *flags, tmp_path / "run", inside=inside)
    assert "3 processes" in success(first)
    assert first[2] == ""
    for status, out, err in others:
        assert (status, err) == (0, "")
        assert "epoch" not in out  # Older versions of gloo say who is connected.

    decoded = Counter()
    for number in range(3):
        decoded.update(json.loads((tmp_path / f"photos{number}.json").read_text()))
    assert decoded == dict.fromkeys([zlib.crc32(photo) for photo, _ in photos], 2)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", still_batch_norm)
    success(run_train(*flags, tmp_path / "one"))
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("run", "one")]
    assert files[0] == files[1]
    one = load(tmp_path / "one/last_checkpoint.pth")["model"]
    three = load(tmp_path / "run/last_checkpoint.pth")["model"]
    for number in range(3):
        assert_same_weights(three, load_weights(tmp_path, number))
    torch.manual_seed(0)
    start = small_resnet(num_classes=2).state_dict()
    step = torch.cat([(one[name] - start[name]).float().flatten() for name in start])
    difference = torch.cat([(one[name] - three[name]).float().flatten() for name in start])
    assert difference.norm() < 0.01 * step.norm()
    for row, expected in zip(
        read_history(tmp_path / "run"), read_history(tmp_path / "one"), strict=True
    ):
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("batch_size, reason", [(9, "2 processes"), (2, "batch norm needs 4")])
def test_batches_that_two_processes_cannot_share_are_refused(ranks, tmp_path, batch_size, reason):
    for outcome in ranks(2, "--batch-size", batch_size, "--output-dir", tmp_path):
        err = refusal(outcome)
        for words in (f"--batch-size {batch_size}", reason):
            assert words in err


def test_a_folder_with_a_run_is_refused_by_all_processes(ranks, finished):
    for outcome in ranks(2, "--output-dir", finished):
        assert "last_checkpoint.pth" in refusal(outcome)


@contextlib.contextmanager
def second_cannot_read_weights(folder: Path):
    unreadable = contextlib.nullcontext()
    if own_rank() == 1:
        unreadable = mock.patch.object(torch, "load", side_effect=OSError("not here"))
    with unreadable, noted_weights(folder):
        yield


def test_one_process_loads_the_weights_and_hands_them_to_the_others(ranks, tmp_path):
    torch.save(small_resnet().state_dict(), tmp_path / "start.pth")
    flags = ["--weights", tmp_path / "start.pth", "--epochs", 1, "--lr", 1e-9]
    inside = functools.partial(second_cannot_read_weights, tmp_path)
    for outcome in ranks(2, *flags, "--output-dir", tmp_path / "run", inside=inside):
        success(outcome)
    expected = load(tmp_path / "start.pth")["conv1.weight"]
    for number in range(2):
        found = load_weights(tmp_path, number)["conv1.weight"]
        assert torch.allclose(found, expected, atol=1e-5)


@contextlib.contextmanager
def overflow_in_second_step_of_second(folder: Path):
    steps = []
    scale = torch.amp.GradScaler.scale

    def overflowing_scale(scaler, loss):
        steps.append(None)
        is_overflow = own_rank() == 1 and len(steps) == 2
        return scale(scaler, loss) * (math.inf if is_overflow else 1)

    overflowing = mock.patch.object(torch.amp.GradScaler, "scale", overflowing_scale)
    with overflowing, noted_weights(folder):
        yield


def test_an_overflow_in_one_of_two_processes_skips_the_step_in_both(ranks, tmp_path):
    flags = ["--amp", "--amp-dtype", "float16", "--epochs", 1, "--output-dir", tmp_path / "run"]
    inside = functools.partial(overflow_in_second_step_of_second, tmp_path)
    for outcome in ranks(2, *flags, inside=inside):
        success(outcome)
    last = load(tmp_path / "run/last_checkpoint.pth")
    assert_same_weights(last["model"], load_weights(tmp_path, 1))
    assert all(value.isfinite().all() for value in last["model"].values())
    assert last["scaler"]["_growth_tracker"] == 0


@contextlib.contextmanager
def noted_statistics(folder: Path):
    """Each rank leaves a mean of batch norm before each forward pass, and if it was in training."""
    noted = []

    def note(network, inputs):
        noted.append((network.training, network.bn1.running_mean.tolist()))

    with at_build(lambda network: network.register_forward_pre_hook(note)), noted_weights(folder):
        yield
    (folder / f"statistics{own_rank()}.json").write_text(json.dumps(noted))


def test_batch_norm_statistics_are_broadcast_for_an_evaluation_and_not_in_each_step(
    ranks, tmp_path
):
    inside = functools.partial(noted_statistics, tmp_path)
    for outcome in ranks(2, "--epochs", 2, "--output-dir", tmp_path / "run", inside=inside):
        success(outcome)
    first, second = [
        json.loads((tmp_path / f"statistics{number}.json").read_text()) for number in range(2)
    ]
    # In each of two epochs: two steps, and one batch of test photos.
    assert [is_training for is_training, _ in first] == 2 * [True, True, False]
    is_same = [mine == other for mine, other in zip(first, second, strict=True)]
    assert is_same == 2 * [True, False, True]
    assert_same_weights(load_weights(tmp_path, 0), load_weights(tmp_path, 1))


@contextlib.contextmanager
def noted_graphs(folder: Path):
    """Compile with a backend that notes the batch size of each graph, without compiling C++."""
    sizes = []

    def note_sizes(graph, inputs):
        images = [value for value in inputs if value.ndim == 4 and value.shape[1] == 3]
        sizes.extend(str(value.shape[0]) for value in images if value.shape[2] > 7)
        return graph

    compile_eagerly = functools.partial(torch.compile, backend=note_sizes)
    with mock.patch.object(torch, "compile", compile_eagerly), noted_weights(folder):
        yield
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    notes = {"sizes": sizes, "breaks": breaks}
    (folder / f"graphs{own_rank()}.json").write_text(json.dumps(notes))


def test_the_network_is_compiled_inside_distributed_data_parallel(ranks, tmp_path):
    # Around it, torch.compile would trace DistributedDataParallel's own Python, with graph breaks.
    flags = ["--epochs", 1, "--batch-size", 6, "--output-dir"]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        inside = functools.partial(noted_graphs, tmp_path / name)
        (tmp_path / name).mkdir()
        for outcome in ranks(2, *flags, tmp_path / name / "run", *more, inside=inside):
            success(outcome)
            assert outcome[2] == ""
    for number in range(2):
        graphs = json.loads((tmp_path / f"compiled/graphs{number}.json").read_text())
        # A full batch's share, in training and evaluation. The last batch has two.
        assert graphs == {"sizes": ["3", "3"], "breaks": 0}
        plain = load_weights(tmp_path / "plain", number)
        assert_same_weights(plain, load_weights(tmp_path / "compiled", number))


def test_ctrl_c_ends_all_processes(fork, cars, tmp_path):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--dataset", cars, *SMALL, "--epochs", 100_000, "--output-dir", tmp_path / "run"]
    start = functools.partial(fork, "train.py", *flags, **environment)
    processes = [start(RANK=number, LOCAL_RANK=number) for number in range(2)]
    processes[0].wait_for("epoch   2/")
    for process in processes:  # As a terminal sends it to all at once.
        os.killpg(process.pid, signal.SIGINT)
    first, second = [process.end() for process in processes]
    assert first[0] == 130
    assert "--resume" in first[1].splitlines()[-1]
    assert second[0] in (1, 130)  # It may meet the end of the first one in a collective.
    assert len(read_history(tmp_path / "run")) >= 1


@contextlib.contextmanager
def other_flags_in_the_second_process(*flags: str):
    if own_rank() == 1:
        sys.argv += flags
    yield


def test_processes_with_other_flags_are_refused_before_a_file_is_written(ranks, tmp_path):
    inside = functools.partial(other_flags_in_the_second_process, "--seed", "5")
    for outcome in ranks(2, "--epochs", 1, "--output-dir", tmp_path / "run", inside=inside):
        assert "differ in flags" in refusal(outcome)
    assert not list((tmp_path / "run").iterdir())


def test_a_process_that_finds_no_checkpoint_is_refused(ranks, run_train, tmp_path):
    success(run_train("--epochs", 1, "--output-dir", tmp_path / "run"))
    before = load(tmp_path / "run/last_checkpoint.pth")["epoch"]
    inside = functools.partial(
        other_flags_in_the_second_process, "--output-dir", str(tmp_path / "elsewhere")
    )
    flags = ["--epochs", 2, "--resume", "--output-dir", tmp_path / "run"]
    for outcome in ranks(2, *flags, inside=inside):
        assert "last_checkpoint.pth" in refusal(outcome)
    assert load(tmp_path / "run/last_checkpoint.pth")["epoch"] == before


def test_processes_get_equal_shares_of_an_odd_last_batch(ranks, tmp_path):
    # It has five photos: two for each process, and one that comes in another epoch.
    photos = rows(21)
    cars = write_dataset(tmp_path / "cars", photos[:17], photos[17:], ["Audi", "BMW"])
    flags = ["--dataset", cars, "--batch-size", 6, "--epochs", 1, "--output-dir", tmp_path / "run"]
    inside = functools.partial(noted_photos, tmp_path)
    for outcome in ranks(2, *flags, inside=inside):
        success(outcome)
    noted = [json.loads((tmp_path / f"photos{number}.json").read_text()) for number in range(2)]
    # In training 3, 3 and 2, and two of the test photos.
    assert [len(photos) for photos in noted] == [10, 10]


@contextlib.contextmanager
def noted_draws(folder: Path):
    """Each rank leaves the random numbers that its steps draw in `folder`."""
    drawn = []

    def draw(network, inputs):  # As mixup does.
        if network.training:
            drawn.extend((random.random(), np.random.rand(), torch.rand(1).item()))

    with at_build(lambda network: network.register_forward_pre_hook(draw)):
        yield
    (folder / f"draws{own_rank()}.json").write_text(json.dumps(drawn))


def test_each_process_draws_random_numbers_of_its_own(ranks, tmp_path):
    inside = functools.partial(noted_draws, tmp_path)
    for outcome in ranks(2, "--epochs", 1, "--output-dir", tmp_path / "run", inside=inside):
        success(outcome)
    first, second = [json.loads((tmp_path / f"draws{rank}.json").read_text()) for rank in range(2)]
    assert len(first) == len(second) == 6  # three in each of two steps
    assert len({*first, *second}) == 12


@contextlib.contextmanager
def second_cannot_write():
    unwritable = contextlib.nullcontext()
    if own_rank() == 1:
        unwritable = mock.patch.object(os, "replace", side_effect=OSError("not here"))
    with unwritable:
        yield


def test_the_first_process_alone_writes_the_files(ranks, tmp_path):
    flags = ["--epochs", 2, "--output-dir", tmp_path / "run"]
    for outcome in ranks(2, *flags, inside=second_cannot_write):
        success(outcome)
    assert load(tmp_path / "run/last_checkpoint.pth")["epoch"] == 2


OTHER_PHOTOS = {"classes": (16, ["a", "c"]), "numbers of photos": (17, ["a", "b"])}


@pytest.mark.parametrize("difference", OTHER_PHOTOS)
def test_processes_with_other_photos_are_refused(ranks, tmp_path, difference):
    count, names = OTHER_PHOTOS[difference]
    one = write_dataset(tmp_path / "one", rows(16), rows(4), ["a", "b"])
    other = write_dataset(tmp_path / "other", rows(count), rows(4), names)
    inside = functools.partial(other_flags_in_the_second_process, "--dataset", str(other))
    flags = ["--dataset", one, "--epochs", 1, "--output-dir", tmp_path / "run"]
    for outcome in ranks(2, *flags, inside=inside):
        assert f"differ in {difference}\n" in refusal(outcome)
    assert not list((tmp_path / "run").iterdir())


# ---------------------------------------------------------------- torchrun itself


class Torchrun:
    """train.py with the small network under torchrun, as the README says, on CPUs."""

    def __init__(self, folder: Path, processes: int, *flags, restarts: int = 0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--max-restarts={restarts}", f"--nproc-per-node={processes}"]
        command += ["tests/small.py", "train.py", *SMALL, *flags]
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.out = folder / f"out{processes}-{restarts}"
        self.err = folder / f"err{processes}-{restarts}"
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=out,
                stderr=err,
            )

    def kill(self, rank: int):
        for pid in children(self.process.pid):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables:
                os.kill(pid, signal.SIGKILL)
                return
        raise ProcessLookupError(f"rank {rank}")

    def end(self) -> tuple[int, str, str]:
        self.process.wait(HANGS)
        return self.process.returncode, self.out.read_text(), self.err.read_text()


@pytest.fixture
def torchrun(cars, tmp_path):
    started = []

    def start(processes: int, *flags, **options) -> Torchrun:
        folders = ["--dataset", cars, "--output-dir", tmp_path / "run"]
        started.append(Torchrun(tmp_path, processes, *folders, *flags, **options))
        return started[-1]

    yield start
    for run in started:
        run.process.terminate()  # torchrun then ends its processes.
        run.process.wait()


def saved_epochs(folder: Path) -> list[int]:
    if not (folder / "history.csv").exists():
        return []
    return [int(row["epoch"]) for row in read_history(folder)]


@pytest.mark.slow
def test_runs_resume_across_process_counts(torchrun, run_train, tmp_path):
    flags = ["--batch-size", 6, "--resume", "--epochs"]
    success(torchrun(2, *flags, 1).end())
    out = success(run_train(*flags, 2, "--output-dir", tmp_path / "run"))
    assert "after epoch 1" in out
    assert "after epoch 2" in success(torchrun(3, *flags, 3).end())
    assert saved_epochs(tmp_path / "run") == [1, 2, 3]


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_a_restart_continues(torchrun, tmp_path):
    folder = tmp_path / "run"

    def kill_second_after(epoch: int, run: Torchrun):
        deadline = time.monotonic() + HANGS
        while epoch not in saved_epochs(folder):
            assert run.process.poll() is None, run.end()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.kill(rank=1)

    run = torchrun(2, "--epochs", 100_000)
    kill_second_after(2, run)
    status, _, err = run.end()
    assert status != 0
    assert "rank      : 1" in err
    epochs = len(saved_epochs(folder))
    assert saved_epochs(folder) == list(range(1, epochs + 1))

    run = torchrun(2, "--epochs", epochs + 6, "--resume", restarts=1)
    kill_second_after(epochs + 1, run)
    out = success(run.end())
    assert out.count("resuming") == 2
    assert saved_epochs(folder) == list(range(1, epochs + 7))
