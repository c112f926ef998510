"""Kernels first: attention and cells multiplied once for a batch. Parity of every kind of layer: `test_mixed_conv`."""

import pytest
import torch
from layers import make, naive_forward
from parity import assert_parity
from processor import needs_bfloat16, needs_compiler

from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.kernel_warehouse import (
    KWConv2d,
    Partition,
    Warehouses,
    chained,
    layer,
    set_temperature,
    streamed,
)
from kernelwarehouse.models.ops.kernel_warehouse.mixed_conv import choose


def wide_layer(cells=96, channels=16):
    torch.manual_seed(0)
    warehouses = Warehouses({"w": (cells, channels, channels, 1, 1)})
    module = KWConv2d(channels, channels, 3, padding=1, warehouses=warehouses, warehouse="w", own_cells=range(cells))
    module.reset_parameters()
    return module, warehouses


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("tile", [1, 1500, 1 << 20])
def test_any_tile_gives_the_same(monkeypatch, tile, temperature):
    monkeypatch.setitem(streamed._TILE_BYTES, "cpu", tile)
    monkeypatch.setattr(streamed, "_TILE_CHANNELS", 1)
    module, warehouses, x = make("conv2d")
    taken = list(streamed.tiles((3, 2, 2, 54), x, copied=35))
    assert (len(taken), len(taken[0][1])) == {1: (3, 2), 1500: (3, 2), 1 << 20: (1, 1)}[tile]
    set_temperature(warehouses, temperature)
    module.implementation = "chained"
    leaves = {"x": x.requires_grad_(), "cells": warehouses.w, **dict(module.named_parameters())}
    assert_parity(lambda: module(x), lambda: naive_forward(module, x, temperature), leaves, tolerance=1e-11)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["conv2d", "conv2d-nonlocal", "conv1d-circular", "conv3d", "linear-tokens"])
def test_inference_applies_products_natively(monkeypatch, kind, temperature, dtype):
    monkeypatch.setattr(chained, "stream", None)
    module, warehouses, x = make(kind)
    set_temperature(warehouses, temperature)
    expected = naive_forward(module, x, temperature)
    module.to(dtype), warehouses.to(dtype)
    module.implementation = "chained"
    error = (module(x.to(dtype)).double() - expected).norm() / expected.norm()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def test_nothing_can_go_stale():
    """In whatever way parameters change, the next forward pass computes with them."""
    module, warehouses, x = make("conv2d")
    module.implementation = "chained"
    optimizer = torch.optim.SGD([*module.parameters(), *warehouses.parameters()], lr=1e-3)

    def check(temperature=0.0):
        y = module(x)
        torch.testing.assert_close(y, naive_forward(module, x, temperature))
        return y

    check().square().mean().backward()
    optimizer.step()
    check()
    with torch.no_grad():
        module.attention.fc2.weight.mul_(-2)
        warehouses.w.data = torch.randn_like(warehouses.w)
    check()
    warehouses.load_state_dict({"w": torch.randn_like(warehouses.w)})
    check()
    set_temperature(warehouses, 0.7)
    check(0.7)
    with torch.inference_mode():
        check(0.7)


def test_the_temperature_may_move_before_the_backward_pass():
    module, warehouses, x = make("conv2d")
    module.implementation = "chained"
    set_temperature(warehouses, 0.3)
    expected = torch.autograd.grad(naive_forward(module, x, 0.3).sum(), warehouses.w)
    y = module(x)
    set_temperature(warehouses, 0.0)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), warehouses.w), expected)


@pytest.mark.parametrize("frozen", ["cells", "attention", "both", "x"])
def test_gradients_that_nobody_wants_are_not_computed(frozen):
    module, warehouses, x = make("conv2d")
    x.requires_grad_(frozen != "x")
    warehouses.requires_grad_(frozen not in ("cells", "both"))
    module.attention.requires_grad_(frozen not in ("attention", "both"))
    leaves = {"x": x, "cells": warehouses.w, **dict(module.named_parameters())}
    module.implementation = "chained"
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    assert_parity(lambda: module(x), lambda: naive_forward(module, x, 0.0), wanted, tolerance=1e-11)
    module(x).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)


def test_gradients_under_autocast_are_no_further_from_the_truth_than_grouped():
    module, warehouses = wide_layer(cells=300, channels=32)
    x = torch.randn(20, 32, 7, 7, requires_grad=True)

    def gradients(name, dtype, x, device_type="cpu"):
        module.implementation = name
        with torch.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(x)
        return torch.autograd.grad(y, [x, warehouses.w, module.attention.fc2.weight], received.to(y.dtype))

    received = torch.randn(20, 32, 7, 7)
    found = {name: gradients(name, torch.bfloat16, x) for name in ("grouped", "chained")}
    module.double(), warehouses.double()
    exact = gradients("grouped", torch.float64, x.double().detach().requires_grad_())
    errors = {
        name: [((g - e).norm() / e.norm()).item() for g, e in zip(grads, exact, strict=True)]
        for name, grads in found.items()
    }
    assert all(ours <= 1.1 * theirs for ours, theirs in zip(errors["chained"], errors["grouped"], strict=True)), errors


class TestChoice:
    LAYER = Partition((256, 256, 3, 3), (256, 256, 1, 1)), Geometry.of((3, 3), padding=1), 552

    def images(self, batch, **kwargs):
        return torch.empty(batch, 256, 14, 14, device="meta", **kwargs)

    def test_large_batches_take_it(self):
        # On a device of which no more is known than that products are cheap beside memory.
        assert choose(*self.LAYER, self.images(256), hidden=16) == "chained"
        assert choose(*self.LAYER, self.images(8), hidden=16) != "chained"
        assert choose(*self.LAYER, self.images(256), hidden=600) != "chained"
        assert choose(*self.LAYER, self.images(256)) != "chained"  # of coefficients alone, without an attention

    @needs_compiler
    def test_a_layer_takes_it(self, monkeypatch):
        asked = []
        compute = layer.chained_conv
        monkeypatch.setattr(layer, "chained_conv", lambda *a, **k: asked.append(len(a[2])) or compute(*a, **k))
        module, warehouses = wide_layer(cells=600, channels=128)
        large = torch.randn(64, 128, 4, 4).to(memory_format=torch.channels_last)
        leaves = {"cells": warehouses.w, **dict(module.named_parameters())}

        def grouped():
            module.implementation = "grouped"
            return module(large)

        def auto():
            module.implementation = "auto"
            return module(large)

        assert_parity(auto, grouped, leaves, tolerance=1e-4)
        assert asked == [64]
        module(large[:16])
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            module(large.bfloat16())
            module(large)
        module.implementation = "native"
        module(large)
        assert asked == [64]

    @pytest.mark.parametrize("name", ["", "fc2"])
    def test_who_waits_for_the_coefficients_is_served(self, name):
        module, _, x = make("conv2d")
        expected = module(x)
        module.implementation = "chained"
        seen = []
        handle = module.attention.get_submodule(name).register_forward_hook(lambda _m, _i, y: seen.append(y))
        torch.testing.assert_close(module(x), expected)
        handle.remove()
        torch.testing.assert_close(module(x), expected)
        assert len(seen) == 1

    def test_an_attention_that_was_changed_is_asked(self):
        class Scaled(torch.nn.Linear):
            def forward(self, h):
                return 2 * super().forward(h)

        module, _, x = make("conv2d")
        with torch.no_grad():
            module.attention.fc2.bias.zero_()
        module.attention.fc2.__class__ = Scaled
        module.implementation = "kernels"
        expected = module(x)
        module.implementation = "chained"
        torch.testing.assert_close(module(x), expected)
        with pytest.raises(ValueError, match="other layers than torch's Linear cannot be folded"):
            module.eval().fold()

    def test_a_graph_for_export_does_not_depend_on_its_batch(self):
        module, warehouses = wide_layer(cells=600, channels=32)
        module = torch.nn.Sequential(module, warehouses).eval()
        x = torch.randn(128, 32, 2, 2)
        batch = torch.export.Dim("batch", min=1, max=256)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x[:3]), module(x[:3]), rtol=1e-3, atol=1e-3)

    @needs_compiler
    def test_inference_takes_it_sooner(self):
        """There the products are applied natively."""
        layer = Partition((256, 256, 3, 3), (256, 256, 1, 1)), Geometry.of((3, 3), padding=1), 188
        images = torch.empty(64, 256, 14, 14).to(memory_format=torch.channels_last)
        assert choose(*layer, images, hidden=16) == "native"
        with torch.no_grad():
            assert choose(*layer, images, hidden=16) == "chained"
            assert choose(*layer, images[:8], hidden=16) == "native"

    @needs_compiler
    @needs_bfloat16
    def test_inference_in_bfloat16_does_not(self):
        layer = Partition((256, 256, 3, 3), (256, 256, 1, 1)), Geometry.of((3, 3), padding=1), 188
        images = torch.empty(64, 256, 14, 14).to(memory_format=torch.channels_last)
        with torch.no_grad():
            assert choose(*layer, images, hidden=16, kind=torch.bfloat16) != "chained"
