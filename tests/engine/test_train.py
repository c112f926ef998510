"""A step of training does what its recipe says."""

import copy

import pytest
import torch
from processor import needs_compiler
from timm.utils import random_seed
from torch import nn

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import NonFiniteLossError, Training
from kernelwarehouse.engine.state import synchronise_norms
from kernelwarehouse.engine.train import gradient_norm, update_weights
from kernelwarehouse.models import build_model


def linear_net():
    """Without BatchNorm, whose statistics know how the batch was divided."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 10)).double()


def images_and_targets(n=24):
    return torch.randn(n, 1, 4, 4, dtype=torch.float64), torch.randint(10, (n,))


CONVERTED = {"model": "kw_resnet18", "sharing_range": "layer_conv"}


@pytest.mark.parametrize("clip_grad", [None, 0.01])
@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_k_micro_batches_equal_one_large_batch(tiny_config, cpu, train_one_epoch, loader, opt, clip_grad):
    images, targets = images_and_targets()
    first = linear_net()
    second = copy.deepcopy(first)
    fields = {"opt": opt, "smoothing": 0.1, "epochs": 1, "clip_grad": clip_grad}
    one = Training.build(first, tiny_config(**fields), cpu, iterations_per_epoch=2)
    many = Training.build(second, tiny_config(**fields, update_freq=3), cpu, iterations_per_epoch=6)
    figures = train_one_epoch(one, loader(images, targets, 12))
    accumulated = train_one_epoch(many, loader(images, targets, 4))
    assert one.step == many.step == 2
    assert accumulated["loss"] == pytest.approx(figures["loss"], rel=1e-12)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_smaller_last_window_weighs_its_own_micro_batches(tiny_config, cpu, train_one_epoch, loader):
    images, targets = images_and_targets(20)
    model = linear_net()
    expected = copy.deepcopy(model)
    config = tiny_config(opt="momentum", weight_decay=0, update_freq=3, epochs=1)
    training = Training.build(model, config, cpu, iterations_per_epoch=5)
    train_one_epoch(training, loader(images, targets, 4))
    assert training.step == 2

    reference = Training.build(expected, config, cpu, iterations_per_epoch=5)
    for step, window in enumerate((slice(0, 12), slice(12, 20))):
        for group in reference.optimizer.param_groups:
            group["lr"] = reference.schedule.lr(step)
        nn.functional.cross_entropy(expected(images[window]), targets[window]).backward()
        update_weights(reference, gradient_norm(reference))
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "precision",
    [{}, {"use_amp": True, "amp_dtype": "bfloat16"}, {"use_amp": True, "amp_dtype": "float16"}],
    ids=["float32", "bfloat16", "float16"],
)
def test_clipping_bounds_the_update(tiny_config, cpu, train_one_epoch, loader, precision):
    """With SGD at rate 1 and without momentum's past, the update of the first step is the clipped gradient."""
    images, targets = images_and_targets(8)
    for limit in (1e-3, None):
        model = linear_net().float()
        before = [p.detach().clone() for p in model.parameters()]
        config = tiny_config(opt="momentum", lr=1.0, weight_decay=0, clip_grad=limit, epochs=1, **precision)
        training = Training.build(model, config, cpu, iterations_per_epoch=1)
        train_one_epoch(training, loader(images.float(), targets, 8))
        change = torch.cat([(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)]).norm().item()
        if limit:
            assert change == pytest.approx(limit, rel=1e-3)
        else:
            assert change > 0.1


def test_float16_scales_the_loss_and_bfloat16_does_not(tiny_config, cpu):
    def scaler(dtype):
        return Training.build(linear_net(), tiny_config(use_amp=True, amp_dtype=dtype), cpu, 1).scaler

    assert scaler("float16").is_enabled()
    assert not scaler("bfloat16").is_enabled()


@pytest.mark.parametrize("precision", [{}, {"use_amp": True, "amp_dtype": "float16"}], ids=["float32", "float16"])
def test_a_step_whose_loss_is_not_finite_changes_nothing(tiny_config, cpu, train_one_epoch, loader, precision):
    images, targets = images_and_targets(24)
    images[8:12] = float("nan")  # the third micro-batch: the first half of the second step
    norm = nn.BatchNorm1d(16)
    training = Training.build(
        nn.Sequential(nn.Flatten(), norm, nn.Linear(16, 10)),
        tiny_config(update_freq=2, model_ema=True, opt="momentum", **precision),
        cpu,
        iterations_per_epoch=6,
    )
    states = []
    training.parallel.register_forward_pre_hook(lambda net, _: states.append(copy.deepcopy(net.state_dict())))
    scale = training.scaler.get_scale()
    figures = train_one_epoch(training, loader(images.float(), targets, 4))
    before, after = states[2], states[4]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert figures["skipped_steps"] == 1
    assert 0 < figures["loss"] < 100
    assert training.step == 3
    assert all(torch.isfinite(v).all() for v in training.ema.module.state_dict().values())
    assert not torch.equal(after["2.weight"], training.model.state_dict()["2.weight"])
    assert training.scaler.get_scale() == (scale / 2 if precision else 1.0)


def test_too_many_bad_steps_in_a_row_stop_the_run(tiny_config, cpu, train_one_epoch, loader):
    images, targets = images_and_targets(60)
    for bad in (0, 1, 3, 4, 5):  # never three in a row, but at the end
        images[4 * bad] = float("nan")
    training = Training.build(linear_net(), tiny_config(max_bad_steps=2), cpu, iterations_per_epoch=15)
    with pytest.raises(
        NonFiniteLossError, match=r"in 3 step\(s\) in a row.*the loss, in epoch 0, micro-batches 5 to 5"
    ):
        train_one_epoch(training, loader(images, targets, 4))
    assert all(torch.isfinite(p).all() for p in training.model.parameters())


def test_a_converted_network_trains_with_batches_of_one(tiny_config, cpu, train_one_epoch, loader):
    config = tiny_config(epochs=1, **CONVERTED)
    model = build_model(config.model)
    before = copy.deepcopy(model.state_dict())
    training = Training.build(model, config, cpu, iterations_per_epoch=3)
    figures = train_one_epoch(training, loader(torch.randn(3, 1, 64, 64), torch.tensor([1, 2, 3]), 1))
    assert 0 < figures["loss"] < 100
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if "warehouse" in n)


def test_the_network_and_its_average_have_the_temperature_of_each_iteration(tiny_config, cpu, train_one_epoch, loader):
    config = tiny_config(epochs=4, temp_epoch=2, temp_init_value=0.8, model_ema=True, **CONVERTED)
    training = Training.build(build_model(config.model), config, cpu, iterations_per_epoch=2)
    seen = []
    training.model.register_forward_pre_hook(lambda m, _: seen.append(m.layer1[0].conv2.temperature.value.item()))
    assert training.ema.module.layer1[0].conv2.temperature.value.item() == pytest.approx(0.8)
    data = loader(torch.randn(8, 1, 16, 16), torch.randint(10, (8,)), 4)
    for expected in (0.4, 0.0, 0.0):
        train_one_epoch(training, data)
        training.set_temperature()
        assert training.ema.module.layer1[0].conv2.temperature.value.item() == pytest.approx(expected)
        assert training.model.layer1[0].conv2.temperature.value.item() == pytest.approx(expected)
    assert seen == pytest.approx([0.6, 0.4, 0.2, 0, 0, 0])


def test_a_static_network_has_no_temperature(tiny_config, cpu):
    assert Training.build(linear_net(), tiny_config(temp_epoch=20), cpu, 5).temperatures == {}


def test_the_average_follows_the_weights(tiny_config, cpu, train_one_epoch, loader):
    images, targets = images_and_targets(4)
    model = linear_net()
    before = copy.deepcopy(model.state_dict())
    config = tiny_config(model_ema=True, model_ema_decay=0.75, model_ema_warmup=False, epochs=1)
    training = Training.build(model, config, cpu, iterations_per_epoch=1)
    train_one_epoch(training, loader(images, targets, 4))
    for name, value in training.ema.module.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * model.state_dict()[name])


@pytest.mark.parametrize(
    "fields", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mixup_mode": "elem"}]
)
def test_mixing_changes_what_is_learned(tiny_config, cpu, train_one_epoch, loader, fields):
    images, targets = images_and_targets(8)
    losses = []
    for mixing in ({}, fields):
        random_seed(0)
        model = linear_net().float()
        training = Training.build(model, tiny_config(batch_size=8, epochs=1, **mixing), cpu, iterations_per_epoch=1)
        losses.append(train_one_epoch(training, loader(images.float(), targets, 8))["loss"])
    assert losses[0] != losses[1]


def test_mixing_refuses_an_odd_batch(tiny_config, cpu):
    with pytest.raises(ConfigError, match=r"'batch_size'.*31 is odd"):
        Training.build(linear_net(), tiny_config(batch_size=31, mixup=0.8), cpu, 1)


def test_the_loss_is_read_back_rarely(tiny_config, cpu, train_one_epoch, loader, monkeypatch):
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (reads.append(self), item(self))[1])
    images, targets = images_and_targets(60)
    training = Training.build(linear_net(), tiny_config(opt="momentum"), cpu, iterations_per_epoch=60)
    train_one_epoch(training, loader(images, targets, 1))
    assert len(reads) <= 5


def test_channels_last_reaches_kernels_and_images_and_changes_nothing_but_rounding(
    tiny_config, cpu, train_one_epoch, loader
):
    images, targets = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randint(10, (8,))
    losses, layouts = [], []
    for channels_last in (False, True):
        random_seed(0)
        config = tiny_config(**CONVERTED, in_chans=3, channels_last=channels_last)
        training = Training.build(build_model(config.model).double(), config, cpu, iterations_per_epoch=2)
        training.parallel.register_forward_pre_hook(
            lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        losses.append(train_one_epoch(training, loader(images, targets, 4))["loss"])
        assert training.model.conv1.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert layouts == [False, False, True, True]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@needs_compiler  # which torch.compile asks for too
def test_a_compiled_training_learns_the_same(tiny_config, cpu, train_one_epoch, loader):
    images, targets = images_and_targets()
    first = linear_net()
    second = copy.deepcopy(first)
    for model, compiled in ((first, False), (second, True)):
        training = Training.build(model, tiny_config(compile=compiled), cpu, iterations_per_epoch=6)
        assert isinstance(training.parallel, torch._dynamo.OptimizedModule) == compiled
        train_one_epoch(training, loader(images, targets, 4))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_synchronised_norms_need_gpus(tiny_config, cpu):
    with pytest.raises(ConfigError, match=r"'sync_bn'.*--sync_bn false"):
        Training.build(linear_net(), tiny_config(sync_bn=True), cpu, 1)


def test_synchronised_norms_replace_all_norms_and_keep_the_network(tiny_config):
    model = build_model(tiny_config(**CONVERTED).model).double()
    before = copy.deepcopy(model)
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)}
    assert any("attention" in name for name in norms)
    converted = synchronise_norms(model, torch.device("cuda"))
    assert {name for name, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)} == norms
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in converted.modules())
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    # The two classes of norms may round differently.
    torch.testing.assert_close(converted.eval()(images), before.eval()(images), rtol=1e-10, atol=1e-12)


def test_there_must_be_norms_to_synchronise():
    with pytest.raises(ConfigError, match=r"'sync_bn'.*no BatchNorm"):
        synchronise_norms(linear_net(), torch.device("cuda"))
