"""What DY-Conv, CondConv and ODConv share: layers whose kernel is a mixture of whole kernels, the experts."""

from .checkpoint import ExpertsTranslation
from .layer import ExpertsConv, Mixing
from .operator import ExpertsOperator

__all__ = ["ExpertsConv", "ExpertsOperator", "ExpertsTranslation", "Mixing"]
