"""The main job under torchrun and torch.distributed.launch, as a user starts it, on CPUs."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import TensorDataset

from kernelwarehouse.configs.schema import ConfigError, RunConfig
from kernelwarehouse.datasets import build_train_loader
from kernelwarehouse.engine import Training, World, join
from kernelwarehouse.engine.checkpoint import read_state
from kernelwarehouse.engine.keeper import Keeper
from kernelwarehouse.engine.log import Progress
from kernelwarehouse.engine.signals import Notice
from kernelwarehouse.engine.train import train_epoch

ROOT = Path(__file__).parents[2]
CONVERTED = {"model": "kw_resnet18", "sharing_range": "layer_conv"}
RUN = ["torch.distributed.run", "--standalone"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(launcher, processes, config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_fields() | {"output_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-m", *launcher, "--nproc_per_node", str(processes), "main.py", "--kw_config", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]


def test_two_processes_train_and_evaluate(tiny_config, tmp_path):
    config = tiny_config(**CONVERTED, batch_size=64, update_freq=3, epochs=1)
    output, lines = launch(RUN, 2, config, tmp_path)
    assert output.count("epoch 1/1") == 1
    assert len(lines) == 1
    state = read_state(tmp_path / "run" / "checkpoint-0.pth")
    assert state["step"] == 4  # 11 micro-batches on each process
    assert not any(name.startswith("module.") for name in state["model"])


@pytest.mark.skipif(not importlib.util.find_spec("torch.distributed.launch"), reason="this torch has torchrun only")
def test_one_process_under_the_old_launcher(tiny_config, tmp_path):
    _, lines = launch(
        ["torch.distributed.launch", "--master_port", free_port()], 1, tiny_config(**CONVERTED, epochs=1), tmp_path
    )
    assert len(lines) == 1


def train_part(rank, config, world_size, store, results):
    """One epoch of a network without BatchNorm on this process's part of the images."""
    torch.set_num_threads(1)  # a forked process has lost the threads of its parent
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    images, targets = torch.randn(36, 16, dtype=torch.float64), torch.randint(10, (36,))
    model = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 10)).double()
    data = TensorDataset(images, targets)
    loader = build_train_loader(data, config.run, rank, world_size)
    world = World(torch.device("cpu"), rank, world_size)
    training = Training.build(model, config, world, len(loader))
    figures = train_epoch(training, loader, Progress("", 0, 1, visible=False), Keeper(training, Notice()))
    training.end_epoch()
    results.put((figures["loss"], training.step, [p.detach().numpy() for p in model.parameters()]))
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_with_accumulation_learn_what_one_learns_from_large_batches(tiny_config, tmp_path):
    fields = {"epochs": 1, "opt": "sgd", "lr": 0.1, "clip_grad": 0.5}
    results = mp.get_context("fork").SimpleQueue()
    train_part(0, tiny_config(**fields, batch_size=12), 1, None, results)
    loss, steps, expected = results.get()
    # A step of two processes with three micro-batches of two images each sees the same twelve images.
    fields |= {"batch_size": 2, "update_freq": 3}
    arguments = (tiny_config(**fields), 2, tmp_path / "store", results)
    mp.start_processes(train_part, arguments, nprocs=2, start_method="fork")
    for found_loss, found_steps, found in (results.get(), results.get()):
        assert found_steps == steps == 3
        assert found_loss == pytest.approx(loss, rel=1e-12)
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(p), torch.from_numpy(q), rtol=1e-10, atol=1e-12)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join(RunConfig(device="cpu")) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert torch.equal(world.reduce(torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize(("url", "reason"), [("env://", "MASTER_ADDR"), ("nowhere://", "nowhere")])
def test_processes_that_cannot_meet_say_so_on_one_line(monkeypatch, url, reason):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    message = rf"'dist_url': process 1 of 2 does not find the others: .*{reason}.*$"
    with pytest.raises(ConfigError, match=message), join(RunConfig(device="cpu", dist_url=url)):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"'device'.*found 0"), join(RunConfig(device="cuda")):
        pass


def test_tasks_of_srun_need_to_know_where_to_meet(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match=r"'dist_url'.*MASTER_ADDR.*slurm_train\.sh"), join(RunConfig(device="cpu")):
        pass

    def task(rank):
        os.environ.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        with join(RunConfig(device="cpu", dist_url=f"file://{tmp_path / 'store'}")) as world:
            assert (world.rank, world.size) == (rank, 2)
            assert world.gather(rank) == [0, 1]

    mp.start_processes(task, nprocs=2, start_method="fork")
