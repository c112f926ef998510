"""Batches for one process of a run: shuffled and equal for training, every image exactly once for evaluation."""

import os
import signal
from collections.abc import Callable, Iterator, Sized
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..configs.schema import ConfigError, RunConfig
from .images import Images
from .sampling import SeededDataset, TrainSampler

# From the images of a batch, as they are collated, to what the network takes; None leaves them as they are.
FinishBatch = Callable[[Any], Tensor] | None


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


AnySampler = TypeVar("AnySampler", EvalSampler, TrainSampler)


class FinishingLoader(Generic[AnySampler]):
    """Batches (images, targets) of torch's loader, whose images are finished in the process that asks for them.

    Args:
        dataset: Pairs (image, target).
        sampler: The order in which they come.
        batch_size: How many make a batch.
        finish: Applied to the images of a batch.
        **kwargs: As for torch's.
    """

    def __init__(self, dataset: Sized, sampler: AnySampler, batch_size: int, finish: FinishBatch = None, **kwargs: Any):
        self.dataset, self.sampler, self.batch_size, self.finish = dataset, sampler, batch_size, finish
        # torch asks for its own class, and uses no more of it than any data set has.
        self.batches = DataLoader(dataset, batch_size, sampler=sampler, **kwargs)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        """Batches in a whole iteration."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for images, targets in self.batches:
            yield (self.finish(images) if self.finish else images), targets


def build_train_loader(
    dataset: Images, run: RunConfig, rank: int = 0, world_size: int = 1, finish: FinishBatch = None
) -> FinishingLoader[TrainSampler]:
    """Return the loader of training batches of exactly `run.batch_size` images, finished by `finish`.

    Call `begin_epoch` before each iteration over it. What is left after the last full batch is dropped.

    Raises:
        ConfigError: Fewer images than one batch per process.
    """
    sampler = TrainSampler(len(dataset), rank, world_size, run.seed, repeats=3 if run.repeated_aug else 1)
    if len(sampler) < run.batch_size:
        raise ConfigError(
            f"field 'batch_size': {run.batch_size} images on each of {world_size} process(es) are more than the "
            f"{len(dataset)} training images"
        )
    return _loader(SeededDataset(dataset), sampler, run, finish, drop_last=True)


def begin_epoch(loader: FinishingLoader[TrainSampler], epoch: int, batches_done: int = 0) -> None:
    """Let the next iteration over a training loader be that epoch's, without the batches that are done already.

    These are passed over in the order of the images; none is read or transformed.
    """
    loader.sampler.set_epoch(epoch, batches_done * loader.batch_size)


def build_eval_loader(
    dataset: Images, run: RunConfig, rank: int = 0, world_size: int = 1, finish: FinishBatch = None
) -> FinishingLoader[EvalSampler]:
    """Return the loader of this process's share of the evaluation images, finished by `finish`."""
    return _loader(dataset, EvalSampler(len(dataset), rank, world_size), run, finish, drop_last=False)


def _loader(
    dataset: Sized, sampler: AnySampler, run: RunConfig, finish: FinishBatch, drop_last: bool
) -> FinishingLoader[AnySampler]:
    return FinishingLoader(
        dataset,
        sampler,
        run.batch_size,
        finish,
        num_workers=run.num_workers,
        pin_memory=run.pin_mem and run.device != "cpu" and torch.cuda.is_available(),
        drop_last=drop_last,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # else each iteration would draw from the training's own
    )


def _outlive_signals(_: int) -> None:
    """Let a worker go on when torchrun, SLURM or a terminal tell its group to end: the training finishes its step.

    Windows has no groups, and of these signals only SIGINT.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for name in ("SIGUSR1", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
