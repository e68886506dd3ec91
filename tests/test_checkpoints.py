"""Checkpoints and weights: which are taken, and that the others are refused before they do harm."""

import argparse
import json
import math
import os
import pickle
import random
import socket
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from files import assert_same_weights, load
from scripts import refusal, run, success
from small import small_resnet
from torchvision.models.resnet import resnet18

import train


@pytest.fixture(scope="session")
def good(finished) -> dict:
    return load(finished / "last_checkpoint.pth")


# ---------------------------------------------------------------- what is refused


class Code:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def not_finite(good: dict) -> dict:
    state = {**good["model"], "conv1.weight": good["model"]["conv1.weight"] * math.nan}
    return {**good, "model": state}


def other_fc(good: dict, fc_weight: torch.Tensor | None) -> dict:
    return {**good["model"], "fc.weight": fc_weight}


# What stands in the file, made from a good checkpoint.
BAD = {
    "a list": lambda good: [1, 2, 3],
    "code": lambda good: {"model": Code()},
    "another architecture": lambda good: {"model": resnet18(num_classes=8).state_dict()},
    "half of an fc": lambda good: {
        name: good["model"][name] for name in good["model"] if name != "fc.weight"
    },
    "not finite": not_finite,
    "settings": lambda good: {**good, "settings": None},
    "classes": lambda good: {**good, "classes": None},
    "too few classes": lambda good: {**good, "classes": ["a"]},
    "epoch": lambda good: {**good, "epoch": "last"},
    "history": lambda good: {**good, "history": "none"},
    "resolution 0": lambda good: {**good, "resolution": 0},
    "resolution 10⁹": lambda good: {**good, "resolution": 10**9},
    "resolution in words": lambda good: {**good, "resolution": "224"},
    "sparse": lambda good: other_fc(good, good["model"]["fc.weight"].to_sparse()),
    "quantised": lambda good: other_fc(
        good, torch.quantize_per_tensor(good["model"]["fc.weight"], 0.1, 0, torch.qint8)
    ),
    "meta": lambda good: other_fc(good, good["model"]["fc.weight"].to("meta")),
    "no tensor": lambda good: other_fc(good, 0.5),
    # It claims 10 GB in a kilobyte.
    "larger than its file": lambda good: {
        "fc.weight": torch.zeros(1).expand(50_000, 50_000),
        "fc.bias": torch.zeros(1).expand(50_000),
    },
}


def refused(path: Path) -> str:
    """What is said of a checkpoint, which has to be one line with its name."""
    with pytest.raises(train.InputError) as error:
        train.read_checkpoint(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore")
def test_contents_that_cannot_be_a_trained_resnet50_are_refused(good, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    torch.save(BAD[kind](good), tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists(), "code in the checkpoint was run"


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999999])
def test_cut_off_files_are_refused(finished, tmp_path, share):
    data = (finished / "best_model.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(len(data) * share)])
    refused(tmp_path / "cut.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_other_programs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(5):
        (tmp_path / "random.pth").write_bytes(random.Random(seed).randbytes(10_000))
        refused(tmp_path / "random.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Code()))
    refused(tmp_path / "pickle.pth")
    assert not (tmp_path / "ran").exists(), "code in the pickle was run"
    (tmp_path / "zip.pth").write_bytes(b"PK\x03\x04 cut off")
    refused(tmp_path / "zip.pth")
    refused(tmp_path / "missing.pth")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_in_words(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    assert "TorchScript" in refused(tmp_path / "script.pth")


def test_what_is_wrong_is_said(good, tmp_path):
    torch.save(BAD["half of an fc"](good), tmp_path / "bad.pth")
    assert "it lacks ['fc.weight']" in refused(tmp_path / "bad.pth")
    torch.save(BAD["too few classes"](good), tmp_path / "bad.pth")
    assert "names other than the 8 classes" in refused(tmp_path / "bad.pth")


# What other programs write, and the word that says why it is refused.
OTHERS = {
    "a whole model": (lambda state: small_resnet(), "torchvision.models.resnet.ResNet"),
    "model_state_dict": (lambda state: {"model_state_dict": state, "epoch": 1}, "model_state_dict"),
    "net": (lambda state: {"net": state, "acc": 0.5}, "net"),
    "lightning": (
        lambda state: {"state_dict": {f"model.{name}": state[name] for name in state}},
        "model.",
    ),
    "a list": (lambda state: [state], "list"),
    "none": (lambda state: None, "None"),
    "code": (lambda state: {"state_dict": state, "hook": Code()}, "mkdir"),
    "a terminal's escapes": (lambda state: {"\x1b[31mred": state}, "red"),
}


def refused_by_eval(run_eval, path: Path) -> str:
    """What eval.py says of a checkpoint, without the folder's name."""
    err = refusal(run_eval("--checkpoint", path, "--output-dir", path.parent))
    return err.replace(str(path.parent), "")


@pytest.mark.parametrize("kind", OTHERS)
def test_the_reason_that_a_checkpoint_of_another_program_is_refused_fits_a_line(
    run_eval, good, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    make, word = OTHERS[kind]
    torch.save(make(good["model"]), tmp_path / "other.pth")
    err = refused_by_eval(run_eval, tmp_path / "other.pth")
    assert word in err
    assert len(err) < 300
    assert "\x1b" not in err
    assert "weights_only" not in err
    assert not (tmp_path / "ran").exists(), "code in the checkpoint was run"


def test_safetensors_are_no_file_of_torch_save(run_eval, tmp_path):
    header = json.dumps({"fc.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    err = refused_by_eval(run_eval, tmp_path / "model.safetensors")
    assert "no file of torch.save" in err
    assert len(err) < 300
    assert "weights_only" not in err


# ---------------------------------------------------------------- what other programs keep


SCALARS = [np.float64(0.5), np.float32(0.5), np.int64(3), np.int32(3), np.bool_(True)]


def save_as_numpy_1(value, path: Path):
    """torch.save with the name that numpy 1 has for the function of a scalar."""
    torch.save(value, path.with_name("of_numpy_2.pth"))
    with (
        zipfile.ZipFile(path.with_name("of_numpy_2.pth")) as source,
        zipfile.ZipFile(path, "w") as copy,
    ):
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            copy.writestr(name, content)


@pytest.mark.parametrize("save", [torch.save, save_as_numpy_1])
def test_numpy_scalars_beside_the_weights_are_read(good, tmp_path, save):
    save({"model": good["model"], "best": SCALARS}, tmp_path / "weights.pth")
    read = train.read_checkpoint(tmp_path / "weights.pth")
    assert read["best"] == SCALARS
    assert_same_weights(read["model"], good["model"])


def test_a_checkpoint_of_torchvisions_references_is_read(good, tmp_path):
    # So does timm, with the weights as its state_dict.
    flags = argparse.Namespace(lr=0.1, model="resnet50", data_path=None)
    for name in ("model", "state_dict"):
        torch.save({name: good["model"], "epoch": 1, "args": flags}, tmp_path / "weights.pth")
        read = train.read_checkpoint(tmp_path / "weights.pth")
        assert_same_weights(read["model"], good["model"])


# ---------------------------------------------------------------- by eval.py


@pytest.mark.parametrize(
    "damage", ["missing", "another architecture", "other names", "other count"]
)
def test_eval_refuses_them_in_one_line(run_eval, good, cars, tmp_path, damage):
    bad = tmp_path / "bad.pth"
    if damage == "another architecture":
        torch.save(BAD[damage](good), bad)
    if damage == "other names":
        torch.save({**good, "classes": [*good["classes"][:-1], "Tank"]}, bad)
    if damage == "other count":
        torch.save(small_resnet(num_classes=3).state_dict(), bad)
    flags = ["--checkpoint", bad, "--dataset", cars, "--output-dir", tmp_path / "out"]
    err = refusal(run_eval(*flags))
    assert ("'Tank'" if damage == "other names" else "bad.pth") in err
    assert not (tmp_path / "out/metrics.json").exists()


def test_logits_that_are_not_finite_are_no_result(run_eval, good, tmp_path):
    variance = torch.full_like(good["model"]["bn1.running_var"], -1)
    checkpoint = {**good, "model": {**good["model"], "bn1.running_var": variance}}
    torch.save(checkpoint, tmp_path / "bad.pth")
    flags = ["--checkpoint", tmp_path / "bad.pth", "--output-dir", tmp_path]
    assert "the logits are not finite: try --no-amp" in refusal(run_eval(*flags))
    assert not (tmp_path / "metrics.json").exists()


# ---------------------------------------------------------------- by train.py --resume


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_resume_names_the_checkpoint_that_it_cannot_read(finished, tmp_path, run_train, damage):
    last = tmp_path / "last_checkpoint.pth"
    (tmp_path / "history.csv").write_bytes((finished / "history.csv").read_bytes())
    if damage == "cut off":
        last.write_bytes((finished / "last_checkpoint.pth").read_bytes()[:1000])
    err = refusal(run_train("--output-dir", tmp_path, "--epochs", 2, "--resume"))
    assert str(last) in err
    assert "--overwrite" not in err


@pytest.mark.parametrize("name", ["history", "scheduler", "optimizer", "settings", "scaler"])
def test_resume_needs_every_part_of_a_run(good, tmp_path, run_train, name):
    parts = {key: value for key, value in good.items() if key != name}
    torch.save(parts, tmp_path / "last_checkpoint.pth")
    err = refusal(run_train("--resume", "--output-dir", tmp_path))
    assert "no checkpoint to resume" in err
    assert name in err


# ---------------------------------------------------------------- weights to start from


def damaged_weights(path):
    path.write_bytes(b"PK\x03\x04 cut off")


def weights_of_resnet18(path):
    torch.save(resnet18().state_dict(), path)


def missing_weights(path):
    pass


@pytest.mark.parametrize("write", [damaged_weights, weights_of_resnet18, missing_weights])
def test_weights_that_cannot_be_had_are_refused(run_train, tmp_path, write):
    write(tmp_path / "weights.pth")
    flags = ["--weights", tmp_path / "weights.pth", "--output-dir", tmp_path / "run"]
    assert "weights.pth" in refusal(run_train(*flags))


def test_a_thousand_classes_start_a_run_with_a_new_fc(run_train, tmp_path):
    torch.save(small_resnet().state_dict(), tmp_path / "imagenet.pth")
    flags = ["--weights", tmp_path / "imagenet.pth", "--output-dir", tmp_path / "run"]
    success(run_train(*flags, "--epochs", 1))
    assert load(tmp_path / "run/best_model.pth")["model"]["fc.bias"].shape == (8,)


def backbone(state: dict) -> dict:
    return {name: state[name] for name in state if not name.startswith("fc.")}


def test_a_backbone_without_fc_starts_a_run(run_train, tmp_path):
    pretrained = small_resnet().state_dict()
    torch.save(backbone(pretrained), tmp_path / "backbone.pth")
    flags = ["--weights", tmp_path / "backbone.pth", "--epochs", 1, "--lr", 1e-9]
    success(run_train(*flags, "--output-dir", tmp_path / "run"))
    saved = load(tmp_path / "run/best_model.pth")["model"]
    assert saved["fc.weight"].shape == (8, 2048)
    assert torch.allclose(saved["conv1.weight"], pretrained["conv1.weight"], atol=1e-5)


def test_a_backbone_without_fc_is_not_evaluated(run_eval, good, tmp_path):
    torch.save(backbone(good["model"]), tmp_path / "backbone.pth")
    assert "has no fc" in refused_by_eval(run_eval, tmp_path / "backbone.pth")


def test_weights_as_other_programs_store_them(good, tmp_path):
    state = good["model"]
    without_counts = {name: state[name] for name in state if "num_batches_tracked" not in name}
    stored = [state, {"state_dict": state}, without_counts]
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
        stored.append({prefix + name: value for name, value in state.items()})
    for weights in stored:
        torch.save(weights, tmp_path / "weights.pth")
        read = train.read_checkpoint(tmp_path / "weights.pth")["model"]
        if weights is without_counts:
            assert read.keys() == state.keys()
            read = {name: read[name] for name in without_counts}
            assert_same_weights(read, without_counts)
        else:
            assert_same_weights(read, state)


def test_eval_takes_a_bare_state_dict(run_eval, good, cars, finished, tmp_path):
    best = load(finished / "best_model.pth")
    torch.save({f"module.{name}": best["model"][name] for name in best["model"]}, tmp_path / "bare")
    flags = ["--checkpoint", tmp_path / "bare", "--dataset", cars, "--resolution", 33]
    out = success(run_eval(*flags, "--num-gradcam", 0, "--output-dir", tmp_path))
    assert f"({round(8 * best['test_accuracy'])}/8, " in out
    assert "names no classes: those of the data set are assumed" in out
    assert "in its order" in out


def test_eval_assumes_no_classes_where_the_checkpoint_names_them(run_eval, finished, tmp_path):
    flags = ["--checkpoint", finished / "best_model.pth", "--num-gradcam", 0]
    assert "assumed" not in success(run_eval(*flags, "--output-dir", tmp_path))


def test_the_default_weights_get_a_new_fc_and_a_cut_off_download_is_named(
    run_train, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    downloaded = tmp_path / "hub/checkpoints/resnet50-11ad3fa6.pth"
    downloaded.parent.mkdir(parents=True)
    pretrained = small_resnet().state_dict()
    torch.save(pretrained, downloaded)
    flags = ["--weights", "IMAGENET1K_V2", "--epochs", 1, "--lr", 1e-9, "--output-dir"]
    success(run_train(*flags, tmp_path / "run"))
    saved = load(tmp_path / "run/best_model.pth")["model"]
    assert saved["fc.weight"].shape == (8, 2048)
    assert torch.allclose(saved["conv1.weight"], pretrained["conv1.weight"], atol=1e-5)

    downloaded.write_bytes(downloaded.read_bytes()[:100_000])
    assert str(downloaded.parent) in refusal(run_train(*flags, tmp_path / "other"))


@pytest.mark.slow
def test_a_proxy_that_never_answers_is_not_waited_for_for_ever(cars, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        # Without the timeout that train.py may have set in the tests' own process.
        server.settimeout(None)
        threading.Thread(target=lambda: [server.accept() for _ in range(9)], daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        flags = ["--dataset", cars, "--batch-size", 8, "--workers", 0, "--output-dir", tmp_path]
        environment = {"https_proxy": proxy, "TORCH_HOME": str(tmp_path)}
        status, _, err = run("train.py", *flags, small=False, environment=environment)
    assert status == 1
    assert "timed out" in err
