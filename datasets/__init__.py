"""Real images for training and evaluation: embedded digits, class folders, and torchvision's collections."""

from .build import build_dataset, build_datasets
from .digits import Digits
from .loaders import EvalSampler, build_eval_loader, build_train_loader
from .transforms import eval_transform, train_transform

__all__ = [
    "Digits",
    "EvalSampler",
    "build_dataset",
    "build_datasets",
    "build_eval_loader",
    "build_train_loader",
    "eval_transform",
    "train_transform",
]
