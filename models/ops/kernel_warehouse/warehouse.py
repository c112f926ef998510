"""The cells that layers share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..tied import Tied


class Warehouse(Tied):
    """The cells of one warehouse, registered in every layer that mixes from it.

    Attributes:
        weight: The cells as a parameter (cout, n, cin, *c), contiguous: for one output channel after the other, that
            channel's row of every cell, which is what mixing reads.

    Args:
        shape: (n, cout, cin, *c).
        device: Where they are.
        dtype: Their type.

    Raises:
        ValueError: A shape without elements.
    """

    def __init__(
        self, shape: Sequence[int], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        if len(shape) < 4 or min(shape) < 1:
            raise ValueError(f"cells need a shape (n, cout, cin, *c) of positive sizes, found {tuple(shape)}")
        n, cout, *cell = shape
        self.weight = nn.Parameter(torch.zeros(cout, n, *cell, device=device, dtype=dtype))

    @property
    def cells(self) -> Tensor:
        """The cells (n, cout, cin, *c), a view."""
        return self.weight.transpose(0, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Warehouse":
        """Keep the cells' layout: ``to(memory_format=channels_last)`` would take them for images."""

        def matrix(t: Tensor) -> Tensor:
            return fn(t.flatten(1)).view(t.shape) if t.ndim >= 4 else fn(t)

        return super()._apply(matrix, recurse)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"cells={tuple(self.cells.shape)}"
