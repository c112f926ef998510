"""Coefficients of mixtures as operators: in C++ on a CPU, by Triton on a GPU."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu import call, in_either_layout, in_memory, operator
from ..derivatives import Function
from ..means import attention_sizes

EPSILON = 1e-3


def coefficients(z: Tensor, assignment: Tensor, temperature: Tensor) -> Tensor:
    """α = (1 − τ) · z / (Σ|z| + 1e-3) + τ · β (paper, section 3.4).

    Args:
        z: Logits of n cells and the zero cell, (B, m, n + 1).
        assignment: β, (m, n).
        temperature: τ, a scalar tensor.

    Returns:
        α, (B, m, n).
    """
    alpha = (z[..., :-1] / (total(z) + EPSILON)).to(z.dtype)
    return torch.lerp(alpha, assignment.to(z.dtype), temperature.to(z.dtype))


def total(z: Tensor) -> Tensor:
    """Σ|z| over n + 1 logits, in fp32 at least: (B, m, n + 1) → (B, m, 1)."""
    return torch.linalg.vector_norm(z, 1, dim=2, keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32))


class _Coefficients(Function):
    """α of a hidden vector h (B, r), weights (m · (n + 1), r) and biases of the logits, β (m, n) and τ."""

    name = "cpp"
    fast = True

    def compute(
        self, _arguments: Any, hidden: Tensor, weight: Tensor, bias: Tensor, assignment: Tensor, temperature: Tensor
    ) -> Tensor:
        z = torch.nn.functional.linear(hidden, weight, bias)
        return coefficients(z.reshape(len(hidden), len(assignment), -1), assignment, temperature)

    def forward(self, _arguments: Any, *tensors: Tensor) -> Tensor:
        return coefficients_operator(*tensors)

    def gradients(
        self,
        _arguments: Any,
        grad: Tensor,
        _needs: Sequence[bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        _assignment: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return *coefficients_gradients(grad, hidden, weight, bias, temperature), None, None


class _Attention(Function):
    """α of images, all in one, without a gradient.

    The tensors are images; weights and bias of FC1; mean and variance, or none, scale and shift of the norm; weights
    and bias of FC2; β (m, n) and τ. The argument is the norm's ε.
    """

    name = "cpp"
    fast = True

    def compute(self, arguments: float, x: Tensor, *parameters: Any) -> Tensor:
        weight1, bias1, mean, variance, scale, shift, weight2, bias2, assignment, temperature = parameters
        hidden = torch.nn.functional.linear(x.flatten(2).mean(dim=2), weight1, bias1)
        if mean is None:
            hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[1:], scale, shift, arguments)
        else:
            hidden = torch.nn.functional.batch_norm(hidden, mean, variance, scale, shift, False, 0.0, arguments)
        return COEFFICIENTS.compute(None, hidden.relu(), weight2, bias2, assignment, temperature)

    def forward(self, arguments: float, x: Tensor, *parameters: Any) -> Tensor:
        return attention_operator(x, parameters, arguments)


COEFFICIENTS, ATTENTION = _Coefficients(), _Attention()


def _empty_alpha(hidden: Tensor, _weight: Tensor, _bias: Tensor, assignment: Tensor, _temperature: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], *assignment.shape)


def _coefficients_on_gpu(*tensors: Tensor) -> Tensor:
    from . import attention_triton  # which needs Triton

    _check_logits(tensors[1], tensors[2], tensors[0].shape[1], tensors[3])
    return attention_triton.coefficients(*tensors)


@operator("coefficients", fake=_empty_alpha, cuda=_coefficients_on_gpu)
def coefficients_operator(
    hidden: Tensor, weight: Tensor, bias: Tensor, assignment: Tensor, temperature: Tensor
) -> Tensor:
    """As `_Coefficients`; all in one type, single or double precision."""
    _check_logits(weight, bias, hidden.shape[1], assignment)
    alpha = _empty_alpha(hidden, weight, bias, assignment, temperature)
    operands = in_memory((hidden, weight, bias, assignment, temperature), hidden.dtype)
    call("coefficients", (_hidden_sizes(hidden, alpha), EPSILON), (*operands, alpha))
    return alpha


def _empty_gradients(
    _grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, _temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (hidden, weight, bias))
    return hidden, weight, bias


def _coefficients_gradients_on_gpu(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from . import attention_triton

    return attention_triton.gradients(*tensors)


@operator("coefficients_gradients", fake=_empty_gradients, cuda=_coefficients_gradients_on_gpu)
def coefficients_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of h, the weights and the bias, given that of α."""
    _, grad_weight, grad_bias = _empty_gradients(grad, hidden, weight, bias, temperature)
    grad_hidden = hidden.new_zeros(torch.get_num_threads(), *hidden.shape)
    operands = in_memory((grad, hidden, weight, bias, temperature), hidden.dtype)
    results = grad_hidden, grad_weight, grad_bias
    call("coefficients_gradients", (_hidden_sizes(hidden, grad), EPSILON), (*operands, *results))
    return grad_hidden.sum(0), grad_weight, grad_bias


def _check_logits(weight: Tensor, bias: Tensor, width: int, assignment: Tensor) -> None:
    mixtures, cells = assignment.shape
    if tuple(weight.shape) != (mixtures * (cells + 1), width) or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weights {tuple(weight.shape)} do not give {mixtures} mixtures logits for {cells} cells and the zero cell "
            f"from a hidden vector of {width}"
        )


def _hidden_sizes(hidden: Tensor, alpha: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return attention_sizes((len(hidden), 1), True, hidden.shape[1], *alpha.shape[1:])


def _empty_result(x: Tensor, parameters: Sequence[Any], _norm_eps: float) -> Tensor:
    return x.new_empty(x.shape[0], *parameters[8].shape)


@operator("attention", fake=_empty_result)
def attention_operator(x: Tensor, parameters: Sequence[Tensor | None], norm_eps: float) -> Tensor:
    """α (B, m, n), of what `_Attention` says."""
    weight1, *_, weight2, bias2, assignment, _ = parameters
    assert weight1 is not None
    assert weight2 is not None
    assert bias2 is not None
    assert assignment is not None
    if weight1.shape[1] != x.shape[1]:
        raise ValueError(f"an attention for {weight1.shape[1]} channels got {x.shape[1]}")
    _check_logits(weight2, bias2, len(weight1), assignment)
    alpha = _empty_result(x, parameters, norm_eps)
    x, channels_last = in_either_layout(x)
    sizes = attention_sizes(tuple(x.shape), channels_last, len(weight1), *alpha.shape[1:])
    call("attention", (sizes, norm_eps, EPSILON), (x, *in_memory(parameters, x.dtype), alpha))
    return alpha
