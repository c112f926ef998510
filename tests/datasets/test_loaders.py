"""Which images each process sees, and how they vary."""

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.utils import random_seed
from torch.utils.data import Dataset

from kernelwarehouse.configs.schema import ConfigError, RunConfig
from kernelwarehouse.datasets import EvalSampler, TrainSampler, begin_epoch, build_eval_loader, build_train_loader


class Draws(Dataset):
    """Its image is what torch, and its target is what the index says."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.rand(()), index


def run(**fields):
    return RunConfig(**{"device": "cpu", "num_workers": 0, "batch_size": 4, **fields})


def targets(loader):
    return torch.cat([t for _, t in loader]).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_evaluation_sees_every_image_exactly_once(world_size):
    loaders = [build_eval_loader(Draws(23), run(), rank, world_size) for rank in range(world_size)]
    assert sorted(t for loader in loaders if len(loader) for t in targets(loader)) == list(range(23))
    assert sum(len(EvalSampler(23, rank, world_size)) for rank in range(world_size)) == 23


@pytest.mark.parametrize("world_size", [1, 3])
def test_training_sees_other_images_on_each_process_in_equal_batches(world_size):
    loaders = [build_train_loader(Draws(26), run(), rank, world_size) for rank in range(world_size)]
    seen = [targets(loader) for loader in loaders]
    assert {len(s) for s in seen} == {26 // world_size // 4 * 4}
    together = [t for s in seen for t in s]
    assert len(set(together)) == len(together)


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    def order(seed, epoch):
        loader = build_train_loader(Draws(24), run(seed=seed))
        begin_epoch(loader, epoch)
        return targets(loader)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 0)


def augmentations(epoch=0, batches_done=0, rank=0, world_size=1, **fields):
    loader = build_train_loader(Draws(24), run(**fields), rank, world_size)
    begin_epoch(loader, epoch, batches_done)
    return torch.stack([torch.cat(part).double() for part in zip(*loader, strict=True)])


@pytest.mark.parametrize("repeated_aug", [False, True])
def test_augmentations_know_neither_workers_nor_interruptions_nor_processes(repeated_aug):
    fields = {"epoch": 3, "repeated_aug": repeated_aug}
    expected = augmentations(**fields)
    assert len(expected[0].unique()) == 24
    assert torch.equal(augmentations(**fields, num_workers=2), expected)
    assert torch.equal(augmentations(**fields, batches_done=2, num_workers=2), expected[:, 8:])
    for rank in range(2):
        assert torch.equal(augmentations(**fields, rank=rank, world_size=2), expected[:, rank::2])
    assert not torch.equal(augmentations(**fields | {"epoch": 4}), expected)
    assert not torch.equal(augmentations(**fields, seed=1), expected)


def test_loading_leaves_the_generators_of_the_training_alone():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    random_seed(0)
    expected = draws()
    for workers in (0, 1):
        random_seed(0)
        augmentations(num_workers=workers)
        assert draws() == expected


def test_repeated_augmentation_is_that_of_timm():
    """Given the same permutation: images come three times in a row, dealt to the processes in turn."""
    size, world_size = 600, 4
    ours = [[draw.image for draw in TrainSampler(size, r, world_size, repeats=3)] for r in range(world_size)]
    permutation = [draw.image for draw in TrainSampler(size)]
    for rank, indices in enumerate(ours):
        theirs = RepeatAugSampler(range(size), world_size, rank, shuffle=False, selected_round=0)
        assert indices == [permutation[i] for i in theirs]


def test_a_worker_outlives_the_signals_that_end_its_training():
    loader = build_train_loader(Draws(24), run(num_workers=1, batch_size=1))
    batches = iter(loader)
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGUSR1)
    assert os.getpgid(worker.pid) != os.getpgid(0)  # torchrun sends SIGTERM to the group
    assert len([first, *batches]) == 24


def test_too_few_images_for_one_batch():
    with pytest.raises(ConfigError, match=r"'batch_size': 4 images on each of 2 process\(es\) are more than the 7"):
        build_train_loader(Draws(7), run(), 0, 2)
