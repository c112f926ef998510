"""What a configuration says about ODConv."""

from dataclasses import dataclass
from typing import ClassVar

from ....configs.schema import limited
from ..api import OperatorConfig


@dataclass(frozen=True)
class ODConfig(OperatorConfig):
    """How a network is converted to ODConv.

    Attributes:
        kernel_num: n, the kernels of a layer that are mixed; with one, the other three attentions remain.
        reduction: Hidden width of the attention, as a share of the layer's input channels (at least 16 values).
        include: Regular expressions over module names; convolutions that match one entirely are converted. None takes
            the paper's choice: all but the stem, the classifier and the shortcuts of residual blocks.
        exclude: Regular expressions over module names that stay static.
    """

    operator: ClassVar[str] = "odconv"

    kernel_num: int = limited(4, low=1)
    reduction: float = limited(0.0625, above=0)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
