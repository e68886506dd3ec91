"""What a run writes, and how it resumes: after kills, signals and full disks, anywhere."""

import contextlib
import io
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from draw_cars import draw_cars
from files import assert_same_run, assert_same_weights, load, read_folder, read_history
from PIL import Image
from scripts import SMALL, refusal, run, start, success
from small import small_resnet

import train

FILES = ["best_model.pth", "history.csv", "last_checkpoint.pth", "training_curves.png"]

# ---------------------------------------------------------------- what a run writes


def test_best_model_is_a_plain_state_dict_with_what_eval_needs(finished):
    best = load(finished / "best_model.pth")
    assert set(best) == {"model", "classes", "resolution", "epoch", "test_accuracy", "settings"}
    small_resnet(num_classes=8).load_state_dict(best["model"], strict=True)
    assert all(value.is_contiguous() for value in best["model"].values())
    assert {value.dtype for value in best["model"].values()} == {torch.float32, torch.int64}
    assert len(best["classes"]) == 8
    assert best["resolution"] == 33
    assert best["settings"]["batch_size"] == 8


def test_history_and_curves(finished):
    history = read_history(finished)
    assert [row["epoch"] for row in history] == [1, 2]
    assert [row["lr"] for row in history] == pytest.approx([0.01, 0.001])
    for row in history:
        assert 0 <= row["train_accuracy"] <= 1
        assert 0 <= row["test_accuracy"] <= 1
    with Image.open(finished / "training_curves.png") as picture:
        assert picture.size == (1100, 450)
    assert sorted(path.name for path in finished.iterdir()) == [".lock", *FILES]


def test_the_best_epoch_is_kept_and_named_beside_the_last(run_train, tmp_path, monkeypatch):
    accuracies = iter([0.25, 0.75, 0.5, 0.75])
    evaluate = train.evaluate

    def evaluate_so(*args, **names):
        return {**evaluate(*args, **names), "test_accuracy": next(accuracies)}

    monkeypatch.setattr(train, "evaluate", evaluate_so)
    out = success(run_train("--output-dir", tmp_path, "--epochs", 4))
    best = load(tmp_path / "best_model.pth")
    assert best["epoch"] == 2
    assert best["test_accuracy"] == 0.75
    assert "best test accuracy 75.00% in epoch 2" in out
    assert "last epoch 75.00%" in out
    assert "16 train and 8 test photos, 8 classes" in out
    assert "\r" not in out


def test_a_finished_run_is_not_written_over(run_train, finished):
    before = read_folder(finished)
    err = refusal(run_train("--output-dir", finished))
    for word in ("last_checkpoint.pth", "--resume", "--overwrite", "--output-dir"):
        assert word in err
    assert read_folder(finished) == before


def test_overwrite_replaces_the_run(run_train, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    success(run_train("--output-dir", folder, "--epochs", 1, "--overwrite"))
    assert len(read_history(folder)) == 1
    assert load(folder / "best_model.pth")["epoch"] == 1


def test_an_output_folder_that_is_a_file_is_refused(run_train, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refusal(run_train("--output-dir", tmp_path / "file"))


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit_whatever_the_workers(run_train, tmp_path):
    flags = ["--step-size", 2, "--batch-size", 6]
    success(run_train("--output-dir", tmp_path / "unbroken", "--epochs", 3, *flags))
    flags += ["--output-dir", tmp_path / "resumed"]
    success(run_train(*flags, "--epochs", 1, "--workers", 1))
    out = success(run_train(*flags, "--epochs", 3, "--workers", 2, "--resume"))
    assert "resumed after epoch 1" in out
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_resume_takes_the_settings_of_the_run(finished, tmp_path, capfd):
    folder = shutil.copytree(finished, tmp_path / "run")
    train.main(["--resume", "--epochs", "3", "--workers", "0", "--output-dir", str(folder)])
    assert "resolution=33 batch_size=8 epochs=3" in capfd.readouterr().out
    assert len(read_history(folder)) == 3


@pytest.mark.parametrize(
    "flag, value", [("--lr", "0.5"), ("--resolution", "64"), ("--seed", "7"), ("--epochs", "1")]
)
def test_resume_refuses_other_settings_by_name(run_train, finished, flag, value):
    before = read_folder(finished)
    flags = ["--resume", "--step-size", 1, "--epochs", 2, "--output-dir", finished]
    assert f"{flag} {value}" in refusal(run_train(*flags, flag, value))
    assert read_folder(finished) == before


def test_resume_refuses_a_data_set_that_changed(run_train, finished, tmp_path):
    draw_cars(tmp_path / "cars", train_per_class=3, test_per_class=1, width=80)
    folder = shutil.copytree(finished, tmp_path / "run")
    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", folder]
    err = refusal(run_train(*flags, "--dataset", tmp_path / "cars"))
    assert "has changed" in err


def test_resume_takes_the_same_data_from_another_place(cars, tmp_path, run_train, monkeypatch):
    here = shutil.copytree(cars, tmp_path / "here")
    flags = ["--output-dir", tmp_path / "run", "--resume", "--dataset"]
    monkeypatch.chdir(tmp_path)
    success(run_train(*flags, "here", "--epochs", 1))
    assert load(tmp_path / "run/best_model.pth")["settings"]["dataset"] == str(here)
    assert "resumed" in success(run_train(*flags, "./here/", "--epochs", 2))
    here.rename(tmp_path / "there")
    assert "resumed" in success(run_train(*flags, tmp_path / "there", "--epochs", 3))


def test_resume_mends_what_a_kill_left_behind(run_train, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.copy(folder / "last_checkpoint.pth", folder / ".partial-last_checkpoint.pth")
    last = load(folder / "last_checkpoint.pth")
    last["history"][-1]["test_accuracy"] = 1.0
    torch.save(last, folder / "last_checkpoint.pth")
    for name in ("best_model.pth", "history.csv", "training_curves.png"):
        (folder / name).unlink()
    success(run_train("--resume", "--step-size", 1, "--epochs", 2, "--output-dir", folder))
    assert load(folder / "best_model.pth")["epoch"] == 2
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *FILES]


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_resuming_says_that_the_best_model_is_lost(finished, tmp_path, run_train, damage):
    folder = shutil.copytree(finished, tmp_path / "run")
    last = load(folder / "last_checkpoint.pth")
    last["history"][0]["test_accuracy"] = 1.0
    torch.save(last, folder / "last_checkpoint.pth")
    best = folder / "best_model.pth"
    if damage == "gone":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:1000])
    flags = ["--output-dir", folder, "--step-size", 1, "--epochs", 2, "--resume"]
    out = success(run_train(*flags))
    assert f"{best} is missing, damaged" in out
    assert "better than epoch 1" in out


# ---------------------------------------------------------------- kills


def assert_whole(folder):
    """That what a killed run left can be read, and says the same in each file."""
    for name in ("last_checkpoint.pth", "best_model.pth"):
        if (folder / name).exists():
            train.read_checkpoint(folder / name)
    if (folder / "history.csv").exists():
        finished = [row["epoch"] for row in read_history(folder)]
        assert finished == list(range(1, len(finished) + 1))


# The writes at which a run is killed: it writes last_checkpoint.pth and moves it into place, and
# does the same with best_model.pth, history.csv and the curves.
QUICK = (3, [1, 4, 11])
SLOW = (24, [random.Random(seed).randint(1, 16) for seed in range(16)])


@pytest.mark.parametrize("epochs, writes", [QUICK, pytest.param(*SLOW, marks=pytest.mark.slow)])
def test_kills_at_any_write_lose_nothing(cars, tmp_path, fork, epochs, writes):
    flags = ["--dataset", cars, *SMALL, "--epochs", epochs, "--resume", "--output-dir"]
    success(fork("train.py", *flags, tmp_path / "unbroken").end())
    folder = tmp_path / "killed"
    for write in writes:
        status, _, err = fork("tests/spy.py", *flags, folder, SPY_KILLED_AT=write).end()
        assert status == -signal.SIGKILL, err
        assert_whole(folder)
    success(fork("train.py", *flags, folder).end())
    assert_same_run(tmp_path / "unbroken", folder)
    best = load(folder / "best_model.pth")
    expected = load(tmp_path / "unbroken/best_model.pth")
    assert best["epoch"] == expected["epoch"]
    assert_same_weights(best["model"], expected["model"])
    assert not list(folder.glob(".partial-*"))


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(cars, tmp_path, fork):
    flags = ["--dataset", cars, *SMALL, "--epochs", 40, "--resume", "--output-dir"]
    success(fork("train.py", *flags, tmp_path / "unbroken").end())
    draw = random.Random(0)
    for _ in range(20):
        process = fork("train.py", *flags, tmp_path / "killed")
        # A run that has ended by then has lost nothing either.
        process.join(draw.uniform(0, 3))
        process.kill()
        process.join()
        assert_whole(tmp_path / "killed")
    success(fork("train.py", *flags, tmp_path / "killed").end())
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


# ---------------------------------------------------------------- signals, locks, dying workers


@pytest.fixture
def long_run(fork, cars, tmp_path):
    """Start a run with workers that would take hours, and wait for its second epoch."""
    flags = ["--dataset", cars, *SMALL, "--epochs", 100_000, "--output-dir", tmp_path / "run"]
    process = fork("train.py", *flags, "--workers", 1)
    process.wait_for("epoch 2/100000")
    return process


def test_ctrl_c_ends_at_once_and_holds_nobody_up(long_run, tmp_path, run_train):
    flags = ["--output-dir", tmp_path / "run", "--epochs", 1, "--overwrite"]
    err = refusal(run_train(*flags))
    assert f"another run is writing to --output-dir {tmp_path / 'run'}" in err
    # A terminal sends it to the workers too, and people press it twice.
    long_run.signal_group(signal.SIGINT)
    long_run.signal_group(signal.SIGINT)
    status, out, err = long_run.end()
    assert status == -signal.SIGINT
    assert err == ""
    assert "\nCtrl-C is safe once an epoch is printed: --resume goes on after the last one\n" in out
    assert load(tmp_path / "run/last_checkpoint.pth")["epoch"] >= 2
    success(run_train(*flags))


@pytest.mark.parametrize("whole_group", [True, False])
def test_sigterm_ends_without_a_word_and_loses_nothing(long_run, tmp_path, whole_group):
    if whole_group:
        long_run.signal_group(signal.SIGTERM)
    else:
        long_run.terminate()
    status, _, err = long_run.end()
    assert status == -signal.SIGTERM
    assert err == ""
    assert load(tmp_path / "run/last_checkpoint.pth")["epoch"] >= 2


def test_a_worker_that_dies_is_said_in_one_line(long_run):
    os.kill(long_run.children()[0], signal.SIGKILL)
    assert "worker" in refusal(long_run.end())


def test_ctrl_c_while_the_libraries_are_imported_is_quiet(tmp_path):
    with start("train.py", "--output-dir", tmp_path, small=False) as process:
        # The first of them that takes long; Linux says which files a process has mapped.
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert err == ""


def test_ctrl_c_stops_eval_as_its_workers_start(trained, tmp_path, fork):
    flags = ["--checkpoint", trained.run / "best_model.pth", "--output-dir", tmp_path / "report"]
    process = fork("eval.py", *flags, "--workers", 2)
    while not process.children():
        assert process.is_alive()
        time.sleep(0.01)
    process.signal_group(signal.SIGINT)
    status, _, err = process.end()
    assert status == -signal.SIGINT, err
    assert not (tmp_path / "report/metrics.json").exists()


# ---------------------------------------------------------------- full disks


def test_a_full_disk_leaves_the_old_files(run_train, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = read_folder(folder)

    def full(path, contents):
        with open(path, "wb") as file:
            file.write(contents[: len(contents) // 2])
        raise OSError(28, "No space left on device")

    flags = ["--resume", "--step-size", 1, "--epochs", 3, "--output-dir", folder]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        err = refusal(run_train(*flags))
    assert "last_checkpoint.pth (the old one is whole): [Errno 28] No space left" in err
    after = read_folder(folder)
    assert after.keys() == before.keys()
    assert after["last_checkpoint.pth"] == before["last_checkpoint.pth"]
    success(run_train(*flags))
    assert len(read_history(folder)) == 3


# ---------------------------------------------------------------- consoles, notebooks, containers


@pytest.fixture
def eval_flags(trained, tmp_path):
    paths = ["--checkpoint", trained.run / "best_model.pth", "--output-dir", tmp_path / "report"]
    return [*paths, "--num-gradcam", 0, "--workers", 0]


def test_consoles_that_know_no_arrows_and_notebooks_without_their_package(eval_flags):
    environment = {"PYTHONIOENCODING": "ascii"}
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    out = success(run("eval.py", *eval_flags, environment=environment))
    assert "true ? predicted" in out


def test_head_ends_it_quietly(eval_flags):
    reader, writer = os.pipe()
    os.close(reader)
    status, _, err = run("eval.py", *eval_flags, stdout=writer)
    os.close(writer)
    assert status == 1
    assert err == ""


def test_a_full_disk_behind_the_output_is_said_in_one_line(eval_flags, fork):
    assert "No space left" in refusal(fork("eval.py", *eval_flags, out=Path("/dev/full")).end())


def said_of(error: Exception) -> str:
    """What run_command says of an error."""

    def fail():
        raise error

    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())) as file:
        status = train.run_command(fail)
        file.seek(0)
        return refusal((status, "", file.read()))


SHARED_MEMORY = "unable to write to file </torch_1_2_3>: No space left on device (28)"
IN_A_WORKER = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: "
)
BUS_ERROR = "DataLoader worker (pid 7) is killed by signal: Bus error. Out of shared memory."


@pytest.mark.parametrize("message", [SHARED_MEMORY, IN_A_WORKER + SHARED_MEMORY, BUS_ERROR])
def test_small_shared_memory_is_named_with_its_cure(message):
    line = said_of(RuntimeError(message))
    for word in ("/dev/shm (", "--shm-size", "--workers 0"):
        assert word in line


def test_what_torch_raises_for_gpus_is_one_line():
    assert "--batch-size" in said_of(torch.OutOfMemoryError("CUDA out of memory. Tried to"))
    line = said_of(torch.distributed.DistBackendError("NCCL error: unhandled system error"))
    assert "another process" in line
    assert "NCCL error" in line
    no_kernel = "CUDA error: no kernel image is available for execution"
    assert "this GPU" in said_of(RuntimeError(no_kernel))


@pytest.mark.parametrize("message", ["a bug", IN_A_WORKER + "a bug"])
def test_a_bug_keeps_its_traceback(message):
    with pytest.raises(RuntimeError, match="a bug"):
        said_of(RuntimeError(message))


@pytest.mark.slow
def test_no_deprecation_is_left_on_the_main_paths(cars, tmp_path):
    ignored = "ignore::ImportWarning,ignore::ResourceWarning"
    strict = {"PYTHONWARNINGS": f"error,{ignored}"}
    flags = ["--output-dir", tmp_path]
    train_flags = ["--dataset", cars, *SMALL, "--epochs", 1, *flags]
    success(run("train.py", *train_flags, small=False, environment=strict))
    eval_flags = ["--checkpoint", tmp_path / "best_model.pth", "--tta", "--num-gradcam", 2, *flags]
    success(run("eval.py", *eval_flags, small=False, environment=strict))
