"""Models: backbones of timm, converted to dynamic convolutions."""

from ..configs.schema import ConfigError, KWConfig, ModelConfig
from .build import build_model
from .checkpoints import (
    DEFAULT_KEY,
    CheckpointError,
    find_state_dict,
    load_checkpoint,
    load_content,
    load_weights,
    read_checkpoint,
    to_upstream,
    upstream_names,
)
from .convert import conversion_plan, convert_, plan_conversion, remove_unused_warehouses_, warehouse_users
from .fold import fold_
from .ops.kernel_warehouse import set_implementation, set_temperature
from .plan import ConversionPlan
from .tuning import tune

__all__ = [
    "DEFAULT_KEY",
    "CheckpointError",
    "ConfigError",
    "ConversionPlan",
    "KWConfig",
    "ModelConfig",
    "build_model",
    "conversion_plan",
    "convert_",
    "find_state_dict",
    "fold_",
    "load_checkpoint",
    "load_content",
    "load_weights",
    "plan_conversion",
    "read_checkpoint",
    "remove_unused_warehouses_",
    "set_implementation",
    "set_temperature",
    "to_upstream",
    "tune",
    "upstream_names",
    "warehouse_users",
]
