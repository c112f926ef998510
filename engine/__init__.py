"""Training and evaluation: `train_run` and `evaluate_run` do what a configuration says."""

from .cli import parse_arguments
from .distributed import World, join
from .evaluate import Metrics, evaluate
from .memory import keep_freed_memory
from .outputs import SaveError, check_picture
from .recalibrate import recalibrate
from .run import dry_run, evaluate_run, parameter_count, train_run
from .signals import EXIT_INTERRUPTED, Interrupted
from .state import NonFiniteLossError, Training
from .terminal import complain, flush_errors

__all__ = [
    "EXIT_INTERRUPTED",
    "Interrupted",
    "Metrics",
    "NonFiniteLossError",
    "SaveError",
    "Training",
    "World",
    "check_picture",
    "complain",
    "dry_run",
    "evaluate",
    "evaluate_run",
    "flush_errors",
    "join",
    "keep_freed_memory",
    "parameter_count",
    "parse_arguments",
    "recalibrate",
    "train_run",
]
