"""What a run writes, and how it resumes: after kills, signals and full disks, anywhere."""

import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from draw_cars import draw_cars
from files import assert_same_run, assert_same_weights, load, read_folder, read_history
from scripts import HANGS, ROOT, SMALL, refusal, run, start, success
from small import small_resnet

import train

FILES = ["best_model.pth", "history.csv", "last_checkpoint.pth"]


@pytest.fixture
def old(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "old")


def test_a_run_writes_plain_state_dicts_and_a_history(finished):
    assert sorted(path.name for path in finished.iterdir()) == FILES
    best = load(finished / "best_model.pth")
    assert set(best) == {"model", "classes", "resolution", "epoch", "test_accuracy", "settings"}
    small_resnet(num_classes=8).load_state_dict(best["model"], strict=True)
    assert {value.dtype for value in best["model"].values()} == {torch.float32, torch.int64}
    history = read_history(finished)
    assert [row["lr"] for row in history] == pytest.approx([0.01, 0.001])
    assert 0 <= history[0]["input_wait"] <= 1


def test_the_best_epoch_is_kept_and_named_beside_the_last(run_train, tmp_path, monkeypatch):
    accuracies = iter([{"test_accuracy": share} for share in (0.25, 0.75, 0.5, 0.75)])
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | next(accuracies))
    out = success(run_train("--output-dir", tmp_path, "--epochs", 4))
    best = load(tmp_path / "best_model.pth")
    assert (best["epoch"], best["test_accuracy"]) == (2, 0.75)
    assert "; last test accuracy 75.00%" in out
    assert "best 75.00%, in epoch 2: chosen on the test split" in out


def test_the_next_epoch_trains_while_one_is_written(run_train, tmp_path, monkeypatch):
    begun = [threading.Event(), threading.Event()]
    not_begun = iter(begun)
    train_one_epoch = train.train_one_epoch
    write_bytes = Path.write_bytes

    def noting_train_one_epoch(*args):
        next(not_begun).set()
        return train_one_epoch(*args)

    def waiting_write_bytes(path, contents):
        assert begun[1].wait(HANGS), "the second epoch has not begun"
        return write_bytes(path, contents)

    monkeypatch.setattr(train, "train_one_epoch", noting_train_one_epoch)
    monkeypatch.setattr(Path, "write_bytes", waiting_write_bytes)
    success(run_train("--output-dir", tmp_path, "--epochs", 2))


def test_a_run_is_replaced_with_overwrite_alone_and_once_nothing_can_be_refused(run_train, old):
    before = read_folder(old)
    err = refusal(run_train("--output-dir", old))
    for word in ("last_checkpoint.pth", "--resume", "--overwrite", "--output-dir"):
        assert word in err
    flags = ["--output-dir", old, "--epochs", 1, "--overwrite"]
    refusal(run_train(*flags, "--dataset", old / "misspelt"))
    assert read_folder(old) == before
    success(run_train(*flags))
    assert len(read_history(old)) == 1


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(run_train, cars, tmp_path, monkeypatch):
    flags = ["--step-size", 2, "--batch-size", 6, "--resume", "--output-dir"]
    success(run_train(*flags, tmp_path / "unbroken", "--epochs", 3))
    flags.append(tmp_path / "resumed")
    here = shutil.copytree(cars, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    out = success(run_train(*flags, "--epochs", 1, "--workers", 1, "--dataset", "here"))
    assert "\n0 of 1 epochs are done" in out
    assert load(tmp_path / "resumed/best_model.pth")["settings"]["dataset"] == str(here)
    here.rename(tmp_path / "there")
    success(run_train(*flags, "--epochs", 3, "--workers", 2, "--dataset", "./there/"))
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_resume_takes_the_runs_settings_and_mends_what_a_kill_left_behind(old, capfd):
    last = load(old / "last_checkpoint.pth")
    last["history"][-1]["test_accuracy"] = 1.0
    torch.save(last, old / "last_checkpoint.pth")
    for name in ("best_model.pth", "history.csv"):
        (old / name).rename(old / f".partial-1-{name}")
    train.main(["--resume", "--output-dir", str(old)])
    out = capfd.readouterr().out
    assert " 'resolution': 33, 'batch_size': 8, 'epochs': 2," in out
    assert "\nepoch 2  lr 0.001  train_loss " in f"\n{out}"
    assert load(old / "best_model.pth")["epoch"] == 2
    assert sorted(path.name for path in old.iterdir()) == FILES


def test_resume_refuses_other_settings_and_other_photos(run_train, old, tmp_path):
    before = read_folder(old)
    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", old]
    others = ["--weights other.pth", "--resolution 64", "--batch-size 4", "--lr 0.5", "--seed 7"]
    others += ["--momentum 0.5", "--weight-decay 0.5", "--step-size 7", "--amp-dtype float16"]
    for other in others:
        assert f": {other}: the run to resume" in refusal(run_train(*flags, *other.split()))
    assert read_folder(old) == before
    draw_cars(tmp_path / "cars", train_per_class=3, test_per_class=1, width=80)
    err = refusal(run_train(*flags, "--dataset", tmp_path / "cars"))
    assert "the run began with {'train': 16, 'test': 8} photos" in err


def assert_whole(folder: Path, out: str):
    """That what a killed run left can be read, and holds what it has printed."""
    for path in folder.glob("[!.]*.pth"):
        train.read_checkpoint(path)
    rows = read_history(folder) if (folder / "history.csv").exists() else []
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    printed = [int(epoch) for epoch in re.findall(r"^epoch (\d+) ", out, re.MULTILINE)]
    assert max(printed, default=0) <= len(rows)


# The writes at which a run is killed: it writes last_checkpoint.pth and moves it into place, and
# does the same with best_model.pth and history.csv.
QUICK = (3, [1, 4, 9])
SLOW = (24, [random.Random(seed).randint(1, 12) for seed in range(16)])


@pytest.mark.parametrize("epochs, writes", [QUICK, pytest.param(*SLOW, marks=pytest.mark.slow)])
def test_kills_at_any_write_lose_nothing(cars, tmp_path, fork, run_train, epochs, writes):
    flags = ["--dataset", cars, *SMALL, "--epochs", epochs, "--resume", "--output-dir"]
    success(run_train(*flags, tmp_path / "unbroken"))
    folder = tmp_path / "killed"
    for write in writes:
        status, out, err = fork("tests/spy.py", *flags, folder, SPY_KILLED_AT=write).end()
        assert status == -signal.SIGKILL, err
        assert_whole(folder, out)
    success(run_train(*flags, folder))
    assert_same_run(tmp_path / "unbroken", folder)
    best, expected = [load(path / "best_model.pth") for path in (folder, tmp_path / "unbroken")]
    assert_same_weights(best["model"], expected["model"])
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.fixture
def long_run(fork, cars, tmp_path):
    """Start a run with a worker that would take hours, and wait for its second epoch."""
    flags = ["--dataset", cars, *SMALL, "--epochs", 100_000, "--output-dir", tmp_path / "run"]
    process = fork("train.py", *flags, "--workers", 1)
    process.wait_for("epoch 2 ")
    return process


@pytest.mark.parametrize("name, kill", [("SIGINT", os.killpg), ("SIGTERM", os.kill)])
def test_a_signal_ends_it_at_once_without_a_word(long_run, tmp_path, name, kill):
    kill(long_run.pid, signal.Signals[name])  # A terminal sends SIGINT to the workers too.
    status, out, err = long_run.end()
    assert (status, err) == (-signal.Signals[name], "")
    assert_whole(tmp_path / "run", out)


@pytest.mark.slow
@pytest.mark.parametrize("before, status", [(signal.SIG_DFL, -signal.SIGINT), (signal.SIG_IGN, 0)])
def test_ctrl_c_ends_the_imports_too_and_nothing_behind_nohup(cars, tmp_path, before, status):
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path]
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGINT, before)}
    with start("train.py", *flags, small=False, **nohup) as process:
        # The first library that takes long; Linux says which files a process has mapped.
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.stdout.readline()  # What main prints first, or nothing.
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANGS)
    assert (process.returncode, err) == (status, "")


def test_a_full_disk_leaves_the_old_files_and_says_why(run_train, old, tmp_path, request):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # bytes in a file
    (tmp_path / "new").mkdir()
    for folder in (old, tmp_path / "new"):
        before = read_folder(folder)
        flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", folder]
        err = refusal(run_train(*flags))
        assert f"cannot write {folder / 'last_checkpoint.pth'}: [Errno 27] File too large" in err
        assert read_folder(folder) == before


def test_a_worker_that_dies_ends_the_run(long_run):
    subprocess.run(["pkill", "-KILL", "-P", str(long_run.pid)])
    status, _, err = long_run.end()
    assert status == 1
    assert "DataLoader worker" in err.splitlines()[-1]


def test_a_worker_that_hands_nothing_over_ends_the_run(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(train, "decode_photo", lambda encoded: time.sleep(HANGS))
    with pytest.raises(RuntimeError, match="timed out"):
        run_train("--output-dir", tmp_path, "--workers", 1)


@pytest.mark.slow
def test_a_run_that_was_stopped_for_longer_than_the_timeout_goes_on(fork, cars, tmp_path):
    flags = ["--dataset", cars, *SMALL, "--epochs", 2, "--workers", 1, "--output-dir", tmp_path]
    process = fork("tests/spy.py", *flags, SPY_TIMEOUT=2)
    process.wait_for("epoch 1 ")
    subprocess.run(["pkill", "-STOP", "-P", str(process.pid)])
    time.sleep(1)  # The run waits for its worker now.
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.killpg(process.pid, signal.SIGCONT)
    success(process.end())


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
FULL = RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")
BUS = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Out of memory.")


@pytest.mark.parametrize("error, cure", [(OOM, "batch-"), (FULL, "shm-size"), (BUS, "shm-size")])
def test_too_small_a_memory_is_one_line(run_train, tmp_path, monkeypatch, error, cure):
    monkeypatch.setattr(train, "train_one_epoch", Mock(side_effect=error))
    assert cure in refusal(run_train("--output-dir", tmp_path))


def test_a_console_that_knows_no_multiplication_sign(run_train, tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    assert b" 1 ? CPU" in console.buffer.getvalue()


@pytest.mark.slow
def test_no_folder_named_tilde_is_left_where_there_is_no_home(cars, tmp_path):
    unknown_user = ["unshare", "--user", "--map-user=12345"]
    if shutil.which("unshare") is None or subprocess.run([*unknown_user, "true"]).returncode:
        pytest.skip("no process can be another user's here")
    flags = ["--dataset", cars, *SMALL, "--epochs", "1", "--output-dir", "run"]
    command = [*unknown_user, sys.executable, ROOT / "train.py", *flags]
    environment = {"PATH": os.environ["PATH"], "USER": "unknown"}
    subprocess.run(command, cwd=tmp_path, env=environment, timeout=HANGS)
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_no_deprecation_is_left_on_the_main_paths(cars, tmp_path):
    strict = {"PYTHONWARNINGS": "error,ignore::ImportWarning,ignore::ResourceWarning"}
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path]
    success(run("train.py", *flags, small=False, environment=strict))
    flags = ["--checkpoint", tmp_path / "best_model.pth", "--tta", "--num-gradcam", 2]
    success(run("eval.py", *flags, "--output-dir", tmp_path, small=False, environment=strict))
