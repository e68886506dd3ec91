"""What a run prints and writes, how it resumes, and how it ends: kills, Ctrl-C, full disks."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from draw_cars import draw_cars
from files import assert_same_run, assert_same_weights, load, read_folder, read_history
from matplotlib.figure import Figure
from scripts import HANGS, SMALL, children, is_running, refusal, run, success
from small import small_resnet

import train

FILES = ["best_model.pth", "history.csv", "last_checkpoint.pth", "settings.json"]
FILES += ["training_curves.png"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "old")


# ---------------------------------------------------------------- what is printed


def test_a_run_prints_its_start_its_epochs_and_its_end(run_train, tmp_path):
    out = success(run_train("--output-dir", tmp_path / "run", "--epochs", 3, "--resume"))
    history = read_history(tmp_path / "run")
    lines = out.splitlines()
    assert lines[0] == f"no run in {tmp_path / 'run'} yet: starting one"
    assert "data        16 train and 8 test photos, 8 classes" in lines
    assert "None" not in out and "{" not in out
    epochs = [line for line in lines if line.startswith("epoch ")]
    best = 0
    for epoch, (line, row) in enumerate(zip(epochs, history, strict=True), 1):
        percent = {name: f"{row[name]:.2%}" for name in row if "accuracy" in name}
        expected = f"epoch   {epoch}/3 | lr {row['lr']:#.4g} | "
        expected += f"train loss {row['train_loss']:.4f} acc {percent['train_accuracy']} | "
        expected += f"test loss {row['test_loss']:.4f} acc {percent['test_accuracy']} | "
        expected += f"{row['seconds']:.1f} s"
        # The first epoch of a start takes longer, so that the second one is the first to tell.
        expected += " | <1 min left" if epoch == 2 else ""
        expected += " | best" if row["test_accuracy"] > best or epoch == 1 else ""
        best = max(best, row["test_accuracy"])
        assert line == expected
        assert len(line) <= 110
    best_epoch = [row["test_accuracy"] for row in history].index(best) + 1
    end = rf"trained 3 epochs in \d\.\d min\. Last {history[-1]['test_accuracy']:.2%}\. "
    end += rf"Best {best:.2%} in epoch {best_epoch} \(chosen on the test split\): "
    assert re.fullmatch(end + re.escape(f"{tmp_path / 'run' / 'best_model.pth'}"), lines[-2])
    command = f"next: python eval.py --tta --checkpoint {tmp_path / 'run/best_model.pth'}"
    assert lines[-1] == command


def test_minutes_left_leave_out_the_first_epoch_of_a_start():
    row = {"lr": 0.1, "train_loss": 1, "train_accuracy": 0.5, "test_loss": 1, "test_accuracy": 0.5}
    seconds = [600, 600, 900, 60, 120]
    history = [{"epoch": epoch, "seconds": s, **row} for epoch, s in enumerate(seconds, 1)]
    line = train.epoch_line(history, "test", 90, first_epoch=3)
    assert line.startswith("epoch   5/90 | lr 0.1000 | ")
    assert line.endswith(" | 120.0 s | 128 min left")  # 85 epochs of 90 seconds


def test_without_a_terminal_a_line_a_minute_says_how_far_an_epoch_is(
    run_train, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "SECONDS_BETWEEN_LINES", 0)
    status, out, err = run_train("--output-dir", tmp_path, "--epochs", 1)
    assert status == 0
    assert err.splitlines() == [
        "epoch 1/1 train: 0 of 2 steps",
        "epoch 1/1 train: 1 of 2 steps",
        "epoch 1/1 test: 0 of 1 steps",
    ]
    monkeypatch.undo()
    assert run_train("--output-dir", tmp_path, "--epochs", 1, "--overwrite")[2] == ""


def test_a_terminal_shows_a_bar_with_the_epoch(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = run_train("--output-dir", tmp_path, "--epochs", 1)
    assert "epoch 1/1 train:" in err
    assert "epoch 1/1 test:" in err


# ---------------------------------------------------------------- what is written


def test_a_run_writes_plain_state_dicts_a_history_its_settings_and_curves(finished):
    assert names_in(finished) == FILES
    best = load(finished / "best_model.pth")
    assert set(best) == {"model", "classes", "resolution", "epoch", "test_accuracy", "settings"}
    small_resnet(num_classes=8).load_state_dict(best["model"], strict=True)
    assert {value.dtype for value in best["model"].values()} == {torch.float32, torch.int64}
    history = read_history(finished)
    columns = "epoch lr train_loss train_accuracy photos_per_second input_wait test_loss "
    assert list(history[0]) == (columns + "test_accuracy seconds").split()
    assert 0 <= history[0]["input_wait"] <= 1
    settings = json.loads((finished / "settings.json").read_text())
    assert settings["settings"] == best["settings"]
    assert settings["settings"]["resolution"] == 33
    assert settings["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (finished / "training_curves.png").read_bytes().startswith(b"\x89PNG")


DRAW_CURVES = train.draw_curves  # before a fixture replaces it


def test_curves_show_losses_accuracies_the_best_epoch_and_each_learning_rate():
    history = []
    for epoch in range(1, 5):
        row = {"epoch": epoch, "lr": 0.1 if epoch < 3 else 0.01, "train_loss": 1 / epoch}
        row |= {"train_accuracy": 0.2 * epoch, "val_loss": float("inf")}
        history.append(row | {"val_accuracy": [0.1, 0.7, 0.3, 0.7][epoch - 1]})
    figure = DRAW_CURVES(history, "val")
    assert isinstance(figure, Figure)
    loss, accuracy, lr = figure.axes
    assert loss.get_yscale() == "log"
    assert list(loss.lines[0].get_ydata()) == [1, 1 / 2, 1 / 3, 1 / 4]
    assert list(accuracy.lines[1].get_ydata()) == pytest.approx([10, 70, 30, 70])
    labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert labels == ["train", "val", "best: 70.00% in epoch 2"]
    assert list(accuracy.lines[2].get_xdata()) == [2]
    assert list(lr.lines[0].get_ydata()) == [0.1, 0.1, 0.01, 0.01]
    figure.savefig(io.BytesIO())


def test_the_best_epoch_is_kept_and_named_beside_the_last(run_train, tmp_path, monkeypatch):
    accuracies = iter([0.25, 0.75, 0.5, 0.75])
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: (evaluate(*args)[0], next(accuracies)))
    out = success(run_train("--output-dir", tmp_path, "--epochs", 4))
    best = load(tmp_path / "best_model.pth")
    assert (best["epoch"], best["test_accuracy"]) == (2, 0.75)
    is_best = [line.endswith("| best") for line in out.splitlines() if line.startswith("epoch")]
    assert is_best == [True, True, False, False]
    assert "Last 75.00%. Best 75.00% in epoch 2 (chosen on the test split)" in out


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


def test_minutes_are_wall_clock_with_saving_and_add_up_over_restarts(
    run_train, tmp_path, monkeypatch
):
    write_run = train.write_run

    def slow_write_run(*args):
        time.sleep(1.5)
        write_run(*args)

    monkeypatch.setattr(train, "write_run", slow_write_run)
    flags = ["--output-dir", tmp_path, "--resume"]
    success(run_train(*flags, "--epochs", 1))
    last = load(tmp_path / "last_checkpoint.pth")
    last["elapsed"] = 3600.0
    torch.save(last, tmp_path / "last_checkpoint.pth")
    start = time.perf_counter()
    out = success(run_train(*flags, "--epochs", 2))
    minutes = float(re.search(r"trained 2 epochs in ([\d.]+) min", out)[1])
    saved = load(tmp_path / "last_checkpoint.pth")
    assert 60 + 1.5 / 60 - 0.05 <= minutes <= 60 + (time.perf_counter() - start) / 60 + 0.05
    assert saved["elapsed"] > 3600 + saved["history"][-1]["seconds"]


# ---------------------------------------------------------------- a folder has one run


def test_an_existing_run_is_refused_and_overwritten_only_once_nothing_can_be_refused(
    run_train, old
):
    before = read_folder(old)
    err = refusal(run_train("--output-dir", old))
    for word in ("last_checkpoint.pth", "--resume", "--overwrite", "--output-dir"):
        assert word in err
    flags = ["--output-dir", old, "--epochs", 1, "--overwrite"]
    refusal(run_train(*flags, "--dataset", old / "misspelt"))
    refusal(run_train(*flags, "--weights", old / "misspelt.pth"))
    assert read_folder(old) == before
    success(run_train(*flags))
    assert len(read_history(old)) == 1


def test_a_kill_in_the_first_epoch_after_overwrite_leaves_nothing_of_the_old_run(
    run_train, fork, cars, old
):
    flags = ["--dataset", cars, *SMALL, "--lr", 0.003, "--epochs", 1, "--output-dir", old]
    # It is killed before the first file is complete.
    status, _, err = fork("train.py", *flags, "--overwrite", SPY_KILL=1).end()
    assert status == -signal.SIGKILL, err
    assert [name for name in names_in(old) if name[0] != "."] == ["settings.json"]
    # The flags that are left out are those of the run that was killed.
    out = success(run_train("--lr", 0.003, "--epochs", 1, "--output-dir", old, "--resume"))
    assert "has not saved an epoch yet: starting it again" in out
    assert load(old / "last_checkpoint.pth")["settings"]["lr"] == 0.003
    assert len(read_history(old)) == 1


def test_resume_takes_the_flags_of_a_run_that_has_not_saved_an_epoch(old, capfd):
    for name in FILES:
        if name != "settings.json":
            (old / name).unlink()
    train.main(["--resume", "--output-dir", str(old)])
    assert "settings    weights none, resolution 33, batch size 8, " in capfd.readouterr().out
    assert len(read_history(old)) == 2


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_of_two_runs_that_start_in_one_folder_the_second_is_refused(
    run_train, tmp_path, monkeypatch, flags
):
    build_training = train.build_training

    def start_another(*args):
        monkeypatch.setattr(train, "build_training", build_training)
        success(run_train("--epochs", 1, "--output-dir", tmp_path))
        return build_training(*args)

    monkeypatch.setattr(train, "build_training", start_another)
    err = refusal(run_train("--epochs", 2, "--output-dir", tmp_path, *flags))
    assert f"another run has started in {tmp_path}: choose another --output-dir" in err
    assert len(read_history(tmp_path)) == 1
    assert names_in(tmp_path) == FILES


def test_a_run_that_fails_before_it_saves_an_epoch_leaves_the_folder_free(
    run_train, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", Mock(side_effect=torch.OutOfMemoryError))
        assert "--batch-size" in refusal(run_train("--output-dir", tmp_path))
    assert names_in(tmp_path) == []
    success(run_train("--output-dir", tmp_path, "--epochs", 1))


@pytest.mark.parametrize("minutes, is_there", [(30, True), (90, False)])
def test_drafts_of_a_killed_run_are_removed_and_those_of_a_live_one_are_not(
    run_train, tmp_path, minutes, is_there
):
    draft = tmp_path / ".partial-1-last_checkpoint.pth"
    draft.touch()
    os.utime(draft, times=(time.time() - 60 * minutes,) * 2)
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    assert draft.exists() is is_there


# ---------------------------------------------------------------- resuming


@pytest.mark.cpu("cudnn.benchmark picks kernels by timing, so sums differ between runs")
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(run_train, cars, tmp_path, monkeypatch):
    flags = ["--step-size", 2, "--batch-size", 6, "--resume", "--output-dir"]
    success(run_train(*flags, tmp_path / "unbroken", "--epochs", 3))
    flags.append(tmp_path / "resumed")
    here = shutil.copytree(cars, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    success(run_train(*flags, "--epochs", 1, "--workers", 1, "--dataset", "here"))
    assert load(tmp_path / "resumed/best_model.pth")["settings"]["dataset"] == str(here)
    here.rename(tmp_path / "there")
    out = success(run_train(*flags, "--epochs", 3, "--workers", 2, "--dataset", "./there/"))
    assert re.match(r"resuming after epoch 1 of 3 \(best \d+\.\d\d% in epoch 1\)\n", out)
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


@pytest.mark.parametrize("epochs, is_done", [([], 2), (["--epochs", "1"], 1)])
def test_a_finished_run_says_so_and_ends_without_loading_anything(
    old, capfd, monkeypatch, epochs, is_done
):
    monkeypatch.setattr(train, "load_splits", Mock(side_effect=AssertionError))
    monkeypatch.setattr(train, "build_network", Mock(side_effect=AssertionError))
    train.main(["--resume", "--output-dir", str(old), *epochs])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"nothing to train: 2 epochs are done, of --epochs {is_done}"
    assert lines[1].startswith("trained 2 epochs in ")
    assert len(lines) == 3


def test_resume_writes_again_what_a_kill_left_behind(old):
    last = load(old / "last_checkpoint.pth")
    last["history"][-1]["test_accuracy"] = 1.0
    torch.save(last, old / "last_checkpoint.pth")
    (old / "history.csv").unlink()
    (old / "training_curves.png").unlink()
    train.main(["--resume", "--output-dir", str(old)])
    assert load(old / "best_model.pth")["epoch"] == 2
    assert names_in(old) == FILES


def test_resume_from_last_checkpoint_alone_says_when_best_model_comes(run_train, old):
    last = load(old / "last_checkpoint.pth")
    last["history"][0]["test_accuracy"] = 1.0
    torch.save(last, old / "last_checkpoint.pth")
    (old / "best_model.pth").unlink()
    flags = ["--resume", "--output-dir", old, "--step-size", 1, "--epochs", 3]
    out = success(run_train(*flags))
    assert out.startswith("resuming after epoch 2 of 3 (best 100.00% in epoch 1)\n")
    assert "best_model.pth is missing: it is saved once 100.00% is beaten" in out
    assert not (old / "best_model.pth").exists()


def test_a_run_of_an_earlier_version_resumes(run_train, finished, old):
    # Version 11e251b stored a schedule, and no elapsed time, settings.json or --val-split.
    last = load(old / "last_checkpoint.pth")
    seconds = sum(row["seconds"] for row in last["history"])
    del last["elapsed"], last["settings"]["val_split"]
    last["scheduler"] = {"last_epoch": 2, "_step_count": 3}
    last["optimizer"]["param_groups"][0]["initial_lr"] = 0.01
    torch.save(last, old / "last_checkpoint.pth")
    for name in ("settings.json", "training_curves.png"):
        (old / name).unlink()
    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", old]
    assert ": --val-split 0.5: " in refusal(run_train(*flags, "--val-split", 0.5)).replace(
        "train.py", ""
    )
    success(run_train(*flags))
    assert [row["lr"] for row in read_history(old)][:2] == [
        row["lr"] for row in read_history(finished)
    ]
    assert load(old / "last_checkpoint.pth")["elapsed"] > seconds
    assert names_in(old) == FILES


def test_resume_refuses_other_settings_and_other_photos(run_train, old, tmp_path):
    before = read_folder(old)
    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", old]
    others = ["--weights other.pth", "--resolution 64", "--batch-size 4", "--lr 0.5", "--seed 7"]
    others += ["--momentum 0.5", "--weight-decay 0.5", "--step-size 7", "--amp-dtype float16"]
    others += ["--val-split 0.25"]
    for other in others:
        assert f": {other}: the run to resume" in refusal(run_train(*flags, *other.split()))
    assert read_folder(old) == before
    draw_cars(tmp_path / "cars", train_per_class=3, test_per_class=1, width=80)
    err = refusal(run_train(*flags, "--dataset", tmp_path / "cars"))
    assert "has 16 train and 8 test photos, but there are 24 train and 8 test photos" in err


# ---------------------------------------------------------------- kills


def assert_whole(folder: Path, out: str):
    """That what a killed run left can be read, and lacks at most the last epoch it has printed."""
    for path in folder.glob("[!.]*.pth"):
        train.read_checkpoint(path)
    rows = read_history(folder) if (folder / "history.csv").exists() else []
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    printed = [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/", out, re.MULTILINE)]
    assert max(printed, default=0) <= len(rows) + 2


# The writes at which a run is killed: it writes last_checkpoint.pth and moves it into place, and
# does the same with best_model.pth, history.csv and training_curves.png. A run that is resumed
# writes them at its start.
QUICK = (3, [1, 4, 11])
SLOW = (24, [random.Random(seed).randint(1, 16) for seed in range(16)])


@pytest.mark.cpu("cudnn.benchmark picks kernels by timing, so sums differ between runs")
@pytest.mark.parametrize("split", [[], ["--val-split", 0.5]])
@pytest.mark.parametrize("epochs, writes", [QUICK, pytest.param(*SLOW, marks=pytest.mark.slow)])
def test_kills_at_any_write_lose_nothing(cars, tmp_path, fork, run_train, epochs, writes, split):
    flags = ["--dataset", cars, *SMALL, *split, "--epochs", epochs, "--resume", "--output-dir"]
    success(run_train(*flags, tmp_path / "unbroken"))
    folder = tmp_path / "killed"
    for write in writes:
        status, out, err = fork("train.py", *flags, folder, SPY_KILL=write).end()
        assert status == -signal.SIGKILL, err
        assert_whole(folder, out)
    success(run_train(*flags, folder))
    assert_same_run(tmp_path / "unbroken", folder)
    best, expected = [load(path / "best_model.pth") for path in (folder, tmp_path / "unbroken")]
    assert_same_weights(best["model"], expected["model"])
    assert [name for name in names_in(folder) if name[0] != "."] == FILES


@pytest.mark.cpu("cudnn.benchmark picks kernels by timing, so sums differ between runs")
def test_a_float16_run_that_was_killed_continues_as_if_it_had_not_been(fork, cars, tmp_path):
    flags = ["--dataset", cars, *SMALL, "--amp", "--amp-dtype", "float16", "--epochs", 3]
    flags += ["--resume", "--output-dir"]
    success(fork("train.py", *flags, tmp_path / "unbroken").end())
    # While it writes the second epoch; the third is training then.
    status, _, err = fork("train.py", *flags, tmp_path / "killed", SPY_KILL=9).end()
    assert status == -signal.SIGKILL, err
    out = success(fork("train.py", *flags, tmp_path / "killed").end())
    assert "resuming after epoch 1 of 3" in out
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")
    scalers = [
        load(tmp_path / name / "last_checkpoint.pth")["scaler"] for name in ("unbroken", "killed")
    ]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] > 0


# ---------------------------------------------------------------- Ctrl-C and signals


@pytest.fixture
def long_run(fork, cars, tmp_path):
    """Start a run with two workers that would take hours, and wait for its second epoch."""

    def start(*flags, **environment):
        folders = ["--dataset", cars, "--output-dir", tmp_path / "run"]
        flags = [*folders, *SMALL, "--epochs", 100_000, "--workers", 2, *flags]
        process = fork("train.py", *flags, **environment)
        process.wait_for("epoch   2/")
        return process

    return start


def test_ctrl_c_finishes_what_is_written_says_how_to_continue_and_leaves_no_process(
    long_run, run_train, tmp_path
):
    process = long_run(SPY_WRITE=0.3)
    workers = children(process.pid)
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)  # A terminal sends it to the workers too.
    status, out, err = process.end()
    assert (status, err) == (130, "")
    saved = len(read_history(tmp_path / "run"))
    advice = "interrupted: --resume continues after the last saved epoch"
    assert out.splitlines()[-1] == advice
    # The last epoch may have waited for the one before it to be written.
    assert len(re.findall("^epoch ", out, re.MULTILINE)) in (saved, saved + 1)
    assert names_in(tmp_path / "run") == FILES
    assert not any(is_running(worker) for worker in workers)
    flags = ["--output-dir", tmp_path / "run", "--resume", "--epochs", saved + 1]
    assert f"resuming after epoch {saved} of {saved + 1} " in success(run_train(*flags))


def test_a_second_ctrl_c_ends_at_once(long_run, tmp_path):
    process = long_run(SPY_WRITE=HANGS / 4)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.is_alive()  # It finishes what it is writing.
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.end()[0] == 130
    assert time.monotonic() - start < HANGS / 8


def test_sigterm_ends_it_at_once_and_loses_nothing(long_run, tmp_path):
    process = long_run()
    os.kill(process.pid, signal.SIGTERM)
    status, out, err = process.end()
    assert (status, err) == (-signal.SIGTERM, "")
    assert_whole(tmp_path / "run", out)


NOHUP = """
import signal, sys, train
train.main(sys.argv[1:])
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
"""


@pytest.mark.slow
def test_behind_nohup_ctrl_c_stays_ignored(cars, tmp_path):
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path]
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    success(run("-c", NOHUP, *flags, **nohup))


# ---------------------------------------------------------------- notebooks


def test_an_interrupt_in_a_notebook_leaves_no_workers_and_resumes(cars, tmp_path, monkeypatch):
    write_run = train.write_run
    writes = []

    def interrupt(run, folder):
        write_run(run, folder)
        writes.append(run["epoch"])
        if len(writes) % 3 == 2:  # Again, if Python raised the first in a place that ignores it.
            signal.raise_signal(signal.SIGINT)

    folders = ["--dataset", str(cars), "--output-dir", str(tmp_path)]
    flags = [*folders, *SMALL, "--workers", "2", "--resume"]
    monkeypatch.setattr(train, "write_run", interrupt)
    before = children(os.getpid())
    with pytest.raises(KeyboardInterrupt) as kept_traceback:  # As a notebook keeps it.
        train.main([*flags, "--epochs", "100000"])
    assert kept_traceback
    assert set(children(os.getpid())) <= set(before)
    epochs = len(read_history(tmp_path))
    assert epochs >= 2
    train.main([*flags, "--epochs", str(epochs + 1)])
    assert len(read_history(tmp_path)) == epochs + 1


def test_an_output_stream_of_a_notebook_is_enough(run_train, tmp_path, monkeypatch):
    class OutStream:
        """What IPython puts in place of sys.stdout has no `reconfigure`."""

        def __init__(self):
            self.text = ""

        def write(self, text: str):
            self.text += text

        def flush(self):
            pass

    stream = OutStream()
    monkeypatch.setattr(sys, "stdout", stream)
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    assert "trained 1 epochs" in stream.text


IMPORT = """
import json, os, signal
import matplotlib, pandas
def state():
    options = [pandas.get_option(name) for name in ("display.float_format", "display.width")]
    handlers = [str(signal.getsignal(signal.SIGINT)), str(signal.getsignal(signal.SIGTERM))]
    variables = {n: v for n, v in os.environ.items() if n in ("HOME", "MPLBACKEND", "HF_HOME")}
    params = {n: str(v) for n, v in matplotlib.rcParams.items() if n != "backend"}
    return json.dumps([str(options), handlers, variables, params])
before = state()
import train, eval
assert state() == before
"""


@pytest.mark.slow
def test_importing_the_scripts_changes_no_setting_of_the_caller():
    # A notebook's backend need not be installed where the script runs.
    backend = {"MPLBACKEND": "module://a_backend_that_is_not_installed"}
    success(run("-c", IMPORT, environment=backend))


# ---------------------------------------------------------------- mistakes and faults


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


@pytest.mark.parametrize("bug", [NameError, AttributeError, TypeError, IndexError, AssertionError])
@pytest.mark.parametrize("function", ["random_crop", "read_parquet", "build_network"])
def test_a_bug_keeps_its_type_and_traceback(run_train, tmp_path, monkeypatch, function, bug):
    monkeypatch.setattr(train, function, Mock(side_effect=bug("a slip")))
    with pytest.raises(bug, match="a slip"):
        run_train("--output-dir", tmp_path)


def test_a_worker_that_is_killed_ends_the_run_with_one_line(long_run):
    process = long_run()
    for worker in children(process.pid):
        os.kill(worker, signal.SIGKILL)
    err = refusal(process.end())
    assert "a worker process was killed, probably because the memory (RAM) is full" in err
    assert "--workers" in err


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed."
EXITED = "DataLoader worker (pid(s) 7, 8) exited unexpectedly"
SEGFAULT = "DataLoader worker (pid 7) is killed by signal: Segmentation fault."
BUS = "DataLoader worker (pid 7) is killed by signal: Bus error. Out of memory."
FULL = "unable to write to file </torch_1_2_3>: No space left on device (28)"
ERRORS = [(RuntimeError(text), "(RAM)") for text in (KILLED, EXITED)]
ERRORS += [(RuntimeError(text), "--shm-size") for text in (BUS, FULL)]
ERRORS += [(error("Connection reset by peer"), "(RAM)") for error in (ConnectionResetError,)]
ERRORS += [(EOFError(), "(RAM)")]


@pytest.mark.parametrize("error, remedy", ERRORS)
def test_an_error_of_a_worker_is_one_line_that_says_which_memory_is_full(error, remedy):
    with pytest.raises(train.InputError, match="--workers") as caught, train.worker_errors():
        raise error
    assert remedy in str(caught.value)


CAUGHT = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"


@pytest.mark.parametrize("text", [CAUGHT, SEGFAULT])
def test_another_error_in_a_worker_keeps_its_traceback(text):
    with pytest.raises(RuntimeError, match="DataLoader worker"), train.worker_errors():
        raise RuntimeError(text)


def test_workers_start_by_fork_on_linux_whatever_the_default(long_run):
    # A fork server, Python 3.14's default, would import torch again in each worker.
    process = long_run(SPY_FORKSERVER=1)
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children(process.pid)]
    # A forked process has the command line of its parent.
    assert commands == [Path(f"/proc/{process.pid}/cmdline").read_text()] * 2


@pytest.mark.slow
def test_no_deprecation_is_left_on_the_main_paths(cars, tmp_path):
    strict = {"PYTHONWARNINGS": "error,ignore::ImportWarning,ignore::ResourceWarning"}
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path]
    success(run("train.py", *flags, environment=strict))
    flags = ["--checkpoint", tmp_path / "best_model.pth", "--tta", "--num-gradcam", 2]
    success(run("eval.py", *flags, "--output-dir", tmp_path, environment=strict))
