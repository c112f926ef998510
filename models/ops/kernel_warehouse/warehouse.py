"""The shared cells of a network and its temperature."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Warehouses(nn.Module):
    """Owns every cell of a network, and the one temperature τ of all its attentions.

    It is a child of the network's root; layers refer to it without registering it, so that each parameter appears
    once in a state dict. Called on a tensor it returns it, so that an `nn.Sequential` may own it.

    Cells have the shape (n, cout, cin, *c) and lie in memory as (cout, n, cin, *c): mixing reads, for one output
    channel after the other, that channel's row of every cell. Any other layout, as ``load_state_dict(assign=True)`` may
    bring in, is as correct and slower. (As with weights in channels_last, safetensors wants ``contiguous()`` copies.)

    Attributes:
        temperature: τ as a scalar tensor, a non-persistent buffer: 1 is the static assignment, 0 pure attention.
        names: The warehouses' names, in their order.
        plan: The `ConversionPlan` by which `convert_` made them, None elsewhere.
        folded: Whether a layer was folded, which holds the temperature at 0.

    Args:
        shapes: Shape (n, cout, cin, *c) of each warehouse by name; the order is kept.
        device: Where the cells are.
        dtype: Their type.

    Raises:
        ValueError: A name that a module cannot have, or a shape without elements.
    """

    temperature: Tensor

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.names = tuple(shapes)
        self.plan: Any = None
        self.folded = False
        for name, shape in shapes.items():
            if not name.isidentifier() or hasattr(self, name) or name == "temperature":
                raise ValueError(f"warehouse {name!r}: not a usable name; take letters, digits and underscores")
            if len(shape) < 4 or min(shape) < 1:
                raise ValueError(f"warehouse {name!r}: cells need a shape (n, cout, cin, *c), found {tuple(shape)}")
            n, cout, *cell = shape
            cells = torch.zeros(cout, n, *cell, device=device, dtype=dtype).transpose(0, 1)
            self.register_parameter(name, nn.Parameter(cells))
        self.register_buffer("temperature", torch.zeros((), device=device, dtype=dtype), persistent=False)

    def cells(self, name: str) -> nn.Parameter:
        """The cells (n, cout, cin, *c) of a warehouse."""
        return getattr(self, name)

    def keep(self, names: Collection[str]) -> None:
        """Drop the cells of all warehouses but these."""
        for name in self.names:
            if name not in names:
                delattr(self, name)
        self.names = tuple(name for name in self.names if name in names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Warehouses":
        """Keep the cells' layout: ``to(memory_format=channels_last)`` would take them for images."""

        def rows(t: Tensor) -> Tensor:
            if t.ndim < 4:
                return fn(t)
            return fn(t.transpose(0, 1).flatten(1)).unflatten(1, (len(t), *t.shape[2:])).transpose(0, 1)

        return super()._apply(rows, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """Return x unchanged."""
        return x

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return "\n".join(f"{name}: {tuple(self.cells(name).shape)}" for name in self.names)


@torch.no_grad()
def set_temperature(model: nn.Module, value: float) -> None:
    """Set τ of every converted network inside `model`; a static network has none and is left as it is.

    Args:
        model: A network, or a module that contains one (DDP, an EMA copy).
        value: Between 0 (trained) and 1 (start of training).

    Raises:
        ValueError: A value outside [0, 1], or other than 0 where layers are folded.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"the temperature must be between 0 and 1, found {value}")
    for module in model.modules():
        if isinstance(module, Warehouses):
            if module.folded and value:
                raise ValueError(f"folded layers have no temperature but 0, found {value}")
            module.temperature.fill_(value)
