"""The fields that describe a model: its backbone and how it is converted."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .fields import Fields, limited


@dataclass(frozen=True)
class ModelConfig(Fields):
    """A model by its backbone's name and its operator.

    Attributes:
        model: A name of timm's for the static network, or one with an operator's prefix for a converted one, such as
            kw_resnet18; the short names of the authors' configurations are known too.
        operator: The dynamic operator that replaces layers of the network; null takes the one that the model's
            name says, if it says any.
        nb_classes: Number of classes.
        in_chans: Channels of the input image.
        input_size: Side of the training image in pixels.
        drop_path: Rate of stochastic depth.
        drop_path_rule: "constant" for all blocks or "linear" over depth; None takes upstream's (constant for
            ResNet, linear elsewhere).
        dropout: Dropout before the classifier.
        layer_scale_init_value: Initial layer scale of ConvNeXt; None takes the backbone's (1e-6).
        pretrained: Start from timm's pretrained static weights (needs the network); a conversion keeps them.
        model_kwargs: Further arguments of the timm backbone, such as ``{"channels": [16, 32, 64, 128]}``.
        operator_fields: The operator's fields that differ from the model's own defaults (they stand flat in a file).
    """

    model: str
    operator: str | None = None
    nb_classes: int = limited(1000, low=0)
    in_chans: int = limited(3, low=1)
    input_size: int = limited(224, low=1)
    drop_path: float = limited(0.0, low=0, below=1)
    drop_path_rule: Literal["constant", "linear"] | None = None
    dropout: float = limited(0.0, low=0, below=1)
    layer_scale_init_value: float | None = None
    pretrained: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    operator_fields: dict[str, Any] = field(default_factory=dict)
