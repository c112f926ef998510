"""Batches for one process of a run: shuffled and equal for training, every image exactly once for evaluation."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from kernelwarehouse.schema import ConfigError, RunConfig


class EvalSampler(Sampler[int]):
    """The images that one of several processes evaluates: disjoint from the others', and together all of them.

    DistributedSampler would repeat images until every process has equally many, and so count some twice.

    Args:
        size: Number of images in all.
        rank: This process's number.
        world_size: Number of processes.
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, size, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def build_train_loader(dataset: Dataset, run: RunConfig, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return the loader of training batches of exactly `run.batch_size` images.

    Its sampler is a DistributedSampler also for one process: call `set_epoch` for each epoch's own order, which
    depends on the seed and the epoch alone. What is left after the last full batch is dropped. Workers are seeded by
    torch's random generator as it stands when the iteration begins.

    Raises:
        ConfigError: Fewer images than one batch per process.
    """
    sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=run.seed, drop_last=True)
    if len(sampler) < run.batch_size:
        raise ConfigError(
            f"field 'batch_size': {run.batch_size} images on each of {world_size} process(es) are more than the "
            f"{len(dataset)} training images"
        )
    return _loader(dataset, sampler, run, drop_last=True)


def build_eval_loader(dataset: Dataset, run: RunConfig, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return the loader of this process's share of the evaluation images."""
    return _loader(dataset, EvalSampler(len(dataset), rank, world_size), run, drop_last=False)


def _loader(dataset: Dataset, sampler: Sampler[int], run: RunConfig, drop_last: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=run.batch_size,
        sampler=sampler,
        num_workers=run.num_workers,
        pin_memory=run.pin_mem and run.device != "cpu" and torch.cuda.is_available(),
        drop_last=drop_last,
    )
