"""DY-Conv (CVPR 2020): the kernel is a mixture of K kernels by a softmax over the input's means."""

from .config import DYConfig
from .layer import DYAttention, DYConv1d, DYConv2d, DYConv3d, DYConvNd
from .operator import DYConv

__all__ = ["DYAttention", "DYConfig", "DYConv", "DYConv1d", "DYConv2d", "DYConv3d", "DYConvNd"]
