"""Layers by every implementation, against the definition: every gradient, layouts, types, graphs."""

import pytest
import torch
import torch.nn.functional as F
from layers import LAYERS, expected, make, reference_forward
from torch import nn

from kernelwarehouse import build_model, set_implementation
from kernelwarehouse.datasets import Digits
from kernelwarehouse.models.ops.kernel_warehouse import NAMES, KWConv2d, Warehouse

FAST = [name for name in NAMES if name not in ("reference", "triton")]  # triton: see test_triton


def prepared(case, implementation, dtype=torch.float64):
    """The layer and its input, or a skip where the implementation cannot compute it, as it says."""
    layer, x = make(case)
    if implementation != "auto" and (reason := layer.unsupported(implementation)):
        layer.implementation = implementation
        with pytest.raises(ValueError, match=f"'{implementation}' cannot compute this layer: .*; .*reference.* can"):
            layer(x)
        pytest.skip(reason)
    layer.implementation = implementation
    return layer.to(dtype), x.to(dtype)


@pytest.mark.parametrize(("training", "temperature"), [(True, 0.0), (True, 0.3), (False, 0.3), (False, 1.0)])
@pytest.mark.parametrize("implementation", ["auto", "reference", *FAST])
@pytest.mark.parametrize("case", LAYERS)
def test_every_gradient_by_the_definition(case, implementation, training, temperature):
    layer, x = prepared(case, implementation)
    layer.train(training)
    layer.temperature.fill(temperature)
    y, upstream, gradients = expected(case, training, temperature)
    x.requires_grad_()
    found = layer(x)
    assert (found - y).norm() <= 1e-10 * y.norm()
    leaves = {"x": x, **dict(layer.named_parameters())}
    received = torch.autograd.grad(found, list(leaves.values()), upstream, allow_unused=True)
    for name, ours, truth in zip(leaves, received, gradients, strict=True):
        assert (ours is None) == (truth is None), name
        if truth is not None:
            # A parameter of FC3 or FC1 may have no influence at τ = 1 but rounding errors.
            assert (ours - truth).norm() <= 1e-10 * truth.norm() + 1e-13, name


@pytest.mark.parametrize("implementation", ["auto", *FAST])
@pytest.mark.parametrize("case", LAYERS)
def test_inference_and_single_precision(case, implementation):
    layer, x = prepared(case, implementation)
    layer.eval()
    y, _, _ = expected(case, False, 0.0)
    with torch.no_grad():
        assert (layer(x) - y).norm() <= 1e-10 * y.norm()
        error = (layer.float()(x.float()).double() - y).norm() / y.norm()
    assert 0 < error < 1e-5


@pytest.mark.parametrize(
    "implementation", ["auto", *(name for name in FAST if name not in ("grouped", "reassociated"))]
)
@pytest.mark.parametrize("case", ["conv2d", "depthwise", "whole-kernel-cells"])
def test_layout_of_the_input_is_kept(case, implementation):
    layer, x = prepared(case, implementation)
    y = layer.eval()(x)
    assert y.is_contiguous()
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["auto", *FAST])
@pytest.mark.parametrize("case", ["conv2d", "depthwise", "linear-tokens"])
def test_autocast_is_no_further_from_the_truth_than_grouped(case, implementation, dtype):
    layer, x = prepared(case, implementation)
    layer.eval().reset_parameters()
    exact = reference_forward(layer, x, 0.0)
    layer, x, errors = layer.float(), x.float(), {}
    for name in ("grouped", implementation):
        layer.implementation = name
        with torch.no_grad(), torch.autocast("cpu", dtype):
            errors[name] = ((layer(x).double() - exact).norm() / exact.norm()).item()
    assert errors[implementation] <= 1.5 * errors["grouped"]
    assert errors[implementation] < 0.03


@pytest.mark.parametrize("implementation", ["auto", "materialize", "cpp", "mix_inputs"])
@pytest.mark.parametrize("case", ["conv2d", "depthwise"])
def test_training_in_bfloat16(case, implementation):
    """Under autocast, and of a network that is in bfloat16 itself."""
    layer, x = prepared(case, implementation)
    layer.reset_parameters()
    layer.eval()
    (truth,) = torch.autograd.grad(reference_forward(layer, x, 0.0).square().sum(), layer.warehouse.weight)
    for own in (torch.float32, torch.bfloat16):
        layer.to(own)
        with torch.autocast("cpu", torch.bfloat16, enabled=own == torch.float32):
            y = layer(x.to(own))
        assert y.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(y.float().square().sum(), layer.warehouse.weight)
        assert grad.dtype == own
        assert (grad.double() - truth).norm() <= 0.06 * truth.norm()


def takes_compiling_for_exporting():
    """As torch 2.8 does."""

    def ask(x):
        return x + torch.compiler.is_exporting()

    return torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(())).item() == 1


@pytest.mark.parametrize("implementation", ["auto", "materialize", "mix_inputs", "cpp", "reassociated"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["one-size", "any-size"])
def test_compiled_in_one_graph(implementation, dynamic):
    if implementation == "cpp" and takes_compiling_for_exporting():
        pytest.skip("this torch says of every graph that it is compiled for export, which holds torch's own operators")
    layer, x = prepared("conv2d", implementation)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    leaves = [x.requires_grad_(), *layer.parameters()]
    y = layer(x)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(compiled(x), y)
    pairs = (torch.autograd.grad(z, leaves, upstream, allow_unused=True) for z in (compiled(x), layer(x)))
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("case", ["conv2d-layer-norm", "depthwise", "linear-tokens"])
def test_compiled_for_inference(case):
    layer, x = make(case)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = layer.eval()(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_cells_of_any_layout():
    """Ours lie in memory by output channel; a state dict that is assigned brings its own."""
    layer, x = make("conv2d")
    expected = layer(x)
    weight = layer.warehouse.weight
    strided = weight.detach().transpose(0, 2).contiguous().transpose(0, 2)
    layer.warehouse.load_state_dict({"weight": strided}, assign=True)
    assert not layer.warehouse.weight.is_contiguous()
    for implementation in ("auto", *FAST):
        if implementation == "auto" or layer.unsupported(implementation) is None:
            layer.implementation = implementation
            torch.testing.assert_close(layer(x), expected)


def test_forced_by_name():
    net = build_model("configs/quickstart/kw1x_resnet18.json")
    set_implementation(net, "grouped")
    assert {m.implementation for m in net.modules() if isinstance(m, KWConv2d)} == {"grouped"}
    with pytest.raises(ValueError, match=r"implementation must be auto, materialize, .*, reassociated; found 'fast'"):
        set_implementation(net, "fast")
    with pytest.raises(ValueError, match="no converted layer"):
        set_implementation(nn.Linear(2, 2), "auto")


def test_a_layer_that_cannot_be_computed_so_is_named_or_takes_what_was_said():
    net = build_model(
        {"model": "kw_convnext_atto", "nb_classes": 5, "model_kwargs": {"depths": [1] * 4, "dims": [8] * 4}}
    )
    with pytest.raises(ValueError, match=r"conv_dw: implementation 'mix_inputs' cannot compute .*: it is a grouped"):
        set_implementation(net, "mix_inputs")
    names = {m.implementation for m in net.modules() if hasattr(m, "implementation")}
    assert names == {"auto"}
    set_implementation(net, "mix_inputs", otherwise="materialize")
    names = {m.implementation for m in net.modules() if hasattr(m, "implementation")}
    assert names == {"mix_inputs", "materialize"}
    net(torch.randn(1, 3, 32, 32))


@pytest.mark.slow
def test_training_follows_the_definition():
    """200 steps on the digits: the losses of every fast implementation and of loops differ by less than 1 %."""
    data = Digits(train=True)
    images, labels = data.images, torch.tensor(data.targets)
    curves = {}
    for name in ("reference", "auto", "materialize", "mix_inputs", "reassociated"):
        torch.manual_seed(0)
        warehouse = Warehouse((6, 4, 4, 1, 1))
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            KWConv2d(4, 4, 2, own_cells=range(4), norm="layer", warehouse=warehouse),
            nn.ReLU(),
            KWConv2d(4, 8, 1, own_cells=range(4, 6), norm="layer", warehouse=warehouse),
            nn.Flatten(),
            nn.Linear(72, 10),
        )
        for layer in (net[2], net[4]):
            layer.reset_parameters()
        set_implementation(net, name)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        losses = []
        for step in range(200):
            for layer in (net[2], net[4]):
                layer.temperature.fill(max(0.0, 1 - step / 100))
            chosen = torch.randint(len(images), (6,), generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves[name] = torch.tensor(losses)
    truth = curves.pop("reference")
    assert truth[-40:].mean() < 0.7 * truth[:40].mean()
    for name, losses in curves.items():
        assert ((losses - truth).abs() <= 0.01 * truth.clamp_min(0.1)).all(), name
