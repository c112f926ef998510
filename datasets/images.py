"""What is asked of a data set: by the loaders of batches, and by those who name its classes and where it is kept."""

from collections.abc import Sequence
from typing import Any, Protocol


class Images(Protocol):
    """Pairs (image, target) in a fixed order; torch's data sets are such, whatever class they have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


class ClassifiedImages(Images, Protocol):
    """Images whose targets are numbers of classes."""

    @property
    def root(self) -> Any:
        """Where they are kept, for messages."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""
        ...
