"""A dry run says what would be done, and does nothing."""

import os

import pytest
import torch
from torch import nn

from kernelwarehouse.engine import Training, dry_run
from kernelwarehouse.engine.dry_run import _optimizer_copies, _try_micro_batch


def test_the_plan_the_recipe_and_the_estimates_are_printed_and_nothing_is_written(tiny_config, cpu, tmp_path, capsys):
    fields = {"model": "kw_resnet18", "sharing_range": "layer_conv", "batch_size": 64, "update_freq": 2}
    dry_run(tiny_config(**fields, output_dir=str(tmp_path / "run"), log_dir=str(tmp_path / "log")), cpu)
    text = capsys.readouterr().out
    for expected in (
        "stage0_layer_conv",
        '"batch_size": 64,',
        "parameters: 35,400, of which 35,400 are trained",
        "total batch: 128 = 64 images × 2 micro-batches × 1 process(es); 11 steps an epoch, 22 in all",
        "memory of a process, about:",
        "time to compute, about:",
    ):
        assert expected in text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("opt", "copies"), [("sgd", 1), ("adamw", 2), ("lion", 1)])
def test_the_tensors_of_the_optimizer_are_counted(tiny_config, cpu, opt, copies):
    assert _optimizer_copies(Training.build(nn.Linear(2, 2), tiny_config(opt=opt), cpu, 1)) == copies


def test_activations_are_what_the_backward_pass_needs(tiny_config, cpu):
    """A linear layer keeps its input, a sigmoid its output, the square of the trial's loss its input."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10), nn.Sigmoid())
    before = [p.clone() for p in model.parameters()]
    training = Training.build(model, tiny_config(batch_size=32), cpu, 1)
    assert _try_micro_batch(training)[1] == 32 * (256 + 10) * 4
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
