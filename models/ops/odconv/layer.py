"""The layers of ODConv."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..experts import ExpertsConv, Mixing
from ..geometry import Padding
from ..tied import Temperature
from .attention import ODAttention, head_widths

LIMITS = 1e-3, 1e4  # of the temperature


class ODConvNd(ExpertsConv):
    """y[b] = a_f[b] · conv(a_c[b] · x[b], Σ_n a_w[b, n] · a_s[b] ⊙ W_n) + bias.

    The authors' layer has no bias; ours is added last and is the same for all inputs.

    Args:
        in_channels: As torch's convolution; all up to `padding_mode`.
        out_channels: See there.
        kernel_size: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        bias: See there.
        padding_mode: See there.
        kernel_num: n.
        reduction: As `ODAttention`.
        device: Where the parameters are.
        dtype: Their type.
    """

    mixes_bias = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        kernel_num: int = 4,
        reduction: float = 0.0625,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        convolution = kernel_size, stride, padding, dilation, groups, bias, padding_mode
        kwargs = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, *convolution, num_experts=kernel_num, by_position=True, **kwargs)
        widths = head_widths(in_channels, out_channels, groups, math.prod(self.kernel_size), kernel_num)
        self.attention = ODAttention(in_channels, widths, reduction, **kwargs)
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
