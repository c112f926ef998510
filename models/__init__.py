"""Models: backbones of timm, converted to dynamic convolutions."""

from ..configs.schema import ConfigError, ModelConfig, limited
from .build import build_model, create_model, find_preset
from .checkpoints import (
    DEFAULT_KEY,
    CheckpointError,
    find_state_dict,
    load_checkpoint,
    load_content,
    load_weights,
    read_checkpoint,
    to_upstream,
    translations,
)
from .convert import (
    anneals,
    convert_,
    dynamic_layers,
    plan_conversion,
    plans,
    set_implementation,
    set_temperature,
    shared_labels,
    sharing,
    sharing_groups,
    temperatures,
)
from .merge import merge_
from .operators import SCHEMAS, get_operator, operator_names, read_config, register
from .ops.api import Anneal, DynamicLayer, Operator, OperatorConfig, Preset, Report
from .ops.tied import Tied
from .plan import ConversionPlan, LayerPlan
from .sites import Site, Sites
from .temperature import TemperatureSchedule
from .tuning import tune

__all__ = [
    "DEFAULT_KEY",
    "SCHEMAS",
    "Anneal",
    "CheckpointError",
    "ConfigError",
    "ConversionPlan",
    "DynamicLayer",
    "LayerPlan",
    "ModelConfig",
    "Operator",
    "OperatorConfig",
    "Preset",
    "Report",
    "Site",
    "Sites",
    "TemperatureSchedule",
    "Tied",
    "anneals",
    "build_model",
    "convert_",
    "create_model",
    "dynamic_layers",
    "find_preset",
    "find_state_dict",
    "get_operator",
    "limited",
    "load_checkpoint",
    "load_content",
    "load_weights",
    "merge_",
    "operator_names",
    "plan_conversion",
    "plans",
    "read_checkpoint",
    "read_config",
    "register",
    "set_implementation",
    "set_temperature",
    "shared_labels",
    "sharing",
    "sharing_groups",
    "temperatures",
    "to_upstream",
    "translations",
    "tune",
]
