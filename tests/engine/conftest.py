"""Small things to train: a few digits, and networks that take milliseconds."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kernelwarehouse.engine import World
from kernelwarehouse.schema import load_config

TINY = {
    "model": "resnet18",
    "model_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
    "nb_classes": 10,
    "in_chans": 1,
    "input_size": 16,
    "data_set": "DIGITS",
    "device": "cpu",
    "num_workers": 0,
    "batch_size": 128,
    "epochs": 2,
    "warmup_epochs": 0,
    "mixup": 0,
    "cutmix": 0,
    "smoothing": 0,
    "reprob": 0,
}


@pytest.fixture
def tiny_config():
    """A function from fields to a configuration that trains within seconds."""
    return lambda **fields: load_config(TINY, fields)


@pytest.fixture
def cpu():
    return World(torch.device("cpu"))


@pytest.fixture
def loader():
    """A function from tensors to a loader of them in their own order."""

    def build(images, targets, batch_size):
        dataset = TensorDataset(images, targets)
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(dataset, batch_size, sampler=sampler)

    return build
