"""train.py in several processes: equal weights, exact counts, one set of files, and deaths."""

import json
import zlib
from collections import Counter

import pytest
import torch
from files import assert_same_weights, load, read_history
from scripts import SMALL, refusal, run, success
from spy import still_batch_norm

import train


@pytest.fixture
def torchrun(cars, tmp_path):
    """Run spy.py under torchrun, as the README says; its exit status, output and errors."""

    def call(processes: int, *flags, restarts: int = 0, **environment) -> tuple[int, str, str]:
        environment = {"SPY_NOTES": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
        command += [f"--nproc-per-node={processes}", "tests/spy.py", "--dataset", cars, *SMALL]
        flags = [*flags, "--output-dir", tmp_path / "run"]
        return run(*command, *flags, small=False, environment=environment)

    return call


def assert_ranks_agree(cars, folder, processes: int, epochs: int):
    """That all have the weights that were saved, and decoded each photo once an epoch together."""
    last = load(folder / "run/last_checkpoint.pth")["model"]
    decoded = Counter()
    for rank in range(processes):
        assert_same_weights(last, load(folder / f"rank{rank}.pth"))
        decoded.update(json.loads((folder / f"rank{rank}.json").read_text()))
    assert len(list((folder / "run").iterdir())) == 3
    splits = train.load_cars(str(cars)).values()
    names = [zlib.crc32(photo["image"]["bytes"]) for photos in splits for photo in photos]
    assert decoded == dict.fromkeys(names, epochs)


def test_three_processes_train_the_weights_that_one_trains_and_end_without_a_warning(
    ranks, run_train, cars, tmp_path, monkeypatch
):
    # Batch norm sees a process's own photos, so that it is held still here. Of the last batch of
    # seven photos the processes have three, two and two.
    flags = ["--batch-size", 9, "--epochs", 1, "--lr", 1e-6, "--output-dir"]
    first, *others = ranks(3, *flags, tmp_path / "run", SPY_NOTES=tmp_path, SPY_STILL=1)
    assert "3 × CPU" in success(first)
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
    start = train.build_model("none", 8).state_dict()
    step = torch.cat([(one[name] - start[name]).float().flatten() for name in start])
    difference = torch.cat([(one[name] - three[name]).float().flatten() for name in start])
    assert difference.norm() < 0.01 * step.norm()
    (row,) = read_history(tmp_path / "run")
    (expected,) = read_history(tmp_path / "one")
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4)


# Nine is no multiple of two, and two photos are one for each process.
@pytest.mark.parametrize("batch_size", [9, 2])
def test_batches_that_two_processes_cannot_share_are_refused(ranks, tmp_path, batch_size):
    for outcome in ranks(2, "--batch-size", batch_size, "--output-dir", tmp_path):
        assert f"--batch-size {batch_size} of 16 " in refusal(outcome)


@pytest.mark.slow
def test_all_processes_take_the_flags_of_the_first_and_share_the_photos(torchrun, cars, tmp_path):
    others = f"--lr 0.5 --epochs 9 --output-dir {tmp_path / 'elsewhere'}"
    success(torchrun(2, "--batch-size", 6, "--epochs", 2, SPY_FLAGS=others))
    assert_ranks_agree(cars, tmp_path, processes=2, epochs=2)
    assert not (tmp_path / "elsewhere").exists()
    assert [row["lr"] for row in read_history(tmp_path / "run")] == [0.01, 0.01]


@pytest.mark.slow
def test_runs_resume_across_process_counts(torchrun, run_train, tmp_path):
    flags = ["--batch-size", 6, "--resume", "--epochs"]
    success(torchrun(2, *flags, 1))
    out = success(run_train(*flags, 2, "--output-dir", tmp_path / "run"))
    assert "1 of 2 epochs are done" in out
    elsewhere = f"--output-dir {tmp_path / 'elsewhere'}"
    assert "2 of 3 epochs are done" in success(torchrun(3, *flags, 3, SPY_FLAGS=elsewhere))
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_a_restart_goes_on(torchrun, tmp_path):
    # In each epoch it decodes eight train photos, and four test photos: it dies in the third.
    status, _, err = torchrun(2, "--epochs", 4, SPY_ENDS_AT="25")
    assert status != 0
    assert "rank      : 1" in err
    # The first may have been stopped before it had written the second epoch.
    assert [row["epoch"] for row in read_history(tmp_path / "run")] in ([1], [1, 2])
    (tmp_path / "ended").unlink()
    out = success(torchrun(2, "--epochs", 4, "--resume", restarts=1, SPY_ENDS_AT="5"))
    assert (tmp_path / "ended").exists()
    assert "epochs are done" in out
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1, 2, 3, 4]
