"""The layers of ODConv."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import ExpertsConv, Mixing
from ..tied import Temperature
from .attention import ODAttention, head_widths

LIMITS = 1e-3, 1e4  # of the temperature


class ODConvNd(ExpertsConv):
    """y[b] = a_f[b] · conv(a_c[b] · x[b], Σ_n a_w[b, n] · a_s[b] ⊙ W_n) + bias.

    The authors' layer has no bias; ours is added last and is the same for all inputs.

    Args:
        *convolution: The arguments of torch's convolution; so are those of `**named`.
        kernel_num: n.
        reduction: As `ODAttention`.
        device: Where the parameters are.
        dtype: Their type.
    """

    mixes_bias = False

    def __init__(
        self,
        *convolution: Any,
        kernel_num: int = 4,
        reduction: float = 0.0625,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **named: Any,
    ):
        kwargs = {"device": device, "dtype": dtype}
        super().__init__(*convolution, num_experts=kernel_num, by_position=True, **named, **kwargs)
        widths = head_widths(self.in_channels, self.out_channels, self.groups, math.prod(self.kernel_size), kernel_num)
        self.attention = ODAttention(self.in_channels, widths, reduction, **kwargs)
        self.temperature = Temperature(1.0, LIMITS, **kwargs)
        self.reset_parameters()

    def mixing(self, x: Tensor) -> Mixing:
        """As the base class; the attention over positions multiplies that over kernels, position by position."""
        channel, filters, spatial, kernel = self.attention(self.pooled(x), self.tau)
        if spatial is None:
            return Mixing(None if kernel is None else kernel.unsqueeze(1), channel, filters)
        alpha = spatial.unsqueeze(2)
        return Mixing(alpha if kernel is None else alpha * kernel.unsqueeze(1), channel, filters)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors: each kernel Kaiming normal over the fan out, the bias zero."""
        self.attention.reset_parameters()
        for kernel in self.weight:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def rest_attention(self) -> float:
        """Each σ is 1/2 at every temperature, and the kernels' shares are equal; powers of two divide exactly."""
        return 0.5 ** self.attention.rest()


class ODConv1d(ODConvNd):
    """The 1-D form of `ODConvNd`."""

    dims = 1


class ODConv2d(ODConvNd):
    """The 2-D form of `ODConvNd`."""

    dims = 2


class ODConv3d(ODConvNd):
    """The 3-D form of `ODConvNd`."""

    dims = 3
