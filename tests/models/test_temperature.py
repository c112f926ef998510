"""The temperature is part of a network: files, copies and averages keep it, and older files mean a trained one."""

import copy

import pytest
import torch
from networks import narrow_resnet
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kernelwarehouse import KWConfig, convert_, load_checkpoint, set_temperature
from kernelwarehouse.models import temperatures, to_upstream

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
NAME = "layer1.0.conv2.temperature.value"


def network(temperature=0.0):
    net = convert_(narrow_resnet(), KWConfig(), keep_weights=False).eval()
    set_temperature(net, temperature)
    return net


def test_a_state_dict_holds_it_once_and_brings_it_back():
    net, other = network(0.5), network()
    assert [name for name in net.state_dict() if "temperature" in name] == [NAME]
    assert all(isinstance(value, torch.Tensor) for value in net.state_dict().values())
    other.load_state_dict(net.state_dict())
    assert temperatures(other) == {"kernel_warehouse": 0.5}
    torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)
    assert not torch.allclose(network()(X), net(X), rtol=1e-3)  # it matters


@pytest.mark.parametrize("load", ["strict", "file", "upstream"])
def test_a_file_without_it_is_of_a_trained_network(tmp_path, load):
    net, other = network(0.5), network(0.25)
    state = {name: value for name, value in net.state_dict().items() if name != NAME}
    if load == "strict":
        assert other.load_state_dict(state).missing_keys == []
    else:
        torch.save({"model": to_upstream(net) if load == "upstream" else state}, tmp_path / "c.pth")
        load_checkpoint(other, tmp_path / "c.pth")
    assert temperatures(other) == {"kernel_warehouse": 0}


def test_older_checkpoints_of_a_training_have_it_beside_the_weights(tmp_path):
    net, other = network(0.5), network()
    state = {name: value for name, value in net.state_dict().items() if name != NAME}
    torch.save({"model": state, "temperature": 0.5}, tmp_path / "c.pth")
    load_checkpoint(other, tmp_path / "c.pth")
    torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)


def test_loading_another_part_leaves_it():
    net = network(0.5)
    net.load_state_dict({"fc.weight": torch.zeros(5, 16)}, strict=False)
    assert temperatures(net) == {"kernel_warehouse": 0.5}


def test_it_is_of_the_layers_whoever_holds_them():
    net = network()
    stage = net.layer3
    set_temperature(net, 0.75)
    assert temperatures(stage) == {"kernel_warehouse": 0.75}
    assert temperatures(copy.deepcopy(stage)) == {"kernel_warehouse": 0.75}
    assert temperatures(narrow_resnet()) == {}


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_value_that_the_operator_cannot_have_changes_nothing(value):
    net = network(0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        set_temperature(net, value)
    assert temperatures(net) == {"kernel_warehouse": 0.5}
    set_temperature(net, 1.0, operator="another")
    assert temperatures(net) == {"kernel_warehouse": 0.5}


@pytest.mark.parametrize(
    "average",
    [lambda net: AveragedModel(net), lambda net: ModelEmaV3(net, decay=0.5, exclude_buffers=True)],
    ids=["AveragedModel", "ModelEmaV3-exclude_buffers"],
)
def test_averages_of_parameters_copy_it_as_it_is(average):
    net = network(1.0)
    averaged = average(net)
    for value in (0.75, 0.5):
        set_temperature(net, value)
        averaged.update_parameters(net) if isinstance(averaged, AveragedModel) else averaged.update(net)
        assert temperatures(averaged) == {"kernel_warehouse": value}


@pytest.mark.parametrize(
    "average",
    [
        lambda net: ModelEmaV2(net, decay=0.5),
        lambda net: ModelEmaV3(net, decay=0.5),
        lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    ],
    ids=["ModelEmaV2", "ModelEmaV3", "AveragedModel-use_buffers"],
)
def test_averages_of_all_entries_are_told(average):
    """They average the temperature too; set_temperature after each update gives them the network's own."""
    net = network(1.0)
    averaged = average(net)
    set_temperature(net, 0.5)
    update = averaged.update_parameters if isinstance(averaged, AveragedModel) else averaged.update
    for _ in range(2):
        update(net)
        set_temperature(averaged, 0.5)
        assert temperatures(averaged) == {"kernel_warehouse": 0.5}
    torch.testing.assert_close(averaged.module(X), net(X))


def test_an_exported_network_has_the_temperature_that_it_was_exported_at(tmp_path):
    net = network(0.5)
    torch.export.save(torch.export.export(net, (X,)), tmp_path / "net.pt2")
    expected = net(X).detach()
    program = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(program(X).detach(), expected, rtol=1e-4, atol=1e-4)
