"""A network of experts is trained, killed, started again, and evaluated from what the run has kept."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from networks import TINY

from kernelwarehouse import build_model, load_checkpoint
from kernelwarehouse.engine import join, train_run
from kernelwarehouse.engine.checkpoint import read_state
from kernelwarehouse.engine.keeper import Keeper
from kernelwarehouse.models import read_config, temperatures

FIELDS = {
    **{name: value for name, value in TINY.items() if name != "sharing_range"},
    "epochs": 1,
    "temp_epoch": 0.5,
    "save_ckpt_steps": 1,
    "kernel_num": 2,
}


def train(fields, run, killed_at):
    torch.set_num_threads(1)  # a forked process has lost the threads of its parent
    step_done = Keeper.step_done

    def step_done_or_killed(self, save):
        step_done(self, save)
        if self.training.step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Keeper.step_done = step_done_or_killed
    config = read_config(fields, {"output_dir": run})
    with join(config.run) as world:
        train_run(config, world)


def in_a_process(*arguments):
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    process.join(timeout=300)
    return process.exitcode


@pytest.mark.parametrize("model", ["dy_resnet18", "od_resnet18"])
def test_killed_and_started_again_it_ends_where_it_would_have(model, tmp_path):
    fields = FIELDS | {"model": model}
    run, whole = str(tmp_path / "run"), str(tmp_path / "whole")
    assert in_a_process(fields, run, 3) == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-0-3.pth").is_file()
    assert in_a_process(fields, run, None) == in_a_process(fields, whole, None) == 0
    states = [read_state(folder / "checkpoint-0.pth")["model"] for folder in (tmp_path / "run", tmp_path / "whole")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert (tmp_path / "run" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()
    last = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert last["train_temperature"] == 1.0
    net = build_model(tmp_path / "run" / "config.json").eval()
    load_checkpoint(net, tmp_path / "run" / "checkpoint-0.pth")
    assert list(temperatures(net).values()) == [1.0]
    assert net(torch.zeros(2, 1, 16, 16)).isfinite().all()
