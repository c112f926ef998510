"""Implementations that were measured to be the fastest, which "auto" takes in place of its estimate.

They belong to the process, as what cuDNN finds does: for a layer of the same sizes it does not matter whose it is.
`kernelwarehouse.models.tuning` measures them.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..geometry import Geometry
from .partition import Partition


class Call(NamedTuple):
    """What decides which implementation of a layer is the fastest.

    Attributes:
        partition: How its kernel is cut.
        geometry: The convolution's arguments.
        num_cells: n.
        hidden: r, the width of the attention's hidden vector.
        num_basis: Of the attention's non-local basis; 0 for none.
        images: Shape of the input, (B, Cin, *spatial).
        channels_last: Whether channels lie together in memory.
        dtype: Of the input.
        computed_in: The type of products.
        gradients: Whether they are recorded.
        of_images: Whether the input requires one.
        device: Its name, with the number of threads of a CPU.
    """

    partition: Partition
    geometry: Geometry
    num_cells: int
    hidden: int
    num_basis: int
    images: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    computed_in: torch.dtype
    gradients: bool
    of_images: bool
    device: str


_TAKEN: dict[str, str] = {}  # by the text of a call, which a checkpoint can hold


def anything_tuned() -> bool:
    """Whether there is anything to look for."""
    return bool(_TAKEN)


@functools.lru_cache(4096)
def tuned(call: Call) -> str | None:
    """The name that was remembered for a call, "auto" where the estimate was right, or None."""
    return _TAKEN.get(str(call))


def remember(taken: Mapping[str, str]) -> None:
    """Take implementations by the text of their calls, as `remembered` gives them."""
    _TAKEN.update(taken)
    tuned.cache_clear()


def remembered() -> dict[str, str]:
    """All implementations that were found, by the text of their calls."""
    return dict(_TAKEN)


def forget() -> None:
    """Let "auto" take what it estimates again."""
    _TAKEN.clear()
    tuned.cache_clear()


def device_name(device: torch.device) -> str:
    """What times are compared on: a GPU's model, or the CPU's vector instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
