"""Every implementation of the convolution with mixed kernels, against loops and against the others."""

import pytest
import torch
import torch.nn.functional as F
from layers import LAYERS, make, naive_forward
from parity import assert_parity
from processor import needs_compiler
from torch import nn

from kernelwarehouse import build_model, set_implementation
from kernelwarehouse.datasets import Digits
from kernelwarehouse.models.ops.dynamic_conv import columns, columns_adjoint
from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.kernel_warehouse import (
    KWConv2d,
    Partition,
    Warehouses,
    mixed_conv,
    set_temperature,
    streamed,
)
from kernelwarehouse.models.ops.kernel_warehouse.cost import FACTORS, costs, folding_saves
from kernelwarehouse.models.ops.kernel_warehouse.layer import NAMES
from kernelwarehouse.models.ops.kernel_warehouse.mixed_conv import choose

FAST = [name for name in NAMES if name not in ("naive", "fused")]  # fused: see test_fused


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", LAYERS)
def test_parity_with_naive(case, implementation, training, temperature):
    layer, warehouses, x = make(case)
    layer.implementation = implementation
    layer.train(training)
    set_temperature(warehouses, temperature)
    x.requires_grad_()
    assert_parity(
        lambda: layer(x),
        lambda: naive_forward(layer, x, temperature),
        {"x": x, "cells": warehouses.w, **dict(layer.named_parameters())},
        tolerance=1e-10,
    )


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", LAYERS)
def test_single_precision_is_near_the_truth(case, implementation):
    layer, warehouses, x = make(case)
    exact = naive_forward(layer, x, 0.0)
    layer.float(), warehouses.float()
    layer.implementation = implementation
    error = (layer(x.float()).double() - exact).norm() / exact.norm()
    assert 0 < error < 1e-5


class TestStreaming:
    # stride, padding, dilation, and blocks of output channels: 7 × 5 = 35 pixels in, never a multiple of a tile
    GEOMETRIES = ((1, 1, 1), (2, 0, 1), (2, 2, 2), ((2, 1), (0, 2), (1, 2)), (1, "same", 2))

    def case(self, stride, padding, dilation, dtype=torch.float64):
        torch.manual_seed(0)
        partition = Partition((12, 6, 3, 3), (6, 3, 1, 1))
        geometry = Geometry.of((3, 3), stride, padding, dilation)
        tensors = torch.randn(5, partition.mixtures, 11), torch.randn(11, 6, 3, 1, 1), torch.randn(5, 6, 7, 5)
        return partition, geometry, [t.to(dtype).requires_grad_() for t in tensors]

    @pytest.mark.parametrize("tile", [1, 4096, 1 << 20])
    @pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
    def test_any_tile_gives_the_same(self, monkeypatch, arguments, tile):
        monkeypatch.setitem(streamed._TILE_BYTES, "cpu", tile)
        monkeypatch.setattr(streamed, "_TILE_CHANNELS", 3)
        partition, geometry, (alpha, cells, x) = self.case(*arguments)
        taken = list(streamed.tiles((5, 2, 6, 54), x, copied=35))
        assert (len(taken), len(taken[0][1])) == {1: (5, 2), 4096: (5, 2), 1 << 20: (1, 1)}[tile]
        assert_parity(
            lambda: mixed_conv(alpha, cells, x, partition, geometry, "streamed"),
            lambda: mixed_conv(alpha, cells, x, partition, geometry, "naive"),
            {"alpha": alpha, "cells": cells, "x": x},
        )

    @pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
    def test_columns_and_their_adjoint(self, arguments):
        """⟨columns(x), c⟩ = ⟨x, adjoint(c)⟩."""
        _, geometry, (_, _, x) = self.case(*arguments)
        parts = columns(x, (3, 3), geometry, 4)
        assert [part.shape[2] for part in parts] == [18, 18, 18]  # three taps of six channels each
        torch.testing.assert_close(torch.cat(parts, 2), columns(x, (3, 3), geometry)[0])
        c = [torch.randn_like(part) for part in parts]
        received = sum((part * grad).sum() for part, grad in zip(parts, c, strict=True))
        torch.testing.assert_close(received, (x * columns_adjoint(c, (7, 5), (3, 3), geometry)).sum())

    @pytest.mark.parametrize("implementation", ["streamed", "native"])
    @pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradients_that_nobody_wants_are_not_computed(self, implementation, wanted):
        partition, geometry, tensors = self.case(1, 1, 1)
        tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        mixed_conv(*tensors, partition, geometry, implementation).square().sum().backward()
        assert tuple(t.grad is not None for t in tensors) == wanted

    @pytest.mark.parametrize("implementation", ["streamed", "native"])
    def test_second_order_is_refused(self, implementation):
        partition, geometry, (alpha, cells, x) = self.case(1, 1, 1)
        y = mixed_conv(alpha, cells, x, partition, geometry, implementation)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("implementation", [name for name in FAST if name != "grouped"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_layout_of_the_input_is_kept(implementation, kernel_size):
    warehouses = Warehouses({"w": (20, 4, 3, 1, 1)})
    share = {"warehouses": warehouses, "warehouse": "w", "own_cells": range(20)}
    layer = KWConv2d(6, 8, kernel_size, padding=kernel_size // 2, **share)
    layer.implementation = implementation
    layer.eval()
    x = torch.randn(3, 6, 7, 5)
    y = layer(x)
    assert y.is_contiguous()
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("implementation", ["kernels", "streamed", "chained", "native", "inputs"])
def test_nothing_of_the_size_of_the_kernels_is_kept_for_backward(implementation):
    """Samples × kernel is 147,456 values here; the cells are 2,048, x is 8,192 and α 18,432."""
    warehouses = Warehouses({"w": (32, 8, 8, 1, 1)})
    layer = KWConv2d(16, 16, 3, padding=1, warehouses=warehouses, warehouse="w", own_cells=range(32))
    layer.implementation = implementation
    x = torch.randn(64, 16, 2, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert max(kept) < 64 * 36 * 33 + 1  # the logits z, of the attention
    assert sum(n for n in kept if n > 20_000) <= 5 * 64 * 36 * 33


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["kernels", "streamed", "chained", "inputs"])
def test_autocast_is_no_further_from_the_truth_than_grouped(implementation, dtype):
    torch.manual_seed(0)
    net = build_model({"model": "kw_resnet18", "nb_classes": 10, "cell_num_ratio": 1}).eval()
    layer = net.layer2[1].conv1
    x = torch.randn(4, 128, 9, 9)
    with torch.no_grad():
        errors = {}
        for name in ("grouped", implementation):
            layer.implementation = name
            with torch.autocast("cpu", dtype):
                errors[name] = layer(x).double()
        net.double()
        layer.implementation = "grouped"
        exact = layer(x.double())
    errors = {name: ((y - exact).norm() / exact.norm()).item() for name, y in errors.items()}
    assert errors[implementation] <= 1.1 * errors["grouped"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("side", [2, 1])
def test_a_single_position_in_half_precision(side, implementation, dtype):
    torch.manual_seed(0)
    c = 16 + 4 * FAST.index(implementation) + 2 * side  # torch keeps what multiplies such sizes, right or wrong
    warehouses = Warehouses({"w": (40, c, c, 1, 1)})
    layer = KWConv2d(c, c, 3, stride=side, padding=1, warehouses=warehouses, warehouse="w", own_cells=range(40))
    layer.reset_parameters()
    x = torch.randn(3, c, side, side)
    exact = naive_forward(layer.eval(), x, 0.0)
    layer.implementation = implementation
    with torch.no_grad(), torch.autocast("cpu", dtype):
        for _ in range(2):
            error = (layer(x).float() - exact).norm() / exact.norm()
            assert error < 0.03


@pytest.mark.parametrize("implementation", ["kernels", "streamed", "chained", "native", "inputs"])
def test_compiled_in_one_graph(implementation):
    layer, warehouses, x = make("conv2d")
    layer.implementation = implementation
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = {"x": x.requires_grad_(), "cells": warehouses.w, **dict(layer.named_parameters())}
    assert_parity(lambda: compiled(x), lambda: layer(x), leaves)


def test_cells_of_any_layout():
    """Ours lie in memory by output channel; a state dict that is assigned brings its own."""
    layer, warehouses, x = make("conv2d")
    assert not warehouses.w.is_contiguous()
    assert warehouses.w.transpose(0, 1).is_contiguous()
    expected = layer(x)
    warehouses.load_state_dict({"w": warehouses.w.detach().contiguous()}, assign=True)
    assert warehouses.w.is_contiguous()
    for implementation in FAST:
        layer.implementation = implementation
        torch.testing.assert_close(layer(x), expected)
    assert warehouses.double().w.transpose(0, 1).is_contiguous()


def test_optimizer_keeps_the_layout_of_the_cells():
    layer, warehouses, x = make("conv2d")
    optimizer = torch.optim.AdamW(warehouses.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    state = optimizer.state[warehouses.w]
    assert warehouses.w.grad.stride() == warehouses.w.stride() == state["exp_avg"].stride()


def test_forced_by_name():
    net = build_model("configs/quickstart/kw1x_resnet18.json")
    set_implementation(net, "grouped")
    assert {m.implementation for m in net.modules() if isinstance(m, KWConv2d)} == {"grouped"}
    with pytest.raises(
        ValueError, match="auto, naive, grouped, kernels, streamed, native, fused, inputs, chained; found 'fast'"
    ):
        set_implementation(net, "fast")
    with pytest.raises(ValueError, match="no converted layer"):
        set_implementation(nn.Linear(2, 2), "auto")


class TestCost:
    def cheapest(self, kernel, cell, cells, batch, positions, without=None):
        estimates = costs(Partition(kernel, cell), cells, batch, positions, 4, FACTORS["cpu"])
        return min(estimates.keys() - {without}, key=estimates.get)

    def test_kernels_are_mixed_for_maps_and_inputs_for_single_pixels(self):
        assert self.cheapest((64, 64, 3, 3), (64, 64, 1, 1), 56, 8, 3136) == "native"
        assert self.cheapest((256, 256, 3, 3), (256, 256, 1, 1), 47, 8, 196) == "native"
        assert self.cheapest((512, 512, 3, 3), (512, 512, 1, 1), 27, 64, 1) == "inputs"

    def test_narrow_layers_take_the_one_with_the_fewest_operators(self):
        """Around little work they take the time: by what has fewer multiply-adds, 1.6 to 2.1 times as much."""
        assert self.cheapest((32, 32, 3, 3), (32, 32, 1, 1), 47, 64, 4) == "native"
        assert self.cheapest((64, 64, 3, 3), (64, 64, 1, 1), 27, 8, 1) == "native"
        assert self.cheapest((64, 64, 3, 3), (64, 64, 1, 1), 27, 64, 1) == "inputs"
        layer = Partition((8, 8, 3, 3), (8, 8, 1, 1)), 47, 64, 64, 4, FACTORS["cpu"]
        estimates = costs(*layer, hidden=16, natively=True)
        assert min(estimates, key=estimates.get) == "native"

    def test_folding_saves_less_where_only_the_folded_layer_cannot_be_native(self):
        layer = Partition((256, 256, 3, 3), (256, 256, 1, 1)), 16, 552, 8, 196, 4, FACTORS["cpu"]
        saved = folding_saves(*layer, native=True, folded_native=True)
        assert saved > folding_saves(*layer, native=True, folded_native=False)
        assert saved > 0

    def test_without_native_large_maps_are_convolved_and_small_maps_multiplied(self):
        assert self.cheapest((256, 256, 3, 3), (256, 256, 1, 1), 47, 8, 196, without="native") == "kernels"
        assert self.cheapest((512, 512, 3, 3), (512, 512, 1, 1), 27, 8, 49, without="native") == "streamed"

    @needs_compiler
    def test_only_what_can_compute_a_layer_is_chosen(self, monkeypatch):
        grouped = Geometry.of((3, 3), padding=1, groups=4)
        images = torch.empty(2, 16, 64, 64).to(memory_format=torch.channels_last)
        assert choose(Partition((16, 4, 3, 3), (16, 4, 1, 1)), grouped, 8, images) == "kernels"
        assert choose(Partition((16, 4, 3, 3), (16, 4, 3, 3)), grouped, 8, images) == "kernels"
        large = Partition((64, 64, 3, 3), (64, 64, 1, 1)), Geometry.of((3, 3), padding=1), 56
        images = torch.empty(8, 64, 56, 56).to(memory_format=torch.channels_last)
        assert choose(*large, images) == "native"
        assert choose(*large, images.half()) in ("kernels", "streamed")
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert choose(*large, images) == "kernels"


def test_training_follows_the_truth():
    """200 steps on the digits: the losses of every fast implementation and of loops differ by less than 1 %."""
    data = Digits(train=True)
    images, labels = data.images, torch.tensor(data.targets)
    curves = {}
    for name in ("naive", "auto", "streamed", "chained", "native", "inputs"):
        torch.manual_seed(0)
        warehouses = Warehouses({"w": (6, 4, 4, 1, 1)})
        share = {"warehouses": warehouses, "warehouse": "w"}
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            KWConv2d(4, 4, 2, own_cells=range(4), norm="layer", **share),
            nn.ReLU(),
            KWConv2d(4, 8, 1, own_cells=range(4, 6), norm="layer", **share),
            nn.Flatten(),
            nn.Linear(72, 10),
            warehouses,
        )
        for layer in (net[2], net[4]):
            layer.reset_parameters()
        set_implementation(net, name)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        losses = []
        for step in range(200):
            set_temperature(net, max(0.0, 1 - step / 100))
            chosen = torch.randint(len(images), (6,), generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves[name] = torch.tensor(losses)
    truth = curves.pop("naive")
    assert truth[-40:].mean() < 0.7 * truth[:40].mean()
    for name, losses in curves.items():
        assert ((losses - truth).abs() <= 0.01 * truth.clamp_min(0.1)).all(), name
