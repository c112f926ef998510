"""Models: backbones of timm, converted to dynamic convolutions."""

from ..configs.schema import ConfigError, ModelConfig, limited
from .build import build_model, create_model, find_preset
from .checkpoints import (
    DEFAULT_KEY,
    KEPT_FOR,
    CheckpointError,
    MisfitError,
    check_entries,
    check_file,
    find_state_dict,
    read_checkpoint,
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
from .loading import (
    check_values,
    copy_weights,
    fit_weights,
    load_checkpoint,
    load_content,
    load_weights,
    to_upstream,
    translations,
)
from .merge import merge_
from .operators import SCHEMAS, get_operator, operator_names, read_config, register
from .ops.api import Anneal, DynamicLayer, Operator, OperatorConfig, Preset, Report
from .ops.tied import Tied
from .plan import ConversionPlan, LayerPlan
from .seal import seal
from .sites import Site, Sites
from .tuning import tune
from .values import cannot_hold, is_finite

__all__ = [
    "DEFAULT_KEY",
    "KEPT_FOR",
    "SCHEMAS",
    "Anneal",
    "CheckpointError",
    "ConfigError",
    "ConversionPlan",
    "DynamicLayer",
    "LayerPlan",
    "MisfitError",
    "ModelConfig",
    "Operator",
    "OperatorConfig",
    "Preset",
    "Report",
    "Site",
    "Sites",
    "Tied",
    "anneals",
    "build_model",
    "cannot_hold",
    "check_entries",
    "check_file",
    "check_values",
    "convert_",
    "copy_weights",
    "create_model",
    "dynamic_layers",
    "find_preset",
    "find_state_dict",
    "fit_weights",
    "get_operator",
    "is_finite",
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
    "seal",
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
