"""BatchNorm's statistics estimated anew, and averages of short runs."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from kernelwarehouse.configs.schema import RunConfig
from kernelwarehouse.engine import Training, World, evaluate_run, recalibrate, train_run
from kernelwarehouse.models import build_model, set_temperature

CONVERTED = {"model": "kw_resnet18", "sharing_range": "layer_conv", "lr": 2e-2}
FIELDS = {**CONVERTED, "batch_size": 64, "epochs": 4, "model_ema": True, "model_ema_eval": True, "save_ckpt_num": 9}
BATCHES = [torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]


def statistics(net):
    return [b.clone() for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))]


@pytest.fixture
def net(tiny_config):
    torch.manual_seed(0)
    model = build_model(tiny_config(**CONVERTED).model)
    set_temperature(model, 0.3)
    return model


class TestRecalibrate:
    def test_statistics_are_those_of_torchs_update(self, net):
        other = copy.deepcopy(net)
        update_bn(BATCHES, other)
        recalibrate(net.eval(), iter(BATCHES))
        torch.testing.assert_close(statistics(net), statistics(other))

    def test_nothing_else_changes(self, net):
        net.layer2.eval()
        net.bn1.momentum = None
        before = copy.deepcopy(net)
        recalibrate(net, BATCHES)
        assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
        assert net.bn1.momentum is None
        assert net.layer1[0].bn1.momentum == 0.1
        moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
        assert moved
        assert all(key.endswith(("running_mean", "running_var")) for key in moved)
        assert all(p.grad is None for p in net.parameters())

    def test_dropout_and_paths_are_evaluations(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1))
        recalibrate(net.train(), BATCHES[:1])
        torch.testing.assert_close(net[1].running_mean, BATCHES[0].mean().view(1))

    def test_frozen_norms_and_such_without_statistics_stay(self):
        net = nn.Sequential(
            nn.BatchNorm2d(1).requires_grad_(False), nn.BatchNorm2d(1, track_running_stats=False), nn.BatchNorm2d(1)
        )
        recalibrate(net, BATCHES)
        assert net[0].running_mean == 0
        assert net[2].running_var != 1
        plain = nn.Conv2d(1, 1, 1)
        recalibrate(plain, iter(()))

    def test_an_error_leaves_modes_and_momenta(self, net):
        with pytest.raises(RuntimeError):
            recalibrate(net.train(), [torch.randn(2, 5, 16, 16)])
        assert all(m.training for m in net.modules())
        assert net.bn1.momentum == 0.1

    def test_processes_average(self, net):
        class Two(World):
            def reduce(self, values):
                return values + theirs.pop(0)

        parts = [copy.deepcopy(net) for _ in range(2)]
        for part, batch in zip(parts, BATCHES, strict=False):
            recalibrate(part, [batch])
        norms = [[m for m in part.modules() if hasattr(m, "running_mean")] for part in (*parts, net)]
        theirs = [torch.stack([m.running_mean, m.running_var + m.running_mean**2]).double() for m in norms[1]]
        recalibrate(net, BATCHES[:1], RunConfig(), Two(torch.device("cpu"), 0, 2))
        for a, b, both in zip(*norms, strict=True):
            mean = (a.running_mean + b.running_mean) / 2
            var = (a.running_var + a.running_mean**2 + b.running_var + b.running_mean**2) / 2 - mean**2
            torch.testing.assert_close((both.running_mean, both.running_var), (mean, var))


class TestRuns:
    def test_the_average_of_a_short_run_is_as_good_as_its_weights(self, tiny_config, cpu, tmp_path):
        fields = {**FIELDS, "output_dir": str(tmp_path)}
        train_run(tiny_config(**fields), cpu)
        lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
        last = lines[-1]
        assert last["test_acc1"] > 50
        assert last["test_acc1_ema"] >= last["test_acc1"] - 2
        assert lines[1]["test_acc1"] > 20  # while the temperature moves
        checkpoint = str(tmp_path / "checkpoint-3.pth")  # what is saved is what was evaluated
        for key, suffix in (("model", ""), ("model_ema", "_ema")):
            metrics = evaluate_run(tiny_config(**CONVERTED, resume=checkpoint, model_key=key, eval=True), cpu)
            assert metrics.acc1 == last[f"test_acc1{suffix}"]

    def test_the_decay_of_an_average_rises(self, tiny_config, cpu):
        def decays(epochs, **fields):
            config = tiny_config(model_ema=True, epochs=epochs, **fields)
            average = Training.build(nn.Sequential(nn.Linear(2, 2)), config, cpu, iterations_per_epoch=100).ema
            return [average.get_decay(step) for step in (1, 2, 1001, 10**6)]

        assert decays(100) == pytest.approx([0, 1 - 2 ** (-2 / 3), 1 - 1001 ** (-2 / 3), 0.998])
        assert decays(10**5)[-1] == 0.9999
        assert decays(1, model_ema_warmup=False)[1:] == [0.9999] * 3

    def test_running_averages_as_upstream_has_them(self, tiny_config, cpu):
        fields = {**FIELDS, "epochs": 1, "recalibrate_bn": 0, "model_ema_warmup": False, "save_ckpt": False}
        training = train_run(tiny_config(**fields), cpu)
        norm, average = training.model.bn1, training.ema.module.bn1
        assert norm.num_batches_tracked == 22
        assert average.running_mean.norm() < 0.01 * norm.running_mean.norm()
        anew = copy.deepcopy(training.model)
        recalibrate(anew, BATCHES)
        assert not torch.equal(anew.bn1.running_mean, norm.running_mean)

    def test_the_training_itself_is_the_same(self, tiny_config, cpu):
        fields = {**FIELDS, "batch_size": 256, "epochs": 1, "save_ckpt": False, "disable_eval": True}
        states = [train_run(tiny_config(**fields, recalibrate_bn=n), cpu).model.state_dict() for n in (0, 3)]
        weights = [[v for k, v in s.items() if "running" not in k] for s in states]
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
        assert not torch.equal(states[0]["bn1.running_var"], states[1]["bn1.running_var"])
