"""Who drives the temperature: a schedule for loops of one's own, a callback, and a warning where nobody does."""

import copy
import sys
import types
import warnings

import pytest
import timm
import torch
from networks import narrow_resnet
from torch import nn
from toy_operator import ToyConfig

from kernelwarehouse import KWConfig, TemperatureSchedule, convert_, set_temperature
from kernelwarehouse.configs.schema import RunConfig
from kernelwarehouse.engine.schedule import Schedule
from kernelwarehouse.models import anneals, temperatures

X = torch.randn(2, 3, 32, 32)


def network(config=None):
    return convert_(narrow_resnet(), config or KWConfig(), keep_weights=False).train()


class TestSchedule:
    @pytest.mark.parametrize("config", [KWConfig(), ToyConfig()], ids=lambda config: config.operator)
    def test_it_is_the_engines(self, config):
        net = network(config)
        schedule = TemperatureSchedule(net, epochs=6, steps_per_epoch=5)
        run = RunConfig(epochs=6, warmup_epochs=0)
        engines = Schedule.build(run, 5, anneals(net))
        assert temperatures(net) == {config.operator: anneals(net)[config.operator].start}
        for iteration in range(1, 31):
            schedule.step()
            assert temperatures(net) == pytest.approx(engines.temperatures(iteration))
        assert temperatures(net) == {config.operator: anneals(net)[config.operator].end}

    def test_two_operators_and_averages(self):
        net = convert_(narrow_resnet(), KWConfig(exclude=("layer4.*",)), keep_weights=False)
        convert_(net, ToyConfig(include=("layer4.*",)), keep_weights=False)
        average = copy.deepcopy(net)
        schedule = TemperatureSchedule(nn.DataParallel(net), average, epochs=4, steps_per_epoch=2, anneal_epochs=2)
        schedule.step()
        assert temperatures(net) == temperatures(average) == schedule.temperatures
        assert temperatures(net)["kernel_warehouse"] == 0.75

    def test_it_goes_on_from_its_state(self):
        net = network()
        first = TemperatureSchedule(net, epochs=6, steps_per_epoch=10)
        for _ in range(7):
            first.step()
        for steps_per_epoch in (10, 20):
            other = network()
            second = TemperatureSchedule(other, epochs=6, steps_per_epoch=steps_per_epoch)
            second.load_state_dict(first.state_dict())
            assert temperatures(other) == pytest.approx(temperatures(net))
        with pytest.raises(ValueError, match="it has epoch"):
            first.load_state_dict({"epoch": 3})

    def test_a_static_network_is_left_alone(self):
        schedule = TemperatureSchedule(narrow_resnet(), epochs=1, steps_per_epoch=1)
        schedule.step()
        assert schedule.temperatures == {}

    @pytest.mark.parametrize(
        "wrong",
        [{"epochs": 0, "steps_per_epoch": 1}, {"epochs": 1, "steps_per_epoch": 0}]
        + [{"epochs": 2, "steps_per_epoch": 1, "anneal_epochs": n} for n in (-1, 3)],
    )
    def test_errors(self, wrong):
        with pytest.raises(ValueError, match="epochs"):
            TemperatureSchedule(network(), **wrong)


class TestReminder:
    @pytest.mark.parametrize("config", [KWConfig(), ToyConfig()], ids=lambda config: config.operator)
    def test_a_network_that_nobody_drives_says_so_once(self, config):
        net = network(config)
        with torch.no_grad():
            net(X)
        net.eval()(X)
        net.train()
        with pytest.warns(
            UserWarning, match=rf"{config.operator} stays at .*TemperatureSchedule\(model.*schedule.step"
        ):
            net(X)
        assert silent(net)

    def test_whoever_holds_the_layers(self):
        for part in (
            timm.create_model("kw_resnet18", features_only=True),
            nn.Sequential(*list(network().children())[:-2]),
            nn.DataParallel(network()),
        ):
            with pytest.warns(UserWarning, match="TemperatureSchedule"):
                part.train()(X)
            assert silent(part)

    def test_whoever_has_a_driver_or_trained_weights_hears_nothing(self):
        driven, kept, loaded, older = network(), network(), network(), network()
        TemperatureSchedule(driven, epochs=1, steps_per_epoch=1)
        set_temperature(kept, 0.0)
        state = network().state_dict()
        loaded.load_state_dict(state)
        older.load_state_dict({k: v for k, v in state.items() if not k.endswith("temperature.value")})
        assert all(silent(net) for net in (driven, kept, loaded, older, copy.deepcopy(driven), narrow_resnet().train()))

    def test_a_compiled_network_says_so_when_it_is_compiled(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        convert_(net, KWConfig(), keep_weights=False).train()
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        with pytest.warns(UserWarning, match="TemperatureSchedule"):
            assert compiled(X).shape == (2, 4, 28, 28)
        assert silent(compiled)


class TestLightning:
    """Against a stand-in of Lightning, which this package does not need."""

    @pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
    def callback_class(self, request, monkeypatch):
        for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "kernelwarehouse.models.lightning"):
            monkeypatch.delitem(sys.modules, name, raising=False)
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "kernelwarehouse.models.lightning")
        module = types.ModuleType(request.param)
        module.Callback = type("Callback", (), {})
        if request.param.startswith("lightning."):
            monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
        monkeypatch.setitem(sys.modules, request.param, module)
        from kernelwarehouse.models.lightning import TemperatureCallback

        assert issubclass(TemperatureCallback, module.Callback)
        return TemperatureCallback

    def test_it_drives_and_goes_on(self, callback_class):
        trainer = types.SimpleNamespace(num_training_batches=4, max_epochs=6, max_steps=-1, accumulate_grad_batches=1)
        net, callback = network(), callback_class()
        callback.on_train_start(trainer, net)
        for batch in range(4):
            callback.on_train_batch_end(trainer, net, None, None, batch)
        assert temperatures(net) == {"kernel_warehouse": 0.5}
        other, second = network(), callback_class()
        second.load_state_dict(callback.state_dict())
        trainer.max_epochs, trainer.max_steps = -1, 24
        second.on_train_start(trainer, other)
        assert temperatures(other) == {"kernel_warehouse": 0.5}
        trainer.num_training_batches = float("inf")
        with pytest.raises(ValueError, match="max_epochs"):
            callback_class().on_train_start(trainer, net)


def silent(net):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net(X)
    return not [w for w in caught if "temperature" in str(w.message)]
