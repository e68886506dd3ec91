"""Other people's machines and folders: containers, notebooks, clusters, odd data sets, odd checkpoints."""

import contextlib
import errno
import glob
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, write_dataset
from PIL import Image
from test_train import jpeg, load

import eval as evaluation
import train

SMALL_SCRIPT = [sys.executable, str(ROOT / "tests/small.py")]


def run_small(script: str, *flags: object, **options) -> subprocess.CompletedProcess:
    """Run a script, with the small network, as a user does."""
    command = [*SMALL_SCRIPT, str(ROOT / script), *map(str, flags)]
    environment = {**os.environ, **options.pop("environment", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, env=environment, text=True, timeout=120, **options)


def eval_flags(checkpoint, output_dir) -> list[str]:
    """Of eval.py, in the tests' own process."""
    return ["--checkpoint", str(checkpoint), "--output-dir", str(output_dir), "--workers", "0"]


# ---------------------------------------------------------------- data sets


ROWS = [(jpeg(seed), seed % 2) for seed in range(4)]


def damaged(path):
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(len(data) - 300) + data[-200:])


def truncated(path):
    path.write_bytes(path.read_bytes()[:-50])


def empty(path):
    path.write_bytes(b"")


def git_lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")


@pytest.mark.parametrize("damage", [damaged, truncated, empty, git_lfs_pointer])
def test_a_parquet_file_that_is_not_whole_is_refused_by_name(tmp_path, damage):
    folder = write_dataset(tmp_path / "cars", ROWS, ROWS, ["a", "b"])
    damage(folder / "data/train-0.parquet")
    with pytest.raises(train.InputError, match="train-0.parquet"):
        train.load_cars(str(folder))


def test_half_of_the_files_are_not_taken_for_the_data_set(tmp_path):
    folder = write_dataset(tmp_path / "cars", ROWS, ROWS, ["a", "b"])
    (folder / "data/train-0.parquet").rename(folder / "data/train-00000-of-00002.parquet")
    with pytest.raises(train.InputError, match="1 of the train split's files; .* there are 2"):
        train.load_cars(str(folder))


def test_a_backup_beside_the_data_is_not_loaded_too(tmp_path):
    folder = write_dataset(tmp_path / "cars", ROWS, ROWS, ["a", "b"])
    shutil.copytree(folder / "data", folder / "backup")
    assert len(train.load_cars(str(folder))["train"]) == 4


@pytest.mark.parametrize("name", ["cars*", "cars [v2]", "cars?", "."])
def test_a_path_is_a_path_and_no_pattern(tmp_path, monkeypatch, name):
    write_dataset(tmp_path / "cars-sibling", ROWS, ROWS, ["a", "b"])
    folder = write_dataset(
        tmp_path / ("cars here" if name == "." else name), ROWS[:2], ROWS, ["a", "b"]
    )
    monkeypatch.chdir(folder if name == "." else tmp_path)
    cars = train.load_cars(name)
    assert (len(cars["train"]), len(cars["test"])) == (2, 4)


def test_classes_behind_links_and_in_deeper_folders_are_found(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b/2012/blue"):
            (tmp_path / "cars" / split / name).mkdir(parents=True)
            (tmp_path / "cars" / split / name / "photo.jpg").write_bytes(jpeg(0))
        (tmp_path / f"elsewhere_{split}").mkdir()
        (tmp_path / f"elsewhere_{split}/photo.jpg").write_bytes(jpeg(0))
        (tmp_path / "cars" / split / "c").symlink_to(tmp_path / f"elsewhere_{split}")
    cars = train.load_cars(str(tmp_path / "cars"))
    assert cars["train"].features["label"].names == ["a", "b", "c"]
    assert list(cars["train"]["label"]) == [0, 1, 2]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(tmp_path, run_script, cars):
    (tmp_path / "cache").write_text("a file where the cache should be")
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = run_script(
        "train.py", "--dataset", cars, *SMALL, "--output-dir", tmp_path, **environment
    )
    assert done.returncode == 1 and str(tmp_path / "cache") in done.stderr, done.stderr


def test_an_eps_file_is_not_handed_to_ghostscript():
    file = io.BytesIO()
    Image.new("RGB", (50, 40)).save(file, "EPS")
    with pytest.raises(Exception, match="cannot identify"):
        train.decode_photo(file.getvalue())


# ---------------------------------------------------------------- one folder, one run


def start_run(cars, folder, *flags, **options) -> subprocess.Popen:
    command = [*SMALL_SCRIPT, str(ROOT / "train.py"), "--dataset", str(cars), *SMALL, *flags]
    command += ["--output-dir", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **{**pipes, **options})


def wait_for(process, beginning: str):
    while not process.stdout.readline().startswith(beginning):
        assert process.poll() is None, process.stderr.read()


def test_a_second_run_in_the_folder_ends_and_a_killed_one_holds_nobody_up(
    cars, tmp_path, run_train
):
    first = start_run(cars, tmp_path, "--epochs", "500", "--workers", "2")
    try:
        wait_for(first, "epoch 1/500")
        status, _, err = run_train("--output-dir", tmp_path, "--resume", "--epochs", 500)
        assert (
            status == 1
            and err.count("\n") == 1
            and f"another run is writing to --output-dir {tmp_path}" in err
        )
    finally:
        first.kill()
        first.communicate()
    epochs = load(tmp_path / "last_checkpoint.pth")["epoch"]
    status, _, err = run_train(
        "--output-dir", tmp_path, "--resume", "--epochs", epochs, "--workers", 0
    )
    assert "another run" not in err


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_resuming_says_that_the_best_model_is_lost(cars, tmp_path, run_train, damage):
    assert run_train("--output-dir", tmp_path, "--epochs", 2)[0] == 0
    last = load(tmp_path / "last_checkpoint.pth")
    last["history"][0]["test_accuracy"] = 1.0
    torch.save(last, tmp_path / "last_checkpoint.pth")
    best = tmp_path / "best_model.pth"
    if damage == "gone":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:1000])
    status, out, err = run_train("--output-dir", tmp_path, "--epochs", 2, "--resume")
    assert (
        status == 0 and f"{best} is missing, damaged" in out and "an epoch better than 1" in out
    ), err


def test_resume_takes_the_same_data_from_another_place(cars, tmp_path, run_train, monkeypatch):
    here = shutil.copytree(cars, tmp_path / "here")
    flags = ["--output-dir", tmp_path / "run", "--dataset"]
    monkeypatch.chdir(tmp_path)
    assert run_train(*flags, "here", "--epochs", 1)[0] == 0
    assert load(tmp_path / "run/best_model.pth")["settings"]["dataset"] == str(here)
    for epochs, name in ((2, "./here/"), (3, str(here))):
        status, out, err = run_train(*flags, name, "--epochs", epochs, "--resume")
        assert status == 0 and "resumed" in out, err
    here.rename(tmp_path / "there")
    status, out, err = run_train(*flags, "there", "--epochs", 4, "--resume")
    assert status == 0 and "resumed" in out, err


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_resume_names_the_checkpoint_that_it_cannot_read(cars, tmp_path, run_train, damage):
    assert run_train("--output-dir", tmp_path, "--epochs", 1)[0] == 0
    path = tmp_path / "last_checkpoint.pth"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000])
    status, _, err = run_train("--output-dir", tmp_path, "--epochs", 2, "--resume")
    assert status == 1 and err.count("\n") == 1 and str(path) in err and "--overwrite" not in err


# ---------------------------------------------------------------- signals


def test_a_run_that_was_stopped_in_its_very_first_save_goes_on(cars, tmp_path, run_train):
    folder = tmp_path / "a folder"
    process = start_run(cars, folder, "--epochs", "1")
    while process.poll() is None and not glob.glob(str(folder / ".partial-last*")):
        time.sleep(0.0005)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and err == ""
    status, _, err = run_train("--output-dir", folder, "--epochs", 1, "--resume")
    assert status == 0 and load(folder / "last_checkpoint.pth")["epoch"] == 1, err


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_signals_to_the_whole_group_draw_no_tracebacks(cars, tmp_path, signals):
    process = start_run(
        cars, tmp_path, "--epochs", "500", "--workers", "2", start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for(process, "epoch 1/500")
    for number in signals:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signals[0], 128 + signals[0]) and err == ""


@pytest.mark.parametrize("delay", [0.5, 3])
def test_ctrl_c_in_the_first_seconds_is_quiet(cars, tmp_path, delay):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--dataset", str(cars), *SMALL, "--output-dir", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and err == ""


def test_ctrl_c_stops_eval_as_its_workers_start(trained, tmp_path):
    command = [*SMALL_SCRIPT, str(ROOT / "eval.py"), "--workers", "2"]
    command += ["--checkpoint", str(trained[1] / "best_model.pth"), "--output-dir", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for(process, "test        ")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not (tmp_path / "metrics.json").exists(), err


# ---------------------------------------------------------------- consoles, notebooks, containers


def test_consoles_that_know_no_arrows_and_notebooks_without_their_package(trained, tmp_path):
    environment = {
        "PYTHONIOENCODING": "ascii",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    checkpoint = trained[1] / "best_model.pth"
    flags = ["--checkpoint", checkpoint, "--output-dir", tmp_path, "--num-gradcam", 0]
    done = run_small("eval.py", *flags, environment=environment)
    assert done.returncode == 0 and (tmp_path / "metrics.json").exists(), done.stderr
    assert "true ? predicted" in done.stdout


def test_head_and_a_full_disk_behind_the_output_end_quietly(trained, tmp_path):
    checkpoint = trained[1] / "best_model.pth"
    flags = ["--checkpoint", checkpoint, "--output-dir", tmp_path, "--num-gradcam", 0]
    reader, writer = os.pipe()
    os.close(reader)
    done = run_small("eval.py", *flags, stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""
    with open("/dev/full", "w") as full:
        done = run_small("eval.py", *flags, stdout=full)
    assert (
        done.returncode != 0 and "No space left" in done.stderr and "Traceback" not in done.stderr
    )


def raised(error: Exception) -> str:
    def fail():
        raise error

    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())) as file:
        assert train.run_command(fail) == 1
        file.seek(0)
        return file.read()


def test_small_shared_memory_is_named_with_its_cure():
    text = "unable to write to file </torch_1_2_3>: No space left on device (28)"
    worker = f"Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: {text}"
    killed = "DataLoader worker (pid 7) is killed by signal: Bus error. Out of shared memory."
    for message in (text, worker, killed):
        line = raised(RuntimeError(message))
        assert (
            line.count("\n") == 1
            and "/dev/shm (" in line
            and "--shm-size" in line
            and "--workers 0" in line
        )


def test_what_torch_raises_for_gpus_and_compilers_is_one_line():
    assert "--batch-size" in raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    line = raised(torch.distributed.DistBackendError("NCCL error: unhandled system error"))
    assert "another process" in line and "NCCL error" in line
    assert "this GPU" in raised(
        RuntimeError("CUDA error: no kernel image is available for execution")
    )
    for message in ("a bug", "Caught RuntimeError in DataLoader worker process 0.\na bug"):
        with pytest.raises(RuntimeError, match="a bug"):
            raised(RuntimeError(message))


def test_a_machine_that_cannot_compile_is_told_of_no_compile(run_train, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise FileNotFoundError(errno.ENOENT, "no C++ compiler")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_with(network, backend=broken))
    torch.compiler.reset()
    status, _, err = run_train("--output-dir", tmp_path, "--epochs", 1, "--compile")
    assert status == 1 and err.count("\n") == 1 and "--no-compile" in err, err


def test_a_stale_rank_is_refused(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RANK", 1)
    status, _, err = run_train("--output-dir", tmp_path, "--epochs", 1)
    assert status == 1 and err.count("\n") == 1 and "WORLD_SIZE" in err


@pytest.mark.slow
def test_a_proxy_that_never_answers_is_not_waited_for_for_ever(cars, tmp_path, run_script):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [server.accept() for _ in range(9)], daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        flags = ["--dataset", cars, "--batch-size", 8, "--workers", 0, "--output-dir", tmp_path]
        environment = {"https_proxy": proxy, "TORCH_HOME": str(tmp_path)}
        done = run_script("train.py", *flags, **environment)
    assert done.returncode == 1 and "timed out" in done.stderr, done.stderr


def test_a_full_disk_says_how_much_room_there_is(tmp_path):
    with pytest.raises(
        train.InputError, match=r"last.pth .*whole; \d+ MB are free.*unexpected pos"
    ):
        with train.whole_file(tmp_path / "last.pth"):
            raise RuntimeError(
                "[enforce fail at inline_container.cc:671] . unexpected pos 156950464"
            )


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def good(trained) -> dict:
    return load(trained[1] / "last_checkpoint.pth")


BAD_FIELDS = {
    "settings": None,
    "classes": None,
    "epoch": "last",
    "resolution": [0, 10**9, "224"],
    "history": "none",
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_fields_that_make_no_sense_are_refused(good, tmp_path, name):
    values = BAD_FIELDS[name] if isinstance(BAD_FIELDS[name], list) else [BAD_FIELDS[name]]
    for value in values:
        torch.save({**good, name: value}, tmp_path / "bad.pth")
        with pytest.raises(train.InputError, match="bad.pth"):
            train.read_checkpoint(tmp_path / "bad.pth")


def test_too_few_class_names_are_refused(good, tmp_path):
    torch.save({**good, "classes": ["a"]}, tmp_path / "bad.pth")
    with pytest.raises(train.InputError, match="bad.pth.*names other than the 8 classes"):
        train.read_checkpoint(tmp_path / "bad.pth")


@pytest.mark.parametrize("name", ["history", "scheduler", "optimizer", "settings", "scaler"])
def test_resume_needs_every_part_of_a_run(good, tmp_path, run_train, name):
    torch.save(
        {key: value for key, value in good.items() if key != name}, tmp_path / "last_checkpoint.pth"
    )
    status, _, err = run_train("--resume", "--output-dir", tmp_path)
    assert (
        status == 1 and err.count("\n") == 1 and "no checkpoint to resume" in err and name in err
    ), err


ODD_TENSORS = {
    "sparse": lambda value: value.to_sparse(),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "meta": lambda value: value.to("meta"),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_odd_kinds_are_refused(good, tmp_path, kind):
    state = {**good["model"], "fc.weight": ODD_TENSORS[kind](good["model"]["fc.weight"])}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(train.InputError, match="odd.pth"):
        train.read_checkpoint(tmp_path / "odd.pth")


def test_weights_as_other_programs_store_them(good, tmp_path):
    state = good["model"]
    old = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    for stored in ({"state_dict": state}, old):
        torch.save(stored, tmp_path / "weights.pth")
        read = train.read_checkpoint(tmp_path / "weights.pth")["model"]
        assert read.keys() == state.keys() and torch.equal(read["fc.weight"], state["fc.weight"])
    torch.save(
        {name: value for name, value in state.items() if "fc." not in name},
        tmp_path / "weights.pth",
    )
    with pytest.raises(train.InputError, match='Missing key.*"fc.weight"'):
        train.read_checkpoint(tmp_path / "weights.pth")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_in_words(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    with pytest.raises(train.InputError, match="script.pth.*TorchScript"):
        train.read_checkpoint(tmp_path / "script.pth")


def test_logits_that_are_not_finite_are_no_result(trained, tmp_path):
    checkpoint = load(trained[1] / "best_model.pth")
    checkpoint["model"]["bn1.running_var"][:] = -1.0
    torch.save(checkpoint, tmp_path / "bad.pth")
    with pytest.raises(train.InputError, match="bad.pth gives logits that are not finite"):
        evaluation.main(eval_flags(tmp_path / "bad.pth", tmp_path))
    assert not (tmp_path / "metrics.json").exists()


def test_a_run_goes_on_where_float16_needs_a_scaler_and_where_it_does_not(
    cars, tmp_path, run_train, monkeypatch
):
    for epochs, dtype in ((1, torch.float32), (2, torch.float16), (3, torch.float32)):
        monkeypatch.setattr(train, "pick_precision", lambda *args, dtype=dtype: dtype)
        status, _, err = run_train("--output-dir", tmp_path, "--epochs", epochs, "--resume")
        assert status == 0, err


# ---------------------------------------------------------------- names and pictures


def test_names_with_dollars_and_odd_files_stop_no_figure(trained, tmp_path, capfd):
    names = ["$x_{$", "b$"]
    write_dataset(tmp_path / "cars", ROWS, ROWS, names)
    torch.manual_seed(0)
    checkpoint = {
        "model": train.resnet50(num_classes=2).state_dict(),
        "classes": names,
        "resolution": 33,
        "epoch": 1,
    }
    torch.save(checkpoint, tmp_path / "two.pth")
    flags = eval_flags(tmp_path / "two.pth", tmp_path)
    evaluation.main([*flags, "--dataset", str(tmp_path / "cars")])
    assert (tmp_path / "gradcam_samples.png").exists() and (
        tmp_path / "confusion_matrix.png"
    ).exists()
    os.mkfifo(tmp_path / "fifo.jpg")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/ph\xf8to $5.jpg")
    with open(odd, "wb") as file:
        file.write(jpeg(0))
    status = train.run_command(
        lambda: evaluation.main([*flags, "--images", str(tmp_path / "fifo.jpg"), odd])
    )
    out, err = capfd.readouterr()
    assert status == 1 and "fifo.jpg (no file)" in err and "1 of 2" in err
    assert (tmp_path / "gradcam_images.png").exists()


def test_metrics_are_there_when_a_figure_fails(trained, tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(evaluation, "plot_confusion", fail)
    with pytest.raises(MemoryError):
        evaluation.main(eval_flags(trained[1] / "best_model.pth", tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["total"] == 32


def test_grad_cam_keeps_no_activations_of_the_early_layers(trained):
    args = evaluation.parse_args(["--no-amp"])
    checkpoint = train.read_checkpoint(trained[1] / "best_model.pth")
    model, _ = evaluation.load_model(args, checkpoint)
    free = train.resnet50(num_classes=8).eval()
    free.load_state_dict(checkpoint["model"])
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: saved.append(value.numel()) or value, lambda v: v
    ):
        maps = evaluation.grad_cam(model, crops, [0, 1, 2], batch_size=3)
    assert (
        max(saved) <= 3 * 2048 * 512
    )  # the last block's weights, and nothing as large as an early feature map
    assert not any(value == 3 * 64 * 32 * 32 for value in saved)
    np.testing.assert_array_equal(maps, evaluation.grad_cam(free, crops, [0, 1, 2], batch_size=3))
