"""What a configuration says about DY-Conv."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....configs.schema import limited
from ..api import OperatorConfig


@dataclass(frozen=True)
class DYConfig(OperatorConfig):
    """How a network is converted to DY-Conv.

    Attributes:
        kernel_num: K, the kernels of a layer that are mixed.
        reduction: Hidden width of the attention, as a share of the layer's input channels (rounded down, plus 1).
        anneal: How the temperature falls in training: "paper", from 30 to 1 linearly over 10 epochs; "authors", from 34
            by 3 after each epoch, as the public code does.
        include: Regular expressions over module names; convolutions that match one entirely are converted. None takes
            the paper's choice: all but the stem and the classifier.
        exclude: Regular expressions over module names that stay static.
    """

    operator: ClassVar[str] = "dyconv"

    kernel_num: int = limited(4, low=1)
    reduction: float = limited(0.25, above=0)
    anneal: Literal["paper", "authors"] = "paper"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
