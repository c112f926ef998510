"""Real images for training and evaluation: embedded digits, class folders, and torchvision's collections."""

from .build import build_dataset, build_datasets
from .digits import Digits
from .finish import Erasable, Finish, viewable
from .folders import ClassFolders
from .images import ClassifiedImages, Images
from .labels import Relabelled
from .loaders import EvalSampler, FinishingLoader, begin_epoch, build_eval_loader, build_train_loader
from .photographs import UNLABELLED, DataError, Photographs
from .sampling import Draw, SeededDataset, TrainSampler
from .shards import Shards, write_shards
from .transforms import eval_transform, train_transform

__all__ = [
    "UNLABELLED",
    "ClassFolders",
    "ClassifiedImages",
    "DataError",
    "Digits",
    "Draw",
    "Erasable",
    "EvalSampler",
    "Finish",
    "FinishingLoader",
    "Images",
    "Photographs",
    "Relabelled",
    "SeededDataset",
    "Shards",
    "TrainSampler",
    "begin_epoch",
    "build_dataset",
    "build_datasets",
    "build_eval_loader",
    "build_train_loader",
    "eval_transform",
    "train_transform",
    "viewable",
    "write_shards",
]
