"""The precision in which the operators compute."""

from functools import reduce

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> list[Tensor]:
    """Bring tensors to their widest type, float32 at least.

    torchvision's kernels want one type for all, and half precision is too coarse for coordinates: at 1024 pixels its
    step is a whole pixel. Results are cast back where they are stored.
    """
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.to(dtype) for t in tensors]
