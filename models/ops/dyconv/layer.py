"""The attention of DY-Conv, and the layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..experts import ExpertsConv, Mixing
from ..tied import Temperature

LIMITS = 1e-3, 1e4  # of the temperature


def hidden_width(in_channels: int, reduction: float, kernel_num: int) -> int:
    """Width of the attention's hidden layer; of images of three channels K, as in the public code."""
    return kernel_num if in_channels == 3 else int(in_channels * reduction) + 1


class DYAttention(nn.Module):
    """π = softmax(z / τ) with z = FC2(ReLU(FC1(mean of x over space))).

    Args:
        in_channels: Channels of the layer's input.
        kernel_num: K.
        reduction: Hidden width as a share of `in_channels`.
        device: Where the parameters are.
        dtype: Their type.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_num: int,
        reduction: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden = hidden_width(in_channels, reduction, kernel_num)
        self.fc1 = nn.Linear(in_channels, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, kernel_num, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the public code: Kaiming normal over the fan out, the bias zero."""
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(fc.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc2.bias)

    def forward(self, pooled: Tensor, temperature: Tensor | None) -> Tensor:
        """The means (B, C) of images and τ, a scalar tensor, or None for 1 → π (B, K)."""
        z = self.fc2(F.relu(self.fc1(pooled)))
        return torch.softmax(z if temperature is None else z / temperature.to(z.dtype), 1)


class DYConvNd(ExpertsConv):
    """y[b] = conv(x[b], Σ_n π[b, n] W_n) + Σ_n π[b, n] b_n.

    Args:
        *convolution: The arguments of torch's convolution; so are those of `**named`.
        kernel_num: K.
        reduction: As `DYAttention`.
        device: Where the parameters are.
        dtype: Their type.
    """

    def __init__(
        self,
        *convolution: Any,
        kernel_num: int = 4,
        reduction: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **named: Any,
    ):
        kwargs = {"device": device, "dtype": dtype}
        super().__init__(*convolution, num_experts=kernel_num, **named, **kwargs)
        self.attention = DYAttention(self.in_channels, kernel_num, reduction, **kwargs)
        self.temperature = Temperature(1.0, LIMITS, **kwargs) if kernel_num > 1 else None
        self.reset_parameters()

    def mixing(self, x: Tensor) -> Mixing:
        """As the base class."""
        return Mixing(self.attention(self.pooled(x), None if self.temperature is None else self.tau).unsqueeze(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the public code: each kernel Kaiming uniform over the fan in, biases zero."""
        self.attention.reset_parameters()
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def rest_attention(self) -> float:
        """All π equal, 1/K."""
        nn.init.zeros_(self.attention.fc2.weight)
        nn.init.zeros_(self.attention.fc2.bias)
        return 1.0


class DYConv1d(DYConvNd):
    """The 1-D form of `DYConvNd`."""

    dims = 1


class DYConv2d(DYConvNd):
    """The 2-D form of `DYConvNd`."""

    dims = 2


class DYConv3d(DYConvNd):
    """The 3-D form of `DYConvNd`."""

    dims = 3
