"""A feature pyramid out of one feature map, for backbones whose levels all have one resolution."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The simple feature pyramid of ViTDet (https://arxiv.org/abs/2203.16527): one map at 4, 2, 1 and ½ times its size.

    With patches of 16 pixels the strides are 4, 8, 16 and 32, as an FPN's.

    Args:
        in_channels: Channels of the backbone's one map, or a list of this one number; divisible by 4.
        out_channels: Channels of every map of the pyramid.
        num_outs: Number of maps; each one beyond the fourth halves the one before.

    Raises:
        ValueError: Several maps, channels that 4 does not divide, or fewer than four maps.
    """

    def __init__(self, in_channels: int | Sequence[int], out_channels: int = 256, num_outs: int = 5):
        super().__init__()
        widths = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        if len(widths) != 1 or widths[0] % 4 or num_outs < 4:
            raise ValueError(
                "SimpleFeaturePyramid makes at least 4 maps of one map, whose channels 4 divides: found in_channels "
                f"{in_channels}, num_outs {num_outs}; give the backbone out_indices=(-1,)"
            )
        self.in_channels = widths
        self.num_outs = num_outs
        c = widths[0]
        scales = (
            (_double(c, c // 2), LayerNorm2d(c // 2), nn.GELU(), _double(c // 2, c // 4)),
            (_double(c, c // 2),),
            (),
            (nn.MaxPool2d(2),),
        )
        self.scales = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for scale, width in zip(scales, (c // 4, c // 2, c, c), strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, in_channels, H, W) → (B, out_channels, 4H, 4W), then 2H × 2W, H × W, H/2 × W/2 and further halves."""
        (x,) = maps
        pyramid = [scale(x) for scale in self.scales]
        while len(pyramid) < self.num_outs:
            pyramid.append(F.max_pool2d(pyramid[-1], 1, stride=2))
        return tuple(pyramid)


def _double(in_channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
