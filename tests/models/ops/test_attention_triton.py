"""The attention's Triton kernels: in Triton's interpreter, by a pytest of its own, and on a GPU, if any."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, compile_for_gpu, in_interpreter, needs_triton, run_in_interpreter
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernelwarehouse.models.ops.kernel_warehouse import Attention, assign, attention


def attention_of(cells=37, mixtures=3, channels=40, dtype=torch.float64):
    """With a hidden vector of 20."""
    torch.manual_seed(0)
    own = range(cells)
    attention = Attention(channels, cells, own, assign(mixtures, cells, 0), reduction=0.5, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.5)
    return attention


def operands(attention, batch, tau):
    weight = attention.fc2.weight
    hidden = torch.randn(batch, weight.shape[1], dtype=weight.dtype, device=DEVICE).relu()
    return (
        hidden,
        weight.detach(),
        attention.fc2.bias.detach(),
        attention.assignment,
        torch.full_like(weight[0, 0], tau),
    )


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """Everything in `TestKernels`, on the CPU."""
    assert run_in_interpreter(__file__) > 8


@in_interpreter
class TestKernels:
    @pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize(("batch", "cells"), [(1, 1), (3, 63), (35, 64), (17, 130)])
    def test_parity_with_the_module(self, batch, cells, tau):
        from kernelwarehouse.models.ops.kernel_warehouse import attention_triton

        attention = attention_of(cells)
        hidden, weight, bias, assignment, temperature = operands(attention, batch, tau)
        alpha = attention_triton.coefficients(hidden, weight, bias, assignment, temperature)
        leaves = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
        z = (leaves[0] @ leaves[1].mT + leaves[2]).reshape(batch, -1, cells + 1)
        truth = torch.lerp(z[..., :-1] / (z.abs().sum(2, keepdim=True) + 1e-3), assignment, temperature)
        torch.testing.assert_close(alpha, truth, rtol=1e-10, atol=1e-12)
        grad = torch.randn_like(truth)
        expected = torch.autograd.grad(truth, leaves, grad)
        found = attention_triton.gradients(grad, hidden, weight, bias, temperature)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_single_precision(self):
        from kernelwarehouse.models.ops.kernel_warehouse import attention_triton

        exact = operands(attention_of(), 5, 0.3)
        rounded = [value.float() for value in exact]
        grad = torch.randn(5, *exact[3].shape, dtype=torch.float64, device=DEVICE)
        truth = attention_triton.coefficients(*exact), *attention_triton.gradients(grad, *exact[:3], exact[4])
        found = (
            attention_triton.coefficients(*rounded),
            *attention_triton.gradients(grad.float(), *rounded[:3], rounded[4]),
        )
        for ours, theirs in zip(found, truth, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    def test_the_assignment_exactly(self):
        """At τ = 1, as the optimizer magnifies whatever else there were."""
        from kernelwarehouse.models.ops.kernel_warehouse import attention_triton

        hidden, *rest = operands(attention_of(dtype=torch.float32), 4, 1.0)
        alpha = attention_triton.coefficients(hidden, *rest)
        assert torch.equal(alpha, rest[2].expand_as(alpha))

    def test_a_logit_of_zero_has_no_sign(self):
        from kernelwarehouse.models.ops.kernel_warehouse import attention_triton

        attention = attention_of()
        attention.hold_assignment()
        hidden, weight, bias, assignment, temperature = operands(attention, 3, 0.0)
        grad = torch.ones(3, *assignment.shape, dtype=torch.float64, device=DEVICE)
        _, _, received = attention_triton.gradients(grad, hidden, weight, bias, temperature)
        empty = bias == 0
        empty[attention.num_cells :: attention.num_cells + 1] = False  # those of zero cells, which get nothing at all
        torch.testing.assert_close(received[empty], torch.full_like(received[empty], 3 / (1 + 1e-3)))


aten = torch.ops.aten
IDLE = {aten.view.default, aten.t.default, aten.slice.Tensor, aten.empty.memory_format, aten.promote_types.default}


class Operators(TorchDispatchMode):
    """The operators that are called and do work."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in IDLE and function.namespace != "prim":
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_few_launches(monkeypatch):
    """On a GPU that is only pretended, where no kernel runs."""
    monkeypatch.setattr(attention.triton_conv, "unavailable", lambda *_: None)
    monkeypatch.setattr(attention, "is_untouched", lambda _: True)
    module = Attention(40, 9, range(9), assign(4, 9, 0)).eval()
    x, temperature = torch.randn(8, 40, 7, 7), torch.tensor(0.5)
    with torch.no_grad(), Operators() as plain:
        module(x, temperature, "torch")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                tensors |= {k: torch.empty(v.shape, device="cuda") for k, v in tensors.items() if v is not None}
        x, temperature = torch.empty(8, 40, 7, 7, device="cuda"), torch.empty((), device="cuda")
        with torch.no_grad(), Operators() as operators:
            alpha = module(x, temperature, "triton")
        assert alpha.shape == (8, 4, 9)
        assert alpha.device.type == "cuda"
    assert operators.names[-1] == "kernelwarehouse::coefficients"
    assert len(operators.names) < len(plain.names)
    for name in ("coefficients", "coefficients_gradients"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kernelwarehouse::{name}", "CUDA")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", ["find_coefficients", "find_gradients"])
def test_compiles_for_gpus_that_are_not_here(name, architecture, monkeypatch, tmp_path):
    from kernelwarehouse.models.ops.kernel_warehouse import attention_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(attention_triton, name)
    types = {"hidden", "weight", "bias", "assignment", "temperature", "alpha", "grad", "received"}
    constants = {"epsilon": 1e-3, "precision": "tf32", "block_b": 32, "block_n": 64, "block_r": 32}
    compiled = compile_for_gpu(kernel, architecture, dict.fromkeys(types, "*fp32"), constants, {"num_warps": 4})
    assert "mma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 << 10
