"""Scikit-learn's handwritten digits: 1,797 real 8×8 images that travel with the library, so nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

# Statistics of all pixels, scaled to [0, 1].
MEAN, STD = 0.305, 0.376


class Digits(Dataset):
    """One part of the digits: 1,437 images for training or the 360 held out, the same ones on every machine.

    Both parts hold the ten classes in equal shares.

    Args:
        train: The training part, else the held-out part.
        transform: Applied to an image, a float tensor (1, 8, 8) with values in [0, 1].

    Attributes:
        images: All images of this part, (N, 1, 8, 8).
        targets: Their digits, N integers.
        classes: "0" to "9".
        root: Where they are kept.
    """

    classes = tuple("0123456789")
    root = "scikit-learn"

    def __init__(self, train: bool, transform: Callable[[Tensor], Any] | None = None):
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
        pixels, labels = (np.asarray(part) for part in parts[0 if train else 1 :: 2])
        self.images = torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8)
        self.targets = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, self.targets[index]
