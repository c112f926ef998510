"""Timing detectors: every row is measured, on equal work."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONFIGS = ["quickstart_static", "quickstart"]
CONFIG_FOLDER = SCRIPTS.parent / "detection" / "configs"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # where Python looks when the file is run
    spec = importlib.util.spec_from_file_location("benchmark_detection", SCRIPTS / "benchmark_detection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments):
    fixed = ["--device", "cpu", "--size", "120", "96", "--batch", "2", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark_detection.py", *fixed, *map(str, arguments)])
    return script.main()


def test_each_detector_has_a_row_in_each_mode(script, monkeypatch, capsys, tmp_path):
    assert run(script, monkeypatch, "--configs", *CONFIGS, "--json", tmp_path / "seconds.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("batches of 2 at 120×96, fp32, CPU")
    rows = [line.replace(" ± ", "±").split() for line in lines[2:]]
    assert [(row[0], row[5]) for row in rows] == [(m, name) for m in ("infer", "train") for name in CONFIGS]
    kept = json.loads((tmp_path / "seconds.json").read_text())
    assert len(kept) == 8
    medians = {}
    for mode, rate, time, ratio, layout, name in rows:
        of_layouts = {
            k["layout"]: sum(k["seconds"]) / 2 for k in kept if (k["mode"], k["configuration"]) == (mode, name)
        }
        assert of_layouts.keys() == {"NCHW", "NHWC"}
        medians[mode, name] = median = min(of_layouts.values())
        assert of_layouts[layout] == median
        assert float(time.split("±")[0]) == pytest.approx(median, abs=1e-3)
        assert float(rate) == pytest.approx(2 / median, abs=1e-2)
        assert float(ratio) == pytest.approx(median / medians[mode, CONFIGS[0]], abs=1e-2)


def test_random_weights_find_as_much_as_a_trained_detector_may(script):
    config = script.read("quickstart")
    config.model.test_cfg.rpn.max_per_img = 1000
    model = script.build(config, torch.device("cpu")).eval()
    data = script.make_batch(model, 2, 160, 160, torch.device("cpu"))
    with torch.inference_mode():
        found = model.predict(data["inputs"], data["data_samples"], rescale=False)
    for sample in found:
        assert len(sample.pred_instances) == 100
        assert sample.pred_instances.masks.shape == (100, 160, 160)


def test_training_reaches_every_parameter_that_learns(script):
    model = script.build(script.read("quickstart"), torch.device("cpu"))
    data = script.make_batch(model, 2, 120, 96, torch.device("cpu"))
    assert data["inputs"].shape == (2, 3, 96, 128)
    script.step(model, data, train=True)()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_backbone_that_differs_from_upstreams_formulation_is_not_timed(script, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["timing.parity"], "TOLERANCE", -1.0)  # below any difference
    with pytest.raises(SystemExit, match=r"error: .* differ by .*; no figure is printed"):
        run(script, monkeypatch, "--configs", *CONFIGS)
    assert not capsys.readouterr().out


ERRORS = {
    ("--configs", "quickstat"): "quickstat: no such configuration file",
    (
        "--configs",
        "retinanet_kw1x_resnet50",
    ): f"{CONFIG_FOLDER}/retinanet_kw1x_resnet50.py: is a RetinaNet on a DynamicBackbone",
    ("--rounds", "0"): "--rounds: at least 1 is needed, found 0",
    ("--size", "320", "8"): "--size: at least 32 is needed, found 8",
    ("--json", "nowhere/seconds.json"): "--json: nowhere/seconds.json",
}


@pytest.mark.parametrize("arguments", ERRORS, ids=" ".join)
def test_what_cannot_be_used_is_named_in_one_line(script, monkeypatch, capsys, arguments):
    assert run(script, monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {ERRORS[arguments]}")
    assert error.count("\n") == 1
