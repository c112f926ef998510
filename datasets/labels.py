"""Other labels for images that have some: ImageNet-ReaL's several acceptable ones, ImageNet-V2's, one's own."""

import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..configs.schema import ConfigError
from .images import ClassifiedImages
from .photographs import UNLABELLED


class Relabelled(Dataset):
    """Images with the labels of a file: pairs (image, labels), the labels filled up to one length with UNLABELLED.

    Args:
        dataset: The images, as pairs with their own class; an image that cannot be read stays without labels.
        path: A JSON list with, for each image in order, its acceptable classes (or the only one); [] for none. A
            class that is listed twice counts once.

    Raises:
        ConfigError: The file does not hold that.
    """

    def __init__(self, dataset: ClassifiedImages, path: str | Path):
        self.dataset, self.root, self.classes = dataset, dataset.root, dataset.classes
        self.labels = _read(Path(path), len(dataset), len(dataset.classes))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        image, own = self.dataset[index]
        return image, self.labels[index] if own != UNLABELLED else torch.full_like(self.labels[index], UNLABELLED)


def _read(path: Path, images: int, classes: int) -> Tensor:
    """The labels (images, most labels of an image)."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"field 'eval_labels': {path} is no file")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:  # of UTF-8, of JSON, and of numbers with thousands of digits
        raise ConfigError(f"field 'eval_labels': {path}: {e}") from e
    if not isinstance(entries, list) or len(entries) != images:
        found = f"a list of {len(entries)}" if isinstance(entries, list) else type(entries).__name__
        raise ConfigError(
            f"field 'eval_labels': {path} must list labels for each of the {images} images, holds {found}"
        )
    entries = [entry if isinstance(entry, list) else [entry] for entry in entries]
    for number, entry in enumerate(entries):
        if any(type(label) is not int or not 0 <= label < classes for label in entry):
            raise ConfigError(
                f"field 'eval_labels': {path}: image {number}: classes are whole numbers from 0 to {classes - 1}, "
                f"found {reprlib.repr(entry)}"
            )
    # A class that is listed twice counts once in the loss, which takes the sum of the classes' probabilities.
    entries = [list(dict.fromkeys(entry)) for entry in entries]
    labels = torch.full((images, max(map(len, entries), default=1) or 1), UNLABELLED)
    for row, entry in zip(labels, entries, strict=True):
        row[: len(entry)] = torch.tensor(entry, dtype=torch.long)
    return labels
