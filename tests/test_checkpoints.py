"""Checkpoints and weights: which are taken, and that the others are refused before they do harm."""

import csv
import json
import os
import pickle
import random

import pytest
import torch
from files import load, read_folder, read_history
from scripts import refusal, success
from small import small_resnet
from torchvision.models.resnet import resnet18


@pytest.fixture(scope="session")
def good(finished) -> dict:
    return load(finished / "best_model.pth")


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
    "a layer too few": lambda state: {n: state[n] for n in state if not n.startswith("layer2")},
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
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*CONTENTS, *FILES, "missing"])
def test_both_scripts_refuse_it_in_a_line_that_names_it(
    run_train, run_eval, good, finished, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pth"
    if kind in CONTENTS:
        torch.save(CONTENTS[kind](good["model"]), bad)
    elif kind in FILES:
        bad.write_bytes(FILES[kind]((finished / "best_model.pth").read_bytes()))
    for run, flag in ((run_eval, "--checkpoint"), (run_train, "--weights")):
        err = refusal(run(flag, bad, "--output-dir", tmp_path / "out"))
        assert not (tmp_path / "ran").exists(), "code in the file was run"
        assert not any((tmp_path / "out").glob("*"))
        assert bad.name in err
        assert len(err) < 1000
        # That is torch's advice: to run the code.
        assert "weights_only" not in err


def test_logits_that_are_not_finite_are_an_error(run_eval, good, tmp_path):
    state = {**good["model"], "bn1.running_var": -good["model"]["bn1.running_var"]}
    torch.save({**good, "model": state}, tmp_path / "bad.pth")
    flags = ["--checkpoint", tmp_path / "bad.pth", "--output-dir", tmp_path]
    err = refusal(run_eval(*flags))
    assert "NaN" in err
    assert "--no-amp" in err
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("damage", ["cut off", "missing", "a copy of best_model.pth"])
def test_resume_refuses_a_checkpoint_that_it_cannot_read(finished, tmp_path, run_train, damage):
    best = (finished / "best_model.pth").read_bytes()
    last = tmp_path / "last_checkpoint.pth"
    (tmp_path / "best_model.pth").write_bytes(best)
    if damage == "cut off":
        last.write_bytes((finished / "last_checkpoint.pth").read_bytes()[:1000])
    if damage.startswith("a copy"):
        last.write_bytes(best)
    before = read_folder(tmp_path)
    err = refusal(run_train("--output-dir", tmp_path, "--epochs", 3, "--resume"))
    assert str(tmp_path) in err
    assert "last_checkpoint.pth" in err
    assert read_folder(tmp_path) == before


# ---------------------------------------------------------------- what is taken


def renamed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


OTHERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 1},
    "torch.compile": lambda state: renamed(state, "_orig_mod."),
    "DistributedDataParallel": lambda state: {"model": renamed(state, "module.")},
    "both": lambda state: {"model": renamed(state, "module._orig_mod.")},
}


def read_report(folder) -> tuple[dict, list[dict]]:
    """Return the metrics and the predictions of an evaluation."""
    with open(folder / "predictions.csv", newline="", encoding="utf-8-sig") as file:
        predictions = list(csv.DictReader(file))
    return json.loads((folder / "metrics.json").read_text()), predictions


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_without_class_names_gets_those_of_the_dataset_and_a_warning(
    run_eval, good, cars, finished, tmp_path, kind
):
    torch.save(OTHERS[kind](good["model"]), tmp_path / "other.pth")
    flags = ["--dataset", cars, "--resolution", 33, "--num-gradcam", 0]
    out = success(run_eval(*flags, "--checkpoint", tmp_path / "other.pth"))
    warning = "names no classes"
    assert warning in out
    metrics, predictions = read_report(tmp_path)  # beside the checkpoint
    chosen = read_history(finished)[good["epoch"] - 1]
    assert metrics["test"]["loss"] == pytest.approx(chosen["test_loss"], rel=1e-4)
    assert {photo["true"] for photo in predictions} == set(good["classes"])
    if kind == "model":
        flags += ["--checkpoint", finished / "best_model.pth", "--output-dir", tmp_path]
        assert warning not in success(run_eval(*flags))


def test_of_another_programs_checkpoint_only_the_weights_are_trusted(
    run_eval, good, cars, tmp_path
):
    other = {"model": good["model"], "epoch": 7, "classes": [*"hgfedcba"], "resolution": 4096}
    torch.save(other, tmp_path / "other.pth")
    flags = ["--dataset", cars, "--checkpoint", tmp_path / "other.pth", "--num-gradcam", 0]
    out = success(run_eval(*flags))
    assert "224 px" in out
    assert "4096" not in out
    assert "epoch 7" not in out
    metrics, predictions = read_report(tmp_path)
    assert metrics["run"]["epoch"] is None
    assert {photo["true"] for photo in predictions} == set(good["classes"])


@pytest.mark.parametrize("weights", ["backbone.pth", "eight.pth", "compiled.pth", "IMAGENET1K_V2"])
def test_pretrained_weights_start_a_run_with_a_new_fc(run_train, tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    downloaded = tmp_path / "hub/checkpoints/resnet50-11ad3fa6.pth"
    downloaded.parent.mkdir(parents=True)
    torch.manual_seed(1)  # A run's own seed is 0.
    pretrained = small_resnet().state_dict()
    eight_classes = {name: pretrained[name][:8] for name in ("fc.weight", "fc.bias")}
    backbone = {name: pretrained[name] for name in pretrained if not name.startswith("fc.")}
    if weights == "IMAGENET1K_V2":
        torch.save(pretrained, downloaded)
    if weights == "eight.pth":
        torch.save({**pretrained, **eight_classes}, weights)
    if weights == "compiled.pth":
        torch.save(renamed(pretrained, "_orig_mod."), weights)
    if weights == "backbone.pth":
        torch.save(backbone, weights)
    success(run_train("--weights", weights, "--epochs", 1, "--lr", 1e-9, "--output-dir", "run"))
    saved = load(tmp_path / "run/best_model.pth")["model"]
    assert saved["fc.weight"].shape == (8, 2048)
    assert not torch.allclose(saved["fc.weight"], pretrained["fc.weight"][:8], atol=1e-2)
    for name, _ in small_resnet().named_parameters():
        if not name.startswith("fc."):
            assert torch.allclose(saved[name], pretrained[name], atol=1e-5), name


def test_weights_that_cannot_be_found_or_read_are_named(run_train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    err = refusal(run_train("--weights", "IMAGENET1K_V9", "--output-dir", tmp_path / "run"))
    for name in ("IMAGENET1K_V9", "IMAGENET1K_V1", "IMAGENET1K_V2", "none"):
        assert name in err
    downloaded = tmp_path / "hub/checkpoints/resnet50-11ad3fa6.pth"
    downloaded.parent.mkdir(parents=True)
    downloaded.write_bytes(b"PK\x03\x04 cut off")
    err = refusal(run_train("--weights", "IMAGENET1K_V2", "--output-dir", tmp_path / "run"))
    for words in ("--weights IMAGENET1K_V2", str(downloaded), "delete"):
        assert words in err


def test_a_checkpoint_without_a_head_is_not_evaluated(run_eval, good, tmp_path):
    state = {name: good["model"][name] for name in good["model"] if not name.startswith("fc.")}
    torch.save(state, tmp_path / "backbone.pth")
    err = refusal(run_eval("--checkpoint", tmp_path / "backbone.pth"))
    assert "backbone.pth" in err
    assert "fc.bias" in err


def test_classes_that_are_not_the_datasets_are_named(run_eval, good, cars, tmp_path):
    torch.save({**good, "classes": [*good["classes"][:-1], "Tank"]}, tmp_path / "names.pth")
    torch.save(small_resnet(num_classes=3).state_dict(), tmp_path / "count.pth")
    flags = ["--dataset", cars, "--output-dir", tmp_path, "--checkpoint"]
    # Of eight classes of the dataset, one is unknown to the checkpoint.
    err = refusal(run_eval(*flags, tmp_path / "names.pth"))
    assert good["classes"][-1] in err
    assert "Tank" in err
    assert not any(name in err for name in good["classes"][:-1])
    err = refusal(run_eval(*flags, tmp_path / "count.pth"))
    assert "3 classes" in err
    assert "8" in err.replace(str(cars), "")
    assert not (tmp_path / "metrics.json").exists()
