"""Learning rate and temperature have the values that the paper and the recipes say."""

import math
import warnings

import pytest
from torch import nn

from kernelwarehouse.configs.schema import ConfigError, RunConfig
from kernelwarehouse.engine.optim import build_optimizer
from kernelwarehouse.engine.schedule import Schedule, set_weight_decay
from kernelwarehouse.models import Anneal

TOY = Anneal(start=1.0, end=0.0, epochs=2, limits=(0.0, 1.0))


def schedule(iterations=10, **fields):
    return Schedule.build(RunConfig(**{"epochs": 10, "warmup_epochs": 2, **fields}), iterations, {"toy": TOY})


def temperatures(s, iterations):
    return [s.temperatures(t)["toy"] for t in iterations]


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
    assert temperatures(s, (1, 10, 19, 20, 21, 1000)) == pytest.approx([0.76, 0.4, 0.04, 0, 0, 0])


def test_the_temperature_counts_micro_batches():
    assert temperatures(schedule(temp_epoch=2, update_freq=4), [10]) == [0.5]
    assert temperatures(schedule(temp_epoch=2), [10]) == [0.5]


def test_without_annealing_the_temperature_is_zero():
    assert temperatures(schedule(temp_epoch=0), [1]) == [0]
    assert Schedule.build(RunConfig(epochs=30), 10, {}).temperatures(1) == {}


def test_unset_it_takes_the_papers_length_or_a_third_of_the_run():
    assert [schedule(epochs=n).anneals["toy"].epochs for n in (3, 6, 300)] == [1, 2, 2]


def test_longer_than_the_run_is_refused_and_names_both_fields():
    with pytest.raises(ConfigError, match=r"'temp_epoch'.*toy.*'epochs', 10; found 11"):
        schedule(temp_epoch=11)


@pytest.mark.parametrize(("epochs", "warns"), [(9, False), (9.5, True), (10, True)])
def test_ending_in_the_last_tenth_of_the_run_is_a_warning(epochs, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule(temp_epoch=epochs)
    assert [("temp_epoch" in str(w.message), "'epochs'" in str(w.message)) for w in caught] == [(True, True)] * warns


def test_a_start_that_the_operator_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"'temp_init_value'.*between 0 and 1, found 30"):
        schedule(temp_init_value=30)


def test_an_operator_may_start_high_end_at_one_and_fall_by_steps():
    linear = Schedule.build(RunConfig(epochs=40), 10, {"toy": Anneal(30.0, 1.0, epochs=10)})
    assert temperatures(linear, (1, 50, 100, 399)) == pytest.approx([29.71, 15.5, 1, 1])
    stepped = Schedule.build(RunConfig(epochs=40), 10, {"toy": Anneal(34.0, 1.0, epochs=11, step=3.0)})
    assert temperatures(stepped, (1, 9, 10, 109, 110, 399)) == [34, 34, 31, 4, 1, 1]


def test_the_weight_decay_follows_a_cosine_to_its_end_and_spares_what_does_not_decay():
    s = schedule(weight_decay=0.04, weight_decay_end=0.4)
    assert [s.decay(i) for i in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert schedule(weight_decay=0.04).decay(70) == 0.04
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, RunConfig(weight_decay=0.04))
    set_weight_decay(optimizer, 0.3)
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(model.weight): 0.3, id(model.bias): 0.0}
