"""A layer in training as one function of autograd, in C++ for a CPU.

The attention and the convolution read the same input, and each sends back a gradient of it. Here the attention's, one
number for each channel, is added while the convolution's is written; between two functions autograd would read and
write that once more.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ..dynamic_conv import depthwise_gradient_of_x
from ..geometry import Geometry
from ..images import add_bias
from ..native import mean, sum_type, window_of
from . import depthwise, native
from .attention import Attention
from .attention_operator import coefficients, coefficients_gradients, hides_plainly
from .mixing import by_output_blocks, by_positions
from .partition import Partition


def trains_at_once(attention: Attention, x: Tensor, partition: Partition, geometry: Geometry) -> bool:
    """Whether `native_training` can compute a layer that `attends_at_once` and whose convolution is to be "native"."""
    return (
        x.requires_grad
        and not torch.compiler.is_compiling()
        and hides_plainly(attention)
        and geometry.pads_evenly
        and (geometry.groups > 1 or native.in_pairs(x, partition))
    )


def native_training(
    attention: Attention,
    cells: Tensor,
    x: Tensor,
    temperature: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias with W[b] mixed from the cells by the attention to x[b].

    Args:
        attention: One that `trains_at_once`.
        cells: The warehouse, (n, *cell).
        x: (B, Cin, *spatial), of the type to compute in.
        temperature: τ, a scalar tensor.
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
        bias: (Cout,), if any.

    Returns:
        (B, Cout, *output spatial), channels last in memory if x is; its gradient is of first order only.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    x, padding = geometry.split_padding(x)
    window = window_of(partition.kernel[2:], geometry, padding)
    cells = cells.to(sum_type(x.dtype))
    bias = None if bias is None else bias.to(sum_type(x.dtype))
    if geometry.groups > 1:
        convolution, cells = _Depthwise(window), depthwise.channels_together(cells)
    else:
        convolution = _Tiled(partition, window)
    fc1, norm, fc2 = (attention._modules[name]._parameters for name in ("fc1", "norm", "fc2"))
    hidden = (*fc1.values(), *norm.values())
    return _Layer.apply(convolution, attention, temperature, x, cells, bias, *fc2.values(), *hidden)


class _Tiled(NamedTuple):
    """The convolution of `native`: what it does with α (B, m, n), and how it is undone."""

    partition: Partition
    window: list[int]

    def convolve(self, alpha: Tensor, cells: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        alpha = by_output_blocks(alpha.to(x.dtype), self.partition)
        return native.convolve(alpha, cells.transpose(0, 1), x, bias, self.window, False)

    def gradients(self, grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of α and of the cells, and what `gradient_of_x` needs besides."""
        alpha = by_output_blocks(alpha.to(x.dtype), self.partition)
        grad_alpha, grad_cells = native.gradients_of_mixing(grad, alpha, cells, x, self.window)
        return by_positions(grad_alpha, self.partition), grad_cells, alpha

    def gradient_of_x(self, grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, each: Tensor) -> Tensor:
        return native.gradient_of_x(grad, alpha, cells, x, self.window, each)


class _Depthwise(NamedTuple):
    """The same of `depthwise`."""

    window: list[int]

    def convolve(self, alpha: Tensor, cells: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        return add_bias(depthwise.convolve(alpha, cells, x, self.window), bias)

    def gradients(self, grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernels = depthwise.kernels(alpha, cells, x)
        return *depthwise.gradients_of_mixing(grad, alpha, cells, x, kernels, self.window), kernels

    def gradient_of_x(self, grad: Tensor, kernels: Tensor, _cells: Tensor, x: Tensor, each: Tensor) -> Tensor:
        return depthwise_gradient_of_x(grad, x, kernels, self.window, each)


class _Layer(torch.autograd.Function):
    """`native_training`; autograd records the hidden vector, since its norm may have statistics of the batch."""

    @staticmethod
    def forward(
        ctx,
        convolution: _Tiled | _Depthwise,
        attention: Attention,
        temperature: Tensor,
        x: Tensor,
        cells: Tensor,
        bias: Tensor | None,
        weight: nn.Parameter,
        offset: nn.Parameter,
        *parameters: nn.Parameter | None,
    ) -> Tensor:
        pooled = mean(x).to(x.dtype)
        # Checkpointing would compute what it keeps away anew for each graph: this one is small, and kept.
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
            hidden = attention.hidden(pooled.requires_grad_()).to(weight.dtype)
        alpha = coefficients(hidden.detach(), weight, offset, attention.assignment, temperature)
        # The temperature changes after every step; that parameters have not is checked when they are asked for.
        ctx.save_for_backward(x, cells, alpha, weight, offset, temperature.clone(), *parameters)
        ctx.convolution, ctx.hidden = convolution, (pooled, hidden)
        return convolution.convolve(alpha, cells, x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, cells, alpha, weight, offset, temperature, *parameters = ctx.saved_tensors
        pooled, hidden = ctx.hidden
        grad_alpha, grad_cells, kept = ctx.convolution.gradients(grad, alpha, cells, x)
        grad_alpha = grad_alpha.to(alpha.dtype)
        grad_hidden, *grads = coefficients_gradients(grad_alpha, hidden.detach(), weight, offset, temperature)
        wanted = [value for value in parameters if value is not None and value.requires_grad]
        grad_pooled, *found = torch.autograd.grad(hidden, [pooled, *wanted], grad_hidden, retain_graph=True)
        each = grad_pooled.to(alpha.dtype) / x.shape[2:].numel()
        grad_x = ctx.convolution.gradient_of_x(grad, kept, cells, x, each)
        found = iter(found)
        others = [next(found) if value is not None and value.requires_grad else None for value in parameters]
        grad_bias = native.gradient_of_bias(grad) if ctx.needs_input_grad[5] else None
        return None, None, None, grad_x, grad_cells, grad_bias, *grads, *others


def _itself(tensor: Tensor) -> Tensor:
    return tensor
