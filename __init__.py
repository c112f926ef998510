"""Dynamic convolutions for any PyTorch backbone, above all KernelWarehouse (https://arxiv.org/abs/2406.07879).

Importing the package registers converted networks such as ``kw_resnet18`` with timm.
"""

from .models import (
    CheckpointError,
    ConfigError,
    ConversionPlan,
    ModelConfig,
    TemperatureSchedule,
    accelerate_,
    build_model,
    convert_,
    create_model,
    load_checkpoint,
    merge_,
    plan_conversion,
    plans,
    set_implementation,
    set_temperature,
    sharing_groups,
    tune,
)
from .models.ops.condconv import CondConvConfig
from .models.ops.kernel_warehouse import KWConfig

__all__ = [
    "CheckpointError",
    "CondConvConfig",
    "ConfigError",
    "ConversionPlan",
    "KWConfig",
    "ModelConfig",
    "TemperatureSchedule",
    "accelerate_",
    "build_model",
    "convert_",
    "create_model",
    "load_checkpoint",
    "merge_",
    "plan_conversion",
    "plans",
    "set_implementation",
    "set_temperature",
    "sharing_groups",
    "tune",
]
