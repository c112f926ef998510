"""The images of class folders or shards; and what becomes of one that cannot be decoded."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..configs.schema import ConfigError
from .decoding import decode
from .folders import printable

# The target of an image that has none, which evaluation leaves out.
UNLABELLED = -1


class DataError(ConfigError):
    """An image that cannot be read; the message names it, on one line."""

    def __init__(self, message: str):
        # A loader's worker hands on an error as the text of its traceback, whose last line is the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Source(Protocol):
    """Where encoded images are kept, in a fixed order.

    Attributes:
        root: Folder that holds them.
        classes: Names of their classes.
        targets: Class of each image, (N,) integers.
    """

    root: Any
    classes: tuple[str, ...]
    targets: np.ndarray

    @abstractmethod
    def name(self, index: int) -> str:
        """Where a person finds an image."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """An image as it is stored."""


class Photographs(Dataset):
    """The images of a source as pairs (transformed image, class index).

    An image that cannot be decoded raises, unless `skip_corrupt` allows for it. For training the next one in order
    that can be decoded, mostly of the same class, takes its place, so that batches stay as they are and a resumed run
    sees what an uninterrupted one saw. For evaluation it has no label.

    Args:
        source: The encoded images.
        transform: Applied to an image, a tensor (3, H, W) of bytes.
        train: For training, else for evaluation.
        skip_corrupt: How many images to pass over, in this process and its loader's workers together.
        exif: Whether images are turned as their EXIF orientation says, or given as they are stored.

    Attributes:
        corrupt: Which images have been passed over, (N,) in memory that the workers share.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Tensor], Any],
        train: bool,
        skip_corrupt: int = 0,
        exif: Literal["apply", "ignore"] = "ignore",
    ):
        self.source, self.transform, self.train, self.skip_corrupt = source, transform, train, skip_corrupt
        self.exif: Literal["apply", "ignore"] = exif
        self.root, self.classes = source.root, source.classes
        self.corrupt = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source.targets)

    def name(self, index: int) -> str:
        """Where a person finds an image."""
        return self.source.name(index)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._decode(index)
        if image is None and not self.train:
            return self.transform(torch.zeros(3, 256, 256, dtype=torch.uint8)), UNLABELLED
        for _ in range(len(self)):
            if image is not None:
                return self.transform(image), int(self.source.targets[index])
            index = (index + 1) % len(self)
            image = self._decode(index)
        raise DataError(f"{printable(self.root)}: not one of its {len(self)} images can be decoded")

    def _decode(self, index: int) -> Tensor | None:
        """The image, or None for one to pass over."""
        try:
            return decode(self.source.read(index), self.exif)
        except Exception as e:  # whatever a decoder makes of bytes that are no image
            self.corrupt[index] = True
            found = int(self.corrupt.sum())
            if found > self.skip_corrupt:
                # torchvision puts its own source file first, and a trace below.
                reason = (str(e).splitlines() or [type(e).__name__])[0].rpartition(", ")[2]
                allowed = f"the last of {found}" if self.skip_corrupt else "the first"
                raise DataError(
                    f"{self.name(index)}: cannot be read ({reason}), {allowed} such images; pass a larger "
                    f"--skip_corrupt than {self.skip_corrupt} to pass over them"
                ) from e
            return None
