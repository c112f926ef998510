"""Evaluation counts every image once, whatever the number of classes and processes."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kernelwarehouse.datasets import EvalSampler
from kernelwarehouse.engine import Metrics, World, evaluate
from kernelwarehouse.schema import RunConfig

LINE = re.compile(r"Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d+\.\d{3}")


def test_the_line_at_the_end():
    line = str(Metrics(acc1=98.1234, acc5=100.0, loss=0.0661, images=1, seconds=1.0))
    assert line == "Acc@1 98.123 Acc@5 100.000 loss 0.066"
    assert LINE.fullmatch(line)


def test_fewer_than_five_classes(cpu):
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    targets = torch.tensor([0, 1, 2, 0])
    metrics = evaluate(nn.Identity(), DataLoader(TensorDataset(logits, targets), 3), RunConfig(), cpu)
    assert (metrics.acc1, metrics.acc5, metrics.images) == (50.0, 100.0, 4)
    assert metrics.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())


def test_top_5_counts_the_five_highest(cpu):
    logits = torch.arange(8.0).repeat(8, 1)
    metrics = evaluate(nn.Identity(), DataLoader(TensorDataset(logits, torch.arange(8)), 3), RunConfig(), cpu)
    assert (metrics.acc1, metrics.acc5) == (12.5, 62.5)


def images_and_model(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 6, generator=generator)
    targets = torch.randint(7, (size,), generator=generator)
    model = nn.Linear(6, 7)
    with torch.no_grad():
        model.weight.copy_(torch.randn(7, 6, generator=generator))
        model.bias.zero_()
    return TensorDataset(images, targets), model


def evaluate_part(rank, world_size, size, store, results):
    torch.set_num_threads(1)  # a forked process has lost the threads of its parent
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    data, model = images_and_model(size)
    part = DataLoader(data, 4, sampler=EvalSampler(size, rank, world_size))
    results.put(evaluate(model, part, RunConfig(), World(torch.device("cpu"), rank, world_size)))
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "size"), [(2, 23), (3, 23), (3, 2)])
def test_several_processes_give_the_figures_of_one(cpu, tmp_path, world_size, size):
    data, model = images_and_model(size)
    alone = evaluate(model, DataLoader(data, 4), RunConfig(), cpu)
    results = mp.get_context("fork").SimpleQueue()
    arguments = (world_size, size, tmp_path / "store", results)
    mp.start_processes(evaluate_part, arguments, nprocs=world_size, start_method="fork")
    for _ in range(world_size):
        together = results.get()
        assert (together.acc1, together.acc5, together.images) == (alone.acc1, alone.acc5, size)
        assert together.loss == pytest.approx(alone.loss, rel=1e-6)
