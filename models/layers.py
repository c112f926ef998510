"""The layers of torch.nn that operators may replace."""

from timm.layers.conv2d_same import Conv2dSame
from torch import nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def pads_same(layer: nn.Module) -> bool:
    """Whether a layer is timm's Conv2dSame, which pads as TensorFlow's "same": by the size of its input."""
    return type(layer) is Conv2dSame


def kernel_shape(layer: Layer) -> tuple[int, ...]:
    """The shape of a layer's weight by its arguments: (Cout, Cin/groups, *k), (out_features, in_features)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
