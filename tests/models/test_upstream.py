"""Upstream's 20 configurations: parameters, warehouses, state dicts, and logits with the same weights."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from fill import fill, images

from kernelwarehouse import build_model, load_checkpoint, plans, set_temperature
from kernelwarehouse.configs.schema import find_config
from kernelwarehouse.models import read_config, to_upstream

DATA = Path(__file__).parent.parent / "data"
MODELS = json.loads((DATA / "upstream_models.json").read_text())
GOLDEN = json.loads((DATA / "golden_logits.json").read_text())


def upstream_state(path):
    return {key: torch.from_numpy(fill(key, shape)) for key, shape in MODELS[path]["state_dict"].items()}


@pytest.mark.parametrize("path", MODELS)
def test_file_is_upstreams(path):
    assert json.loads(find_config(path).read_text()) == MODELS[path]["config"]
    config = read_config(path)
    assert read_config(config.to_fields()) == config


@pytest.mark.parametrize("path", MODELS)
def test_parameters_warehouses_and_names(path):
    model = build_model(path)
    assert sum(p.numel() for p in model.parameters()) == MODELS[path]["parameters"]
    shapes = [list(warehouse.shape) for plan in plans(model) for warehouse in plan.warehouses]
    assert shapes == list(MODELS[path]["warehouses"].values())
    written = to_upstream(model)
    assert {key: list(value.shape) for key, value in written.items()} == MODELS[path]["state_dict"]


@pytest.mark.parametrize("path", GOLDEN)
def test_golden_logits(path, tmp_path):
    """Read a training checkpoint as upstream writes it, and compute what upstream computes."""
    torch.save({"model": upstream_state(path), "epoch": 299, "args": argparse.Namespace(lr=4e-3)}, tmp_path / "c.pth")
    model = build_model(path).double().eval()
    load_checkpoint(model, tmp_path / "c.pth")
    x = torch.from_numpy(images()).double()
    for entry, expected in GOLDEN[path].items():
        set_temperature(model, 0.0 if entry == "eval" else float(entry.removeprefix("temp")))
        with torch.no_grad():
            logits, nudged = model(x)[:, :8], model(x * (1 + 1e-15))[:, :8]
        expected = torch.tensor(expected, dtype=torch.float64)
        error = (logits - expected).abs().max() / expected.abs().max()
        # One of these networks of random weights is chaotic at temperature 1: a change of the input by one rounding
        # error moves its logits by 4e-3, and no other order of summation can come closer than that.
        rounding = (logits - nudged).abs().max() / expected.abs().max()
        assert error <= max(1e-6, 10 * rounding), f"{entry}: {error:.2e}, rounding alone {rounding:.2e}"


@pytest.mark.parametrize(
    "path", ["configs/mobilenetv2_050/kw1d2x_mobilenetv2_050.json", "configs/convnext/kw1x_convnext_tiny.json"]
)
def test_written_for_upstream_and_read_back(path):
    from kernelwarehouse.models import load_weights

    model, twin = build_model(path), build_model(path)
    load_weights(twin, to_upstream(model))
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
