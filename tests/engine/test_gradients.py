"""A step whose loss is finite and whose gradient is not changes nothing and is counted; too many end the run."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kernelwarehouse.engine import NonFiniteLossError, Training, World
from kernelwarehouse.engine.keeper import Keeper
from kernelwarehouse.engine.log import Progress
from kernelwarehouse.engine.signals import Notice
from kernelwarehouse.engine.train import train_epoch

PRECISIONS = {
    "float32": {},
    "bfloat16": {"use_amp": True, "amp_dtype": "bfloat16"},
    "float16": {"use_amp": True, "amp_dtype": "float16"},
}
MARK = 100.0


class AddToGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + ctx.fault, None


class Net(nn.Module):
    """Finite for all images; where one has a pixel above MARK, `fault` is added to the gradient."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 10))

    def forward(self, images):
        marked = bool((images > MARK).any())
        return AddToGradient.apply(self.layers(images.clamp(max=1)), self.fault if marked else 0.0)


def images_and_targets(n, marked):
    draw = torch.Generator().manual_seed(0)
    images, targets = torch.randn(n, 1, 4, 4, generator=draw), torch.randint(10, (n,), generator=draw)
    images[marked, 0, 0, 0] = 2 * MARK
    return images, targets


def snapshot(training):
    parts = (training.model, training.optimizer, training.ema.module)
    return [copy.deepcopy(part.state_dict()) for part in parts]


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"lr"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("update_freq", [1, 2])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    tiny_config, cpu, train_one_epoch, loader, precision, fault, clip_grad, update_freq
):
    """The squares of 1e30, of which Adam's second moments are made, are infinite."""
    images, targets = images_and_targets(24, marked=[8])  # in the first micro-batch of the second step
    config = tiny_config(
        epochs=1, update_freq=update_freq, clip_grad=clip_grad, model_ema=True, **PRECISIONS[precision]
    )
    training = Training.build(Net(fault), config, cpu, iterations_per_epoch=3 * update_freq)
    states, scale = [], training.scaler.get_scale()
    progress = Progress("", total=0, batch_size=1, visible=False)
    progress.advance = lambda _: states.append(snapshot(training))
    figures = train_epoch(training, loader(images, targets, 8 // update_freq), progress, Keeper(training, Notice()))
    assert_same(states[0], states[1])
    assert not torch.equal(states[1][0]["layers.2.weight"], states[2][0]["layers.2.weight"])
    assert figures["skipped_steps"] == 1
    assert 0 < figures["loss"] < 100
    assert (training.step, training.bad_steps) == (3, 0)
    assert all(value.isfinite().all() for state in (states[2][0], states[2][2]) for value in state.values())
    assert training.scaler.get_scale() == (scale / 2 if precision == "float16" else 1.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_too_many_bad_gradients_in_a_row_stop_the_run(tiny_config, cpu, train_one_epoch, loader, precision):
    images, targets = images_and_targets(32, marked=[0, 4, 12, 16, 20])  # never three in a row, but at the end
    config = tiny_config(max_bad_steps=2, **PRECISIONS[precision])
    training = Training.build(Net(float("inf")), config, cpu, iterations_per_epoch=8)
    with pytest.raises(NonFiniteLossError, match=r"in 3 step\(s\).*the gradient, in epoch 0, micro-batches 5 to 5"):
        train_one_epoch(training, loader(images, targets, 4))
    assert all(p.isfinite().all() for p in training.model.parameters())


def test_losses_and_gradients_count_together(tiny_config, cpu, train_one_epoch, loader):
    images, targets = images_and_targets(12, marked=[0])
    images[4:12] = float("nan")
    training = Training.build(Net(float("nan")), tiny_config(max_bad_steps=2), cpu, iterations_per_epoch=3)
    with pytest.raises(NonFiniteLossError, match=r"in 3 step\(s\) in a row, the last time the loss"):
        train_one_epoch(training, loader(images, targets, 4))


def train_part(rank, config, marked, store, results):
    torch.set_num_threads(1)  # a forked process has lost the threads of its parent
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    images, targets = images_and_targets(24, marked=marked if rank == 1 else [])
    sampler = SimpleNamespace(set_epoch=lambda epoch, start: None)
    batches = [(images[i : i + 4], targets[i : i + 4]) for i in range(0, 24, 4)]
    loader = type("Loader", (list,), {"sampler": sampler, "batch_size": 4})(batches)
    training = Training.build(Net(float("inf")), config, World(torch.device("cpu"), rank, 2), len(batches))
    progress = Progress("", total=0, batch_size=1, visible=False)
    train_epoch(training, loader, progress, Keeper(training, Notice()))
    results.put((training.skipped, [p.detach().numpy() for p in training.model.parameters()]))
    dist.destroy_process_group()


@pytest.mark.parametrize("update_freq", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_processes_skip_the_step_of_which_one_has_a_bad_gradient(tiny_config, tmp_path, precision, update_freq):
    config = tiny_config(epochs=1, update_freq=update_freq, **PRECISIONS[precision])
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(train_part, (config, [0], tmp_path / "store", results), nprocs=2, start_method="fork")
    (skipped, weights), (skipped_there, weights_there) = results.get(), results.get()
    assert skipped == skipped_there == 1
    for p, q in zip(weights, weights_there, strict=True):
        torch.testing.assert_close(torch.from_numpy(p), torch.from_numpy(q), rtol=0, atol=0)
        assert torch.from_numpy(p).isfinite().all()
