"""The attention as an operator: in C++ for a CPU, by Triton on a GPU.

A small layer's convolution takes as long as two or three of torch's operators, of which the module takes a dozen. On a
CPU, inference takes one from images to coefficients; on a GPU, and in training (but see `attention_training`), one from
the hidden vector on.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from ..exporting import exporting
from ..native import attention_sizes, call, can_run, in_either_layout, operator, sum_type
from . import fused
from .attention import EPSILON, Attention, AttentionBatchNorm1d, pool

_TENSORS = (nn.Parameter, Tensor)


def attends_at_once(attention: Attention, x: Tensor, implementation: str = "auto") -> bool:
    """Whether `attend_at_once` can compute what the module would, and nobody is looking at it.

    Args:
        attention: A layer's.
        x: Images, (B, C, *spatial).
        implementation: The layer's: "auto" and "native" take C++ on a CPU, "fused" takes Triton on a GPU.
    """
    fc2 = attention._modules["fc2"]  # ten times as fast as by the attribute
    return (
        not exporting()
        and _is_at_hand(implementation, x)
        and not attention.num_basis
        and _is_plain(fc2)
        and fc2.weight.dtype == sum_type(x.dtype)
        and not has_hooks(attention)
    )


def _is_at_hand(implementation: str, x: Tensor) -> bool:
    if implementation == "fused":
        return x.is_cuda and fused.can_run("cuda", x.dtype, warn=True)
    return implementation in ("auto", "native") and can_run(x.device.type, x.dtype)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer is torch's own, with weights that are no more than tensors, and has no hook."""
    return type(linear) is nn.Linear and type(linear._parameters["weight"]) in _TENSORS and not _hooks(linear)


def attend_at_once(attention: Attention, x: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """α (B, m, n), in single precision at least, and x, to be used in place of it from here on.

    Args:
        attention: One that `attends_at_once`.
        x: Images, (B, C, *spatial).
        temperature: τ, a scalar tensor.
    """
    assignment = attention.assignment
    if torch.is_grad_enabled() or x.is_cuda or not is_whole(attention):
        pooled, x = pool(x)
        weight, bias = attention._modules["fc2"]._parameters.values()
        compute = _Coefficients.apply if torch.is_grad_enabled() else coefficients
        return compute(attention.hidden(pooled).to(weight.dtype), weight, bias, assignment, temperature), x
    return _whole(attention, x, temperature), x


def folded_at_once(attention: Attention, x: Tensor) -> Tensor:
    """The coefficients s [h; 1] of a folded layer (see `folded`), (B, m, r + 1); arguments as `attend_at_once`."""
    return _whole(attention, x, None)


def folds_at_once(attention: Attention, x: Tensor) -> bool:
    """Whether `folded_at_once` can compute what the module would, and nobody is looking at it."""
    return attends_at_once(attention, x) and is_whole(attention)


def is_whole(attention: Attention) -> bool:
    """Whether all of one that `attends_at_once` can be computed at once, in inference."""
    return not attention._modules["norm"].training and hides_plainly(attention)


def hides_plainly(attention: Attention) -> bool:
    """Whether the hidden vector is found by torch's own layers with a scale and a shift, and nobody looks at them."""
    fc1, norm = attention._modules["fc1"], attention._modules["norm"]
    if not _is_plain(fc1) or _hooks(norm) or norm._parameters["bias"] is None:
        return False
    batch = type(norm) is AttentionBatchNorm1d and norm._buffers["running_mean"] is not None
    return batch or type(norm) is nn.LayerNorm


def parameters_of(attention: Attention, temperature: Tensor | None) -> list[Tensor | None]:
    """What the operator takes of an attention that `is_whole`; without τ, for a folded layer."""
    fc1, norm, fc2 = (attention._modules[name] for name in ("fc1", "norm", "fc2"))
    running = norm._buffers.get("running_mean"), norm._buffers.get("running_var")  # a LayerNorm has none
    first, last = (layer._parameters.values() for layer in (fc1, fc2))
    held = None if temperature is None else attention.assignment
    return [*first, *running, *norm._parameters.values(), *last, held, temperature]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for a module to be called."""
    return bool(_has_any_global_hook() or _hooks(module))


def _hooks(module: nn.Module) -> dict:
    forward = module._forward_hooks or module._forward_pre_hooks
    return forward or module._backward_hooks or module._backward_pre_hooks


class _Coefficients(torch.autograd.Function):
    """`Attention` from h (B, hidden) on; the gradient is of first order only."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, assignment: Tensor, temperature: Tensor):
        ctx.save_for_backward(hidden, weight, bias, temperature.clone())  # which is changed after every step
        return coefficients(hidden, weight, bias, assignment, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *coefficients_gradients(grad, *ctx.saved_tensors), None, None


def _empty_alpha(hidden: Tensor, _weight: Tensor, _bias: Tensor, assignment: Tensor, _temperature: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], *assignment.shape)


def _coefficients_on_gpu(
    hidden: Tensor, weight: Tensor, bias: Tensor, assignment: Tensor, temperature: Tensor
) -> Tensor:
    from . import fused_attention  # which needs Triton

    _check_logits(weight.shape, hidden.shape[1], *assignment.shape)
    return fused_attention.coefficients(hidden, weight, bias, assignment, temperature)


@operator("coefficients", fake=_empty_alpha, cuda=_coefficients_on_gpu)
def coefficients(hidden: Tensor, weight: Tensor, bias: Tensor, assignment: Tensor, temperature: Tensor) -> Tensor:
    """α (B, m, n) from h (B, r), the logits' weights (m · (n + 1), r) and bias, β (m, n) and τ."""
    _check_logits(weight.shape, hidden.shape[1], *assignment.shape)
    alpha = _empty_alpha(hidden, weight, bias, assignment, temperature)
    operands = laid_out((hidden, weight, bias, assignment, temperature), hidden.dtype)
    call("coefficients", (_sizes(hidden, alpha), EPSILON), (*operands, alpha))
    return alpha


def _empty_gradients(
    _grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, _temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in (hidden, weight, bias))


def _coefficients_gradients_on_gpu(*operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from . import fused_attention

    return fused_attention.gradients(*operands)


@operator("coefficients_gradients", fake=_empty_gradients, cuda=_coefficients_gradients_on_gpu)
def coefficients_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of h, the weights and the bias, given that of α."""
    _, grad_weight, grad_bias = _empty_gradients(grad, hidden, weight, bias, temperature)
    grad_hidden = hidden.new_zeros(torch.get_num_threads(), *hidden.shape)
    operands = laid_out((grad, hidden, weight, bias, temperature), hidden.dtype)
    call("coefficients_gradients", (_sizes(hidden, grad), EPSILON), (*operands, grad_hidden, grad_weight, grad_bias))
    return grad_hidden.sum(0), grad_weight, grad_bias


def _sizes(hidden: Tensor, alpha: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return attention_sizes((hidden.shape[0], 1), True, hidden.shape[1], *alpha.shape[1:])


def _empty_result(x: Tensor, parameters: Sequence[Tensor | None], _norm_eps: float, mixtures: int) -> Tensor:
    weight1, weight2, assignment = parameters[0], parameters[6], parameters[8]
    length = weight1.shape[0] + 1 if assignment is None else weight2.shape[0] // mixtures - 1
    return x.new_empty(x.shape[0], mixtures, length, dtype=sum_type(x.dtype))


@operator("attention", fake=_empty_result)
def _attention(x: Tensor, parameters: Sequence[Tensor | None], norm_eps: float, mixtures: int) -> Tensor:
    """α (B, mixtures, n); without an assignment and a temperature s [h; 1], (B, mixtures, r + 1).

    The parameters are weights and bias of FC1; the norm's mean and variance, or none, scale and shift; weights and bias
    of FC2; β and τ, or none.
    """
    weight1, _, mean, *_, weight2, _, assignment, _ = parameters
    cells = weight2.shape[0] // mixtures - 1 if assignment is None else assignment.shape[1]
    check_fit(weight1.shape, weight2.shape, (mixtures, cells), x.shape[1])
    result = _empty_result(x, parameters, norm_eps, mixtures)
    x, channels_last = in_either_layout(x)
    sizes = attention_sizes(x.shape, channels_last, weight1.shape[0], mixtures, cells, mean is None)
    call("attention", (sizes, norm_eps, EPSILON), (x, *laid_out(parameters, result.dtype), result))
    return result


def _whole(attention: Attention, x: Tensor, temperature: Tensor | None) -> Tensor:
    return _attention(x, parameters_of(attention, temperature), attention._modules["norm"].eps, attention.mixtures)


def check_fit(
    weight1: Sequence[int], weight2: Sequence[int], assignment: Sequence[int], channels: int
) -> tuple[int, int]:
    """Return m and n if weights of those shapes, and β (m, n), are of an attention for so many channels.

    Raises:
        ValueError: They are not.
    """
    if weight1[1] != channels:
        raise ValueError(f"an attention for {weight1[1]} channels got {channels}")
    mixtures, cells = assignment
    _check_logits(weight2, weight1[0], mixtures, cells)
    return mixtures, cells


def _check_logits(weight: Sequence[int], width: int, mixtures: int, cells: int) -> None:
    if tuple(weight) != (mixtures * (cells + 1), width):
        raise ValueError(
            f"weights {tuple(weight)} do not give {mixtures} mixtures logits for {cells} cells and the zero cell "
            f"from a hidden vector of {width}"
        )


def laid_out(operands: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """As the library reads them."""
    # Nearly always they are so already, and asking costs a tenth of converting.
    return [
        value if value is None or (value.dtype == dtype and value.is_contiguous()) else value.to(dtype).contiguous()
        for value in operands
    ]
