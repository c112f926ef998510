"""Small things to train: a few digits, and networks that take milliseconds."""

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from kernelwarehouse.engine import World
from kernelwarehouse.engine.keeper import Keeper
from kernelwarehouse.engine.log import Progress
from kernelwarehouse.engine.signals import Notice
from kernelwarehouse.engine.train import train_epoch
from kernelwarehouse.models import read_config

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


SILENT = Progress("", total=0, batch_size=1, visible=False)


class InOrder(SequentialSampler):
    def set_epoch(self, epoch, start=0):
        """Every epoch is the same, and tests that continue one take the engine's own sampler."""


@pytest.fixture(scope="session")
def tiny_config():
    """A function from fields to a configuration that trains within seconds."""
    return lambda **fields: read_config(TINY, fields)


@pytest.fixture
def cpu():
    return World(torch.device("cpu"))


@pytest.fixture
def train_one_epoch():
    """A function that trains an epoch by itself, without logs and checkpoints."""

    def train(training, loader):
        figures = train_epoch(training, loader, SILENT, Keeper(training, Notice()))
        training.end_epoch()
        return figures

    return train


@pytest.fixture
def loader():
    """A function from tensors to a loader of them in their own order."""

    def build(images, targets, batch_size):
        return DataLoader(TensorDataset(images, targets), batch_size, sampler=InOrder(images))

    return build
