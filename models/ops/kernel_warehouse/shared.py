"""One gradient of a warehouse's cells for all the layers that share them.

Autograd would add up a gradient of the whole warehouse from every layer, each written first and then read again to be
added. Here the first layer of a backward pass writes one, and the others add to it while they compute theirs.
"""

from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd.function import once_differentiable


class SharedCells:
    """Cells as the layers of a graph refer to them: by a stand-in, behind which their gradients are added up.

    Attributes:
        stand_in: What a layer's function takes as an argument, so that autograd waits for the layer; it is empty, and
            receives no gradient.
    """

    _known: ClassVar[WeakValueDictionary[tuple, "SharedCells"]] = WeakValueDictionary()

    def __init__(self, cells: Tensor):
        self._cells = cells  # whose id is nobody else's as long as this lives
        self._totals: dict[int, Tensor] = {}
        self.stand_in = _StandIn.apply(cells, self._totals)

    @classmethod
    def of(cls, cells: Tensor) -> "SharedCells":
        """The one of these cells, which require a gradient, for as long as a graph refers to it."""
        key = id(cells), cells.dtype, cells.shape
        known = cls._known.get(key)
        if known is None:
            known = cls._known[key] = cls(cells)
        return known

    @property
    def total(self) -> Tensor | None:
        """What the layers before have added up in this backward pass, if any: the gradient of the cells."""
        return self._totals.get(_current_graph_task_id())

    @total.setter
    def total(self, value: Tensor) -> None:
        self._totals[_current_graph_task_id()] = value


class _StandIn(torch.autograd.Function):
    """Its backward is run when all layers of a backward pass have added their gradients."""

    @staticmethod
    def forward(ctx, cells: Tensor, totals: dict[int, Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.totals = totals
        return cells.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _none: None):
        return ctx.totals.pop(_current_graph_task_id(), None), None
