"""Which images each process sees, and how they vary."""

import pytest
import torch
from torch.utils.data import Dataset

from kernelwarehouse.datasets import EvalSampler, build_eval_loader, build_train_loader
from kernelwarehouse.schema import ConfigError, RunConfig


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
        loader.sampler.set_epoch(epoch)
        return targets(loader)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(5, 1)


def test_workers_draw_different_augmentations_and_the_same_ones_again_after_the_same_seed():
    loader = build_train_loader(Draws(24), run(num_workers=2))

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in loader])

    first = epoch(0)
    assert len(first.unique()) == 24
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))


def test_too_few_images_for_one_batch():
    with pytest.raises(ConfigError, match=r"'batch_size': 4 images on each of 2 process\(es\) are more than the 7"):
        build_train_loader(Draws(7), run(), 0, 2)
