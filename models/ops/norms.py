"""The norm of an attention's hidden vector, which has one value for each sample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalised(norm: nn.Module, h: Tensor) -> Tensor:
    """Norm(h) for h (B, hidden), also where another package has put a norm of its own in the place of ours.

    One value has no variance to normalise by: a batch of one is normalised by the running statistics, as in
    evaluation, and leaves them as they are.
    """
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training and len(h) == 1 and not _spans(norm):
        return F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    if isinstance(norm, nn.BatchNorm2d):  # such as timm's for split batches
        return norm(h[..., None, None]).flatten(1)
    return norm(h)


def _spans(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batches of several processes."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return isinstance(norm, nn.SyncBatchNorm) and several and torch.distributed.get_world_size() > 1
