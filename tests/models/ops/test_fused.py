"""The fused convolution's Triton kernels: in Triton's interpreter, by a pytest of its own, and on a GPU, if any."""

import itertools
import re
import sys
import types
import warnings

import pytest
import torch
from convolutions import CONVOLUTIONS, convolution
from interpreter import DEVICE, INTERPRETED, compile_for_gpu, in_interpreter, needs_triton, run_in_interpreter
from layers import make, naive_forward
from parity import assert_parity

from kernelwarehouse.models.ops import kernel_warehouse
from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.kernel_warehouse import (
    KWConv2d,
    Partition,
    Warehouses,
    chained,
    fused,
    fused_operators,
    mixed_conv,
    set_temperature,
)
from kernelwarehouse.models.ops.kernel_warehouse.mixed_conv import choose


def case(name):
    return convolution(name, DEVICE)


def pointwise_of_many_cells():
    """A layer with little to compute, of so many cells that a small batch has its kernels first."""
    torch.manual_seed(0)
    warehouses = Warehouses({"w": (200, 2, 3, 1, 1)}, dtype=torch.float64)
    layer = KWConv2d(6, 4, 1, warehouses=warehouses, warehouse="w", own_cells=range(200))
    with torch.no_grad():
        for parameter in [*layer.parameters(), *warehouses.parameters()]:
            parameter.normal_()
    return layer.double(), warehouses


def multiply_bfloat16(monkeypatch):
    """Triton's interpreter holds bfloat16 as whole numbers, and its product takes them for such."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """Everything in `TestKernels`, on the CPU."""
    assert run_in_interpreter(__file__) > len(CONVOLUTIONS)


@in_interpreter
class TestKernels:
    @pytest.fixture(autouse=True)
    def nothing_is_streamed(self, monkeypatch):
        monkeypatch.setattr(fused, "streamed_conv", None)
        monkeypatch.setattr(chained, "stream", None)

    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_parity_with_naive(self, name):
        partition, geometry, (alpha, cells, x) = case(name)
        assert_parity(
            lambda: mixed_conv(alpha, cells, x, partition, geometry, "fused"),
            lambda: mixed_conv(alpha, cells, x, partition, geometry, "naive"),
            {"alpha": alpha, "cells": cells, "x": x},
        )

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)]
    )
    def test_lower_precision_is_near_the_truth(self, dtype, tolerance, monkeypatch):
        if INTERPRETED:
            multiply_bfloat16(monkeypatch)
        partition, geometry, (alpha, cells, x) = case("padding")
        assert_parity(
            lambda: mixed_conv(alpha.to(dtype), cells, x.to(dtype), partition, geometry, "fused"),
            lambda: mixed_conv(alpha, cells, x, partition, geometry, "naive"),
            {"alpha": alpha, "cells": cells, "x": x},
            tolerance,
        )

    def test_any_layout(self):
        """Channels last stay so; cells, inputs and gradients may have any strides."""
        partition, geometry, (alpha, cells, x) = case("stride")
        expected = mixed_conv(alpha, cells, x, partition, geometry, "naive")
        truth = torch.autograd.grad(expected.sum(), (alpha, cells, x))
        images = {
            "channels last": x.to(memory_format=torch.channels_last),
            "a part": torch.stack([x, x], -1)[..., 1],
            "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        }
        for name, image in images.items():
            rows = cells.transpose(0, 1).contiguous().transpose(0, 1)
            y = mixed_conv(alpha, rows, image, partition, geometry, "fused")
            assert y.is_contiguous(memory_format=torch.channels_last) == (name == "channels last")
            torch.testing.assert_close(y, expected, check_stride=False)
            received = torch.autograd.grad(y.sum(), (alpha, cells, x))  # of which every stride is 0
            torch.testing.assert_close(received, truth, check_stride=False)

    def test_kernels_of_a_few_samples_at_a_time(self, monkeypatch):
        partition, geometry, (alpha, cells, x) = case("stride")
        alpha, x = (torch.cat([t, 2 * t, 3 * t[:1]]).detach().requires_grad_() for t in (alpha, x))
        monkeypatch.setattr(fused_operators, "_CHUNK_BYTES", 3 * 4 * 6 * 9 * 8)
        whole = torch.empty(5, 2, 9, 5, dtype=torch.float64)
        assert list(fused_operators._chunks(whole, cells, False)) == [slice(0, 3), slice(3, 5)]
        assert_parity(
            lambda: mixed_conv(alpha, cells, x, partition, geometry, "fused"),
            lambda: mixed_conv(alpha, cells, x, partition, geometry, "naive"),
            {"alpha": alpha, "cells": cells, "x": x},
        )

    @pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradients_that_nobody_wants_are_not_computed(self, wanted):
        partition, geometry, tensors = case("pointwise")
        tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        mixed_conv(*tensors, partition, geometry, "fused").square().sum().backward()
        assert tuple(t.grad is not None for t in tensors) == wanted

    def test_an_input_smaller_than_the_kernel_is_refused(self):
        partition, geometry, (alpha, cells, x) = case("stride")
        with pytest.raises(ValueError, match="an input of 2 × 5 is too small"):
            mixed_conv(alpha, cells, x[:, :, :2], partition, geometry, "fused")

    def test_second_order_is_refused(self):
        partition, geometry, (alpha, cells, x) = case("pointwise")
        y = mixed_conv(alpha, cells, x, partition, geometry, "fused")
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    @pytest.mark.parametrize("kind", ["conv2d-nonlocal", "conv1d-circular", "linear-tokens"])
    def test_layers(self, kind):
        layer, warehouses, x = make(kind)
        layer, warehouses, x = layer.to(DEVICE), warehouses.to(DEVICE), x.to(DEVICE).requires_grad_()
        layer.implementation = "fused"
        leaves = {"x": x, "cells": warehouses.w, **dict(layer.named_parameters())}
        assert_parity(lambda: layer(x), lambda: naive_forward(layer, x, 0.0), leaves, tolerance=1e-10)
        with torch.inference_mode():
            y = layer(x)
        torch.testing.assert_close(y, layer(x))

    @pytest.mark.parametrize("chunk", [1, 1 << 20])
    @pytest.mark.parametrize("kind", ["conv2d", "conv2d-half-budget", "conv2d-nonlocal", "conv1d-circular"])
    def test_kernels_first(self, kind, chunk, monkeypatch):
        monkeypatch.setattr(fused_operators, "_CHUNK_BYTES", chunk)
        layer, warehouses, x = make(kind)
        layer, warehouses, x = layer.to(DEVICE), warehouses.to(DEVICE), x.to(DEVICE).requires_grad_()
        set_temperature(warehouses, 0.3)
        leaves = {"x": x, "cells": warehouses.w, **dict(layer.named_parameters())}

        def first():
            rest = warehouses.temperature, layer.partition, layer.geometry, layer.bias
            return chained.chained_conv(layer.attention, layer.cells, x, *rest, fused=True)

        assert_parity(first, lambda: naive_forward(layer, x, 0.3), leaves, tolerance=1e-10)

    def test_large_batches_have_kernels_first(self, monkeypatch):
        layer, warehouses = pointwise_of_many_cells()
        layer, x = layer.to(DEVICE), torch.randn(1, 6, 3, 2).double().to(DEVICE)
        warehouses.to(DEVICE)
        layer.implementation = "fused"
        many = x.expand(24, -1, -1, -1).clone()
        layer.eval()
        expected = layer(x)
        taken = []
        compute = chained.fused_chain
        monkeypatch.setattr(chained, "fused_chain", lambda *a: taken.append(len(a[0])) or compute(*a))
        torch.testing.assert_close(layer(many), expected.expand(24, -1, -1, -1))
        assert taken == [24]
        layer(many[:18])  # 17 products for each of 200 cells, and for each sample, are more than 200 for each sample
        assert taken == [24]

    @pytest.mark.parametrize("batch", [2, 24])  # cells first, and kernels first
    def test_compiled_in_one_graph(self, batch, monkeypatch):
        layer, warehouses = pointwise_of_many_cells()
        layer, warehouses, x = layer.to(DEVICE), warehouses.to(DEVICE), torch.randn(batch, 6, 3, 2).double().to(DEVICE)
        layer.implementation = "fused"
        taken, compute = [], chained.fused_chain
        monkeypatch.setattr(chained, "fused_chain", lambda *a: taken.append(1) or compute(*a))
        layer(x)
        assert bool(taken) == (batch == 24)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        leaves = {"x": x.requires_grad_(), "cells": warehouses.w, **dict(layer.named_parameters())}
        assert_parity(lambda: compiled(x), lambda: layer(x), leaves, tolerance=1e-11)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_what_the_compiler_is_told_is_true(self, channels_last):
        """Shapes, strides and types of the operators' results, and that they change none of their arguments."""
        partition, _, (alpha, cells, x) = case("stride")
        x = x.detach().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        alpha, cells = alpha.detach().view(2, 9, 2, 1, 5).transpose(1, 2).flatten(2, 3), cells.detach()
        window = [3, 3, 2, 2, 0, 0, 1, 1]
        grad = torch.randn(2, partition.kernel[0], 3, 2, dtype=x.dtype, device=DEVICE)
        operators = fused_operators.convolve, fused_operators.gradient_of_x, fused_operators.gradients_of_kernels
        terms = torch.randn(*alpha.shape[1:], *partition.cell[:2], dtype=x.dtype, device=DEVICE)
        for operator, (mixed, own) in itertools.product(operators, [(cells, False), (terms, True)]):
            received = [] if operator is operators[0] else [grad]
            arguments = (*received, alpha, mixed, x, window, own)
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run here")
def test_streams_on_a_cpu_and_says_so_once():
    partition, geometry, (alpha, cells, x) = case("padding")
    fused._warn_once.cache_clear()
    with pytest.warns(
        UserWarning, match="'fused' gives way to 'streamed': its kernels run on CUDA devices, not on 'cpu'"
    ):
        y = mixed_conv(alpha, cells, x, partition, geometry, "fused")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(y, mixed_conv(alpha, cells, x, partition, geometry, "fused"))
    assert torch.equal(y, mixed_conv(alpha, cells, x, partition, geometry, "streamed"))
    torch._dynamo.reset()
    compiled = torch.compile(mixed_conv, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(alpha, cells, x, partition, geometry, "fused"), y)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{kernel_warehouse.__name__}.fused_kernels", raising=False)
    monkeypatch.delattr(kernel_warehouse, "fused_kernels", raising=False)
    assert fused._obstacle.__wrapped__("cuda", torch.float32) == "Triton is not installed"


def test_a_triton_without_double_precision_is_named(monkeypatch):
    kernels = types.ModuleType("fused_kernels")
    kernels.MULTIPLIES_DOUBLE = False
    monkeypatch.setattr(kernel_warehouse, "fused_kernels", kernels, raising=False)
    monkeypatch.setitem(sys.modules, f"{kernel_warehouse.__name__}.fused_kernels", kernels)
    assert "float64" in fused._obstacle.__wrapped__("cuda", torch.float64)


@pytest.mark.parametrize(("kernel", "size"), [((64, 64, 3, 3), (56, 56)), ((512, 512, 3, 3), (7, 7))])
def test_taken_only_by_name(kernel, size):
    """A tensor without data stands for one on a GPU: every device but the CPU takes the GPU's factors."""
    partition, geometry = Partition(kernel, (*kernel[:2], 1, 1)), Geometry.of(kernel[2:], padding=1)
    assert choose(partition, geometry, 56, torch.empty(64, kernel[1], *size, device="meta")) in ("streamed", "inputs")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("architecture", "type_name", "tile"), [(80, "bf16", 0), (90, "fp16", 2), (90, "fp32", 1)])
@pytest.mark.parametrize("name", ["convolve", "convolve_transposed", "correlate"])
def test_compiles_for_gpus_that_are_not_here(name, architecture, type_name, tile, monkeypatch, tmp_path):
    """With products on the tensor cores, and loads that run ahead: of 16 bytes, for 16-bit images, channels last."""
    from kernelwarehouse.models.ops.kernel_warehouse import fused_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuner = getattr(fused_kernels, name)
    config, names = tuner.configs[tile], tuner.fn.arg_names
    constants = dict(zip(fused_operators.Window._fields, (3, 3, 2, 2, 1, 1, 1, 1), strict=True))
    constants |= {"precision": "tf32", **config.kwargs}
    constants |= {step: 1 for step in ("x_c", "y_o", "g_o") if step in names}
    types = dict.fromkeys({"x", "w", "y", "grad", "grad_x", "grad_w"} & set(names), f"*{type_name}")
    sizes = [size for size in names if size.startswith(("x_", "w_", "y_", "g_", "cell_")) or size.endswith("_channels")]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_for_gpu(tuner.fn, architecture, types, constants, options, [*types, *sizes])
    loads = re.findall(r"cp\.async\.\S+ \[[^]]*\], \[[^]]*\], (\w+)", compiled.asm["ptx"])
    assert "mma" in compiled.asm["ptx"]
    assert loads
    assert type_name == "fp32" or {int(size, 0) for size in loads} == {16}
    assert compiled.metadata.shared <= 160 << 10  # of the 163 KB that an A100 has for a block
