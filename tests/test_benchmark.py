"""benchmark.py: it runs and prints its rows, and its textbook computes what eval.py does."""

from types import SimpleNamespace

import benchmark
import pytest
import torch
from small import small_resnet

import eval as evaluation
import train


@pytest.mark.slow
def test_the_table_has_every_row(cars, capfd):
    flags = "--resolution 33 --photos 32 --repeats 1"
    benchmark.main(["--dataset", str(cars), *flags.split()])
    out = capfd.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line[:1] == "|"][2:]
    assert [cells[0] for cells in lines] == [
        "train input, workers: 1",
        "train input, workers: 2",
        "test input, workers: 1",
        "test input, workers: 2",
        "train epoch",
        "test evaluation",
        "eval.py --tta",
    ]
    for cells in lines:
        assert all(float(cell.split()[0]) > 0 for cell in cells[2:])
    assert "pause between epochs, seconds: " in out


def test_the_textbook_gives_the_logits_of_eval(trained):
    test = train.load_split(train.find_splits(str(trained.cars), ["test"]), "test")
    test = test.select(range(16))
    model = small_resnet(num_classes=8).to(train.DEVICE)
    model.load_state_dict(train.read_checkpoint(trained.run / "best_model.pth")["model"])
    expected = benchmark.textbook_tta(model, {"test": test}, sizes=(64, 8, 0))
    flags = SimpleNamespace(batch_size=8, workers=0, tta=True, split="test", resolution=64)
    photos = evaluation.view_dataset(test, flags)
    autocast = train.autocast_to(torch.float32)
    logits = [logits for _, logits, _ in evaluation.predict(model, photos, flags, autocast)]
    mean = torch.cat(logits, dim=1).mean(0)
    assert (mean - expected).norm() < 2e-3 * expected.norm()
