"""The order of training images, and the randomness of each, as functions of seed, epoch and position alone."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

# Transforms of timm draw from NumPy's global generator, which ruff's NPY002 would have replaced.
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .images import Images


class Draw(NamedTuple):
    """One image of an epoch.

    Attributes:
        image: Its number in the data set.
        seed: What its augmentation is drawn from.
    """

    image: int
    seed: int


class TrainSampler(Sampler[Draw]):
    """The images that one of several processes trains on, in an order of each epoch's own.

    Order and seeds depend on the seed, the epoch and the position in the epoch. So several processes draw together
    what one would draw with the same total batch, and a continued epoch goes on as if it had not been interrupted.

    Args:
        size: Number of images in all.
        rank: This process's number.
        world_size: Number of processes.
        seed: Seed of the run.
        repeats: How often an image comes in a row, augmented anew each time (repeated augmentation, Hoffer et al.
            2020, as DeiT uses it). An epoch keeps its length, and so sees only one in `repeats` images.
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1, seed: int = 0, repeats: int = 1):
        self.size, self.rank, self.world_size, self.seed, self.repeats = size, rank, world_size, seed, repeats
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration be that epoch's, from this process's image number `start` on."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Draw]:
        source = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(source[0] >> 1))
        order = torch.randperm(self.size, generator=generator).repeat_interleave(self.repeats)[: self.size]
        seeds = torch.randint(2**62, (self.size,), generator=generator)
        mine = slice(self.rank + self.start * self.world_size, len(self) * self.world_size, self.world_size)
        return map(Draw, order[mine].tolist(), seeds[mine].tolist())

    def __len__(self) -> int:
        """Images of this process in a whole epoch: as many as any other's."""
        return self.size // self.world_size


class SeededDataset(Dataset):
    """A data set whose random transforms draw from the seed that the sampler gives to each image.

    The generators of the process are left as they were, also where the training itself loads the images.
    """

    def __init__(self, dataset: Images):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: Sequence[Draw]) -> list[Any]:
        """Return the images of a batch."""
        items = []
        with _kept_generators():
            for image, seed in draws:
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                torch.default_generator.manual_seed(seed)
                items.append(self.dataset[image])
        return items


@contextmanager
def _kept_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
