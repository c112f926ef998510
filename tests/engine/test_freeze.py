"""Frozen parameters stay, and shared cells stay when all who share them do."""

import copy
import re

import pytest
import torch
from torch import nn

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import Training
from kernelwarehouse.engine.freeze import freeze_parameters, train_mode
from kernelwarehouse.models import build_model, shared_labels, sharing

SMALL = {"model": "kw_resnet18", "model_kwargs": {"channels": [8, 8, 8, 8]}, "nb_classes": 10, "in_chans": 1}


def frozen(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_shared_cells_are_frozen_with_the_last_layer_that_uses_them():
    cells, users = next(iter(sharing(build_model(SMALL)).items()))
    assert len(users) > 1
    patterns = [rf"{re.escape(user)}\..*" for user in users]
    some, every, named = (build_model(SMALL) for _ in range(3))
    freeze_parameters(some, patterns[:-1])
    freeze_parameters(every, patterns)
    freeze_parameters(named, [shared_labels(named)[cells]])
    assert cells not in frozen(some)
    assert cells.startswith(users[0])  # where they are saved does not freeze them, who uses them does
    assert {n.rpartition(".attention")[0] for n in frozen(some)} == set(users[:-1])
    assert cells in frozen(every)
    assert frozen(named) == {cells}


def test_training_leaves_what_is_frozen_and_its_statistics(tiny_config, cpu, train_one_epoch, loader):
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))
    before = copy.deepcopy(model.state_dict())
    config = tiny_config(freeze=["0\\..*", "2.weight"], epochs=1)
    training = Training.build(model, config, cpu, iterations_per_epoch=2)
    train_one_epoch(training, loader(torch.randn(16, 1, 4, 4) + 3, torch.randint(10, (16,)), 8))
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith("0.")} | {"2.weight"}
    train_mode(model)
    assert [m.training for m in model] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("layer9.*", "'layer9.*' matches no parameter, such as"), ("(", "no regular"), (".*", "every")],
)
def test_patterns_that_mean_nothing(pattern, message):
    with pytest.raises(ConfigError, match=f"'freeze'.*{re.escape(message)}"):
        freeze_parameters(build_model(SMALL), [pattern])
