"""The scripts that compare runs, show what a network does, and prepare data."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kernelwarehouse.datasets import Digits, eval_transform
from kernelwarehouse.models import build_model, plans, read_config, set_temperature

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """A converted run, one of whose epochs was repeated, and a static one that was not evaluated while training."""
    converted, static = tmp_path / "converted", tmp_path / "static"
    for run in (converted, static):
        run.mkdir()
    records = [
        {
            "epoch": e,
            "train_loss": 2.0 - a,
            "test_loss": 1.0,
            "train_lr": 0.1,
            "train_temperature": 0.5,
            "test_acc1": 90.0 + a,
        }
        for e, a in ((0, 0.1), (1, 0.2), (1, 0.3), (2, 0.4))
    ]
    (converted / "log.txt").write_text("".join(json.dumps(r) + "\n" for r in records))
    (static / "log.txt").write_text(json.dumps({"epoch": 0, "train_loss": 2.0, "train_lr": 0.1}) + "\n")
    for run, size in ((converted, 320030), (static, 180000)):
        result = {"n_parameters": size, "acc1": 99.1667, "loss": 0.1262, "images_per_second": 1234.5}
        (run / "eval.json").write_text(json.dumps(result))
    return [converted, static]


def test_the_table_has_a_row_for_each_run(runs):
    lines = script("compare_runs").table(runs).splitlines()
    assert lines[0].split() == ["run", "parameters", "top-1", "(%)", "loss", "images/s"]
    assert lines[2].split() == ["converted", "320,030", "99.17", "0.126", "1,234"]
    assert lines[3].split()[0] == "static"
    assert len({len(line) for line in lines}) == 1


def test_a_repeated_epoch_counts_as_it_ended(runs):
    records = script("plot_run").read_log(runs[0])
    assert [(r["epoch"], r["test_acc1"]) for r in records] == [(0, 90.1), (1, 90.3), (2, 90.4)]


def test_the_picture_shows_what_each_run_has(runs, tmp_path):
    figure = script("plot_run").plot(runs)
    curves = {axis.get_title(): len(axis.get_lines()) for axis in figure.axes}
    assert list(curves.values()) == [3, 1, 2, 1]
    figure.savefig(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500


QUICKSTART = "quickstart/kw1x_resnet18"


@pytest.fixture
def checkpoint(tmp_path):
    config = read_config(QUICKSTART)
    torch.manual_seed(0)
    path = tmp_path / "checkpoint.pth"
    model = build_model(config.model)
    set_temperature(model, 0.25)
    torch.save({"model": model.state_dict(), "config": config.to_fields()}, path)
    return path


@pytest.fixture
def pictures(tmp_path):
    digits, paths = Digits(train=False), [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, digits.images, strict=False):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)
    return paths


def test_attention_is_shown_of_every_layer_at_the_stored_temperature(
    checkpoint, pictures, tmp_path, monkeypatch, capsys
):
    module, output = script("show_attention"), tmp_path / "attention.png"
    monkeypatch.setattr(
        sys, "argv", ["show_attention.py", str(checkpoint), *map(str, pictures), "--output", str(output)]
    )
    assert module.main() == 0
    assert "18 layers to 3 images" in capsys.readouterr().out
    assert Image.open(output).size[0] > 1000


def test_the_shown_attention_is_that_of_the_network(checkpoint, pictures):
    module = script("show_attention")
    model, config = module.load(checkpoint, "model")
    images = module.read_images(pictures, config)
    np.testing.assert_allclose(images.mean(), model_input(config).mean(), atol=0.01)
    layers = module.collect(model, images)
    assert [layer.name for layer in layers] == [layer.name for layer in plans(model)[0].layers]
    for layer in layers:
        assert layer.coefficients.shape == (3, *layer.assignment.shape)
        assert (layer.coefficients - 0.25 * layer.assignment).abs().sum(dim=2).max() <= 0.75
        assert layer.change > 0
    set_temperature(model, 1.0)
    for layer in module.collect(model, images):
        assert torch.equal(layer.coefficients[0], layer.assignment)
        assert layer.change == 0


def model_input(config):
    return torch.stack([eval_transform(config)(image) for image in Digits(train=False).images[:3]])


def test_a_static_network_has_no_attention_to_show(tmp_path, pictures, monkeypatch, capsys):
    config, path = read_config("quickstart/resnet18"), tmp_path / "static.pth"
    torch.save({"model": build_model(config.model).state_dict(), "config": config.to_fields()}, path)
    monkeypatch.setattr(sys, "argv", ["show_attention.py", str(path), str(pictures[0])])
    assert script("show_attention").main() == 2
    assert capsys.readouterr().err == f"error: {path}: {config.model.model} has no attention over what layers share\n"


def test_shards_are_made_of_class_folders(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / name / "0.png")
    arguments = [str(tmp_path / "images"), str(tmp_path / "shards"), "--images_per_shard", "1"]
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *arguments])
    assert script("make_shards").main() == 0
    assert "val: 2 images of 2 classes in 2 shards" in capsys.readouterr().out
    names = ["train-000000.tar", "train-000001.tar", "train-index.npz", "val-000000.tar", "val-000001.tar"]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [*names, "val-index.npz"]
    assert script("make_shards").main() == 2
    assert "is there already" in capsys.readouterr().err


def test_the_benchmark_compares_the_two_loaders(monkeypatch, capsys):
    monkeypatch.setattr(ImageOps, "posterize", ImageOps.posterize)  # which the script replaces
    monkeypatch.setattr(sys, "argv", ["benchmark_data.py", "--images", "50", "--rounds", "1"])
    script("benchmark_data").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["50", "ours", "timm", "ratio"]
