"""train.py under torchrun, on gloo processes: equal weights, exact counts, one set of files, resuming, and deaths."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL

import train

# Runs train.py and writes, for each rank, the rows that it loaded and its final weights.
SPY = """
import json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import small
small.use_small_resnet()
import torch, train
if {still!r}:
    import test_distributed
    torch.nn.BatchNorm2d.forward = test_distributed.still_batch_norm
rank, loaded, load, build = os.environ["RANK"], [], train.CarPhotos.__getitem__, train.build_model
def spy(self, key):
    loaded.append((str(self.photos.split), *key))
    if {dies!r} and rank == "1" and key[0] == 3 and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        os._exit(3)
    return load(self, key)
def remember(*args):
    global model
    model = build(*args)
    return model
train.CarPhotos.__getitem__, train.build_model = spy, remember
if {other_flags!r} and rank == "1":
    sys.argv += ["--lr", "0.5", "--output-dir", {folder!r} + "/elsewhere"]
status = train.run_command(train.main)
torch.save(model.state_dict(), {folder!r} + f"/rank{{rank}}.pth")
json.dump(loaded, open({folder!r} + f"/rank{{rank}}.json", "w"))
sys.exit(status)
"""


@pytest.fixture
def torchrun(cars, tmp_path):
    """Run SPY on `processes` processes; returns what subprocess.run returns."""

    def run(
        processes: int,
        *flags: object,
        dies=False,
        still=False,
        other_flags=False,
        restarts: int = 0,
    ) -> subprocess.CompletedProcess:
        names = dict(
            root=str(ROOT),
            folder=str(tmp_path),
            dies=dies,
            still=still,
            other_flags=other_flags,
            marker=str(tmp_path / "died"),
        )
        (tmp_path / "spy.py").write_text(SPY.format(**names))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        command += [str(tmp_path / "spy.py"), "--dataset", str(cars), *SMALL]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as the README says, for restarts
        return subprocess.run(
            [*command, *map(str, flags)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def still_batch_norm(layer, images):
    return images * layer.weight[:, None, None] + layer.bias[:, None, None]


def weights(path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)
    return state.get("model", state)


def check_ranks(folder, processes: int, epochs: int):
    """That all ranks have the weights that were saved, and that each photo was used once an epoch."""
    last = weights(folder / "run/last_checkpoint.pth")
    for rank in range(processes):
        state = weights(folder / f"rank{rank}.pth")
        assert all(torch.equal(value, state[name]) for name, value in last.items())
    loaded = [
        tuple(item)
        for r in range(processes)
        for item in json.loads((folder / f"rank{r}.json").read_text())
    ]
    train_rows = [("train", epoch, row) for epoch in range(1, epochs + 1) for row in range(16)]
    assert sorted(loaded) == sorted(train_rows + [("test", 0, row) for row in range(8)])
    assert len(list((folder / "run").glob("[!.]*"))) == 4


def test_three_processes_train_the_weights_that_one_trains(
    torchrun, run_train, tmp_path, monkeypatch
):
    # Batch norm sees a process's own photos, so it is held still here; without it the steps have to be tiny.
    # Of the last batch of four photos the processes have two, one and one.
    flags = ["--batch-size", 6, "--epochs", 1, "--lr", 1e-6]
    done = torchrun(3, *flags, "--output-dir", tmp_path / "run", still=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best test accuracy") == 1 and "3 × CPU" in done.stdout
    check_ranks(tmp_path, processes=3, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "forward", still_batch_norm)
        status, _, err = run_train(*flags, "--output-dir", tmp_path / "one")
    assert status == 0, err
    one, three = (weights(tmp_path / run / "last_checkpoint.pth") for run in ("one", "run"))
    torch.manual_seed(0)
    start = train.build_model("none", 8).state_dict()
    step, difference = (
        torch.cat([(state[name] - other[name]).float().flatten() for name in start]).norm()
        for state, other in ((one, start), (one, three))
    )
    assert difference < 0.01 * step


@pytest.mark.slow
def test_each_photo_counts_once_in_every_epoch_of_two_processes(torchrun, tmp_path):
    done = torchrun(2, "--batch-size", 6, "--epochs", 2, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    check_ranks(tmp_path, processes=2, epochs=2)


@pytest.mark.slow
def test_runs_resume_across_process_counts(torchrun, run_train, tmp_path):
    flags = ["--batch-size", 6, "--output-dir", tmp_path / "run"]
    assert torchrun(2, *flags, "--epochs", 1).returncode == 0
    status, out, err = run_train(*flags, "--epochs", 2, "--resume")
    assert status == 0 and "resumed after epoch 1" in out, err
    done = torchrun(3, *flags, "--epochs", 3, "--resume")
    assert done.returncode == 0 and "resumed after epoch 2" in done.stdout, done.stderr
    checkpoint = torch.load(tmp_path / "run/last_checkpoint.pth", weights_only=True)
    assert [row["epoch"] for row in checkpoint["history"]] == [1, 2, 3]


@pytest.mark.parametrize(
    "batch_size, words", [(7, "a multiple of the 2"), (10, r"a last batch of at least 2 \(now 1\)")]
)
def test_batches_that_two_processes_cannot_share_are_refused(monkeypatch, batch_size, words):
    monkeypatch.setattr(train, "PROCESSES", 2)
    args = train.parse_args(["--batch-size", str(batch_size)])
    with pytest.raises(train.InputError, match=words):
        train.plan_batches(args, 31)


@pytest.mark.slow
def test_all_processes_take_the_flags_and_the_run_of_the_first(torchrun, tmp_path):
    flags = ["--batch-size", 8, "--output-dir", tmp_path / "run", "--resume"]
    for epochs in (1, 2):
        done = torchrun(2, "--epochs", epochs, *flags, other_flags=True)
        assert done.returncode == 0, done.stderr
    assert "resumed after epoch 1" in done.stdout and not (tmp_path / "elsewhere").exists()
    last = torch.load(tmp_path / "run/last_checkpoint.pth", weights_only=True)
    assert last["settings"]["lr"] == 0.01 and len(last["history"]) == 2
    for rank in range(2):
        state = weights(tmp_path / f"rank{rank}.pth")
        assert all(torch.equal(value, state[name]) for name, value in last["model"].items())


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_a_restart_goes_on(torchrun, tmp_path):
    flags = ["--batch-size", 8, "--epochs", 4, "--output-dir", tmp_path / "run"]
    start = time.perf_counter()
    done = torchrun(2, *flags, dies=True)
    assert done.returncode != 0 and time.perf_counter() - start < 120
    assert "exitcode" in done.stderr and "rank      : 1" in done.stderr
    (tmp_path / "died").unlink()
    done = torchrun(2, *flags, "--resume", dies=True, restarts=1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists() and "resumed after epoch" in done.stdout
    checkpoint = torch.load(tmp_path / "run/last_checkpoint.pth", weights_only=True)
    assert [row["epoch"] for row in checkpoint["history"]] == [1, 2, 3, 4]


def test_shares_are_disjoint_and_complete(monkeypatch):
    for ranks in (1, 2, 3, 4):
        monkeypatch.setattr(train, "PROCESSES", ranks)
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(train, "RANK", rank)
            parts.append(list(train.split_into_batches(range(8041), 128, 1)))
        rows = [row for part in parts for batch in part for _, row in batch]
        assert sorted(rows) == list(range(8041))
        assert all(
            abs(len(a) - len(parts[0][i])) <= 1 for part in parts for i, a in enumerate(part)
        )
