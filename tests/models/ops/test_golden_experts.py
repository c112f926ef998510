"""What the authors' code computes: outputs and gradients of layers, logits of networks, and numbers of parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill

from kernelwarehouse import build_model, plans, set_temperature
from kernelwarehouse.models import load_weights, to_upstream
from kernelwarehouse.models.ops.dyconv import DYConv2d
from kernelwarehouse.models.ops.odconv import ODConv2d

DATA = Path(__file__).parents[2] / "data"
CLASSES = {"dyconv": DYConv2d, "odconv": ODConv2d}
FIELDS = {"in_planes": "in_channels", "out_planes": "out_channels", "K": "kernel_num", "ratio": "reduction"}
GOLDEN = {
    (op, name): case for op in CLASSES for name, case in json.loads((DATA / f"golden_{op}.json").read_text()).items()
}
LAYERS = [key for key in GOLDEN if not key[1].startswith(("model_", "params_"))]
NETWORKS = {
    ("dyconv", "model_resnet18_T34"): {"model": "dy_resnet18"},
    ("odconv", "model_od_resnet18_n1"): {"model": "od_resnet18", "kernel_num": 1},
    ("odconv", "model_od_resnet50_n1"): {"model": "od_resnet50", "kernel_num": 1},
    ("odconv", "model_od_mobilenetv2_100_n1"): {"model": "od_mobilenetv2_100", "kernel_num": 1},
}
# All that authors or papers print, or that their code builds.
COUNTS = {
    "dy_resnet18": {4: 45475008},
    "dy_resnet50": {4: 100895176},
    "od_resnet18": {1: 11943944, 4: 44901640},
    "od_resnet50": {1: 28635112, 4: 90670888},
    "od_mobilenetv2_100": {1: 4940185, 4: 11512149},
    "od_mobilenetv2_075": {1: 3507113, 4: 7496013},
    "od_mobilenetv2_050": {1: 2425537, 4: 4435501},
}


def images(shape):
    return torch.from_numpy(np.random.default_rng(2026).standard_normal(shape).astype(np.float32)).double()


def filled(shapes):
    return {k: torch.from_numpy(fill(k, s)).double() for k, s in shapes.items()}


@pytest.mark.parametrize("key", LAYERS, ids="-".join)
def test_layers(key):
    golden = GOLDEN[key]
    arguments = {FIELDS.get(name, name): value for name, value in golden["args"].items()}
    temperature = arguments.pop("temperature", golden.get("temperature", 1))
    layer = CLASSES[key[0]](**{"bias": False, **arguments}).double().eval()
    assert sum(p.numel() for p in layer.parameters()) == golden["params"]
    own = layer.state_dict()
    state = {k: v.reshape(own[k].shape) for k, v in filled(golden["state_dict"]).items()}
    layer.load_state_dict(state)  # without a temperature, that of a trained network
    layer.temperature.fill(temperature)
    x = images(golden["inputs"]["x"]).requires_grad_()
    y = layer(x)
    assert list(y.shape) == golden["out"]["shape"]
    std = golden["out"]["std"]
    first = torch.tensor(golden["out"]["first16"], dtype=torch.float64)
    assert (y.flatten()[:16] - first).abs().max() <= 1e-9 * std
    assert abs(y.mean().item() - golden["out"]["mean"]) <= 1e-9 * std
    assert y.std(correction=0).item() == pytest.approx(std, rel=1e-9)
    y.square().mean().backward()
    norms = {name: p.grad.norm().item() for name, p in layer.named_parameters()}
    assert norms == {name: pytest.approx(norm, rel=1e-9, abs=1e-15) for name, norm in golden["grad_norm"].items()}
    assert x.grad.norm().item() == pytest.approx(golden["grad_norm_inputs"]["x"], rel=1e-9)


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=[pytest.mark.slow] if "resnet50" in key[1] else []) for key in NETWORKS],
    ids="-".join,
)
def test_networks_with_weights_of_the_authors_names(key):
    golden = GOLDEN[key]
    net = build_model(NETWORKS[key]).double().eval()
    shapes = {k: tuple(v.shape) for k, v in to_upstream(net).items()}
    assert all(len(s) == 4 for k, s in shapes.items() if "attention" in k and "fc" in k and k.endswith("weight"))
    if "state_dict_tensors" in golden:
        assert len(shapes) == golden["state_dict_tensors"]
    load_weights(net, filled(shapes))
    set_temperature(net, 34.0 if key[1].endswith("T34") else 1.0)
    with torch.no_grad():
        logits = net(images(golden["input"]))[0]
    expected = torch.tensor(golden["logits8"], dtype=torch.float64)
    assert (logits[:8] - expected).abs().max() <= 1e-9 * golden["logits_std"]
    assert logits.mean().item() == pytest.approx(golden["logits_mean"], abs=1e-9 * golden["logits_std"])
    assert logits.std(correction=0).item() == pytest.approx(golden["logits_std"], rel=1e-9)


@pytest.mark.parametrize("model", COUNTS)
def test_numbers_of_parameters(model):
    with torch.device("meta"):
        for number, count in COUNTS[model].items():
            net = build_model({"model": model, "kernel_num": number})
            assert sum(p.numel() for p in net.parameters()) == plans(net)[0].parameters_after == count
