"""train.py in several processes: equal weights, exact counts, one set of files, and deaths."""

import json
from collections import Counter

import pytest
import torch
from files import assert_same_weights, jpeg, load, read_history, write_dataset
from scripts import SMALL, refusal, run, success
from spy import photo_name, still_batch_norm

import train


@pytest.fixture
def torchrun(cars, tmp_path):
    """Run spy.py under torchrun, as the README says; its exit status, output and errors."""

    def call(processes: int, *flags, restarts: int = 0, **environment) -> tuple[int, str, str]:
        environment = {"SPY_NOTES": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
        command += [f"--nproc-per-node={processes}", "tests/spy.py", "--dataset", cars, *SMALL]
        return run(*command, *flags, small=False, environment=environment)

    return call


def assert_ranks_agree(folder, processes: int):
    """That all processes have the weights that were saved, once."""
    last = load(folder / "run/last_checkpoint.pth")["model"]
    for rank in range(processes):
        assert_same_weights(last, load(folder / f"rank{rank}.pth"))
    assert len(list((folder / "run").glob("[!.]*"))) == 4


def assert_photos_are_shared(cars, folder, shares: list[int], epochs: int):
    """That all together decoded each photo once an epoch.

    The processes have `shares` of the train photos.
    """
    decoded = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(len(shares))]
    counts = Counter(sum(decoded, []))
    found = train.load_cars(str(cars))
    expected = Counter()
    for photos in found.values():
        for item in photos:
            expected[photo_name(item["image"]["bytes"])] = epochs
    assert counts == expected
    train_names = {photo_name(item["image"]["bytes"]) for item in found["train"]}
    own = [sum(name in train_names for name in names) for names in decoded]
    assert own == [epochs * share for share in shares]


def test_help_ends_all_processes(ranks):
    for outcome in ranks(2, "--help"):
        assert "--batch-size" in success(outcome)


def test_three_processes_train_the_weights_that_one_trains(
    ranks, run_train, cars, tmp_path, monkeypatch
):
    # Batch norm sees a process's own photos, so that it is held still here. Of the last batch of
    # seven photos the processes have three, two and two.
    flags = ["--batch-size", 9, "--epochs", 1, "--lr", 1e-6]
    spied = {"SPY_NOTES": tmp_path, "SPY_STILL": 1}
    first, *others = ranks(3, *flags, "--output-dir", tmp_path / "run", **spied)
    out = success(first)
    assert "3 × CPU" in out
    assert out.count("best test accuracy") == 1
    for other in others:
        assert success(other) == ""
    assert_ranks_agree(tmp_path, processes=3)
    assert_photos_are_shared(cars, tmp_path, shares=[6, 5, 5], epochs=1)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "forward", still_batch_norm)
        success(run_train(*flags, "--output-dir", tmp_path / "one"))
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
    flags = ["--batch-size", batch_size, "--output-dir", tmp_path]
    for outcome in ranks(2, *flags):
        err = refusal(outcome)
        assert f"--batch-size {batch_size} of 16 train photos does not fit 2 processes" in err


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_world_size_without_torchrun_is_refused(fork, trained, tmp_path, script):
    flags = {
        "train.py": ["--dataset", trained.cars, *SMALL],
        "eval.py": ["--checkpoint", trained.run / "best_model.pth"],
    }
    process = fork(script, *flags[script], "--output-dir", tmp_path, WORLD_SIZE=2)
    err = refusal(process.end())
    assert "WORLD_SIZE" in err
    assert "torchrun" in err


def test_eval_under_torchrun_says_that_it_is_one_process(fork, trained, tmp_path):
    place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 9}
    flags = ["--checkpoint", trained.run / "best_model.pth", "--output-dir", tmp_path]
    assert "eval.py runs as one process" in refusal(fork("eval.py", *flags, **place).end())


def test_a_taken_port_is_said_in_one_line(fork, cars, tmp_path):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    process = fork("train.py", "--dataset", cars, *SMALL, "--output-dir", tmp_path, **place)
    assert "--master-port" in refusal(process.end())


def test_a_process_that_finds_another_data_set_is_refused(ranks, tmp_path):
    photos = [(jpeg(seed), 0) for seed in range(16)]
    other = write_dataset(tmp_path / "other", photos, photos[:8], list("abcdefgh"))
    first, second = ranks(2, "--output-dir", tmp_path / "run", SPY_DATASET=other)
    assert "process 1 has another data set than the first" in refusal(second)
    assert first[0] == 1


def test_a_stale_rank_is_refused(fork, cars, tmp_path):
    process = fork("train.py", "--dataset", cars, *SMALL, "--output-dir", tmp_path, RANK=1)
    assert "WORLD_SIZE" in refusal(process.end())


@pytest.mark.slow
def test_each_photo_counts_once_in_every_epoch_of_two_processes(torchrun, cars, tmp_path):
    flags = ["--batch-size", 6, "--epochs", 2, "--output-dir", tmp_path / "run"]
    success(torchrun(2, *flags))
    assert_ranks_agree(tmp_path, processes=2)
    assert_photos_are_shared(cars, tmp_path, shares=[8, 8], epochs=2)


@pytest.mark.slow
def test_runs_resume_across_process_counts(torchrun, run_train, tmp_path):
    flags = ["--batch-size", 6, "--output-dir", tmp_path / "run", "--resume", "--epochs"]
    success(torchrun(2, *flags, 1))
    assert "resumed after epoch 1" in success(run_train(*flags, 2))
    assert "resumed after epoch 2" in success(torchrun(3, *flags, 3))
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_all_processes_take_the_flags_and_the_run_of_the_first(torchrun, tmp_path):
    flags = ["--batch-size", 8, "--output-dir", tmp_path / "run", "--resume", "--epochs"]
    others = f"--lr 0.5 --output-dir {tmp_path / 'elsewhere'}"
    success(torchrun(2, *flags, 1, SPY_FLAGS=others))
    assert "resumed after epoch 1" in success(torchrun(2, *flags, 2, SPY_FLAGS=others))
    assert not (tmp_path / "elsewhere").exists()
    last = load(tmp_path / "run/last_checkpoint.pth")
    assert last["settings"]["lr"] == 0.01
    assert len(last["history"]) == 2
    assert_ranks_agree(tmp_path, processes=2)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_a_restart_goes_on(torchrun, tmp_path):
    flags = ["--batch-size", 8, "--epochs", 4, "--output-dir", tmp_path / "run"]
    # In each epoch it decodes eight train photos, and four test photos.
    in_epoch_3 = {"SPY_ENDS_AT": "25"}
    status, _, err = torchrun(2, *flags, **in_epoch_3)
    assert status != 0
    assert "exitcode" in err
    assert "rank      : 1" in err
    # The first may have been stopped before it had written the second epoch.
    assert [row["epoch"] for row in read_history(tmp_path / "run")] in ([1], [1, 2])
    (tmp_path / "ended").unlink()
    out = success(torchrun(2, *flags, "--resume", restarts=1, SPY_ENDS_AT="5"))
    assert (tmp_path / "ended").exists()
    assert "resumed after epoch" in out
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1, 2, 3, 4]
