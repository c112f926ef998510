"""Evaluation: top-1, top-5 and loss over all held-out images, each counted once whatever the number of processes.

An image may have several acceptable labels, or none; one without is left out.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..configs.schema import ConfigError, RunConfig
from .amp import autocast
from .distributed import World

# Images (B, C, H, W) and class indices (B,), or (B, L) with several acceptable ones filled up with −1.
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Metrics:
    """The result of an evaluation; as text, the line that every evaluation ends with.

    Attributes:
        acc1: Share of images whose class has the highest logit, in percent.
        acc5: Share of images whose class is among the five highest, in percent.
        loss: Mean cross-entropy, without label smoothing; of several acceptable classes, of their sum.
        images: Number of images that have a label.
        seconds: Time for all, loading included.
        unlabelled: Number of images left out.
    """

    acc1: float
    acc5: float
    loss: float
    images: int
    seconds: float
    unlabelled: int = 0

    def __str__(self) -> str:
        return f"Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"


@dataclass(frozen=True)
class Predictions:
    """What was predicted for each image, in the order of the data set.

    Attributes:
        labels: Acceptable classes, (N, L), filled up with −1; an image without any was left out.
        classes: The most probable classes, (N, up to 5), the first one first.
        probabilities: Their probabilities, of the same shape.
    """

    labels: Tensor
    classes: Tensor
    probabilities: Tensor


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Batches, run: RunConfig, world: World) -> Metrics:
    """Evaluate `model`, at the temperature it has, on what the loaders of all processes give together.

    Args:
        model: The network itself, not wrapped for data parallelism: processes may have different numbers of batches.
        loader: This process's batches of images (B, C, H, W) and class indices (B,), or (B, L) with several
            acceptable ones filled up with −1.
        run: For mixed precision.
        world: This process's place.
    """
    start = time.perf_counter()
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    for logits, labels in _outputs(model, loader, run, world):
        sums += _batch_sums(logits, labels)
    return _metrics(world.reduce(sums), start)


@torch.inference_mode()
def predict(model: nn.Module, loader: Batches, run: RunConfig, world: World) -> tuple[Metrics, Predictions]:
    """Evaluate as `evaluate` does, and keep the predictions of all processes, which each of them returns.

    Args:
        model: As for `evaluate`.
        loader: As for `evaluate`; its sampler is an `EvalSampler`.
        run: As for `evaluate`.
        world: As for `evaluate`.
    """
    start = time.perf_counter()
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    found = []
    for logits, labels in _outputs(model, loader, run, world):
        sums += _batch_sums(logits, labels)
        top = logits.softmax(dim=1).topk(min(5, logits.shape[1]))
        found.append([column.cpu() for column in (labels, top.indices, top.values)])
    parts = world.gather([torch.cat(batches) for batches in zip(*found, strict=True)])
    columns = []
    for column in zip(*filter(None, parts), strict=True):  # without processes that had no images
        rows = column[0].new_empty(sum(map(len, column)), column[0].shape[1])
        for rank, part in enumerate(column):
            rows[rank :: world.size] = part
        columns.append(rows)
    return _metrics(world.reduce(sums), start), Predictions(*columns)


@runtime_checkable
class _Resizable(Protocol):
    """A network of timm's that is made for one size of image."""

    def set_input_size(self, img_size: int) -> None: ...


def at_size(model: nn.Module, size: int) -> nn.Module:
    """Return `model` for images of that side: a copy where it depends on it, as one with position embeddings does."""
    if not isinstance(model, _Resizable):
        return model
    model = copy.deepcopy(model)
    model.set_input_size(img_size=size)
    return model


def _outputs(model: nn.Module, loader: Batches, run: RunConfig, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits (B, C) and labels (B, L) of each batch."""
    model.eval()
    for images, targets in loader:
        labels = targets.to(world.device, non_blocking=True).view(len(targets), -1)
        images = images.to(world.device, non_blocking=True)
        if run.channels_last:
            images = images.to(memory_format=torch.channels_last)
        with autocast(run, world.device):
            logits = model(images)
        yield logits.float(), labels


def _batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Right at first, right among five, loss, number of images and number without a label (5,) of a batch."""
    labelled = (labels >= 0).any(dim=1)
    logits, labels = logits[labelled], labels[labelled]
    top = logits.topk(min(5, logits.shape[1])).indices
    hits = (top[:, :, None] == labels[:, None, :]).any(dim=2)
    accepted = logits.log_softmax(dim=1).gather(1, labels.clamp(min=0)).masked_fill(labels < 0, -torch.inf)
    loss = -accepted.logsumexp(dim=1).sum()
    counts = (hits[:, 0].sum(), hits.any(dim=1).sum(), loss, labelled.sum(), (~labelled).sum())
    return torch.stack([count.double() for count in counts])


def _metrics(sums: Tensor, start: float) -> Metrics:
    acc1, acc5, loss, images, unlabelled = sums.tolist()
    if not images:
        raise ConfigError("nothing to evaluate: not one image has a label and can be read")
    seconds = time.perf_counter() - start
    return Metrics(100 * acc1 / images, 100 * acc5 / images, loss / images, int(images), seconds, int(unlabelled))
