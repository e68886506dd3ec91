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
sys.path.insert(0, {root!r})
import torch, train
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
status = train.run_command(train.main)
torch.save(model.state_dict(), {folder!r} + f"/rank{{rank}}.pth")
json.dump(loaded, open({folder!r} + f"/rank{{rank}}.json", "w"))
sys.exit(status)
"""


@pytest.fixture
def torchrun(cars, tmp_path):
    """Run SPY on `processes` processes; returns what subprocess.run returns."""

    def run(processes: int, *flags: object, dies: bool = False, restarts: int = 0) -> subprocess.CompletedProcess:
        names = dict(root=str(ROOT), folder=str(tmp_path), dies=dies, marker=str(tmp_path / "died"))
        (tmp_path / "spy.py").write_text(SPY.format(**names))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", str(tmp_path / "spy.py"), "--dataset", str(cars), *SMALL]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *map(str, flags)], env=environment, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.mark.parametrize("processes", [2, 3])
def test_weights_are_equal_and_each_photo_counts_once(torchrun, tmp_path, processes):
    done = torchrun(processes, "--batch-size", 6, "--epochs", 2, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best test accuracy") == 1 and f"{processes} × CPU" in done.stdout
    states = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(processes)]
    last = torch.load(tmp_path / "run/last_checkpoint.pth", weights_only=True)["model"]
    for name, value in last.items():
        assert all(torch.equal(value, state[name]) for state in states), name
    loaded = [tuple(item) for r in range(processes) for item in json.loads((tmp_path / f"rank{r}.json").read_text())]
    expected = [("train", epoch, row) for epoch in (1, 2) for row in range(16)] + [("test", 0, row) for row in range(8)]
    assert sorted(loaded) == sorted(expected)
    assert len(list((tmp_path / "run").iterdir())) == 4


def test_runs_resume_across_process_counts(torchrun, run_train, tmp_path):
    flags = ["--batch-size", 6, "--output-dir", tmp_path / "run"]
    assert torchrun(2, *flags, "--epochs", 1).returncode == 0
    status, out, err = run_train(*flags, "--epochs", 2, "--resume")
    assert status == 0 and "resumed after epoch 1" in out, err
    done = torchrun(3, *flags, "--epochs", 3, "--resume")
    assert done.returncode == 0 and "resumed after epoch 2" in done.stdout, done.stderr
    checkpoint = torch.load(tmp_path / "run/last_checkpoint.pth", weights_only=True)
    assert [row["epoch"] for row in checkpoint["history"]] == [1, 2, 3]


def test_a_mean_over_processes_is_the_mean_over_photos(torchrun, run_train, tmp_path):
    # Evaluation has no batch norm statistics of its own, so the same weights give the same figures.
    flags = ["--batch-size", 6, "--epochs", 1, "--lr", 1e-9]
    assert run_train(*flags, "--output-dir", tmp_path / "one")[0] == 0
    state = {"model": torch.load(tmp_path / "one/best_model.pth", weights_only=True)["model"]}
    torch.save(state, tmp_path / "weights.pth")
    one, three = tmp_path / "from_one", tmp_path / "from_three"
    flags += ["--weights", tmp_path / "weights.pth"]
    assert run_train(*flags, "--output-dir", one)[0] == 0
    assert torchrun(3, *flags, "--output-dir", three).returncode == 0
    rows = [torch.load(folder / "last_checkpoint.pth", weights_only=True)["history"][0] for folder in (one, three)]
    assert rows[0]["test_accuracy"] == rows[1]["test_accuracy"]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=0.3)


def test_a_batch_that_does_not_divide_is_refused(torchrun, tmp_path):
    done = torchrun(3, "--batch-size", 8, "--epochs", 1, "--output-dir", tmp_path / "run")
    assert done.returncode != 0 and "a multiple of the 3 processes" in done.stderr
    assert not list((tmp_path / "run").iterdir())


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


def test_shares_are_disjoint_and_complete():
    for ranks in (1, 2, 3, 4):
        parts = [list(train.batch_keys(8041, 128, rank=rank, ranks=ranks)) for rank in range(ranks)]
        rows = [row for part in parts for batch in part for _, row in batch]
        assert sorted(rows) == list(range(8041))
        assert all(abs(len(a) - len(parts[0][i])) <= 1 for part in parts for i, a in enumerate(part))
