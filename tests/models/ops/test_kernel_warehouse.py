import copy
import pickle

import pytest
import torch
from layers import LAYERS, make
from torch import nn

from kernelwarehouse import set_temperature
from kernelwarehouse.models.ops.kernel_warehouse import Attention, KWConv2d, Warehouse, assign
from kernelwarehouse.models.ops.means import mean
from kernelwarehouse.models.ops.mixture_conv import cut


def test_attention_by_hand():
    """One mixture, two cells, z = (3, -1, 1): Σ|z| = 5."""
    attention = Attention(1, 2, range(2), assign(1, 2, 0), norm="layer").double()
    nn.init.zeros_(attention.fc2.weight)
    attention.fc2.bias.data = torch.tensor([3.0, -1.0, 1.0]).double()
    x = torch.randn(4, 1, 3, 2).double()
    pure = torch.tensor([3.0, -1.0]).double() / 5.001
    torch.testing.assert_close(attention(x, torch.tensor(0.0).double()), pure.expand(4, 1, 2))
    mixed = 0.75 * pure + 0.25 * torch.tensor([1.0, 0.0]).double()
    torch.testing.assert_close(attention(x, torch.tensor(0.25).double()), mixed.expand(4, 1, 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_through_pooling(memory_format):
    x = torch.randn(2, 3, 5, 4).double().to(memory_format=memory_format).requires_grad_()

    def gradients(pooled):
        (first,) = torch.autograd.grad(pooled.pow(3).sum(), x, create_graph=True)
        return pooled, first, torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(gradients(mean(x)), gradients(x.mean((2, 3))))


def test_temperature_one_is_the_assigned_kernel_for_every_sample():
    layer, x = make("conv2d")
    layer.temperature.fill(1.0)
    kernels = layer.kernels(x)
    expected = layer.static_kernel()
    for kernel in kernels:
        torch.testing.assert_close(kernel, expected)
    for i, cell in enumerate(assign(layer.partition.mixtures, 36, 4)):
        torch.testing.assert_close(cut(expected[None], layer.partition)[0, i], layer.cells[cell])


@pytest.mark.parametrize("case", LAYERS)
def test_initialisation(case):
    layer, _ = make(case)
    layer.warehouse.weight.data.fill_(7.0)
    layer.reset_parameters()
    own = layer.attention.own_cells
    others = [i for i in range(len(layer.cells)) if i not in own]
    assert (layer.cells[others] == 7).all()
    fan_out = len(own) * layer.cells.shape[1] * layer.cells[0, 0, 0].numel()
    assert layer.cells[own.start : own.stop].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.5)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name


class TestBatches:
    def test_batch_of_one_trains_by_running_statistics(self):
        layer, x = make("conv2d")
        layer.attention.norm.running_mean.normal_()
        before = copy.deepcopy(layer.attention.norm.state_dict())
        y = layer.train()(x[:1])
        torch.testing.assert_close(y, layer.eval()(x[:1]))
        for name, value in layer.attention.norm.state_dict().items():
            torch.testing.assert_close(value, before[name])
        layer.train()(x[:1]).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert layer.warehouse.weight.grad.abs().sum() > 0

    def test_larger_batches_are_ordinary_batch_norm(self):
        layer, _ = make("conv2d")
        plain = nn.BatchNorm1d(16).double()
        plain.load_state_dict(layer.attention.norm.state_dict())
        h = torch.randn(5, 16).double()
        torch.testing.assert_close(layer.attention.norm(h), plain(h))
        torch.testing.assert_close(layer.attention.norm.running_var, plain.running_var)

    @pytest.mark.parametrize("case", ["conv2d", "linear-tokens", "conv3d"])
    def test_wrong_channels(self, case):
        layer, x = make(case)
        with pytest.raises(ValueError, match="expected an input"):
            layer(torch.cat([x, x], dim=-1 if case.startswith("linear") else 1))

    def test_samples_do_not_influence_each_other_in_evaluation(self):
        layer, x = make("conv2d")
        layer.eval()
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("order", ["grouped", "materialize", "auto"])
    @pytest.mark.parametrize("case", ["conv2d", "conv2d-nonlocal", "linear-tokens", "depthwise"])
    def test_whole_module_cast(self, case, order, dtype):
        layer, x = make(case, torch.float32)
        layer.implementation = order
        layer.eval()
        expected = layer(x).detach()
        y = layer.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-5}[dtype]
        assert (y.double() - expected.double()).norm() <= tolerance * expected.double().norm()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("order", ["grouped", "materialize", "auto"])
    @pytest.mark.parametrize("case", ["conv2d", "conv2d-nonlocal", "linear-tokens"])
    def test_autocast(self, case, order, dtype):
        layer, x = make(case, torch.float32)
        layer.implementation = order
        expected = layer(x).detach()
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert (y.float() - expected).norm() <= 0.1 * expected.norm()
        y.float().square().mean().backward()
        for p in layer.parameters():
            assert p.grad.dtype == torch.float32
            assert p.grad.isfinite().all()

    def test_sum_of_logits_does_not_overflow_half(self):
        """Σ|z| over 3,000 logits of 50 is beyond float16's range of 65,504."""
        attention = Attention(4, 3000, range(8), assign(8, 8, 0), norm="layer").half()
        nn.init.zeros_(attention.fc2.weight)
        nn.init.constant_(attention.fc2.bias, 50.0)
        alpha = attention(torch.randn(2, 4, 1).half(), torch.tensor(0.0))
        assert alpha.dtype == torch.float16
        torch.testing.assert_close(alpha.float(), torch.full_like(alpha.float(), 1 / 3001), rtol=1e-2, atol=1e-6)


class TestState:
    def network(self):
        warehouse = Warehouse((18, 4, 4, 1, 1))
        net = nn.Sequential(
            KWConv2d(4, 4, 3, padding=1, own_cells=range(9), warehouse=warehouse),
            nn.ReLU(),
            KWConv2d(4, 4, 3, padding=1, own_cells=range(9, 18), warehouse=warehouse),
        )
        net[2].temperature = net[0].temperature
        for layer in (net[0], net[2]):
            layer.reset_parameters()
        return net.eval()

    def test_cells_appear_once_and_are_one_storage(self):
        net = self.network()
        assert [k for k in net.state_dict() if "warehouse" in k] == ["0.warehouse.weight"]
        assert net[0].cells.data_ptr() == net[2].cells.data_ptr() == net[0].warehouse.weight.data_ptr()
        assert not any("assignment" in k for k in net.state_dict())

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
    def test_copies_are_whole_and_independent(self, clone):
        net, x = self.network(), torch.randn(2, 4, 5, 5)
        twin = clone(net)
        torch.testing.assert_close(twin(x), net(x))
        assert twin[0].warehouse is twin[2].warehouse
        set_temperature(twin, 1.0)
        twin[0].warehouse.weight.data.zero_()
        assert twin(x).abs().max() == 0
        assert net(x).abs().max() > 0
        assert net[0].temperature.value == 0

    def test_in_place_changes_and_loading_are_seen(self):
        net, x = self.network(), torch.randn(2, 4, 5, 5)
        state = copy.deepcopy(net.state_dict())
        before = net(x)
        with torch.no_grad():
            net[0].warehouse.weight.mul_(2.0)
        assert not torch.allclose(net(x), before)
        net.load_state_dict(state)
        torch.testing.assert_close(net(x), before)

    def test_moving_and_channels_last(self):
        net, x = self.network(), torch.randn(2, 4, 5, 5)
        before = net(x)
        net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), before)
        assert net[0].warehouse.weight.is_contiguous()
        net.to("meta")
        assert {t.device.type for t in [*net.parameters(), *net.buffers()]} == {"meta"}

    def test_compiled_without_break_or_recompilation_while_the_temperature_moves(self):
        from torch._dynamo.utils import counters

        net, x = self.network(), torch.randn(2, 4, 5, 5)
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        outputs = []
        for temperature in (1.0, 0.6, 0.3, 0.0):
            set_temperature(net, temperature)
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], net(x))
        assert not torch.allclose(outputs[0], outputs[-1])
        assert counters["stats"]["unique_graphs"] == 1

    def test_wrong_arguments(self):
        share = {"warehouse": Warehouse((18, 4, 4, 1, 1)), "own_cells": range(9)}
        for args, change, message in (
            ((4, 4, 3), {"own_cells": range(10, 19)}, "not among the warehouse's 18"),
            ((4, 4, 3), {"norm": "group"}, "'batch' or 'layer'"),
            ((4, 6, 3), {}, "do not divide"),
            ((0, 4, 3), {}, "0 → 4 channels"),
            ((4, 4, 0), {}, "kernel_size"),
            ((4, 4, 3), {"groups": 3}, "3 groups"),
        ):
            with pytest.raises(ValueError, match=message):
                KWConv2d(*args, **{**share, **change})
        for shape in ((0, 1, 1, 1), (4, 4)):
            with pytest.raises(ValueError, match="cells need a shape"):
                Warehouse(shape)
        for value in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="temperature"):
                set_temperature(self.network(), value)
