"""The routing r = σ(A · mean of x + a), of a layer or of a whole block, and how a block hands it to its layers."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tied import Tied


class Routing(nn.Module):
    """r = σ(A · mean of x over its positions + a), for each sample.

    Attributes:
        weight: A, (E, C).
        bias: a, (E,).
    """

    def __init__(self, channels: int, experts: int, **kwargs: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, channels, **kwargs))
        self.bias = nn.Parameter(torch.empty(experts, **kwargs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as timm does: A uniform within ±1/√(C + E), a zero."""
        bound = 1 / math.sqrt(sum(self.weight.shape))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, means: Tensor) -> Tensor:
        """The means of x over its positions, (B, C) → r (B, E)."""
        return torch.sigmoid(F.linear(means, self.weight, self.bias))

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        experts, channels = self.weight.shape
        return f"channels={channels}, experts={experts}"


class BlockRouting(Routing, Tied):
    """The routing of a block, which the block and the layers that it routes share.

    Attributes:
        tokens: Whether channels are the last dimension of the block's input, as of a linear layer's, not the second.
        current: r (B, E) of the block's input, while the block runs; its code calls its layers with their input alone.
    """

    current: Tensor | None

    def __init__(self, channels: int, experts: int, tokens: bool = False, **kwargs: Any):
        super().__init__(channels, experts, **kwargs)
        self.tokens, self.current = tokens, None

    def of_block(self, x: Tensor) -> Tensor:
        """r for the block's input: images (B, C, *spatial), or tokens (B, …, C)."""
        channels = self.weight.shape[1]
        if x.ndim < 2 or x.shape[-1 if self.tokens else 1] != channels:
            expected = f"(B, …, {channels})" if self.tokens else f"(B, {channels}, …)"
            raise ValueError(
                f"the routing reads an input {expected}, as the first layer behind it does, and found "
                f"{tuple(x.shape)}; with routing='layer' each layer has a routing of its own input"
            )
        if x.ndim > 2:
            x = x.flatten(1, -2).mean(1) if self.tokens else x.flatten(2).mean(2)
        return self(x)

    def of(self, x: Tensor) -> Tensor:
        """r for a layer's input x.

        Raises:
            RuntimeError: The block is not running.
            ValueError: The block's input is of other samples.
        """
        if self.current is None:
            raise RuntimeError(
                "the routing of this layer comes from its block, which is not running: call the block, or give "
                "routing_weights"
            )
        if self.current.shape[0] != x.shape[0]:
            raise ValueError(
                f"the block's routing is of {self.current.shape[0]} samples, the layer's input of "
                f"{x.shape[0]}: routing='layer' works"
            )
        return self.current


class RoutedBlock(nn.Module):
    """A block whose input gives one routing for all its converted layers; mixed into the block's own class."""

    routing_fn: BlockRouting

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own class, whose first argument is its input."""
        routing = self.routing_fn
        routing.current = routing.of_block(args[0] if args else next(iter(kwargs.values())))
        try:
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] (the block's class)
        finally:
            routing.current = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made at run time: copies and pickles name the block's own."""
        del protocol
        own = next(cls for cls in type(self).__mro__ if cls is not RoutedBlock and not issubclass(cls, RoutedBlock))
        return _empty_block, (own,), self.__getstate__()


@functools.cache
def _routed_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Routed{cls.__name__}", (RoutedBlock, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _empty_block(cls: type[nn.Module]) -> nn.Module:
    routed = _routed_class(cls)
    return routed.__new__(routed)


def route_block_(block: nn.Module, routing: BlockRouting) -> None:
    """Let a block compute a routing of its input for its layers.

    It becomes the block's first child, so that state dicts hold it under the name that timm gives it.
    """
    others = dict(block._modules)
    block._modules.clear()
    block.routing_fn = routing
    block._modules.update(others)
    block.__class__ = _routed_class(type(block))
    block.__module__ = "torch.nn"  # a leaf of torch.fx, which would not see how the layers come by the routing


def check_block(name: str, block: nn.Module) -> None:
    """Raise a ValueError for a block that cannot be routed."""
    problem = None
    if hasattr(block, "routing_fn"):
        problem = "has something called routing_fn already"
    elif "forward" in vars(block):
        problem = "has a forward of its own, set on the instance"
    if problem is not None:
        raise ValueError(f"the block {name}, a {type(block).__name__}, {problem}: routing='layer' works")
