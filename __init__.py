"""KernelWarehouse: dynamic convolutions for any PyTorch backbone (https://arxiv.org/abs/2406.07879).

Importing the package registers the ``kw_*`` models with timm.
"""

from .models import (
    CheckpointError,
    ConfigError,
    ConversionPlan,
    KWConfig,
    ModelConfig,
    build_model,
    convert_,
    fold_,
    load_checkpoint,
    plan_conversion,
    set_implementation,
    set_temperature,
    tune,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionPlan",
    "KWConfig",
    "ModelConfig",
    "build_model",
    "convert_",
    "fold_",
    "load_checkpoint",
    "plan_conversion",
    "set_implementation",
    "set_temperature",
    "tune",
]
