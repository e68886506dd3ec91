"""benchmark.py: it runs and prints its rows, and its textbook computes what eval.py does."""

import benchmark
import datasets
import numpy as np
import pandas
import pytest
from files import load
from scripts import success
from small import small_resnet

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


def test_the_textbook_gives_the_six_views_of_eval(run_eval, trained, tmp_path):
    best = trained.run / "best_model.pth"
    flags = ["--checkpoint", best, "--output-dir", tmp_path, "--num-gradcam", 0, "--tta"]
    success(run_eval(*flags))
    table = pandas.read_csv(tmp_path / "predictions.csv").head(16)
    file = next((trained.cars / "data").glob("test-*"))
    test = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path)).select(range(16))
    model = small_resnet(num_classes=8).to(train.DEVICE)
    model.load_state_dict(load(best)["model"])
    logits = benchmark.textbook_tta(model, {"test": test}, sizes=(64, 8, 0))
    shares = logits.softmax(1)
    names = np.array(test.features["label"].names)
    assert table["tta_predicted"].tolist() == names[shares.argmax(1)].tolist()
    expected = np.stack([shares.amax(1), shares[range(16), test["label"][:]]], axis=1)
    found = table[["tta_confidence", "tta_true_confidence"]].to_numpy()
    of_one_view = table[["confidence", "true_confidence"]].to_numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(found - of_one_view).max()
