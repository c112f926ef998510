"""Runs that measure first: what they say and keep, and that nothing but the implementation depends on it."""

import re

import pytest
import torch

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import World, evaluate_run, run, train_run
from kernelwarehouse.engine.checkpoint import read_state
from kernelwarehouse.engine.tuning import tune_for
from kernelwarehouse.models import build_model
from kernelwarehouse.models import tuning as models_tuning
from kernelwarehouse.models.ops import selection
from kernelwarehouse.models.ops.kernel_warehouse import layer
from kernelwarehouse.models.ops.selection import forget, remembered

pytestmark = pytest.mark.usefixtures("untuned")

CONVERTED = {"model": "kw_resnet18", "sharing_range": "layer_conv", "batch_size": 256, "tune": True, "epochs": 1}


@pytest.fixture
def fastest(monkeypatch):
    """A function that makes one implementation take half of the others' time."""

    def make(fast):
        def measure(steps, rounds, *_, **__):
            return {name: [0.5 if name == fast else 1.0] * rounds for name in steps}

        monkeypatch.setattr(models_tuning, "measure", measure)

    return make


def test_a_training_tunes_both_modes_keeps_what_it_found_and_continues_with_it(
    tiny_config, cpu, tmp_path, capsys, fastest
):
    fastest("mix_inputs")
    fields = CONVERTED | {"output_dir": str(tmp_path)}
    train_run(tiny_config(**fields), cpu)
    said = capsys.readouterr().out
    for what in ("training", "evaluation"):
        assert re.search(
            rf"tuned for {what} in \d+ s: 0 of 10 layers are computed as estimated, others by mix_inputs 10; "
            r"5,000\.0 instead of 10,000\.0 ms",
            said,
        )
    kept = read_state(tmp_path / "checkpoint-0.pth")["tuned"]
    assert kept == remembered()
    assert {*kept.values()} == {"mix_inputs"}
    forget()
    fastest("materialize")  # by now, but a training goes on as it began
    train_run(tiny_config(**fields | {"epochs": 2}), cpu)
    assert capsys.readouterr().out.count("0 of 10 layers are computed as estimated, others by mix_inputs 10\n") == 2
    assert remembered() == kept


def test_all_full_batches_are_computed_by_what_was_taken(tiny_config, cpu, monkeypatch, fastest):
    fastest("mix_inputs")
    found, look, fit = [], layer.select, run.fit

    def noted(*args):
        chosen = look(*args)
        found.append(chosen.name if selection.measured(args[0]) else None)
        return chosen

    def after_measuring(*args):
        found.clear()
        fit(*args)

    monkeypatch.setattr(layer, "select", noted)
    monkeypatch.setattr(run, "fit", after_measuring)
    train_run(tiny_config(**CONVERTED, recalibrate_bn=0), cpu)
    assert found == ["mix_inputs"] * 10 * (5 + 1) + [None] * 10  # of evaluation's two batches the second is smaller


def test_measuring_changes_nothing_else(tiny_config, cpu, fastest):
    fastest("auto")
    tuned = train_run(tiny_config(**CONVERTED), cpu).model.state_dict()
    assert {*remembered().values()} == {"auto"}
    plain = train_run(tiny_config(**CONVERTED | {"tune": False}), cpu).model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in tuned.items())


def test_an_evaluation_tunes_each_size(tiny_config, cpu, tmp_path, capsys, fastest):
    fields = CONVERTED | {"output_dir": str(tmp_path), "tune": False}
    train_run(tiny_config(**fields), cpu)
    fastest("grouped")
    fields |= {"eval": True, "resume": str(tmp_path / "checkpoint-0.pth"), "eval_sizes": [16, 24]}
    plain = evaluate_run(tiny_config(**fields), cpu)
    capsys.readouterr()
    tuned = evaluate_run(tiny_config(**fields | {"tune": True}), cpu)
    assert capsys.readouterr().out.count("tuned for evaluation") == 2
    assert {*remembered().values()} == {"grouped"}
    assert tuned.acc1 == pytest.approx(plain.acc1, abs=0.5)
    assert tuned.loss == pytest.approx(plain.loss, rel=1e-4)


def test_all_processes_take_what_the_first_one_found(tiny_config, capsys, fastest):
    class Second(World):
        def gather(self, value):
            return [dict.fromkeys(value, "materialize"), value]

    fastest("mix_inputs")
    config = tiny_config(**CONVERTED)
    tune_for(build_model(config.model), config, Second(torch.device("cpu"), 1, 2), training=True)
    assert {*remembered().values()} == {"materialize"}
    assert capsys.readouterr().out == ""


def test_what_cannot_be_tuned_is_refused(tiny_config, cpu):
    with pytest.raises(ConfigError, match=r"field 'tune': resnet18: the model has no converted layer"):
        train_run(tiny_config(tune=True), cpu)
    with pytest.raises(ConfigError, match=r"field 'tune': must be false with 'compile'"):
        tiny_config(**CONVERTED, compile=True)
    with pytest.raises(ConfigError, match=r"field 'tune': must be false with 'sync_bn'"):
        tiny_config(**CONVERTED, sync_bn=True)
