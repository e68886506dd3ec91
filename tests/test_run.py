"""What a run writes, and how it resumes: after kills, signals and full disks, anywhere."""

import contextlib
import errno
import fcntl
import io
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from draw_cars import draw_cars
from files import assert_same_run, assert_same_weights, load, read_folder, read_history
from PIL import Image
from scripts import HANGS, ROOT, SMALL, refusal, run, start, success
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


def test_the_curves_are_losses_on_a_logarithmic_axis_and_accuracies_in_per_cent():
    row = {"epoch": 1, "lr": 0.1, "train_loss": 5.0, "test_loss": 154.0}
    row.update(train_accuracy=0.25, test_accuracy=0.5)
    figure = train.plot_history([row, {**row, "epoch": 2, "lr": 0.01, "train_loss": 0.0}])
    losses, accuracies = figure.axes
    assert losses.get_yscale() == "log"
    assert losses.get_lines()[1].get_ydata().tolist() == [154, 154]
    assert accuracies.get_lines()[0].get_ydata().tolist() == [25, 25]
    figure.savefig(io.BytesIO())


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


def test_an_epoch_is_printed_when_its_files_are_whole(run_train, tmp_path, monkeypatch):
    events = []
    replace = os.replace

    def slow_replace(source, destination):
        time.sleep(0.05)
        replace(source, destination)
        events.append(Path(destination).name)

    class NotingStream(io.StringIO):
        def write(self, text):
            events.extend(text.split()[:2])
            return len(text)

    monkeypatch.setattr(os, "replace", slow_replace)
    monkeypatch.setattr(sys, "stdout", NotingStream())
    success(run_train("--output-dir", tmp_path, "--epochs", 2))
    first = events.index("1/2")
    second = events.index("2/2")
    assert set(FILES) <= set(events[:first])
    assert {"last_checkpoint.pth", "history.csv"} <= set(events[first:second])
    assert "last_checkpoint.pth" not in events[second:]


def test_the_next_epoch_trains_while_one_is_written(run_train, tmp_path, monkeypatch):
    crops = []
    second_epoch = threading.Event()
    random_crop = train.random_crop
    replace = os.replace

    def noting_crop(*args):
        crops.append(None)
        if len(crops) > 16:
            second_epoch.set()
        return random_crop(*args)

    def waiting_replace(source, destination):
        assert second_epoch.wait(60), "no photo of the second epoch was decoded"
        replace(source, destination)

    monkeypatch.setattr(train, "random_crop", noting_crop)
    monkeypatch.setattr(os, "replace", waiting_replace)
    success(run_train("--output-dir", tmp_path, "--epochs", 2))


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


def test_a_run_that_was_to_be_replaced_is_not_gone_on_with(run_train, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    flags = ["--output-dir", folder, "--epochs", 3]
    # The new run ends in its first epoch: its loss is not finite.
    refusal(run_train(*flags, "--overwrite", "--lr", 1000))
    out = success(run_train(*flags, "--resume"))
    assert "resumed" not in out
    assert [row["epoch"] for row in read_history(folder)] == [1, 2, 3]


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


@pytest.fixture
def resume(finished, tmp_path, capfd):
    """Resume a copy of the finished run, whose settings are changed; no flag is given but these."""

    def run(settings: dict, *flags) -> str:
        folder = shutil.copytree(finished, tmp_path / "run")
        last = load(folder / "last_checkpoint.pth")
        last["settings"].update(settings)
        torch.save(last, folder / "last_checkpoint.pth")
        train.main(["--resume", "--output-dir", str(folder), *map(str, flags)])
        return capfd.readouterr().out

    return run


def test_a_flag_that_is_given_takes_the_place_of_the_runs(resume):
    assert " workers=0 " in resume({"workers": 2}, "--epochs", 3, "--workers", 0)


def test_resume_says_that_there_is_no_run(run_train, tmp_path):
    flags = ["--output-dir", tmp_path / "misspelt", "--epochs", 1, "--resume"]
    out = success(run_train(*flags))
    assert out.startswith(f"no run in {tmp_path / 'misspelt'}: starting one\n")


def test_a_finished_run_needs_no_data_to_say_so(resume, tmp_path):
    out = resume({"dataset": str(tmp_path / "deleted")})
    assert "all 2 epochs are done; --resume with more --epochs trains on" in out
    assert "best test accuracy" in out


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


def test_resuming_says_that_the_best_model_is_gone(finished, tmp_path, run_train):
    folder = shutil.copytree(finished, tmp_path / "run")
    last = load(folder / "last_checkpoint.pth")
    last["history"][0]["test_accuracy"] = 1.0
    torch.save(last, folder / "last_checkpoint.pth")
    (folder / "best_model.pth").unlink()
    flags = ["--output-dir", folder, "--step-size", 1, "--epochs", 2, "--resume"]
    assert "best_model.pth is gone" in success(run_train(*flags))


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


def test_ctrl_c_ends_at_once_and_holds_nobody_up(long_run, tmp_path, run_train, monkeypatch):
    monkeypatch.setattr(train, "LOCK_TIMEOUT", 0)
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


def test_a_run_begins_though_workers_of_a_killed_one_are_not_gone_yet(
    long_run, tmp_path, run_train
):
    (worker,) = long_run.children()
    # It sees the end of the run only once it goes on.
    os.kill(worker, signal.SIGSTOP)
    long_run.kill()
    threading.Timer(2, os.kill, (worker, signal.SIGCONT)).start()
    success(run_train("--output-dir", tmp_path / "run", "--epochs", 1, "--overwrite"))


def test_a_lock_that_cannot_be_had_is_not_another_run(run_train, tmp_path):
    (tmp_path / ".lock").mkdir()
    err = refusal(run_train("--output-dir", tmp_path))
    assert "another run" not in err
    assert f"cannot lock {tmp_path / '.lock'}, which may be deleted while no run" in err


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_left_on_a_file_system_without_locks_may_be_deleted(
    run_train, tmp_path, monkeypatch
):
    lock = tmp_path / ".lock"
    flock = fcntl.flock

    def no_lock_there(file, operation):
        if lock.exists() and os.path.samestat(os.fstat(file), lock.stat()):
            raise OSError(errno.ENOSYS, "Function not implemented")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", no_lock_there)
    monkeypatch.setattr(train, "LOCK_TIMEOUT", 0)
    flags = ["--output-dir", tmp_path, "--epochs", 1]
    lock.write_text("1\nanother-host\n")
    assert f"if there is none, delete {lock}" in refusal(run_train(*flags))
    lock.unlink()
    success(run_train(*flags))


def test_a_worker_that_hands_nothing_over_ends_the_run(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(train, "decode_photo", lambda encoded: time.sleep(HANGS))
    err = refusal(run_train("--output-dir", tmp_path, "--workers", 1))
    assert "the workers hand nothing over" in err


def test_a_long_tmpdir_ends_a_run_in_one_line_or_does_no_harm(run_train, tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    # What TMPDIR decides, as in a new process. Newer Pythons choose another folder for sockets.
    process = multiprocessing.current_process()
    config = {name: value for name, value in process._config.items() if name != "tempdir"}
    monkeypatch.setattr(process, "_config", config)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    flags = ["--output-dir", tmp_path / "run", "--epochs", 1, "--workers", 1]
    status, out, err = run_train(*flags)
    if status != 0:
        assert f"set a shorter TMPDIR than {folder}" in refusal((status, out, err))


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


def is_read(fifo: Path) -> bool:
    """Whether a process waits for somebody to write."""
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


def test_ctrl_c_loses_nothing_that_eval_has_printed_to_no_terminal(trained, tmp_path, fork):
    for name in load(trained.run / "best_model.pth")["classes"]:
        (tmp_path / "cars/test" / name).mkdir(parents=True)
        os.mkfifo(tmp_path / "cars/test" / name / "endless.jpg")
    flags = ["--checkpoint", trained.run / "best_model.pth", "--dataset", tmp_path / "cars"]
    flags += ["--output-dir", tmp_path / "report", "--workers", 0]
    process = fork("eval.py", *flags)
    while not is_read(min(tmp_path.glob("cars/test/*/endless.jpg"))):
        assert process.is_alive(), process.err.read_text()
        time.sleep(0.01)
    process.signal_group(signal.SIGINT)
    _, out, _ = process.end()
    assert out.startswith("checkpoint ")
    assert ": 8 photos, 8 classes\n" in out


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


@contextlib.contextmanager
def quota(size: int):
    """No file may become larger, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_first_save_that_fails_gives_the_systems_reason_alone(run_train, tmp_path):
    with quota(1_000_000):
        err = refusal(run_train("--output-dir", tmp_path, "--epochs", 3))
    assert f"cannot write {tmp_path / 'last_checkpoint.pth'}" in err
    assert "File too large" in err
    assert "old one" not in err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


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


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_is_written_nowhere(run_train, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)  # So it is after >&- and 2>&-.
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    status, _, _ = run_train("--output-dir", tmp_path, "--epochs", 1)
    assert status == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_notebooks_stream_gets_all_of_it(run_train, tmp_path, monkeypatch, name):
    stream = io.StringIO()  # It too has no reconfigure.
    monkeypatch.setattr(sys, name, stream)
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    status, _, _ = run_train("--output-dir", tmp_path, "--epochs", 1)
    assert status == 1
    expected = "best test accuracy" if name == "stdout" else "holds a run already"
    assert expected in stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_a_shell_has_closed_are_no_error(cars, tmp_path, closed):
    flags = map(str, ["--dataset", cars, *SMALL, "--epochs", 1, "--output-dir", tmp_path])
    command = shlex.join([sys.executable, "tests/small.py", "train.py", *flags])
    assert subprocess.run(["sh", "-c", f"{command} {closed}"], cwd=ROOT).returncode == 0
    assert len(read_history(tmp_path)) == 1


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


TOO_MANY_FILES = [
    OSError(errno.EMFILE, "Too many open files"),
    RuntimeError("unable to open shared memory object </torch_1_2_3> : Too many open files (24)"),
    RuntimeError("Too many open files. Communication with the workers is no longer possible."),
]


@pytest.mark.parametrize("error", TOO_MANY_FILES, ids=str)
def test_the_limit_of_open_files_is_named_with_its_cure(error):
    line = said_of(error)
    for word in ("ulimit -n", "--workers", str(error)):
        assert word in line
    assert "/dev/shm (" not in line


def test_a_taken_port_is_named_with_its_cure():
    message = "The server socket has failed to listen on any local network address. port: 29500, "
    error = torch.distributed.DistNetworkError(f"{message}code: -98, name: EADDRINUSE")
    line = said_of(error)
    assert "--master-port" in line
    assert "port: 29500" in line


@pytest.mark.parametrize("message", [SHARED_MEMORY, "DataLoader timed out after 600 seconds"])
def test_an_error_of_a_worker_is_shown_without_its_traceback(message):
    line = said_of(RuntimeError(IN_A_WORKER + message))
    assert f"({message})" in line
    assert "Traceback" not in line
    assert "Caught" not in line


# The places in a traceback say nothing about its error.
ELSEWHERE = "".join(
    f'  File "/home/me/{name}/my.py", line 1, in main\n'
    for name in ("shared memory", "torch._dynamo", "torch._inductor", "torch.distributed", "torch_")
)
UNRELATED = IN_A_WORKER.replace("Traceback\n", f"Traceback\n{ELSEWHERE}")


@pytest.mark.parametrize("message", ["a bug", IN_A_WORKER + "a bug", UNRELATED + "a bug"])
def test_a_bug_keeps_its_traceback(message):
    with pytest.raises(RuntimeError, match="a bug"):
        said_of(RuntimeError(message))


def test_a_path_with_a_word_of_an_advice_draws_none():
    error = FileNotFoundError(errno.ENOENT, "No such file", "/data/torch_cars/1.jpg")
    assert said_of(error).endswith(f": {error}\n")


@pytest.mark.parametrize("name", ["decode_photo", "plot_history"])
@pytest.mark.parametrize("error", [NameError, AttributeError, KeyError])
def test_a_mistake_in_this_code_keeps_its_traceback(run_train, tmp_path, monkeypatch, name, error):
    def mistaken(*args):
        raise error("a typo")

    monkeypatch.setattr(train, name, mistaken)
    with pytest.raises(error, match="a typo"):
        run_train("--output-dir", tmp_path, "--epochs", 1)


def test_the_figure_is_drawn_before_its_file_is_opened(run_train, tmp_path, monkeypatch):
    drafts = []
    plot_history = train.plot_history

    def noting_plot(*args):
        drafts.extend(tmp_path.glob(".partial-*"))
        return plot_history(*args)

    monkeypatch.setattr(train, "plot_history", noting_plot)
    success(run_train("--output-dir", tmp_path, "--epochs", 1))
    assert drafts == []


@pytest.mark.slow
def test_no_deprecation_is_left_on_the_main_paths(cars, tmp_path):
    ignored = "ignore::ImportWarning,ignore::ResourceWarning"
    strict = {"PYTHONWARNINGS": f"error,{ignored}"}
    flags = ["--output-dir", tmp_path]
    train_flags = ["--dataset", cars, *SMALL, "--epochs", 1, *flags]
    success(run("train.py", *train_flags, small=False, environment=strict))
    eval_flags = ["--checkpoint", tmp_path / "best_model.pth", "--tta", "--num-gradcam", 2, *flags]
    success(run("eval.py", *eval_flags, small=False, environment=strict))
