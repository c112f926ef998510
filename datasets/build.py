"""The data sets that a configuration can name, checked before anything is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from ..configs.schema import Config, ConfigError, RunConfig
from .digits import Digits
from .folders import ClassFolders, printable
from .images import ClassifiedImages
from .photographs import Photographs
from .shards import Shards
from .transforms import eval_steps, train_steps

TORCHVISION = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100, "FMNIST": FashionMNIST}


def build_datasets(config: Config) -> tuple[ClassifiedImages, ClassifiedImages]:
    """Return the training and the evaluation images of a run.

    Raises:
        ConfigError: See `build_dataset`; also when the two have different classes.
    """
    train, held_out = _build(config, train=True), _build(config, train=False)
    if tuple(train.classes) != tuple(held_out.classes):
        only_train = sorted(set(train.classes) - set(held_out.classes))
        only_eval = sorted(set(held_out.classes) - set(train.classes))
        raise ConfigError(
            f"{printable(train.root)} and {printable(held_out.root)} have different classes: "
            f"only for training {only_train[:5]}, only for evaluation {only_eval[:5]}"
        )
    _check_number(config, train)
    return train, held_out


def build_dataset(config: Config, train: bool) -> ClassifiedImages:
    """Return one part of the images of a run, transformed for training or for evaluation as far as workers do it.

    Args:
        config: The run's `data_set`, `data_path` and augmentation, and the model's input and number of classes.
        train: The training part, else the held-out part.

    Returns:
        A dataset of pairs (image, class index) that names its `classes`; `Finish` makes tensors of batches of images.

    Raises:
        ConfigError: No path where one is needed, no such folder or files, an empty class folder, or a number of
            classes other than the model's.
    """
    dataset = _build(config, train)
    _check_number(config, dataset)
    return dataset


def _build(config: Config, train: bool) -> ClassifiedImages:
    run = config.run
    transform = train_steps(config) if train else eval_steps(config)
    if run.data_set == "DIGITS":
        return Digits(train, transform)
    if not run.data_path:
        raise ConfigError(f"field 'data_path': {run.data_set} is read from a folder; pass --data_path FOLDER")
    if run.data_set in TORCHVISION:
        return _torchvision(run, train, transform)
    wds, split = run.data_set == "WDS", "train" if train else "val"
    source = Shards(Path(run.data_path), split) if wds else ClassFolders(_split_folder(run, train))
    return Photographs(source, transform, train, run.skip_corrupt, run.exif)


def _check_number(config: Config, dataset: ClassifiedImages) -> None:
    """Compare the number of classes with the model's."""
    run, found = config.run, len(dataset.classes)
    if found != config.model.nb_classes:
        where = "" if run.data_set == "DIGITS" else f" in {printable(dataset.root)}"
        raise ConfigError(
            f"field 'nb_classes': the model has {config.model.nb_classes} classes, {run.data_set}{where} has {found}; "
            f"pass --nb_classes {found}"
        )


def _torchvision(run: RunConfig, train: bool, transform: Callable[[Any], Any]) -> ClassifiedImages:
    kind, where = TORCHVISION[run.data_set], f"field 'data_path': {printable(run.data_path)}"
    try:
        dataset = kind(run.data_path, train=train, transform=transform, download=False)
    except RuntimeError as e:
        # torchvision's own word for files that are not there, or not whole; torch's for too few pixels is another.
        if "download=True" not in str(e):
            raise ConfigError(f"{where}: damaged files of {run.data_set}: {e}") from e
        raise ConfigError(
            f"{where} does not hold the files of {run.data_set} as torchvision keeps them; "
            f"torchvision.datasets.{kind.__name__}({run.data_path!r}, download=True) fetches them"
        ) from e
    except Exception as e:  # a damaged file may make its reader raise anything
        raise ConfigError(f"{where}: damaged files of {run.data_set}: {e!r}") from e
    images, labels = len(dataset.data), torch.as_tensor(dataset.targets)
    if images != len(labels):
        raise ConfigError(f"{where}: damaged files of {run.data_set}: {images} images and {len(labels)} labels")
    if not images or labels.min() < 0 or labels.max() >= len(dataset.classes):
        found = f"from {labels.min()} to {labels.max()}" if images else "none"
        raise ConfigError(
            f"{where}: damaged files of {run.data_set}: labels {found}, expected 0 to {len(dataset.classes) - 1}"
        )
    if run.data_set == "FMNIST" and dataset.data.shape[1:] != (28, 28):
        height, width = dataset.data.shape[1:]
        raise ConfigError(f"{where}: damaged files of FMNIST: images of {height} × {width} pixels, expected 28 × 28")
    return dataset


def _split_folder(run: RunConfig, train: bool) -> Path:
    """The folder of one part; with eval_data_path, data_path is itself the training part, as upstream has it."""
    if run.data_set == "image_folder" and run.eval_data_path is not None:
        return Path(run.data_path if train else run.eval_data_path)
    return Path(run.data_path) / ("train" if train else "val")
