"""Training and evaluation: `train_run` and `evaluate_run` do what a configuration says."""

from .cli import parse_arguments
from .distributed import World, join
from .evaluate import Metrics, evaluate
from .run import evaluate_run, parameter_count, train_run
from .state import Training
from .train import NonFiniteLossError

__all__ = [
    "Metrics",
    "NonFiniteLossError",
    "Training",
    "World",
    "evaluate",
    "evaluate_run",
    "join",
    "parameter_count",
    "parse_arguments",
    "train_run",
]
