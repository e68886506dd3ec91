"""train.py in several processes: equal weights, exact counts, one set of files, and deaths."""

import functools
import json
import os
import signal
import zlib
from collections import Counter

import pytest
import torch
from files import assert_same_weights, load, read_history
from scripts import SMALL, refusal, run, success
from small import small_resnet
from spy import still_batch_norm

import train


@pytest.fixture
def torchrun(cars, tmp_path):
    """Run spy.py under torchrun, as the README says, on CPUs."""

    def call(processes: int, *flags, restarts: int = 0, **environment) -> tuple[int, str, str]:
        environment = {"SPY_NOTES": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
        command += [f"--nproc-per-node={processes}", "tests/spy.py", "train.py", "--dataset", cars]
        flags = [*SMALL, *flags, "--output-dir", tmp_path / "run"]
        return run(*command, *flags, environment=environment)

    return call


def assert_ranks_agree(cars, folder, processes: int, epochs: int):
    """That all have the weights that were saved, and decoded each photo once an epoch together."""
    last = load(folder / "run/last_checkpoint.pth")["model"]
    decoded = Counter()
    for rank in range(processes):
        assert_same_weights(last, load(folder / f"rank{rank}.pth"))
        decoded.update(json.loads((folder / f"rank{rank}.json").read_text()))
    assert len(list((folder / "run").iterdir())) == 5
    sources = train.find_splits(str(cars), [])
    splits = [train.load_split(sources, split) for split in ("train", "test")]
    names = [zlib.crc32(photo["image"]["bytes"]) for photos in splits for photo in photos]
    assert decoded == dict.fromkeys(names, epochs)


@pytest.mark.cpu("the processes run on CPUs, and so must the one they are compared with")
def test_recipe_three_processes_train_the_weights_that_one_trains_and_end_without_a_warning(
    ranks, run_train, cars, tmp_path, monkeypatch
):
    # Batch norm sees a process's own photos, so that it is held still here. Of the last batch of
    # seven photos the processes have three, two and two.
    flags = ["--batch-size", 9, "--epochs", 1, "--lr", 1e-6, "--output-dir"]
    first, *others = ranks(3, *flags, tmp_path / "run", SPY_NOTES=tmp_path, SPY_STILL=1)
    assert "3 processes, each on CPU" in success(first)
    assert first[2] == ""
    for status, out, err in others:
        assert (status, err) == (0, "")
        assert "epoch" not in out  # Older versions of gloo say who is connected.
    assert_ranks_agree(cars, tmp_path, processes=3, epochs=1)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", still_batch_norm)
    success(run_train(*flags, tmp_path / "one"))
    one = load(tmp_path / "one/last_checkpoint.pth")["model"]
    three = load(tmp_path / "run/last_checkpoint.pth")["model"]
    torch.manual_seed(0)
    start = train.build_network("none", 8).state_dict()
    step = torch.cat([(one[name] - start[name]).float().flatten() for name in start])
    difference = torch.cat([(one[name] - three[name]).float().flatten() for name in start])
    assert difference.norm() < 0.01 * step.norm()
    (row,) = read_history(tmp_path / "run")
    (expected,) = read_history(tmp_path / "one")
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4)


BATCH_SIZES = [(9, "is not a multiple of 2 processes"), (2, "batch norm needs two photos in each")]


@pytest.mark.parametrize("batch_size, reason", BATCH_SIZES)
def test_batches_that_two_processes_cannot_share_are_refused(ranks, tmp_path, batch_size, reason):
    for outcome in ranks(2, "--batch-size", batch_size, "--output-dir", tmp_path):
        err = refusal(outcome)
        assert f"--batch-size {batch_size}" in err
        assert reason in err


def test_what_the_first_process_refuses_ends_all_with_its_reason(ranks, finished):
    for outcome in ranks(2, "--output-dir", finished):
        assert "already holds last_checkpoint.pth" in refusal(outcome)


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


def test_an_overflow_in_one_of_two_processes_skips_the_step_in_both(ranks, tmp_path):
    flags = ["--amp", "--amp-dtype", "float16", "--epochs", 1, "--output-dir", tmp_path / "run"]
    for outcome in ranks(2, *flags, SPY_NOTES=tmp_path, SPY_OVERFLOW=2):
        success(outcome)
    last = load(tmp_path / "run/last_checkpoint.pth")
    assert_same_weights(last["model"], load(tmp_path / "rank1.pth"))
    assert all(value.isfinite().all() for value in last["model"].values())
    assert last["scaler"]["_growth_tracker"] == 0


def test_batch_norm_statistics_are_broadcast_for_an_evaluation_and_not_in_each_step(
    ranks, tmp_path
):
    outcomes = ranks(
        2, "--epochs", 2, "--output-dir", tmp_path / "run", SPY_NOTES=tmp_path, SPY_BUFFERS=1
    )
    for rank, outcome in enumerate(outcomes):
        success(outcome)
        notes = json.loads((tmp_path / f"buffers{rank}.json").read_text())
        assert notes == {"forward": 0, "evaluation": 2}
    weights = [load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    assert_same_weights(*weights)


def test_the_network_is_compiled_inside_distributed_data_parallel(ranks, tmp_path):
    # Around it, torch.compile would trace DistributedDataParallel's own Python, with graph breaks.
    flags = ["--epochs", 1, "--batch-size", 6, "--output-dir"]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        notes = tmp_path / f"notes_{name}"
        notes.mkdir()
        outcomes = ranks(2, *flags, tmp_path / name, *more, SPY_NOTES=notes, SPY_COMPILE=1)
        for status, _, err in outcomes:
            assert (status, err) == (0, "")
    for rank in range(2):
        compiled = json.loads((tmp_path / f"notes_compiled/graphs{rank}.json").read_text())
        assert compiled["breaks"] == 0
        assert set(compiled["sizes"]) == {3}  # A full batch's share; the last batch has two.
        plain = load(tmp_path / f"notes_plain/rank{rank}.pth")
        assert_same_weights(plain, load(tmp_path / f"notes_compiled/rank{rank}.pth"))


def test_ctrl_c_ends_all_processes(fork, cars, tmp_path):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--dataset", cars, *SMALL, "--epochs", 100_000, "--output-dir", tmp_path / "run"]
    start = functools.partial(fork, "train.py", *flags, **environment)
    processes = [start(RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    processes[0].wait_for("epoch   2/")
    for process in processes:  # As a terminal sends it to all at once.
        os.killpg(process.pid, signal.SIGINT)
    first, second = [process.end() for process in processes]
    assert first[0] == 130
    assert "interrupted: " in first[1].splitlines()[-1]
    assert second[0] in (1, 130)  # It may meet the end of the first one in a collective.
    assert len(read_history(tmp_path / "run")) >= 1


@pytest.mark.slow
def test_all_processes_take_the_flags_of_the_first_and_share_the_photos(torchrun, cars, tmp_path):
    others = f"--seed 5 --epochs 9 --output-dir {tmp_path / 'elsewhere'}"
    success(torchrun(2, "--batch-size", 6, "--epochs", 2, SPY_FLAGS=others))
    assert_ranks_agree(cars, tmp_path, processes=2, epochs=2)
    assert not (tmp_path / "elsewhere").exists()
    assert load(tmp_path / "run/last_checkpoint.pth")["settings"]["seed"] == 0
    assert len(read_history(tmp_path / "run")) == 2


@pytest.mark.slow
def test_runs_resume_across_process_counts(torchrun, run_train, tmp_path):
    flags = ["--batch-size", 6, "--resume", "--epochs"]
    success(torchrun(2, *flags, 1))
    out = success(run_train(*flags, 2, "--output-dir", tmp_path / "run"))
    assert "resuming after epoch 1 of 2" in out
    elsewhere = f"--output-dir {tmp_path / 'elsewhere'}"
    assert "resuming after epoch 2 of 3" in success(torchrun(3, *flags, 3, SPY_FLAGS=elsewhere))
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_a_restart_continues(torchrun, tmp_path):
    # In each epoch it decodes eight train photos, and four test photos: it dies in the third.
    status, _, err = torchrun(2, "--epochs", 4, SPY_EXIT="25")
    assert status != 0
    assert "rank      : 1" in err
    # The first may have been stopped before it had written the second epoch.
    assert [row["epoch"] for row in read_history(tmp_path / "run")] in ([1], [1, 2])
    (tmp_path / "exited").unlink()
    out = success(torchrun(2, "--epochs", 4, "--resume", restarts=1, SPY_EXIT="5"))
    assert (tmp_path / "exited").exists()
    assert "resuming after epoch" in out
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1, 2, 3, 4]
