"""Evaluation counts every image once, whatever the number of classes and processes."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kernelwarehouse.configs.schema import ConfigError, RunConfig
from kernelwarehouse.datasets import EvalSampler
from kernelwarehouse.engine import Metrics, World, evaluate
from kernelwarehouse.engine.evaluate import at_size, predict
from kernelwarehouse.models import build_model

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


def several_labels(data):
    """The images with their class, another acceptable one for every third, and none for every fifth."""
    images, targets = data.tensors
    others = torch.where(torch.arange(len(targets)) % 3 == 0, (targets + 2) % 7, -1)
    labels = torch.stack([targets, others], dim=1)
    labels[4::5] = -1
    return TensorDataset(images, labels)


def evaluate_part(rank, world_size, size, store, results):
    torch.set_num_threads(1)  # a forked process has lost the threads of its parent
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    data, model = images_and_model(size)
    world = World(torch.device("cpu"), rank, world_size)
    metrics = evaluate(model, DataLoader(data, 4, sampler=EvalSampler(size, rank, world_size)), RunConfig(), world)
    part = DataLoader(several_labels(data), 4, sampler=EvalSampler(size, rank, world_size))
    relabelled, predictions = predict(model, part, RunConfig(), world)
    results.put((metrics, relabelled, [column.tolist() for column in vars(predictions).values()]))
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "size"), [(2, 23), (3, 23), (3, 2)])
def test_several_processes_give_the_figures_of_one(cpu, tmp_path, world_size, size):
    data, model = images_and_model(size)
    alone = evaluate(model, DataLoader(data, 4), RunConfig(), cpu)
    part = DataLoader(several_labels(data), 4, sampler=EvalSampler(size))
    relabelled_alone, predictions = predict(model, part, RunConfig(), cpu)
    results = mp.get_context("fork").SimpleQueue()
    arguments = (world_size, size, tmp_path / "store", results)
    mp.start_processes(evaluate_part, arguments, nprocs=world_size, start_method="fork")
    for _ in range(world_size):
        together, relabelled, columns = results.get()
        assert (together.acc1, together.acc5, together.images) == (alone.acc1, alone.acc5, size)
        assert together.loss == pytest.approx(alone.loss, rel=1e-6)
        assert relabelled.unlabelled == relabelled_alone.unlabelled == size // 5
        assert (relabelled.acc1, relabelled.acc5) == (relabelled_alone.acc1, relabelled_alone.acc5)
        for column, expected in zip(columns, vars(predictions).values(), strict=True):
            torch.testing.assert_close(torch.tensor(column), expected)


def test_any_acceptable_label_is_right_and_images_without_one_are_left_out(cpu):
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [3, 2, 1]])
    labels = torch.tensor([[0, -1], [2, 0], [1, 2], [-1, -1]])
    loader = DataLoader(TensorDataset(logits, labels), 3, sampler=EvalSampler(4))
    metrics, predictions = predict(nn.Identity(), loader, RunConfig(), cpu)
    assert (metrics.images, metrics.unlabelled) == (3, 1)
    assert metrics.acc1 == pytest.approx(200 / 3)
    p = logits[0].softmax(0)
    assert metrics.loss == pytest.approx(-(p[0].log() + (p[0] + p[2]).log() + (p[1] + p[2]).log()).item() / 3)
    assert torch.equal(predictions.labels, labels)
    assert predictions.classes.tolist() == [[0, 1, 2]] * 4
    torch.testing.assert_close(predictions.probabilities, p.expand(4, -1))


def test_nothing_to_evaluate(cpu):
    data = TensorDataset(torch.zeros(2, 3), torch.full((2,), -1))
    with pytest.raises(ConfigError, match="not one image has a label"):
        evaluate(nn.Identity(), DataLoader(data, 2), RunConfig(), cpu)


def test_a_network_with_position_embeddings_is_evaluated_at_another_size():
    fields = {"depth": 1, "embed_dim": 48, "num_heads": 1}
    model = build_model("deit_tiny/kw1x_deit_tiny", model_kwargs=fields, nb_classes=3).eval()
    image = torch.randn(1, 3, 96, 96)
    assert at_size(model, 96)(image).shape == (1, 3)
    assert at_size(model, 224)(torch.randn(1, 3, 224, 224)).shape == (1, 3)
    with pytest.raises(AssertionError):
        model(image)
    convolutional = nn.Conv2d(3, 3, 3)
    assert at_size(convolutional, 96) is convolutional
