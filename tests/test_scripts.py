"""The scripts that compare runs."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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
