"""BatchNorm's statistics estimated anew, since their running averages lag behind weights that change quickly."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from ..configs.schema import RunConfig
from ..datasets import FinishingLoader, TrainSampler, begin_epoch
from .amp import autocast
from .distributed import World
from .freeze import train_mode
from .state import Training

# No more than this share of an epoch's batches, so that it costs a small part of an epoch's time.
LARGEST_SHARE = 1 / 10


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Tensor], run: RunConfig | None = None, world: World | None = None
) -> None:
    """Replace the statistics of every BatchNorm in `model` by their means over some batches.

    All else computes as in evaluation, so these are the statistics that an evaluation needs. Modes and momenta are left
    as they were, and so are norms that are frozen or keep no statistics.

    Args:
        model: The network itself, not wrapped for data parallelism.
        batches: Images (B, C, H, W) on the model's device; in each process its own, equally many.
        run: For mixed precision; None for none.
        world: Averages the statistics of all processes, each of which has to call this; None for this process alone.
    """
    modes = {module: module.training for module in model.modules()}
    train_mode(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    norms = [norm for norm in norms if norm.running_mean is not None]
    model.eval()
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = None  # torch then takes the mean over all batches, which it counts
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=norm.get_buffer("running_mean").device)
    seen = 0
    try:
        for images in batches if norms else ():
            with autocast(run, images.device) if run is not None else torch.autocast("cpu", enabled=False):
                model(images)
            seen += 1
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
        for module, mode in modes.items():
            module.training = mode
    if seen and world is not None and world.size > 1:
        for norm in norms:
            _average(norm, world)


def _average(norm: nn.modules.batchnorm._BatchNorm, world: World) -> None:
    """Give each process the mean of all means, and the variance about it."""
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    means, squares = world.reduce(torch.stack([mean, var + mean.square()]).double()) / world.size
    mean.copy_(means)
    var.copy_(squares - means.square())


def recalibrate_training(training: Training, loader: FinishingLoader[TrainSampler]) -> None:
    """Estimate the statistics of a model in training, and of its moving average, over `run.recalibrate_bn` batches.

    They are the first ones of the next epoch, without mixup. What follows in the training does not depend on it, but
    for the running averages that are saved.
    """
    run = training.run
    count = min(run.recalibrate_bn, max(2, int(LARGEST_SHARE * len(loader)))) if run.recalibrate_bn else 0
    if not count:
        return
    models = [training.model] if training.ema is None else [training.model, training.ema.module]
    for model in models:
        begin_epoch(loader, training.epoch)
        images = (images.to(training.world.device, non_blocking=True) for images, _ in islice(loader, count))
        if run.channels_last:
            images = (batch.to(memory_format=torch.channels_last) for batch in images)
        recalibrate(model, images, run, training.world)
