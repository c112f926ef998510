"""A loss that is not finite: the step changes nothing, is counted, and too many of them stop the training."""

import re

import pytest
import torch
from mmdet.models import MaskRCNN
from mmdet.registry import MODELS

from kernelwarehouse.detection import train
from kernelwarehouse.detection.cli import run
from kernelwarehouse.engine import NonFiniteLossError
from kernelwarehouse.models import read_checkpoint

NO_VAL = ("val_dataloader=None", "val_evaluator=None", "val_cfg=None")


@MODELS.register_module()
class Diverging(MaskRCNN):
    """A Mask R-CNN with bad losses, or gradients, in the iterations that `bad` names; it spoils its statistics too."""

    bad = range(0)
    iteration = 0
    spoil = "loss"

    def loss(self, *args, **kwargs):
        losses = super().loss(*args, **kwargs)
        if type(self).iteration in self.bad:
            weight = self.backbone.net.conv1.weight.sum()
            for name, buffer in self.named_buffers():
                if name.endswith("running_mean"):
                    buffer.data.fill_(torch.nan)
            # The square root of 0 is finite, and its slope is not.
            losses["loss_bad"] = weight * torch.nan if self.spoil == "loss" else (weight * 0).sqrt()
        type(self).iteration += 1
        return losses


@pytest.fixture
def train_with(tiny_config, tmp_path, monkeypatch):
    """A function that trains for two epochs of two iterations with bad ones among them; returns the last checkpoint."""

    def start(bad, *options, spoil="loss", arguments=()):
        for name, value in (("bad", bad), ("iteration", 0), ("spoil", spoil)):
            monkeypatch.setattr(Diverging, name, value)
        fields = ["model.type=Diverging", *NO_VAL, *options]
        train.main([str(tiny_config), "--work-dir", str(tmp_path), *arguments, "--cfg-options", *fields])
        return read_checkpoint(tmp_path / "epoch_2.pth")

    return start


def steps_of(content):
    return {int(state["step"]) for state in content["optimizer"]["state"].values()}


@pytest.mark.parametrize(
    ("bad", "spoil", "options", "taken"),
    [([1, 2], "loss", (), 2), ([0], "gradients", (), 3), ([1], "loss", ("optim_wrapper.accumulative_counts=2",), 1)],
)
def test_bad_steps_are_skipped_and_counted(train_with, capfd, bad, spoil, options, taken):
    content = train_with(bad, *options, spoil=spoil)
    assert steps_of(content) == {taken}
    assert all(v.isfinite().all() for v in content["state_dict"].values())
    out, err = capfd.readouterr()
    assert (out + err).count("the step is skipped") == len(bad)
    assert re.search(r"epoch 1: 1 steps skipped, not finite", out + err)


def test_too_many_in_a_row_stop_the_training(train_with, tmp_path, capsys):
    with pytest.raises(NonFiniteLossError, match=r"not finite in 2 step\(s\) in a row, the last time in iteration 4"):
        train_with([2, 3], arguments=["--max-bad-steps", "1"])
    assert all(v.isfinite().all() for v in read_checkpoint(tmp_path / "epoch_1.pth")["state_dict"].values())
    assert not (tmp_path / "epoch_2.pth").exists()

    def diverge():
        raise NonFiniteLossError("diverged")

    assert run(diverge) == 1
    assert capsys.readouterr().err == "error: diverged\n"
