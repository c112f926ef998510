"""ODConv (ICLR 2022): four attentions, over the kernels, their positions, and the channels of input and output."""

from .config import ODConfig
from .layer import ODAttention, ODConv1d, ODConv2d, ODConv3d, ODConvNd
from .operator import ODConv

__all__ = ["ODAttention", "ODConfig", "ODConv", "ODConv1d", "ODConv2d", "ODConv3d", "ODConvNd"]
