"""The attention in training, in C++ for a CPU: one operator from images to coefficients, one for all the gradients."""

from collections.abc import Sequence

from torch import Tensor

from ..native import attention_sizes, call, in_either_layout, operator, sum_type
from .attention import EPSILON, Attention, AttentionBatchNorm1d
from .attention_operator import check_fit, laid_out

_KEPT, _OWN, _OF_BATCH = range(3)  # statistics that a hidden vector is normalised by, as in attention.h


def attend(attention: Attention, x: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """α (B, m, n), and what `gradients` needs of the way to it. The norm's running statistics follow the batch.

    Args:
        attention: One that hides plainly (see `attention_operator`).
        x: Images, (B, C, *spatial).
        parameters: Its `parameters_of`.
    """
    norm = attention._modules["norm"]
    kind = norm_kind(attention, x.shape[0])
    alpha, trace, found = _attend(x, parameters, norm.eps, kind)
    if kind == _OF_BATCH:
        norm.track(*found)
    return alpha, trace


def norm_kind(attention: Attention, batch: int) -> int:
    """By which statistics an attention that hides plainly normalises a batch."""
    norm = attention._modules["norm"]
    if type(norm) is not AttentionBatchNorm1d:
        return _OWN
    return _OF_BATCH if norm.normalises(batch) else _KEPT


def _empty_results(
    x: Tensor, parameters: Sequence[Tensor | None], _norm_eps: float, _kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    weight, assignment = parameters[0], parameters[8]
    batch, channels = x.shape[:2]
    width = weight.shape[0]
    room = batch * channels + 2 * batch * width + max(batch, width) + 1
    shapes = (batch, *assignment.shape), (room,), (2, width)
    alpha, trace, found = (x.new_empty(shape, dtype=sum_type(x.dtype)) for shape in shapes)
    return alpha, trace, found


@operator("attention_in_training", fake=_empty_results)
def _attend(
    x: Tensor, parameters: Sequence[Tensor | None], norm_eps: float, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    """α; the trace; the mean and the variance (2, r) of the batch, if it is normalised by these."""
    check_fit(parameters[0].shape, parameters[6].shape, parameters[8].shape, x.shape[1])
    results = alpha, *_ = _empty_results(x, parameters, norm_eps, kind)
    x, channels_last = in_either_layout(x)
    sizes = attention_sizes(x.shape, channels_last, parameters[0].shape[0], *alpha.shape[1:], kind)
    call("attention_traced", (sizes, norm_eps, EPSILON), (x, *laid_out(parameters, alpha.dtype), *results))
    return results


def learned(parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What has a gradient of `parameters_of`: weights and bias of FC1, scale and shift, weights and bias of FC2."""
    return [*parameters[:2], *parameters[4:8]]


def gradients(
    grad: Tensor, trace: Tensor, learned: Sequence[Tensor | None], shape: Sequence[int], kind: int
) -> tuple[Tensor, list[Tensor | None]]:
    """What every pixel of the images receives, (B, C), and the gradients of what is learned.

    Args:
        grad: That of α, (B, m, n).
        trace: Of `attend`.
        learned: Of the parameters that `attend` had.
        shape: Of the images, (B, C, *spatial).
        kind: The `norm_kind` then.
    """
    each, *found = _gradients(grad, trace, learned, shape, kind)
    if learned[1] is None:
        found.insert(1, None)
    return each, found


def _empty_gradients(
    grad: Tensor, _trace: Tensor, learned: Sequence[Tensor | None], shape: Sequence[int], _kind: int
) -> list[Tensor]:
    return [grad.new_empty(size) for size in (shape[:2], *(value.shape for value in learned if value is not None))]


@operator("attention_gradients", fake=_empty_gradients)
def _gradients(
    grad: Tensor, trace: Tensor, learned: Sequence[Tensor | None], shape: Sequence[int], kind: int
) -> list[Tensor]:
    """The same in one list, without a bias that there is not."""
    weight1, bias1, scale, _, weight2, bias2 = learned
    results = _empty_gradients(grad, trace, learned, shape, kind)
    each, grad_weight1, *others = results
    grad_bias1 = None if bias1 is None else others.pop(0)
    sizes = attention_sizes(shape, True, weight1.shape[0], *grad.shape[1:], kind)
    operands = laid_out((grad, trace, weight1, scale, weight2, bias2), trace.dtype)
    call("attention_gradients", (sizes, EPSILON), (*operands, each, grad_weight1, grad_bias1, *others))
    return results
