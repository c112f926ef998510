"""Measuring, before a run, which implementation each layer is computed by fastest."""

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..configs.schema import Config, ConfigError
from ..models.tuning import Layer, recall, tune, tuned_layers
from .amp import autocast
from .distributed import World
from .terminal import say


def tune_for(model: nn.Module, config: Config, world: World, *, training: bool) -> None:
    """Let "auto" take what is fastest for the batches of a run; all processes take what the first one found.

    Args:
        model: The network on its device, in its memory layout.
        config: The run's.
        world: This process's place. All measure at a time, as they will compute.
        training: Whether for training, or for evaluation.

    Raises:
        ConfigError: The network has no converted layer.
    """
    start = time.perf_counter()
    images = trial_images(config, config.run.batch_size, world.device)
    try:
        with autocast(config.run, world.device):
            layers = tune(model, images, training=training)
    except ValueError as e:
        raise ConfigError(f"field 'tune': {config.model.model}: {e}") from e
    recall(world.gather(tuned_layers())[0])
    if world.is_main:
        what, seconds = "training" if training else "evaluation", time.perf_counter() - start
        say(f"tuned for {what} in {seconds:.0f} s: {_told(layers)}")


def trial_images(config: Config, count: int, device: torch.device) -> Tensor:
    """Random images (count, in_chans, side, side) as those of a run, always the same ones."""
    model, generator = config.model, torch.Generator(device).manual_seed(0)
    side = model.input_size
    images = torch.randn(count, model.in_chans, side, side, device=device, generator=generator)
    return images.to(memory_format=torch.channels_last) if config.run.channels_last else images


def _told(layers: Sequence[Layer]) -> str:
    count = sum(layer.count for layer in layers)
    others = Counter()
    for layer in layers:
        others[layer.taken] += layer.count
    as_estimated = others.pop("auto", 0)
    named = ", ".join(f"{name} {times}" for name, times in others.most_common())
    told = f"{as_estimated} of {count} layers are computed as estimated" + (f", others by {named}" if named else "")
    if not all(layer.seconds for layer in layers):
        return told  # some were known
    before = sum(layer.count * layer.seconds["auto"] for layer in layers)
    now = sum(layer.count * layer.seconds[layer.taken] for layer in layers)
    return f"{told}; {1e3 * now:,.1f} instead of {1e3 * before:,.1f} ms for a batch in all of them"
