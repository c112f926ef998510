"""A training that an earlier version began goes on, with its cells at the root of the network and numbered last."""

import copy

import pytest
import torch

from kernelwarehouse.engine.checkpoint import newest_checkpoint, save_checkpoint
from kernelwarehouse.engine.optim import parameter_groups
from kernelwarehouse.engine.run import train_run
from kernelwarehouse.models import build_model, load_checkpoint, shared_labels

FIELDS = {
    "model": "kw_resnet18",
    "sharing_range": "layer_conv",
    "epochs": 3,
    "temp_epoch": 1.5,
    "model_ema": True,
    "model_ema_decay": 0.5,
}


def as_before(state, model):
    """The state of a training as the version wrote it whose networks had a child `warehouses`."""
    labels = shared_labels(model)

    def weights(new):
        own = {k: v for k, v in new.items() if k not in labels and not k.endswith("temperature.value")}
        return own | {f"warehouses.{label}": new[k].transpose(0, 1) for k, label in labels.items()}

    names = {p: name for name, p in model.named_parameters()}
    now = [[names[p] for p in group["params"]] for group in parameter_groups(model, 0.05, 1.0)]
    before = [[n for n in group if n not in labels] + [n for n in group if n in labels] for group in now]
    numbers = {name: i for i, name in enumerate(n for group in now for n in group)}
    entries, groups, count = {}, [], 0
    for group, old in zip(state["optimizer"]["param_groups"], before, strict=True):
        groups.append({**group, "params": list(range(count, count + len(old)))})
        for name in old:
            entry = state["optimizer"]["state"][numbers[name]]
            moved = {k: v.transpose(0, 1) for k, v in entry.items() if name in labels and v.ndim > 1}
            entries[count] = {**entry, **moved}
            count += 1
    older = {k: v for k, v in state.items() if k not in ("plans", "model", "model_ema", "optimizer")}
    averages = {"model": weights(state["model"]), "model_ema": weights(state["model_ema"])}
    return older | averages | {"optimizer": {"state": entries, "param_groups": groups}, "temperature": 0.25}


@pytest.fixture
def before(tiny_config, cpu, tmp_path):
    """A whole training; its configuration; and the same training after an epoch, as an earlier version wrote it."""
    config = tiny_config(**FIELDS, output_dir=str(tmp_path / "whole"))
    whole = train_run(config, cpu)
    newest = newest_checkpoint(tmp_path / "whole")
    assert newest is not None
    state = torch.load(tmp_path / "whole" / "checkpoint-0.pth", weights_only=True)
    older = as_before(state, build_model(config.model))
    assert list(older["model"])[-1].startswith("warehouses.")
    (tmp_path / "older").mkdir()
    save_checkpoint(tmp_path / "older" / "checkpoint-0.pth", copy.deepcopy(older))
    return whole, older


def test_it_goes_on_bit_for_bit(before, tiny_config, cpu, tmp_path):
    whole, _ = before
    continued = train_run(tiny_config(**FIELDS, output_dir=str(tmp_path / "older")), cpu)
    assert continued.epoch == 3
    assert whole.ema is not None
    assert continued.ema is not None
    for a, b in ((whole.model, continued.model), (whole.ema.module, continued.ema.module)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_is_evaluated_at_its_temperature(before, tiny_config, tmp_path):
    model = build_model(tiny_config(**FIELDS).model)
    load_checkpoint(model, tmp_path / "older" / "checkpoint-0.pth")
    assert model.layer1[0].conv2.temperature.value == 0.25
    load_checkpoint(model, tmp_path / "whole" / "checkpoint-0.pth")
    assert 0 < model.layer1[0].conv2.temperature.value < 1
