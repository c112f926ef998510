"""What an evaluation writes and draws beside its figures."""

import csv
import json

import pytest
import torch
from PIL import Image

from kernelwarehouse.datasets import build_dataset
from kernelwarehouse.engine import evaluate_run
from kernelwarehouse.engine.report import confusion_matrix, draw_confusion
from kernelwarehouse.models import build_model


@pytest.fixture
def weights(tiny_config, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({"model": build_model(tiny_config().model).state_dict()}, path)
    return str(path)


def test_the_tables_agree_with_the_figures(tiny_config, tmp_path, weights, cpu):
    files = {name: str(tmp_path / name) for name in ("predictions", "per_class", "confusion")}
    files["confusion"] += ".png"
    config = tiny_config(eval=True, resume=weights, **files)
    metrics = evaluate_run(config, cpu)
    with open(files["predictions"], newline="") as f:
        images = list(csv.DictReader(f))
    assert [int(row["target"]) for row in images] == build_dataset(config, train=False).targets
    assert [row["image"] for row in images[:2]] == ["0", "1"]
    assert metrics.acc1 == pytest.approx(100 * sum(row["class1"] == row["target"] for row in images) / 360)
    for row in images:
        probabilities = [float(row[f"probability{i}"]) for i in range(1, 6)]
        assert probabilities == sorted(probabilities, reverse=True)
    with open(files["per_class"], newline="") as f:
        classes = list(csv.DictReader(f))
    counts = [int(row["images"]) for row in classes]
    assert sum(counts) == 360
    for name in ("acc1", "acc5"):
        mean = sum(n * float(row[name]) for n, row in zip(counts, classes, strict=True)) / 360
        assert mean == pytest.approx(getattr(metrics, name), abs=1e-3)
    assert Image.open(files["confusion"]).size[0] > 1000


def test_a_line_for_each_size(tiny_config, weights, cpu, capsys):
    evaluate_run(tiny_config(eval=True, resume=weights, eval_sizes=(8, 16)), cpu)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[-2].split(" of ")[1] for line in lines[::2]] == ["8 pixels", "16 pixels"]
    assert all(line.startswith("Acc@1") for line in lines[1::2])
    assert lines[1] != lines[3]


def test_other_labels(tiny_config, tmp_path, weights, cpu, capsys):
    """Where every class is acceptable every image is right; half of them have no label."""
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([list(range(10)) if i % 2 else [] for i in range(360)]))
    metrics = evaluate_run(tiny_config(eval=True, resume=weights, eval_labels=str(labels)), cpu)
    assert (metrics.acc1, metrics.images, metrics.unlabelled) == (100.0, 180, 180)
    assert "180 left out without a label" in capsys.readouterr().out


def test_the_confusion_matrix_counts_images_with_a_label():
    truth, predicted = torch.tensor([0, 0, 1, -1]), torch.tensor([0, 1, 1, 0])
    assert confusion_matrix(truth, predicted, 2).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("size", [3, 1000])
def test_the_picture_names_the_most_frequent_confusion(size):
    counts = 5 * torch.eye(size, dtype=torch.long)
    counts[1, 2] = 4
    figure = draw_confusion(counts, tuple(f"n{i}" for i in range(size)))
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts[-1].split() == ["4", "n1", "→", "n2"]
    assert len(texts) == (5 if size == 3 else 1)  # four counts where there is room for them
