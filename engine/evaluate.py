"""Evaluation: top-1, top-5 and loss over all held-out images, each counted once whatever the number of processes."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernelwarehouse.schema import RunConfig

from .amp import autocast
from .distributed import World


@dataclass(frozen=True)
class Metrics:
    """The result of an evaluation; as text, the line that every evaluation ends with.

    Attributes:
        acc1: Share of images whose class has the highest logit, in percent.
        acc5: Share of images whose class is among the five highest, in percent.
        loss: Mean cross-entropy, without label smoothing.
        images: Number of images.
        seconds: Time for them, loading included.
    """

    acc1: float
    acc5: float
    loss: float
    images: int
    seconds: float

    def __str__(self) -> str:
        return f"Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, run: RunConfig, world: World) -> Metrics:
    """Evaluate `model`, at the temperature it has, on what the loaders of all processes give together.

    Args:
        model: The network itself, not wrapped for data parallelism: processes may have different numbers of batches.
        loader: This process's batches of images (B, C, H, W) and class indices (B,).
        run: For mixed precision.
        world: This process's place.
    """
    start = time.perf_counter()
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for images, targets in loader:
        targets = targets.to(world.device, non_blocking=True)
        with autocast(run, world.device):
            logits = model(images.to(world.device, non_blocking=True))
        sums += _batch_sums(logits.float(), targets)
    acc1, acc5, loss, images = world.reduce(sums).tolist()
    return Metrics(100 * acc1 / images, 100 * acc5 / images, loss / images, int(images), time.perf_counter() - start)


def _batch_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Right at first, right among five, loss and number of images (4,) of a batch."""
    hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(targets))]).double()
