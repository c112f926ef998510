"""What a configuration says about CondConv."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....configs.schema import limited
from ..api import OperatorConfig


@dataclass(frozen=True)
class CondConvConfig(OperatorConfig):
    """How a network is converted to CondConv.

    Attributes:
        experts: Number E of kernels that each layer mixes.
        routing: What the weights of the mixture come from: with "layer" each layer's own input; with "block" the input
            of its block, which gives one routing for all converted layers of the block, as in the paper.
        include: Regular expressions over module names; layers that match one entirely are converted. None takes all
            but the first layer and the classifier.
        exclude: Regular expressions over module names that stay static.
    """

    operator: ClassVar[str] = "condconv"

    experts: int = limited(8, low=1)
    routing: Literal["layer", "block"] = "layer"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
