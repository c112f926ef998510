"""The layers of torch.nn that operators may replace."""

from timm.layers.conv2d_same import Conv2dSame
from torch import nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def pads_same(layer: nn.Module) -> bool:
    """Whether a layer is timm's Conv2dSame, which pads as TensorFlow's "same": by the size of its input."""
    return type(layer) is Conv2dSame
