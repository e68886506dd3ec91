"""What a run prints and writes, how it resumes, and how it ends: kills, Ctrl-C, full disks."""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
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
from types import SimpleNamespace
from unittest.mock import Mock, patch

import datasets
import pytest
import torch
from draw_cars import draw_cars
from files import (
    assert_same_run,
    assert_same_weights,
    jpeg,
    load,
    read_folder,
    read_history,
    write_dataset,
)
from files import rows as photo_rows
from scripts import HANGS, SMALL, children, is_running, refusal, run, success
from small import small_resnet

import train

FILES = ["best_model.pth", "history.csv", "last_checkpoint.pth", "settings.json"]
FILES += ["training_curves.png"]
SAME_KERNELS = "cudnn.benchmark picks kernels by timing, so sums differ between runs"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def epoch_lines(out: str) -> list[str]:
    """The lines that a run prints, one for each epoch."""
    return re.findall(r"^epoch +\d+/.*", out, re.MULTILINE)


@pytest.fixture
def old(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "old")


@pytest.fixture
def choose_accuracies(monkeypatch):
    """Let the evaluations of a run have these accuracies, and the losses that they have."""

    def choose(*accuracies: float):
        evaluate = train.evaluate
        values = iter(accuracies)

        def chosen(*args, **options):
            return evaluate(*args, **options)[0], next(values)

        monkeypatch.setattr(train, "evaluate", chosen)

    return choose


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of the scripts. Only the test moves it: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=0.0)

    def tell() -> float:
        clock.now += 1e-6  # Nothing takes no time at all: rates divide by it.
        return clock.now

    monkeypatch.setattr(time, "perf_counter", tell)
    return clock


@pytest.fixture
def choose_seconds(clock, monkeypatch):
    """Let the evaluations of a run take these seconds."""

    def choose(*seconds: float):
        evaluate = train.evaluate
        values = iter(seconds)

        def slow_evaluate(*args, **options):
            clock.now += next(values)
            return evaluate(*args, **options)

        monkeypatch.setattr(train, "evaluate", slow_evaluate)

    return choose


# ---------------------------------------------------------------- what is printed


def test_a_run_prints_its_start_its_epochs_and_its_end(run_train, tmp_path):
    folder = tmp_path / "run"
    out = success(run_train("--output-dir", folder, "--epochs", 3, "--resume"))
    history = read_history(folder)
    lines = out.splitlines()
    assert "no run" in lines[0] and str(folder) in lines[0]
    for words in ("16 train", "8 test", "8 classes"):
        assert words in out
    assert "None" not in out and "{" not in out

    best = 0
    for epoch, (line, row) in enumerate(zip(epoch_lines(out), history, strict=True), 1):
        assert re.match(rf"epoch +{epoch}/3 ", line)
        for figure in (
            f"lr {row['lr']:#.4g} ",
            f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.2%} ",
            f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:.2%} ",
            f"{row['seconds']:.1f} s",
        ):
            assert figure in line
        assert ("<1 min left" in line) == (epoch == 2)
        assert ("best" in line) == (row["test_accuracy"] > best or epoch == 1)
        best = max(best, row["test_accuracy"])
        assert len(line) <= 120

    best_epoch = [row["test_accuracy"] for row in history].index(best) + 1
    end = "\n".join(lines[lines.index(epoch_lines(out)[-1]) + 1 :])
    for words in (
        "3 epochs",
        " min",
        f"{history[-1]['test_accuracy']:.2%}",
        f"{best:.2%} in epoch {best_epoch}",
        "test split",
        str(folder / "best_model.pth"),
    ):
        assert words in end
    assert re.search(rf"python eval\.py .*--checkpoint {re.escape(str(folder))}/best", lines[-1])


def test_minutes_left_leave_out_the_first_epoch_of_a_start(run_train, old, choose_seconds):
    choose_seconds(900, 300, 60, 60)
    flags = ["--resume", "--output-dir", old, "--step-size", 1, "--epochs", 6]
    lines = epoch_lines(success(run_train(*flags)))
    assert "900.0 s" in lines[0]
    left = [re.search(r"(\d+) min left", line) for line in lines]
    # Two epochs of 300 seconds, then one of (300 + 60) / 2.
    assert [found and found[1] for found in left] == [None, "10", "3", None]


def test_without_a_terminal_a_line_a_minute_says_how_far_an_epoch_is(
    run_train, tmp_path, monkeypatch
):
    flags = ["--output-dir", tmp_path, "--epochs", 1]
    with monkeypatch.context() as patched:
        patched.setattr(train, "SECONDS_BETWEEN_LINES", 0)
        status, _, err = run_train(*flags)
    assert status == 0
    for words in ("epoch 1/1 train: 1 of 2", "epoch 1/1 test: 0 of 1"):
        assert words in err
    assert "\r" not in err
    assert run_train(*flags, "--overwrite")[2] == ""  # An epoch takes less than a minute.


def test_a_terminal_shows_a_bar_with_the_epoch(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = run_train("--output-dir", tmp_path, "--epochs", 1)
    assert "\repoch 1/1 train:" in err
    assert "\repoch 1/1 test:" in err


def test_the_command_that_comes_next_works_without_a_test_split(run_train, run_eval, tmp_path):
    write_dataset(tmp_path / "cars", photo_rows(16), photo_rows(4), ["a", "b"])
    (tmp_path / "cars/data/test-0.parquet").unlink()
    flags = ["--dataset", tmp_path / "cars", "--val-split", 0.25, "--output-dir", tmp_path / "run"]
    out = success(run_train(*flags, "--epochs", 1))
    command = out.splitlines()[-1].partition("eval.py ")[2].split()
    assert command[command.index("--split") + 1] == "val"
    assert "of 4, " in success(run_eval(*command, "--num-gradcam", 0))


def test_a_single_photo_and_epoch_are_not_plural(run_train, run_eval, tmp_path):
    write_dataset(tmp_path / "cars", photo_rows(8), photo_rows(1), ["a", "b"])
    flags = ["--dataset", tmp_path / "cars", "--epochs", 1, "--output-dir", tmp_path / "run"]
    out = success(run_train(*flags, "--batch-size", 8))
    for words in ("8 train and 1 test photo,", "1 step per epoch", "trained 1 epoch in"):
        assert words in out
    flags = ["--checkpoint", tmp_path / "run/best_model.pth", "--num-gradcam", 0]
    assert "1 test photo," in success(run_eval(*flags))


# ---------------------------------------------------------------- what is written


def test_a_run_writes_plain_state_dicts_a_history_its_settings_and_curves(finished):
    assert names_in(finished) == FILES
    best = load(finished / "best_model.pth")
    assert set(best) >= {"model", "classes", "resolution", "epoch", "test_accuracy"}
    assert len(best["classes"]) == 8 and best["resolution"] == 33
    small_resnet(num_classes=8).load_state_dict(best["model"], strict=True)
    assert {value.dtype for value in best["model"].values()} == {torch.float32, torch.int64}
    history = read_history(finished)
    assert best["test_accuracy"] == max(row["test_accuracy"] for row in history)
    columns = "epoch lr train_loss train_accuracy photos_per_second input_wait test_loss "
    assert list(history[0]) == (columns + "test_accuracy seconds").split()
    assert 0 <= history[0]["input_wait"] <= 1
    settings = json.loads((finished / "settings.json").read_text())
    assert settings["settings"]["resolution"] == 33
    assert settings["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (finished / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_show_losses_accuracies_the_best_epoch_and_each_learning_rate(
    run_train, tmp_path, figures, monkeypatch
):
    results = iter([(2.5, 0.1), (float("inf"), 0.7), (1.5, 0.3), (1.0, 0.7)])
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: next(results))
    monkeypatch.setattr(train, "lr_factor", lambda args, epochs_done: 0.1 ** (epochs_done // 2))
    flags = ["--val-split", 0.5, "--epochs", 4]
    success(run_train(*flags, "--output-dir", tmp_path))
    history = read_history(tmp_path)
    loss, accuracy, lr = figures[-1].axes
    assert loss.get_yscale() == "log"
    curves = {line.get_label(): line.get_ydata() for line in loss.lines}
    assert list(curves["train"]) == pytest.approx([row["train_loss"] for row in history])
    assert list(curves["val"]) == pytest.approx([2.5, float("nan"), 1.5, 1.0], nan_ok=True)
    curves = {line.get_label(): line.get_ydata() for line in accuracy.lines}
    percent = [100 * row["train_accuracy"] for row in history]
    assert list(curves["train"]) == pytest.approx(percent)
    assert list(curves["val"]) == pytest.approx([10, 70, 30, 70])
    (mark,) = (line for line in accuracy.lines if "best" in line.get_label())
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2], [70])
    legend = " ".join(text.get_text() for text in accuracy.get_legend().get_texts())
    for words in ("train", "val", "70.00%", "epoch 2"):
        assert words in legend
    assert list(lr.lines[0].get_ydata()) == pytest.approx([0.01, 0.01, 0.001, 0.001])
    figures[-1].canvas.print_figure(io.BytesIO())  # It can be drawn.


def test_the_best_epoch_is_kept_and_named_beside_the_last(run_train, tmp_path, choose_accuracies):
    choose_accuracies(0.25, 0.75, 0.5, 0.75)
    flags = ["--epochs", 4, "--output-dir"]
    out = success(run_train(*flags, tmp_path / "run"))
    best = load(tmp_path / "run/best_model.pth")
    assert (best["epoch"], best["test_accuracy"]) == (2, 0.75)
    last = load(tmp_path / "run/last_checkpoint.pth")
    assert not torch.equal(best["model"]["fc.weight"], last["model"]["fc.weight"])
    assert ["best" in line for line in epoch_lines(out)] == [True, True, False, False]
    end = out[out.index(epoch_lines(out)[-1]) :]
    assert "Last 75.00%" in end and "Best 75.00% in epoch 2" in end


@pytest.mark.cpu(SAME_KERNELS)
def test_the_next_epoch_trains_while_one_is_written_and_does_not_change_it(
    run_train, tmp_path, monkeypatch
):
    for name in ("one", "first"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(train, "lr_factor", lambda *args: 1.0)  # whatever --epochs is
    success(run_train("--output-dir", tmp_path / "one", "--epochs", 1))
    save, step = torch.save, torch.amp.GradScaler.step
    steps = itertools.count(1)
    second_epoch = threading.Event()

    def noting_step(*args, **options):
        result = step(*args, **options)
        if next(steps) == 3:  # An epoch has two.
            second_epoch.set()
        return result

    def waiting_save(contents, file):
        assert second_epoch.wait(HANGS), "the second epoch has not begun"
        first = tmp_path / "first/last_checkpoint.pth"
        if not first.exists():
            save(contents, first)
        save(contents, file)

    monkeypatch.setattr(torch.amp.GradScaler, "step", noting_step)
    monkeypatch.setattr(torch, "save", waiting_save)
    success(run_train("--output-dir", tmp_path / "two", "--epochs", 2))
    assert_same_run(tmp_path / "one", tmp_path / "first")


def test_a_file_is_synced_as_a_whole_and_then_moved_into_place(run_train, tmp_path, monkeypatch):
    fsync, replace = os.fsync, os.replace
    synced = {}
    moved = []

    def noting_fsync(descriptor):
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        fsync(descriptor)

    def noting_replace(source, destination):
        status = Path(source).stat()
        moved.append((status.st_size, synced[status.st_ino]))
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    assert moved and all(size == size_synced for size, size_synced in moved)


def test_minutes_are_wall_clock_with_saving_and_add_up_over_restarts(
    run_train, tmp_path, monkeypatch, clock, choose_seconds
):
    fsync = os.fsync
    written = []

    def slow_fsync(descriptor):
        clock.now += 60
        written.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    choose_seconds(600, 600, 600)
    for epochs in (1, 2, 3):
        flags = ["--output-dir", tmp_path, "--resume", "--epochs", epochs]
        out = success(run_train(*flags))
        minutes = float(re.search(rf"{epochs} epochs? in ([\d.]+) min", out)[1])
        # Ten for each epoch, and one for each file that was written in the meantime.
        assert 10 * epochs + 1 <= minutes <= 10 * epochs + len(written)


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


@contextlib.contextmanager
def killed_at_write(count: int):
    """Kill the process when it syncs or moves a file, the `count`-th time.

    It syncs a draft first: half of it is left then. When it moves it, the draft is complete.
    """
    fsync, replace = os.fsync, os.replace
    writes = itertools.count(1)

    def killed_fsync(descriptor):
        if next(writes) == count:
            half = os.fstat(descriptor).st_size // 2
            os.truncate(f"/proc/self/fd/{descriptor}", half)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def killed_replace(source, destination):
        if next(writes) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)

    with patch("os.fsync", killed_fsync), patch("os.replace", killed_replace):
        yield


def test_a_kill_in_the_first_epoch_after_overwrite_leaves_nothing_of_the_old_run(
    run_train, fork, cars, old
):
    flags = ["--lr", 0.003, "--epochs", 1, "--output-dir", old]
    # It is killed before the first file is complete.
    inside = functools.partial(killed_at_write, 1)
    command = ["train.py", "--dataset", cars, *SMALL, *flags, "--overwrite"]
    status, _, err = fork(*command, inside=inside).end()
    assert status == -signal.SIGKILL, err
    # settings.json may be there: it is that of the new run.
    assert [name for name in names_in(old) if name[0] != "." and name != "settings.json"] == []
    success(run_train(*flags, "--resume"))
    assert load(old / "last_checkpoint.pth")["settings"]["lr"] == 0.003
    assert len(read_history(old)) == 1


def test_a_run_that_fails_before_it_saves_an_epoch_leaves_the_folder_free(
    run_train, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(torch.amp.GradScaler, "step", Mock(side_effect=torch.OutOfMemoryError))
        assert "--batch-size" in refusal(run_train("--output-dir", tmp_path))
    success(run_train("--output-dir", tmp_path, "--epochs", 1, "--batch-size", 4))


def test_after_a_kill_in_the_first_epoch_the_corrected_command_just_runs(
    run_train, fork, cars, tmp_path
):
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path / "run"]
    status, _, err = fork("train.py", *flags, inside=functools.partial(killed_at_write, 1)).end()
    assert status == -signal.SIGKILL, err
    success(run_train("--epochs", 1, "--lr", 0.003, "--output-dir", tmp_path / "run"))
    assert load(tmp_path / "run/last_checkpoint.pth")["settings"]["lr"] == 0.003


def test_after_a_bad_photo_the_corrected_command_just_runs(run_train, tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "cars" / split / name
            folder.mkdir(parents=True)
            for row in range(4):
                (folder / f"{row}.jpg").write_bytes(jpeg(row))
    bad = tmp_path / "cars/train/a/0.jpg"
    bad.write_bytes(b"not a photo")
    flags = ["--dataset", tmp_path / "cars", "--epochs", 1, "--output-dir", tmp_path / "run"]
    assert str(bad) in refusal(run_train(*flags))
    bad.unlink()
    success(run_train(*flags, "--batch-size", 7))


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_of_two_runs_that_start_in_one_folder_the_second_to_save_is_refused(
    run_train, tmp_path, monkeypatch, flags
):
    build_network = train.build_network
    first = {}

    def start_another(*args):
        monkeypatch.setattr(train, "build_network", build_network)
        success(run_train("--epochs", 1, "--output-dir", tmp_path))
        first.update(read_folder(tmp_path))
        return build_network(*args)

    monkeypatch.setattr(train, "build_network", start_another)
    err = refusal(run_train("--epochs", 2, "--lr", 0.003, "--output-dir", tmp_path, *flags))
    assert str(tmp_path) in err
    assert "another --output-dir" in err
    assert read_folder(tmp_path) == first


def test_best_model_alone_is_neither_resumed_nor_overwritten_unasked(run_train, finished, tmp_path):
    shutil.copy(finished / "best_model.pth", tmp_path)
    before = read_folder(tmp_path)
    flags = ["--epochs", 1, "--output-dir", tmp_path]
    assert "best_model.pth" in refusal(run_train(*flags))
    err = refusal(run_train(*flags, "--resume"))
    assert "best_model.pth" in err and "last_checkpoint.pth" in err
    assert read_folder(tmp_path) == before
    success(run_train(*flags, "--overwrite"))


def test_drafts_of_killed_runs_are_removed_and_those_of_live_ones_are_not(run_train, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    drafts = [tmp_path / f".partial-{pid}-best_model.pth" for pid in (gone.pid, os.getppid())]
    for draft in drafts:
        draft.touch()
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    assert [draft.exists() for draft in drafts] == [False, True]


def test_files_of_results_alone_do_not_hinder_a_run(run_train, finished, tmp_path):
    for name in ("settings.json", "history.csv"):
        shutil.copy(finished / name, tmp_path)
    success(run_train("--epochs", 1, "--output-dir", tmp_path))
    assert len(read_history(tmp_path)) == 1


# ---------------------------------------------------------------- resuming


@pytest.mark.cpu(SAME_KERNELS)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    run_train, cars, tmp_path, monkeypatch, capfd
):
    # A schedule that does not depend on --epochs, which differ here.
    monkeypatch.setattr(train, "lr_factor", lambda args, epochs_done: 0.5**epochs_done)
    flags = ["--batch-size", 6, "--output-dir"]
    success(run_train(*flags, tmp_path / "unbroken", "--epochs", 3))
    flags.append(tmp_path / "resumed")
    shutil.copytree(cars, tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    success(run_train(*flags, "--epochs", 1, "--workers", 1, "--dataset", "here"))
    # Its flags are those of the run. From another folder, it finds the dataset nevertheless.
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ["--resume", "--output-dir", str(tmp_path / "resumed")]
    train.main([*resume, "--epochs", "2"])
    (tmp_path / "here").rename(tmp_path / "there")
    capfd.readouterr()
    train.main([*resume, "--epochs", "3", "--workers", "2", "--dataset", "../there/"])
    out = capfd.readouterr().out
    assert "epoch 2 of 3" in out
    best = max(row["test_accuracy"] for row in read_history(tmp_path / "resumed")[:2])
    assert f"best {best:.2%}" in out
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


@pytest.mark.parametrize("epochs", [2, 1])
def test_a_finished_run_says_so_and_ends_without_loading_photos(old, capfd, epochs):
    weights = load(old / "last_checkpoint.pth")["model"]
    flags = ["--resume", "--output-dir", str(old), "--dataset", str(old / "gone")]
    train.main([*flags, "--epochs", str(epochs)])
    out = capfd.readouterr().out
    assert "nothing to train" in out
    assert f"--epochs {epochs}" in out and "2 epochs done" in out
    best = max(row["test_accuracy"] for row in read_history(old))
    assert f"{best:.2%}" in out and str(old / "best_model.pth") in out
    assert_same_weights(load(old / "last_checkpoint.pth")["model"], weights)


def test_resume_writes_again_what_a_kill_left_behind(old):
    last = load(old / "last_checkpoint.pth")
    last["history"][-1]["test_accuracy"] = 1.0
    torch.save(last, old / "last_checkpoint.pth")
    (old / "history.csv").unlink()
    (old / "training_curves.png").unlink()
    train.main(["--resume", "--output-dir", str(old)])
    best = load(old / "best_model.pth")
    assert (best["epoch"], best["test_accuracy"]) == (2, 1.0)
    assert_same_weights(best["model"], last["model"])
    assert read_history(old)[-1]["test_accuracy"] == 1.0
    assert names_in(old) == FILES


def test_resume_from_last_checkpoint_alone_says_when_best_model_comes(run_train, old):
    last = load(old / "last_checkpoint.pth")
    last["history"][0]["test_accuracy"] = 1.0
    torch.save(last, old / "last_checkpoint.pth")
    (old / "best_model.pth").unlink()
    flags = ["--resume", "--output-dir", old, "--step-size", 1, "--epochs", 3]
    out = success(run_train(*flags))
    assert "100.00% in epoch 1" in out
    assert re.search(r"best_model\.pth is missing.*100\.00%", out)
    assert not (old / "best_model.pth").exists()


def test_resume_refuses_other_settings_and_other_photos(run_train, old, tmp_path):
    before = read_folder(old)
    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", old]
    others = ["--weights other.pth", "--resolution 64", "--batch-size 4", "--lr 0.5", "--seed 7"]
    others += ["--momentum 0.5", "--weight-decay 0.5", "--step-size 7", "--amp-dtype float16"]
    others += ["--val-split 0.25", "--amp"]
    for other in others:
        err = refusal(run_train(*flags, *other.split()))
        assert re.search(rf"{other}(?![\w-])", err), err
    assert read_folder(old) == before
    draw_cars(tmp_path / "cars", train_per_class=3, test_per_class=1, width=80)
    err = refusal(run_train(*flags, "--dataset", tmp_path / "cars"))
    for words in ("--dataset", "16 train", "24 train"):
        assert words in err


@pytest.mark.cpu(SAME_KERNELS)
def test_a_resumed_run_keeps_the_order_of_its_classes(run_train, tmp_path):
    names = ["a", "b", "c"]
    splits = [photo_rows(9, 3), photo_rows(6, 3)]
    cars = write_dataset(tmp_path / "cars", *splits, names)
    # The same photos of the same classes, whose names stand in another order.
    turned = [[(photo, 2 - label) for photo, label in split] for split in splits]
    other = write_dataset(tmp_path / "turned", *turned, names[::-1])
    success(run_train("--dataset", cars, "--epochs", 2, "--output-dir", tmp_path / "unbroken"))
    flags = ["--resume", "--output-dir", tmp_path / "resumed"]
    success(run_train("--dataset", cars, "--epochs", 1, *flags))
    success(run_train("--dataset", other, "--epochs", 2, *flags))
    assert load(tmp_path / "resumed/last_checkpoint.pth")["classes"] == names
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_an_edited_network_or_optimizer_is_told_from_the_runs(
    run_train, finished, tmp_path, monkeypatch
):
    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", tmp_path / "run"]
    shutil.copytree(finished, tmp_path / "run")
    before = load(tmp_path / "run/last_checkpoint.pth")
    with monkeypatch.context() as patch:
        patch.setattr(
            train,
            "build_optimizer",
            lambda args, network: torch.optim.RMSprop(network.parameters()),
        )
        assert "build_optimizer" in refusal(run_train(*flags))
    with monkeypatch.context() as patch:
        patch.setattr(train.NETWORK, "build", lambda num_classes: small_resnet(num_classes + 1))
        assert "NETWORK" in refusal(run_train(*flags))
    assert load(tmp_path / "run/last_checkpoint.pth")["epoch"] == before["epoch"]
    success(run_train(*flags))


# ---------------------------------------------------------------- kills


def assert_whole(folder: Path, out: str):
    """That what a killed run left can be read, and lacks at most the last epoch it has printed."""
    for path in folder.glob("[!.]*.pth"):
        load(path)
    rows = read_history(folder) if (folder / "history.csv").exists() else []
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    if rows:  # They follow from the checkpoint, which is written first.
        assert len(rows) <= len(load(folder / "last_checkpoint.pth")["history"])
    printed = [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/", out, re.MULTILINE)]
    assert max(printed, default=0) <= len(rows) + 2


# The writes at which a run is killed: it syncs last_checkpoint.pth and moves it into place, and
# does the same with its other files. A run that is resumed writes them at its start.
QUICK = (3, [1, 4, 11])
SLOW = (24, [random.Random(seed).randint(1, 16) for seed in range(16)])


@pytest.mark.cpu(SAME_KERNELS)
@pytest.mark.parametrize("split", [[], ["--val-split", 0.5]])
@pytest.mark.parametrize("epochs, writes", [QUICK, pytest.param(*SLOW, marks=pytest.mark.slow)])
def test_kills_at_any_write_lose_nothing(cars, tmp_path, fork, run_train, epochs, writes, split):
    flags = ["--dataset", cars, *SMALL, *split, "--epochs", epochs, "--resume", "--output-dir"]
    success(run_train(*flags, tmp_path / "unbroken"))
    folder = tmp_path / "killed"
    for write in writes:
        inside = functools.partial(killed_at_write, write)
        status, out, err = fork("train.py", *flags, folder, inside=inside).end()
        assert status == -signal.SIGKILL, err
        assert_whole(folder, out)
    success(run_train(*flags, folder))
    assert_same_run(tmp_path / "unbroken", folder)
    best, expected = [load(path / "best_model.pth") for path in (folder, tmp_path / "unbroken")]
    assert_same_weights(best["model"], expected["model"])
    assert [name for name in names_in(folder) if name[0] != "."] == FILES


@contextlib.contextmanager
def first_step_overflows():
    """Let the first scaled loss of the process be Inf, which halves the scale."""
    scale = torch.amp.GradScaler.scale
    steps = itertools.count(1)

    def overflowing_scale(scaler, loss):
        scaled = scale(scaler, loss)
        return scaled * float("inf") if next(steps) == 1 else scaled

    with patch.object(torch.amp.GradScaler, "scale", overflowing_scale):
        yield


@contextlib.contextmanager
def first_step_overflows_and_killed_at_write(count: int):
    with first_step_overflows(), killed_at_write(count):
        yield


@pytest.mark.cpu(SAME_KERNELS)
def test_a_float16_run_that_was_killed_after_an_overflow_continues_as_if_it_had_not_been(
    fork, run_train, cars, tmp_path
):
    flags = ["--dataset", cars, *SMALL, "--amp", "--amp-dtype", "float16", "--epochs", 2]
    flags += ["--resume", "--output-dir"]
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    with first_step_overflows():
        success(run_train(*flags, unbroken))
    # Once the first epoch is saved, at the latest while the second one is.
    inside = functools.partial(first_step_overflows_and_killed_at_write, 9)
    status, _, err = fork("train.py", *flags, killed, inside=inside).end()
    assert status == -signal.SIGKILL, err
    saved = load(killed / "last_checkpoint.pth")
    assert len(saved["history"]) == 1
    assert saved["scaler"]["scale"] < 2**16  # that of a new scaler
    success(run_train(*flags, killed))
    assert_same_run(unbroken, killed)
    scalers = [load(folder / "last_checkpoint.pth")["scaler"] for folder in (unbroken, killed)]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] > 0


# ---------------------------------------------------------------- Ctrl-C and signals


@contextlib.contextmanager
def slow_writes():
    """Let each file take 0.3 seconds to be written."""
    fsync = os.fsync

    def slow_fsync(descriptor):
        time.sleep(0.3)
        fsync(descriptor)

    with patch("os.fsync", slow_fsync):
        yield


@pytest.fixture
def long_run(fork, cars, tmp_path):
    """Start a run with two workers that would take hours, and wait for its second epoch."""

    def start(**options):
        flags = ["--dataset", cars, "--output-dir", tmp_path / "run", *SMALL]
        process = fork("train.py", *flags, "--epochs", 100_000, "--workers", 2, **options)
        process.wait_for("epoch   2/")
        return process

    return start


def test_ctrl_c_finishes_what_is_written_says_how_to_continue_and_leaves_no_process(
    long_run, run_train, tmp_path
):
    process = long_run(inside=slow_writes)
    workers = children(process.pid)
    assert len(workers) == 4  # two for each split
    os.killpg(process.pid, signal.SIGINT)  # A terminal sends it to the workers too.
    status, out, err = process.end()
    assert (status, err) == (130, "")
    saved = len(read_history(tmp_path / "run"))
    assert "--resume" in out.splitlines()[-1]
    # The last epoch may have waited for the one before it to be written.
    assert len(epoch_lines(out)) in (saved, saved + 1)
    assert names_in(tmp_path / "run") == FILES
    assert not any(is_running(worker) for worker in workers)
    flags = ["--output-dir", tmp_path / "run", "--resume", "--epochs", saved + 1]
    assert f"epoch {saved} of {saved + 1}" in success(run_train(*flags))


def test_sigterm_ends_it_at_once_and_loses_nothing(long_run, tmp_path):
    process = long_run()
    os.kill(process.pid, signal.SIGTERM)
    status, out, _ = process.end()  # Workers may complain that it is gone.
    assert status == -signal.SIGTERM
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
    replace = os.replace
    epochs_written = itertools.count(1)

    def interrupting_replace(source, destination):
        replace(source, destination)
        if Path(destination).name == "history.csv" and next(epochs_written) % 3 == 2:
            signal.raise_signal(signal.SIGINT)  # Again, if Python ignored it where it came first.

    folders = ["--dataset", str(cars), "--output-dir", str(tmp_path)]
    flags = [*folders, *SMALL, "--workers", "2", "--resume"]
    before = children(os.getpid())
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupting_replace)
        with pytest.raises(KeyboardInterrupt) as kept_traceback:  # As a notebook keeps it.
            train.main([*flags, "--epochs", "100000"])
    assert kept_traceback
    assert set(children(os.getpid())) <= set(before)
    epochs = len(read_history(tmp_path))
    assert epochs >= 2
    train.main([*flags, "--epochs", str(epochs + 1)])
    assert len(read_history(tmp_path)) == epochs + 1


def test_a_bad_photo_leaves_no_workers_in_a_notebook(tmp_path):
    bad = [(b"not a photo", 0), *photo_rows(7)]
    write_dataset(tmp_path / "cars", bad, photo_rows(4), ["a", "b"])
    folders = ["--dataset", tmp_path / "cars", "--output-dir", tmp_path / "run"]
    before = children(os.getpid())
    with pytest.raises(train.InputError) as kept_traceback:
        train.main([*map(str, folders), *SMALL, "--workers", "2"])
    assert kept_traceback
    assert set(children(os.getpid())) <= set(before)


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
    assert len(epoch_lines(stream.text)) == 1


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


def kept(folder: Path) -> dict[str, bytes]:
    """What a run must not lose, and drafts. The other files follow from these."""
    names = ("last_checkpoint.pth", "best_model.pth", "history.csv")
    contents = read_folder(folder)
    return {name: contents[name] for name in contents if name in names or name[0] == "."}


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_file_that_could_not_be_written_ends_the_run(run_train, tmp_path, monkeypatch, epochs):
    # Even if the next ones could: best_model.pth may be missing, or that of another epoch.
    replace = os.replace
    errors = iter([OSError(28, "No space left on device")])

    def failing_replace(source, destination):
        if Path(destination).name == "best_model.pth":
            for error in errors:
                raise error
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing_replace)
    err = refusal(run_train("--epochs", epochs, "--output-dir", tmp_path))
    assert "best_model.pth" in err and "No space left on device" in err
    assert load(tmp_path / "last_checkpoint.pth")["epoch"] == 1


def test_a_full_disk_leaves_the_old_files_and_says_why(run_train, old, tmp_path, request):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # bytes in a file
    (tmp_path / "new").mkdir()
    for folder in (old, tmp_path / "new"):
        before = kept(folder)
        flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", folder]
        err = refusal(run_train(*flags))
        assert str(folder) in err and ".pth" in err and "File too large" in err
        assert kept(folder) == before


BUGS = [NameError, AttributeError, TypeError, IndexError, AssertionError]


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize(
    "owner, function",
    [(train, "random_crop"), (train, "build_network"), (datasets.Dataset, "cast_column")],
)
def test_a_bug_keeps_its_type_and_traceback(run_train, tmp_path, monkeypatch, owner, function, bug):
    monkeypatch.setattr(owner, function, Mock(side_effect=bug("a slip")))
    with pytest.raises(bug, match="a slip"):
        run_train("--output-dir", tmp_path)


@pytest.mark.parametrize("bug", [KeyError, RuntimeError])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_crop_keeps_its_type_and_traceback(
    run_train, tmp_path, monkeypatch, workers, bug
):
    def slipping_crop(*args, **options):
        raise bug("a slip")

    monkeypatch.setattr(train, "random_crop", slipping_crop)
    with pytest.raises(bug, match="a slip") as caught:
        run_train("--output-dir", tmp_path, "--workers", workers)
    where = "\n".join(map(str, caught.traceback)) + str(caught.value)
    assert "slipping_crop" in where


@contextlib.contextmanager
def forkserver_by_default():
    """The default start method of Python 3.14."""
    multiprocessing.set_start_method("forkserver", force=True)
    yield


def test_workers_start_by_fork_on_linux_whatever_the_default(long_run):
    # A fork server would import torch again in each worker.
    process = long_run(inside=forkserver_by_default)
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children(process.pid)]
    # A forked process has the command line of its parent.
    assert commands == [Path(f"/proc/{process.pid}/cmdline").read_text()] * 4


@pytest.mark.slow
def test_no_deprecation_is_left_on_the_main_paths(cars, tmp_path):
    strict = {"PYTHONWARNINGS": "error,ignore::ImportWarning,ignore::ResourceWarning"}
    flags = ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path]
    success(run("train.py", *flags, environment=strict))
    flags = ["--checkpoint", tmp_path / "best_model.pth", "--tta", "--num-gradcam", 2]
    success(run("eval.py", *flags, "--output-dir", tmp_path, environment=strict))
