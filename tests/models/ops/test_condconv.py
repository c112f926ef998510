"""CondConv: layers against the definition, golden figures of timm's, routing by blocks, warm start, checkpoints."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from fill import fill
from parity import assert_parity
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from kernelwarehouse import CondConvConfig, accelerate_, convert_, plans
from kernelwarehouse.models import (
    create_model,
    load_weights,
    to_upstream,
)
from kernelwarehouse.models.ops.condconv import CondConv1d, CondConv2d, CondConv3d, CondLinear
from kernelwarehouse.models.ops.condconv.reference import reference_forward

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "golden_condconv.json").read_text())

# class, input shape, arguments; experts are 3
LAYERS = {
    "conv2d": (CondConv2d, (3, 6, 7, 5), (6, 4, 3), {"padding": 1}),
    "conv2d-no-bias": (CondConv2d, (2, 6, 7, 5), (6, 4, (3, 1)), {"stride": 2, "bias": False}),
    "conv2d-reflect": (CondConv2d, (2, 4, 5, 7), (4, 4, 3), {"padding": 1, "padding_mode": "reflect"}),
    "pads-same": (CondConv2d, (2, 4, 5, 8), (4, 6, 3), {"stride": 2, "pads_same": True}),
    "pointwise": (CondConv2d, (2, 6, 4, 5), (6, 4, 1), {}),
    "grouped": (CondConv2d, (2, 6, 4, 5), (6, 4, 3), {"groups": 2, "padding": "valid"}),
    "depthwise": (CondConv2d, (2, 6, 6, 5), (6, 6, 3), {"groups": 6, "padding": "same", "dilation": 2}),
    "conv1d-circular": (CondConv1d, (3, 4, 9), (4, 6, 5), {"padding": 2, "padding_mode": "circular"}),
    "conv3d": (CondConv3d, (2, 2, 4, 5, 3), (2, 4, 2), {"dilation": 2}),
    "linear-tokens": (CondLinear, (3, 7, 6), (6, 8), {}),
    "linear-map": (CondLinear, (2, 3, 5, 6), (6, 4), {"bias": False}),
    "linear-vector": (CondLinear, (4, 6), (6, 4), {}),
    "one-sample": (CondConv2d, (1, 6, 1, 1), (6, 4, 3), {"padding": 1}),
}


def make(case, dtype=torch.float64):
    cls, shape, arguments, options = LAYERS[case]
    torch.manual_seed(0)
    layer = cls(*arguments, **options, experts=3, dtype=dtype)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer, torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("case", LAYERS)
def test_layers_compute_the_definition(case):
    layer, x = make(case)
    x.requires_grad_()
    leaves = {"x": x, **dict(layer.named_parameters())}
    assert_parity(lambda: layer(x), lambda: reference_forward(layer, x), leaves)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), reference_forward(layer, x))
    for name in layer.candidates():
        if layer.unsupported(name) is None and name != "triton":
            layer.implementation = name
            torch.testing.assert_close(layer(x), reference_forward(layer, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["conv2d", "depthwise", "linear-tokens"])
def test_half_precision_and_autocast(case, dtype):
    layer, x = make(case, torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    half = layer.to(dtype)(x.to(dtype))
    for found in (y, half):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def filled(net):
    """The deterministic weights of the golden figures, in double precision."""
    state = to_upstream(net) if plans(net) else net.state_dict()
    net.double()
    load_weights(net, {k: torch.from_numpy(fill(k, tuple(v.shape))) for k, v in state.items()})
    return net.eval()


def random(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def check_golden(case, y, x, parameters):
    """Output, loss, and the norms of the gradients of inputs and parameters."""
    std = case["out"]["std"]
    assert list(y.shape) == case["out"]["shape"]
    torch.testing.assert_close(
        y.flatten()[:16], torch.tensor(case["out"]["first16"], dtype=torch.float64), rtol=0, atol=1e-9 * std
    )
    loss = y.square().mean()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    wanted = {**case["grad_norm"], **case["grad_norm_inputs"]}
    tensors = {**parameters, **x}
    assert tensors.keys() == wanted.keys()
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    for name, gradient in zip(tensors, gradients, strict=True):
        assert gradient.norm().item() == pytest.approx(wanted[name], rel=1e-9), name


@pytest.mark.parametrize("name", ["k3_bias", "k1_e8"])
def test_golden_layers(name):
    case = GOLDEN[name]
    arguments = {k: v for k, v in case["args"].items() if k not in ("num_experts", "padding")}
    layer = CondConv2d(
        **{"bias": False, **arguments}, padding=case["args"]["padding"] or 0, experts=case["args"]["num_experts"]
    ).double()
    weights = {name: p for name, p in layer.named_parameters() if not name.startswith("routing_fn")}
    assert sum(p.numel() for p in weights.values()) == case["params"]
    with torch.no_grad():
        for key, p in weights.items():
            p.copy_(torch.from_numpy(fill(key, tuple(case["state_dict"][key]))).reshape(p.shape))
    x = random(2026, case["inputs"]["x"]).double().requires_grad_()
    routing = torch.tensor(case["routing"], dtype=torch.float64, requires_grad=True)
    check_golden(case, layer(x, routing), {"x": x, "routing": routing}, weights)


class Wrapped(nn.Module):
    """A network of one block of timm's, which says what its input is."""

    default_cfg: ClassVar = {"input_size": (8, 7, 9)}

    def __init__(self):
        super().__init__()
        self.block = InvertedResidual(8, 8, dw_kernel_size=3, stride=1, exp_ratio=3.0)
        self.after = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.after(self.block(x))


BLOCK = CondConvConfig(experts=4, routing="block", include=(r"block\..*",))


def test_golden_block():
    case = GOLDEN["residual_block"]
    net = Wrapped()
    convert_(net, BLOCK, keep_weights=False)
    block = net.block.double().eval()
    state = {k: torch.from_numpy(fill(k, tuple(shape))) for k, shape in case["state_dict"].items()}
    assert block.state_dict().keys() == state.keys()
    load_weights(net, {**net.state_dict(), **{f"block.{k}": v for k, v in state.items()}})
    assert sum(p.numel() for p in block.parameters()) == case["params"]
    x = random(2026, case["inputs"]["x"]).double().requires_grad_()
    check_golden(case, block(x), {"x": x}, dict(block.named_parameters()))


@pytest.mark.parametrize("experts", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_golden_efficientnet_converted_from_the_static_one(experts):
    case = GOLDEN[f"model_tf_efficientnet_cc_b0_{experts}e"]
    net = create_model("cond_tf_efficientnet_b0", experts=experts)
    assert sum(p.numel() for p in net.parameters()) == plans(net)[0].parameters_after == case["params"]
    check_logits(case, filled(net))


def test_golden_efficientnet_of_timm_accelerated():
    check_logits(
        GOLDEN["model_tf_efficientnet_cc_b0_4e"], accelerate_(filled(timm.create_model("tf_efficientnet_cc_b0_4e")))
    )


@torch.no_grad()
def check_logits(case, net):
    logits = net(random(2026, (1, 3, 64, 64)).double())
    expected = torch.tensor(case["logits8"], dtype=torch.float64)
    torch.testing.assert_close(logits[0, :8], expected, rtol=0, atol=1e-9 * case["logits_std"])
    assert logits.mean().item() == pytest.approx(case["logits_mean"], abs=1e-9 * case["logits_std"])
