"""Learning rate and temperature have the values that the paper and the recipes say."""

import math

import pytest
from torch import nn

from kernelwarehouse.configs.schema import ConfigError, RunConfig
from kernelwarehouse.engine.optim import build_optimizer
from kernelwarehouse.engine.schedule import Schedule, set_weight_decay


def schedule(iterations=10, **fields):
    return Schedule.build(RunConfig(**{"epochs": 10, "warmup_epochs": 2, **fields}), iterations)


def test_the_learning_rate_rises_linearly_to_its_peak_and_falls_as_a_cosine():
    s = schedule(lr=1.0, min_lr=0.1)
    assert s.total_steps == 100
    assert [s.lr(i) for i in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert s.lr(20) == 1.0
    assert s.lr(60) == pytest.approx(0.55)
    assert s.lr(40) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert s.lr(100) == pytest.approx(0.1)


def test_steps_count_updates_and_not_micro_batches():
    s = schedule(iterations=10, update_freq=4)
    assert (s.steps_per_epoch, s.total_steps, s.warmup_steps) == (3, 30, 6)


def test_warmup_steps_replace_warmup_epochs():
    assert schedule(warmup_steps=7).warmup_steps == 7
    assert schedule(warmup_steps=0).warmup_steps == 20


@pytest.mark.parametrize("fields", [{"warmup_epochs": 11}, {"warmup_steps": 101}])
def test_a_warmup_longer_than_the_run_is_refused(fields):
    with pytest.raises(ConfigError, match=rf"'{next(iter(fields))}'.*more than the run's 100"):
        schedule(**fields)


def test_the_temperature_falls_linearly_from_the_first_iteration_on():
    s = schedule(iterations=10, temp_epoch=2, temp_init_value=0.8)
    assert [s.temperature(t) for t in (1, 10, 19, 20, 21, 1000)] == pytest.approx([0.76, 0.4, 0.04, 0, 0, 0])


def test_the_temperature_counts_micro_batches():
    assert schedule(temp_epoch=2, update_freq=4).temperature(10) == schedule(temp_epoch=2).temperature(10) == 0.5


def test_without_annealing_the_temperature_is_zero():
    assert schedule(temp_epoch=0).temperature(1) == 0


def test_the_weight_decay_follows_a_cosine_to_its_end_and_spares_what_does_not_decay():
    s = schedule(weight_decay=0.04, weight_decay_end=0.4)
    assert [s.decay(i) for i in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert schedule(weight_decay=0.04).decay(70) == 0.04
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, RunConfig(weight_decay=0.04))
    set_weight_decay(optimizer, 0.3)
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(model.weight): 0.3, id(model.bias): 0.0}
