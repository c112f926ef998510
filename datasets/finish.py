"""The last part of a photograph's transform, done for a whole batch on the training device.

Workers hand on bytes: a quarter of what floats would take to collate, to pin and to copy to a GPU.
"""

from typing import NamedTuple

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor

from ..configs.schema import Config, ConfigError, RunConfig
from . import digits


class Erasable(NamedTuple):
    """A photograph, or a batch of them, with rectangles that are still to be erased.

    Attributes:
        pixels: Bytes, ([B,] 3, H, W).
        rectangles: Each one's top, bottom, left, right and seed, ([B,] N, 5) of int64; rows of zeros are none.
    """

    pixels: Tensor
    rectangles: Tensor


class Statistics(NamedTuple):
    """The mean and the standard deviation of each colour over many photographs."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Finish:
    """Makes what a network takes of what a loader's workers hand on: normalises, erases, and averages colours to grey.

    What fills a rectangle is drawn from that rectangle's own seed, so it knows neither batches nor processes; only
    GPUs draw other noise than CPUs.

    Args:
        config: The run's normalisation and `remode`, and the model's `in_chans`.
        device: Where to do it.

    Raises:
        ConfigError: Photographs and thumbnails for a network that takes neither 1 nor 3 channels.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        self.mode, self.grey = config.run.remode, config.model.in_chans == 1
        if config.run.data_set != "DIGITS" and config.model.in_chans not in (1, 3):
            raise ConfigError(f"field 'in_chans': images have 1 or 3 channels, the model takes {config.model.in_chans}")
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in statistics(config.run))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.device, self.generator = device, torch.Generator(device)

    def __call__(self, images: Tensor | Erasable) -> Tensor:
        """([B,] 3, H, W) of bytes → ([B,] in_chans, H, W) of float32 on the device; floats are finished already."""
        pixels, rectangles = images if isinstance(images, Erasable) else (images, None)
        pixels = pixels.to(self.device, non_blocking=True)
        if pixels.is_floating_point():
            return pixels
        result = pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(self.scale).add_(self.shift)
        if rectangles is not None:
            batch = result.view(-1, *result.shape[-3:])
            for image, drawn in zip(batch, rectangles.view(len(batch), -1, 5).tolist(), strict=True):
                for top, bottom, left, right, seed in drawn:
                    self._fill(image[:, top:bottom, left:right], seed)
        return result.mean(-3, keepdim=True) if self.grey else result

    def _fill(self, rectangle: Tensor, seed: int) -> None:
        """As timm does it: with normal noise for each pixel or for each colour, or with the mean."""
        if not rectangle.numel():
            return
        if self.mode == "const":
            rectangle.zero_()
        else:
            shape = rectangle.shape if self.mode == "pixel" else (len(rectangle), 1, 1)
            self.generator.manual_seed(seed)
            rectangle.copy_(torch.randn(shape, generator=self.generator, device=self.device))


def viewable(images: Tensor, config: Config) -> Tensor:
    """Undo the normalisation of network inputs, for people: (B, in_chans, H, W) → (B, 1 or 3, H, W), from 0 to 1."""
    images = images[:, : 3 if images.shape[1] == 3 else 1].float()
    if config.run.data_set == "DIGITS":
        mean, std = torch.tensor([digits.MEAN]), torch.tensor([digits.STD])
    else:
        mean, std = (torch.tensor(values) for values in statistics(config.run))
    if images.shape[1] == 1:  # the average of the colours
        mean, std = mean.mean(), std.mean()
    mean, std = (values.to(images.device).view(-1, 1, 1) for values in (mean, std))
    return (images * std + mean).clamp(0, 1)


def statistics(run: RunConfig) -> Statistics:
    """Return the mean and the deviation of each colour, by which a run normalises photographs, in units of 255."""
    if run.imagenet_default_mean_and_std:
        return Statistics(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Statistics(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
