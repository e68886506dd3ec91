"""benchmark.py: it runs and prints its rows, and its reference computes what eval.py does."""

import functools
import re

import benchmark
import pytest
import torch
from small import small_resnet

import eval as evaluation
import train


@pytest.mark.slow
def test_the_table_has_every_row(cars, capfd):
    flags = "--resolution 32 --photos 8 --repeats 1 --workers 1 --device cpu --no-compile"
    benchmark.main(["--dataset", str(cars), *flags.split()])
    out = capfd.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line[:1] == "|"
    ][2:]
    names = [
        "decode only",
        "train input",
        "test input",
        "train step",
        "train epoch",
        "test evaluation, first",
    ]
    assert [row[0].startswith(name) for row, name in zip(rows, names, strict=False)] == [True] * 6
    assert [row[0] for row in rows[6:]] == [
        "test evaluation, later epochs",
        "eval.py --tta end to end",
    ]
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[2:])
    assert re.search(r"first step, weights cached: \d+\.\d", out)


def test_the_reference_gives_the_logits_of_eval(trained):
    photos = train.load_cars(str(trained[0]), ("test",))["test"].select(range(16))
    model = small_resnet(num_classes=8)
    model.load_state_dict(train.read_checkpoint(trained[1] / "best_model.pth")["model"])
    expected = benchmark.textbook_tta(model, photos, 64, 8, 0, torch.device("cpu"))
    cars = train.CarPhotos(photos, functools.partial(evaluation.crop_views, tta=True), 64)
    views = torch.stack([cars[0, row][0] for row in range(16)])
    _, mean = evaluation.predict(model, views, torch.autocast("cpu", enabled=False))
    assert (mean - expected).norm() < 2e-3 * expected.norm()
