"""Nothing is lost: kills at any moment, signals, a full disk, a worker that dies, hostile photos and checkpoints."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, SMALL, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import assert_same_run, history, jpeg, load

import train


def run_quietly(argv: list[str]):
    """Run train.py in a process that has imported it already, and say nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(train.run_command(lambda: train.main(argv)))


@pytest.mark.parametrize("kills, epochs", [(3, 8), pytest.param(20, 24, marks=pytest.mark.slow)])
def test_kills_lose_nothing(cars, tmp_path, kills, epochs):
    context = multiprocessing.get_context(
        "forkserver"
    )  # imports once, where a new interpreter would take seconds
    context.set_forkserver_preload(
        ["test_faults"]
    )  # and with it conftest, which puts the small network in place
    draw = random.Random(0)

    def start(folder, *flags):
        argv = ["--dataset", str(cars), *SMALL, "--epochs", str(epochs)]
        argv += ["--output-dir", str(folder), *flags]
        process = context.Process(target=run_quietly, args=(argv,))
        process.start()
        return process

    unbroken = start(tmp_path / "unbroken")
    unbroken.join()
    assert unbroken.exitcode == 0
    seconds = sum(row["seconds"] for row in history(tmp_path / "unbroken")) / epochs

    folder, while_writing, killed = tmp_path / "killed", 0, 0
    while killed < kills:
        process = start(folder, "--resume")
        if killed % 4 == 0:  # a moment at which a file is being written
            while process.is_alive() and not list(folder.glob(".partial-*.pth")):
                time.sleep(0.001)
        else:
            process.join(draw.uniform(0, 2 + seconds))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        killed += 1
        while_writing += bool(list(folder.glob(".partial-*")))
        for name in ("last_checkpoint.pth", "best_model.pth"):
            if (folder / name).exists():
                train.read_checkpoint(folder / name)
        if (folder / "history.csv").exists():
            finished = [row["epoch"] for row in history(folder)]
            assert finished == list(range(1, len(finished) + 1))
    assert while_writing >= kills // 4
    last = start(folder, "--resume")
    last.join()
    assert last.exitcode == 0
    assert_same_run(tmp_path / "unbroken", folder)
    best, expected = (load(path / "best_model.pth") for path in (folder, tmp_path / "unbroken"))
    assert best["epoch"] == expected["epoch"]
    assert all(torch.equal(best["model"][name], value) for name, value in expected["model"].items())
    assert not list(folder.glob(".partial-*"))


def start_script(cars, folder, *flags) -> subprocess.Popen:
    """Start a long run of train.py as a user does, and wait for its first epoch."""
    command = [sys.executable, str(ROOT / "tests/small.py"), str(ROOT / "train.py")]
    command += ["--dataset", str(cars), *SMALL, "--epochs", "500", *flags]
    command += ["--output-dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch 1/500"):
        assert process.poll() is None, process.stderr.read()
    return process


def test_sigterm_ends_without_a_word_and_loses_nothing(cars, tmp_path):
    process = start_script(cars, tmp_path, "--workers", "2")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and err == ""
    assert load(tmp_path / "last_checkpoint.pth")["epoch"] >= 1


def test_a_worker_that_dies_is_said_in_one_line(cars, tmp_path):
    process = start_script(cars, tmp_path, "--workers", "1")
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("\n") == 1 and "worker" in err, err


# ---------------------------------------------------------------- labels, sizes, numbers


@pytest.mark.parametrize("label", [-1, None, 2])
def test_labels_that_are_no_class_are_refused(run_train, tmp_path, label):
    rows, names = [(jpeg(0), 0), (jpeg(1), 1)], ["a", "b", "c"]
    folder = write_dataset(tmp_path / "cars", [*rows, (jpeg(2), label)], rows, names)
    for split in ("train", "test"):  # datasets itself writes no label beyond the class count
        path = folder / "data" / f"{split}-0.parquet"
        table = pyarrow.parquet.read_table(path)
        metadata = {
            name: value.replace(b'"b", "c"', b'"b"')
            for name, value in table.schema.metadata.items()
        }
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    status, _, err = run_train(
        "--dataset", folder, "--output-dir", tmp_path / "run", "--batch-size", 2, "--epochs", 1
    )
    assert status == 1 and err.count("\n") == 1 and "row 2" in err and f"label {label}" in err, err


def test_one_class_trains(run_train, tmp_path):
    rows = [(jpeg(seed), 0) for seed in range(4)]
    folder = write_dataset(tmp_path / "cars", rows, rows, ["a"])
    flags = ["--dataset", folder, "--output-dir", tmp_path / "run", "--batch-size", 4]
    status, _, err = run_train(*flags, "--epochs", 1)
    assert status == 0 and history(tmp_path / "run")[0]["test_accuracy"] == 1, err


@pytest.mark.parametrize("resolution, works", [(32, False), (33, True)])
def test_one_photo_trains_or_is_refused(run_train, tmp_path, resolution, works):
    folder = write_dataset(tmp_path / "cars", [(jpeg(0), 0)], [(jpeg(0), 0)], ["a", "b"])
    flags = ["--dataset", folder, "--output-dir", tmp_path / "run", "--batch-size", 1]
    status, _, err = run_train(*flags, "--epochs", 1, "--resolution", resolution)
    assert (status == 0) is works and err.count("\n") == (not works), err


@settings(max_examples=60, deadline=None)
@given(
    flag=st.sampled_from(
        "resolution batch-size epochs lr momentum weight-decay step-size seed workers".split()
    ),
    value=st.one_of(
        st.integers(),
        st.floats(),
        st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=8),
    ),
)
def test_any_number_is_taken_or_refused(flag, value):
    try:
        args = train.parse_args([f"--{flag}={value}"], {})
    except SystemExit as stop:
        assert stop.code == 2
    else:
        parsed = getattr(args, flag.replace("-", "_"))
        assert parsed == float(value) and np.isfinite(parsed) and parsed >= 0


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pth"
    torch.save(train.resnet50(num_classes=8).state_dict(), path)
    return path


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999999])
def test_cut_off_checkpoints_are_refused(good, tmp_path, share):
    data = good.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(train.InputError, match="cut.pth"):
        train.read_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_refused(tmp_path, seed):
    (tmp_path / "random.pth").write_bytes(random.Random(seed).randbytes(10_000))
    with pytest.raises(train.InputError, match="random.pth"):
        train.read_checkpoint(tmp_path / "random.pth")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    state = {
        "fc.weight": torch.zeros(1).expand(50_000, 50_000),
        "fc.bias": torch.zeros(1).expand(50_000),
    }
    torch.save(state, tmp_path / "claims.pth")  # claims 10 GB in a kilobyte
    assert (tmp_path / "claims.pth").stat().st_size < 10_000
    with pytest.raises(train.InputError, match="another architecture"):
        train.read_checkpoint(tmp_path / "claims.pth")


def test_a_thousand_classes_start_a_run_with_a_new_fc(run_train, tmp_path):
    torch.save(train.resnet50().state_dict(), tmp_path / "imagenet.pth")
    flags = ["--weights", tmp_path / "imagenet.pth", "--output-dir", tmp_path / "run"]
    assert run_train(*flags, "--epochs", 1)[0] == 0
    assert load(tmp_path / "run/best_model.pth")["model"]["fc.bias"].shape == (8,)


@pytest.mark.slow
def test_no_deprecation_is_left_on_the_main_paths(cars, tmp_path):
    flags = ["--dataset", str(cars), *SMALL, "--epochs", "1", "--output-dir", str(tmp_path)]
    noise = ["-W", "error", "-W", "ignore::ImportWarning", "-W", "ignore::ResourceWarning"]
    command = [sys.executable, *noise, str(ROOT / "train.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, *noise, str(ROOT / "eval.py"), "--tta", "--num-gradcam", "2"]
    command += ["--checkpoint", str(tmp_path / "best_model.pth"), "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
