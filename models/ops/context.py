"""What surrounds a call: graphs for export, and autocast."""

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether a graph is made that will run elsewhere, for inputs of any size."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # pyright: ignore[reportPrivateImportUsage]


def computing_type(x: Tensor) -> torch.dtype:
    """The type that products of x are computed in: its own, or autocast's."""
    device, dtype = x.device.type, x.dtype
    if dtype != torch.float64 and _knows_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def as_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a type: itself if it has it, which torch takes several times as long to find out."""
    return t if t.dtype == dtype else t.to(dtype)


@torch.compiler.assume_constant_result  # which torch 2.8 could not compile otherwise
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
