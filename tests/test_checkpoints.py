"""Checkpoints and weights: which are taken, and that the others are refused before they do harm."""

import argparse
import math
import os
import pickle
import random

import pytest
import torch
from files import assert_same_weights, load
from scripts import refusal, success
from small import small_resnet
from torchvision.models.resnet import resnet18

import train


@pytest.fixture(scope="session")
def good(finished) -> dict:
    return load(finished / "last_checkpoint.pth")


class Code:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


# What torch.save is given, made from the weights of a good checkpoint.
CONTENTS = {
    "a list": lambda state: [state],
    "nothing": lambda state: None,
    "code": lambda state: {"model": state, "hook": Code()},
    "a whole model": lambda state: small_resnet(),
    "another name for the weights": lambda state: {"net": state, "acc": 0.5},
    "another network": lambda state: {"model": resnet18(num_classes=8).state_dict()},
    "an fc of no tensor": lambda state: {**state, "fc.bias": 0.5},
    "no weights": lambda state: {"model": {}},
    "not finite": lambda state: {**state, "conv1.weight": state["conv1.weight"] * math.nan},
}
# What the file holds, made from a good one.
FILES = {
    "no bytes": lambda good: b"",
    "its first bytes": lambda good: good[:100],
    "a half": lambda good: good[: len(good) // 2],
    "all but its last byte": lambda good: good[:-1],
    "random bytes": lambda good: random.Random(0).randbytes(10_000),
    "other random bytes": lambda good: random.Random(2).randbytes(10_000),
    "a pickle with code": lambda good: pickle.dumps(Code()),
    "a zip's first bytes": lambda good: b"PK\x03\x04 cut off",
    "TorchScript": lambda good: torch.jit.script(torch.nn.Linear(2, 2)).save_to_buffer(),
    "safetensors": lambda good: b"\2\0\0\0\0\0\0\0{}",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*CONTENTS, *FILES, "missing"])
def test_both_scripts_refuse_it_in_a_line_that_names_it(
    run_train, run_eval, good, finished, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / ("bad.safetensors" if kind == "safetensors" else "bad.pth")
    if kind in CONTENTS:
        torch.save(CONTENTS[kind](good["model"]), bad)
    elif kind in FILES:
        bad.write_bytes(FILES[kind]((finished / "best_model.pth").read_bytes()))
    for run, flag in ((run_eval, "--checkpoint"), (run_train, "--weights")):
        err = refusal(run(flag, bad, "--output-dir", tmp_path / "out"))
        assert not (tmp_path / "ran").exists(), "code in the file was run"
        assert list((tmp_path / "out").iterdir()) == []
        assert bad.name in err
        assert len(err) < 1000
        assert "weights_only" not in err
        if kind == "a whole model":
            assert "code, which is not executed torchvision.models.resnet.ResNet" in err
        assert ("safetensors.torch.load_file" in err) is (kind == "safetensors")


def test_logits_that_are_not_finite_are_an_error(run_eval, good, tmp_path):
    state = {**good["model"], "bn1.running_var": -good["model"]["bn1.running_var"]}
    torch.save({**good, "model": state}, tmp_path / "bad.pth")
    flags = ["--checkpoint", tmp_path / "bad.pth", "--output-dir", tmp_path]
    assert "the logits contain NaN or Inf: try --no-amp" in refusal(run_eval(*flags))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("damage", ["cut off", "missing", "a copy of best_model.pth"])
def test_resume_names_the_checkpoint_that_it_cannot_read(finished, tmp_path, run_train, damage):
    last = tmp_path / "last_checkpoint.pth"
    (tmp_path / "history.csv").write_bytes((finished / "history.csv").read_bytes())
    if damage == "cut off":
        last.write_bytes((finished / "last_checkpoint.pth").read_bytes()[:1000])
    if damage.startswith("a copy"):
        last.write_bytes((finished / "best_model.pth").read_bytes())
    assert str(last) in refusal(run_train("--output-dir", tmp_path, "--epochs", 2, "--resume"))


# ---------------------------------------------------------------- what is taken


def renamed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


FLAGS = argparse.Namespace(lr=0.1, model="resnet50", data_path=None)
OTHERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 1},
    "state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
    "torch.compile": lambda state: renamed(state, "_orig_mod."),
    "DistributedDataParallel": lambda state: {"state_dict": renamed(state, "module.")},
    "both": lambda state: {"model": renamed(state, "module._orig_mod.")},
    "torchvision": lambda state: {"model": state, "args": FLAGS},
    "timm": lambda state: {"state_dict": state, "state_dict_ema": {}, "args": FLAGS},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_weights_in_a_checkpoint_of_another_program_are_read(good, tmp_path, kind):
    torch.save(OTHERS[kind](good["model"]), tmp_path / "weights.pth")
    assert_same_weights(train.read_checkpoint(tmp_path / "weights.pth")["model"], good["model"])


@pytest.mark.parametrize("weights", ["backbone.pth", "eight.pth", "IMAGENET1K_V2"])
def test_pretrained_weights_start_a_run_with_a_new_fc(
    run_train, run_eval, tmp_path, monkeypatch, weights
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    downloaded = tmp_path / "hub/checkpoints/resnet50-11ad3fa6.pth"
    downloaded.parent.mkdir(parents=True)
    torch.manual_seed(1)  # A run's own seed is 0.
    pretrained = small_resnet().state_dict()
    torch.save(pretrained, downloaded)
    eight_classes = {name: pretrained[name][:8] for name in ("fc.weight", "fc.bias")}
    torch.save({**pretrained, **eight_classes}, "eight.pth")
    backbone = {name: pretrained[name] for name in pretrained if not name.startswith("fc.")}
    torch.save(backbone, "backbone.pth")
    success(run_train("--weights", weights, "--epochs", 1, "--lr", 1e-9, "--output-dir", "run"))
    saved = load(tmp_path / "run/best_model.pth")["model"]
    assert saved["fc.weight"].shape == (8, 2048)
    assert not torch.allclose(saved["fc.weight"], pretrained["fc.weight"][:8], atol=1e-2)
    assert torch.allclose(saved["conv1.weight"], pretrained["conv1.weight"], atol=1e-5)
    if weights == "backbone.pth":
        err = refusal(run_eval("--checkpoint", weights, "--output-dir", "report"))
        assert "backbone.pth: it has no fc.bias" in err
    err = refusal(run_train("--weights", "IMAGENET1K_V9", "--output-dir", "other"))
    assert "neither a file nor one of ['IMAGENET1K_V1', 'IMAGENET1K_V2', 'DEFAULT', 'none']" in err
    if weights == "IMAGENET1K_V2":
        downloaded.write_bytes(b"PK\x03\x04 cut off")
        err = refusal(run_train("--weights", weights, "--output-dir", "other"))
        assert "--weights IMAGENET1K_V2" in err


def test_of_another_programs_checkpoint_only_the_weights_are_trusted(
    run_eval, good, cars, tmp_path
):
    other = {"model": good["model"], "epoch": 7, "classes": [*"hgfedcba"], "resolution": 4096}
    torch.save(other, tmp_path / "other.pth")
    flags = ["--dataset", cars, "--checkpoint", tmp_path / "other.pth", "--num-gradcam", 0]
    out = success(run_eval(*flags, "--resolution", 33))
    assert out.startswith(f"checkpoint  {tmp_path / 'other.pth'}\n")
    assert "names no classes" in out
    assert (tmp_path / "metrics.json").exists()  # beside the checkpoint


def test_classes_that_are_not_the_data_sets_are_named(run_eval, good, cars, tmp_path):
    torch.save({**good, "classes": [*good["classes"][:-1], "Tank"]}, tmp_path / "names.pth")
    torch.save(small_resnet(num_classes=3).state_dict(), tmp_path / "count.pth")
    flags = ["--dataset", cars, "--output-dir", tmp_path, "--checkpoint"]
    # Of eight classes of the dataset, one is unknown to the checkpoint.
    err = refusal(run_eval(*flags, tmp_path / "names.pth"))
    assert f"only here ['{good['classes'][-1]}'], only in training ['Tank']" in err
    assert "the checkpoint has 3 classes, and the dataset 8" in refusal(
        run_eval(*flags, tmp_path / "count.pth")
    )
    assert not (tmp_path / "metrics.json").exists()


def test_a_checkpoint_without_names_gets_those_of_the_dataset_and_a_warning(
    run_eval, cars, finished, tmp_path
):
    best = load(finished / "best_model.pth")
    torch.save(best["model"], tmp_path / "bare.pth")
    flags = ["--dataset", cars, "--resolution", 33, "--num-gradcam", 0, "--output-dir", tmp_path]
    for path, is_bare in ((finished / "best_model.pth", False), (tmp_path / "bare.pth", True)):
        out = success(run_eval(*flags, "--checkpoint", path))
        assert ("names no classes: assumed to be in the dataset's order" in out) is is_bare
        assert f"({round(8 * best['test_accuracy'])} of 8, " in out
