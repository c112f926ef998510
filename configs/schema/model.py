"""The fields that describe a model: its backbone and how it is converted."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .fields import ConfigError

Ratios = float | tuple[float, ...]


@dataclass(frozen=True)
class KWConfig:
    """How a network is converted to KernelWarehouse; the fields bear upstream's names.

    A ratio given as a tuple holds one value for each warehouse, in the plan's order of warehouses.

    Attributes:
        cell_num_ratio: The convolutional parameter budget b: cells of a warehouse = b × its kernels' mixtures.
        cell_inplane_ratio: Input channels of a cell, as a share of the warehouse's greatest common divisor.
        cell_outplane_ratio: Output channels of a cell, likewise.
        sharing_range: Parts of layer labels (``stage1_layer0_conv2``) whose numbers are dropped, so that layers of
            the same shortened label share a warehouse; None takes the family's. ``"layer_conv"`` is read as
            ``("layer", "conv")``.
        nonlocal_basis_ratio: Below 1, logits of another layer's cells come from a basis this much smaller.
        reduction: Hidden width of the attention, as a share of the layer's input channels (at least 16 values).
        norm: Normalisation in the attention, "batch" or "layer"; None takes the family's.
        spatial_partition: Cells are 1×1 in space (all published configurations); otherwise a cell spans the whole
            kernel, and the layers of a warehouse must have one kernel size.
        include: Regular expressions over module names; layers that match one entirely are converted. None takes
            the family's choice.
        exclude: Regular expressions over module names that stay static.
        warehouses: Regular expressions over module names → warehouse, in place of the family's sharing.
    """

    cell_num_ratio: Ratios = 1.0
    cell_inplane_ratio: Ratios = 1.0
    cell_outplane_ratio: Ratios = 1.0
    sharing_range: str | tuple[str, ...] | None = None
    nonlocal_basis_ratio: Ratios = 1.0
    reduction: float = 0.0625
    norm: Literal["batch", "layer"] | None = None
    spatial_partition: bool = True
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    warehouses: dict[str, str] | None = None

    def __post_init__(self):
        if isinstance(self.sharing_range, str):
            object.__setattr__(self, "sharing_range", tuple(filter(None, self.sharing_range.split("_"))))
        for name in ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio", "nonlocal_basis_ratio"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not values or not all(math.isfinite(v) and v > 0 for v in values):
                raise ConfigError(f"field '{name}': every ratio must be a positive number, found {value!r}")
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, values)
        for name in ("sharing_range", "include", "exclude"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (math.isfinite(self.reduction) and self.reduction > 0):
            raise ConfigError(f"field 'reduction': must be a positive number, found {self.reduction!r}")

    def ratio(self, name: str, index: int) -> float:
        """Return the ratio `name` of the warehouse with number `index`."""
        value = getattr(self, name)
        return value[index] if isinstance(value, tuple) else value


KW_FIELDS = tuple(f.name for f in dataclasses.fields(KWConfig))


@dataclass(frozen=True)
class ModelConfig:
    """A model by its backbone's name and its operator.

    Attributes:
        model: A name of timm's for the static network, or with a ``kw_`` prefix for the converted one
            (``kw_resnet18``); the short names of upstream's configurations are known too.
        operator: The dynamic operator of a ``kw_`` model.
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
        kw: The operator's fields that differ from the model's own defaults (they stand flat in a file).
    """

    model: str
    operator: Literal["kernel_warehouse"] = "kernel_warehouse"
    nb_classes: int = 1000
    in_chans: int = 3
    input_size: int = 224
    drop_path: float = 0.0
    drop_path_rule: Literal["constant", "linear"] | None = None
    dropout: float = 0.0
    layer_scale_init_value: float | None = None
    pretrained: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    kw: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, low, high in (("nb_classes", 0, None), ("in_chans", 1, None), ("input_size", 1, None)):
            _check_range(name, getattr(self, name), low, high)
        _check_range("drop_path", self.drop_path, 0, 1)
        _check_range("dropout", self.dropout, 0, 1)


def _check_range(name: str, value: float, low: float, high: float | None) -> None:
    if not (value >= low and (high is None or value < high)):
        bounds = f"at least {low}" + (f" and below {high}" if high is not None else "")
        raise ConfigError(f"field '{name}': must be {bounds}, found {value!r}")
