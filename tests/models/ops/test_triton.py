"""The Triton kernels of per-sample convolution: in its interpreter, by a pytest of its own, and on a GPU, if any."""

import re
import sys
import types

import pytest
import torch
from convolutions import CONVOLUTIONS, convolution
from interpreter import DEVICE, INTERPRETED, compile_for_gpu, in_interpreter, needs_triton, run_in_interpreter
from layers import make, reference_forward
from parity import assert_parity

from kernelwarehouse.models.ops import per_sample_conv
from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.mixture_conv import IMPLEMENTATIONS, Partition, mixture_conv, signature_of
from kernelwarehouse.models.ops.per_sample_conv import triton_conv
from kernelwarehouse.models.ops.selection import select


def case(name):
    return convolution(name, DEVICE)


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
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """Everything in `TestKernels`, on the CPU."""
    assert run_in_interpreter(__file__) > len(CONVOLUTIONS)


@in_interpreter
class TestKernels:
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_parity_with_reference(self, name):
        partition, geometry, (alpha, cells, x) = case(name)
        assert_parity(
            lambda: mixture_conv(x, alpha, cells, partition, geometry, implementation="triton"),
            lambda: mixture_conv(x, alpha, cells, partition, geometry, implementation="reference"),
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
            lambda: mixture_conv(x.to(dtype), alpha.to(dtype), cells, partition, geometry, implementation="triton"),
            lambda: mixture_conv(x, alpha, cells, partition, geometry, implementation="reference"),
            {"alpha": alpha, "cells": cells, "x": x},
            tolerance,
        )

    def test_any_layout(self):
        """Channels last stay so; cells, inputs and gradients may have any strides."""
        partition, geometry, (alpha, cells, x) = case("stride")
        expected = mixture_conv(x, alpha, cells, partition, geometry, implementation="reference")
        truth = torch.autograd.grad(expected.sum(), (alpha, cells, x))
        images = {
            "channels last": x.to(memory_format=torch.channels_last),
            "a part": torch.stack([x, x], -1)[..., 1],
            "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        }
        for name, image in images.items():
            rows = cells.transpose(0, 1).contiguous().transpose(0, 1)
            y = mixture_conv(image, alpha, rows, partition, geometry, implementation="triton")
            assert y.is_contiguous(memory_format=torch.channels_last) == (name == "channels last")
            torch.testing.assert_close(y, expected, check_stride=False)
            received = torch.autograd.grad(y.sum(), (alpha, cells, x))  # of which every stride is 0
            torch.testing.assert_close(received, truth, check_stride=False)

    def test_a_bank_for_each_part(self):
        partition, geometry, (alpha, _, x) = case("padding")
        bank = torch.randn(5, *partition.kernel, dtype=torch.float64, device=DEVICE, requires_grad=True)
        assert_parity(
            lambda: mixture_conv(x, alpha, bank, partition, geometry, implementation="triton"),
            lambda: mixture_conv(x, alpha, bank, partition, geometry, implementation="reference"),
            {"alpha": alpha, "bank": bank, "x": x},
        )

    @pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradients_that_nobody_wants_are_not_computed(self, wanted):
        partition, geometry, tensors = case("pointwise")
        tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        mixture_conv(tensors[2], *tensors[:2], partition, geometry, implementation="triton").square().sum().backward()
        assert tuple(t.grad is not None for t in tensors) == wanted

    def test_an_input_smaller_than_the_kernel_is_refused(self):
        partition, geometry, (alpha, cells, x) = case("stride")
        with pytest.raises(ValueError, match="an input of 2 × 5 is too small"):
            mixture_conv(x[:, :, :2], alpha, cells, partition, geometry, implementation="triton")

    def test_second_derivatives(self):
        partition, geometry, (alpha, cells, x) = case("pointwise")
        found = []
        for name in ("triton", "reference"):
            y = mixture_conv(x, alpha, cells, partition, geometry, implementation=name)
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), (alpha, cells, x)))
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize("kind", ["conv2d", "conv2d-nonlocal", "conv1d-circular", "linear-tokens"])
    def test_layers(self, kind):
        layer, x = make(kind)
        layer, x = layer.to(DEVICE), x.to(DEVICE).requires_grad_()
        layer.implementation = "triton"
        leaves = {"x": x, **dict(layer.named_parameters())}
        assert_parity(lambda: layer(x), lambda: reference_forward(layer, x, 0.0), leaves, tolerance=1e-10)
        with torch.inference_mode():
            y = layer(x)
        torch.testing.assert_close(y, layer(x))

    def test_compiled_in_one_graph(self):
        layer, x = make("conv2d")
        layer, x = layer.to(DEVICE), x[:2].to(DEVICE)
        layer.implementation = "triton"
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
        assert_parity(lambda: compiled(x), lambda: layer(x), leaves, tolerance=1e-11)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_what_the_compiler_is_told_is_true(self, channels_last):
        """Shapes, strides and types of the operators' results, and that they change none of their arguments."""
        partition, _, (_, _, x) = case("stride")
        x = x.detach().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        kernels = torch.randn(len(x), partition.kernel[0], 9, x.shape[1], dtype=x.dtype, device=DEVICE)
        window = [3, 3, 2, 2, 0, 0, 1, 1]
        grad = torch.randn(2, partition.kernel[0], 3, 2, dtype=x.dtype, device=DEVICE)
        for operator, arguments in (
            (triton_conv.convolve, (x, kernels, window)),
            (triton_conv.gradient_of_x, (grad, x, kernels, window)),
            (triton_conv.gradient_of_kernels, (grad, x, window)),
        ):
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run here")
def test_on_a_cpu_it_is_refused_by_name():
    partition, geometry, (alpha, cells, x) = case("padding")
    with pytest.raises(
        ValueError, match="'triton' cannot compute this layer: Triton's kernels run on CUDA devices, not"
    ):
        mixture_conv(x, alpha, cells, partition, geometry, implementation="triton")


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{per_sample_conv.__name__}.triton_kernels", raising=False)
    monkeypatch.delattr(per_sample_conv, "triton_kernels", raising=False)
    assert triton_conv._unavailable.__wrapped__("cuda", torch.float32) == "Triton is not installed"


def test_a_triton_without_double_precision_is_named(monkeypatch):
    kernels = types.ModuleType("triton_kernels")
    kernels.MULTIPLIES_DOUBLE = False
    monkeypatch.setattr(per_sample_conv, "triton_kernels", kernels, raising=False)
    monkeypatch.setitem(sys.modules, f"{per_sample_conv.__name__}.triton_kernels", kernels)
    assert "float64" in triton_conv._unavailable.__wrapped__("cuda", torch.float64)


@pytest.mark.parametrize(("kernel", "size"), [((64, 64, 3, 3), (56, 56)), ((512, 512, 3, 3), (7, 7))])
def test_taken_only_by_name(kernel, size):
    """A tensor without data stands for one on a GPU: every device but the CPU takes the GPU's factors."""
    partition, geometry = Partition(kernel, (*kernel[:2], 1, 1)), Geometry.of(kernel[2:], padding=1)
    x = torch.empty(64, kernel[1], *size, device="meta")
    chosen = select(signature_of(x, 56, True, partition, geometry, "mixture_conv"), IMPLEMENTATIONS).name
    assert chosen in ("materialize", "mix_inputs")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("architecture", "type_name", "tile"), [(80, "bf16", 0), (90, "fp16", 2), (90, "fp32", 1)])
@pytest.mark.parametrize("name", ["convolve", "convolve_transposed", "correlate"])
def test_compiles_for_gpus_that_are_not_here(name, architecture, type_name, tile, monkeypatch, tmp_path):
    """With products on the tensor cores, and loads that run ahead: of 16 bytes, for 16-bit images, channels last."""
    from kernelwarehouse.models.ops.per_sample_conv import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuner = getattr(triton_kernels, name)
    config, names = tuner.configs[tile], tuner.fn.arg_names
    constants = dict(zip(triton_conv.Window._fields, (3, 3, 2, 2, 1, 1, 1, 1), strict=True))
    constants |= {"precision": "tf32", **config.kwargs}
    constants |= {step: 1 for step in ("x_c", "y_o", "g_o") if step in names}
    types = dict.fromkeys({"x", "w", "y", "grad", "grad_x", "grad_w"} & set(names), f"*{type_name}")
    sizes = [size for size in names if size.startswith(("x_", "w_", "y_", "g_")) or size.endswith("_channels")]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_for_gpu(tuner.fn, architecture, types, constants, options, [*types, *sizes])
    loads = re.findall(r"cp\.async\.\S+ \[[^]]*\], \[[^]]*\], (\w+)", compiled.asm["ptx"])
    assert "mma" in compiled.asm["ptx"]
    assert loads
    assert type_name == "fp32" or {int(size, 0) for size in loads} == {16}
    assert compiled.metadata.shared <= 160 << 10  # of the 163 KB that an A100 has for a block
