"""The four attentions of ODConv, from one hidden vector."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import normalised

LEAST_HIDDEN = 16


def hidden_width(in_channels: int, reduction: float) -> int:
    """Width of the attention's hidden layer."""
    return max(int(in_channels * reduction), LEAST_HIDDEN)


def head_widths(in_channels: int, out_channels: int, groups: int, positions: int, kernel_num: int) -> dict[str, int]:
    """The attentions that a layer has, by name, and how many values each gives.

    A depthwise layer has none over its output channels, which are those of its input; a 1×1 kernel has none over its
    positions, and a single kernel none over kernels.
    """
    widths = {"channel_fc": in_channels}
    if not in_channels == groups == out_channels:
        widths["filter_fc"] = out_channels
    if positions > 1:
        widths["spatial_fc"] = positions
    if kernel_num > 1:
        widths["kernel_fc"] = kernel_num
    return widths


class Attentions(NamedTuple):
    """What multiplies what, each None where it is left out.

    Attributes:
        channel: (B, Cin), the input's channels.
        filter: (B, Cout), the output's channels.
        spatial: (B, positions), the positions of all kernels.
        kernel: (B, n), the kernels; its sum is 1.
    """

    channel: Tensor
    filter: Tensor | None
    spatial: Tensor | None
    kernel: Tensor | None


class ODAttention(nn.Module):
    """σ or softmax of FC(h) / τ, with h = ReLU(BN(FC(mean of x over space))).

    The parts have the authors' names: `fc`, `bn`, and a head for each attention that there is.

    Args:
        in_channels: Channels of the layer's input.
        widths: Its heads, as `head_widths` gives them.
        reduction: Hidden width as a share of `in_channels`, at least 16.
        device: Where the parameters are.
        dtype: Their type.
    """

    def __init__(
        self,
        in_channels: int,
        widths: dict[str, int],
        reduction: float = 0.0625,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden, kwargs = hidden_width(in_channels, reduction), {"device": device, "dtype": dtype}
        self.fc = nn.Linear(in_channels, hidden, bias=False, **kwargs)
        self.bn = nn.BatchNorm1d(hidden, **kwargs)

        def head(name: str) -> nn.Linear | None:
            return nn.Linear(hidden, widths[name], **kwargs) if name in widths else None

        self.channel_fc = nn.Linear(hidden, in_channels, **kwargs)
        self.filter_fc, self.spatial_fc, self.kernel_fc = head("filter_fc"), head("spatial_fc"), head("kernel_fc")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors: Kaiming normal over the fan out, biases zero."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.bn.reset_parameters()

    @torch.no_grad()
    def rest(self) -> int:
        """Let every head give zeros, so that σ is 1/2 and kernels are equal; returns how many σ there are."""
        heads = [self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc]
        for head in filter(None, heads):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        return sum(head is not None for head in heads[:3])

    def forward(self, pooled: Tensor, temperature: Tensor) -> Attentions:
        """The means (B, C) of images and τ, a scalar tensor → the attentions."""
        h = F.relu(normalised(self.bn, self.fc(pooled)))
        scale = temperature.to(h.dtype)

        def sigmoid(head: nn.Linear | None) -> Tensor | None:
            return None if head is None else torch.sigmoid(head(h) / scale)

        kernel = None if self.kernel_fc is None else torch.softmax(self.kernel_fc(h) / scale, 1)
        return Attentions(
            torch.sigmoid(self.channel_fc(h) / scale), sigmoid(self.filter_fc), sigmoid(self.spatial_fc), kernel
        )
