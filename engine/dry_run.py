"""What a training would be: its plan, its recipe, and estimates of memory and time, before anything is started."""

import json
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models import plans
from .amp import autocast
from .optim import build_optimizer
from .state import Training
from .tuning import trial_images

# A CPU takes time in proportion to the images, so a few of them tell; a GPU is tried with the whole micro-batch.
CPU_IMAGES = 8
MIB = 2**20


def describe(training: Training) -> str:
    """Describe a training by text: plan, recipe, parameters, and estimates from one trial micro-batch.

    The estimates know the computation alone, neither loading nor communication, and at a CPU no allocator's overhead.
    The weights of `training` stay as they are; its normalisation statistics do not.
    """
    run, schedule, model = training.run, training.schedule, training.model
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    seconds, saved = _try_micro_batch(training)
    weights = _bytes([*parameters, *model.buffers()])
    gradients = _bytes(p for p in parameters if p.requires_grad)
    copies = _optimizer_copies(training)
    average = weights if training.ema is not None else 0
    total = weights + gradients * (1 + copies) + average + saved
    epoch = seconds * schedule.iterations_per_epoch
    batch = run.batch_size * run.update_freq * training.world.size
    lines = [
        "\n\n".join(map(str, plans(model))) or f"{training.config.model.model} is static: nothing is converted",
        json.dumps(training.config.to_fields(), indent=4),
        f"parameters: {sum(p.numel() for p in parameters):,}, of which {trained:,} are trained",
        f"total batch: {batch} = {run.batch_size} images × {run.update_freq} micro-batches × {training.world.size} "
        f"process(es); {schedule.steps_per_epoch} steps an epoch, {schedule.total_steps} in all",
        f"memory of a process, about: {total / MIB:,.1f} MiB = weights {weights / MIB:,.1f} + gradients "
        f"{gradients / MIB:,.1f} + optimizer {gradients * copies / MIB:,.1f} + average {average / MIB:,.1f} + "
        f"activations {saved / MIB:,.1f}",
        f"time to compute, about: {seconds:.3g} s a micro-batch, {epoch / 60:.3g} min an epoch, "
        f"{epoch * run.epochs / 3600:.3g} h in all, on {training.world.device.type}",
    ]
    return "\n\n".join(lines)


def _try_micro_batch(training: Training) -> tuple[float, int]:
    """Seconds for forward and backward of a micro-batch, and bytes that its forward pass keeps for the backward."""
    run, device = training.run, training.world.device
    count = run.batch_size if device.type == "cuda" else min(run.batch_size, CPU_IMAGES)
    images = trial_images(training.config, count, device)
    known = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward_and_backward() -> float:
        start = _now(device)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(run, device):
            loss = training.model(images).float().square().mean()
        loss.backward()
        return _now(device) - start

    training.model.train()
    forward_and_backward()  # prepares the device
    seconds = forward_and_backward()
    training.optimizer.zero_grad()
    return seconds * run.batch_size / count, sum(kept.values()) * run.batch_size // count


def _optimizer_copies(training: Training) -> int:
    """How many tensors the optimizer keeps beside each weight, asked of one that trains a single weight."""
    weight = nn.Parameter(torch.zeros(2, 2, device=training.world.device))
    holder = nn.Module()
    holder.weight = weight
    optimizer = build_optimizer(holder, replace(training.run, layer_decay=1.0))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return sum(isinstance(v, Tensor) and v.shape == weight.shape for v in optimizer.state[weight].values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
