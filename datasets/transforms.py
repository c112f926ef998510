"""From a stored image to the tensor a network sees, by timm's transforms wherever they apply.

Three kinds of images differ in what may be done to them. Photographs are cropped at random, by upstream's recipes.
Thumbnails (CIFAR, Fashion-MNIST) already fill their frame: they are padded and shifted instead, and evaluated whole.
The embedded digits are tensors of 8×8 pixels, which only a slight affine motion leaves legible.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AutoAugment, RandAugment, posterize
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import resized_crop

from kernelwarehouse.schema import Config, ConfigError, RunConfig

from . import digits
from .lines import FASTER

THUMBNAILS = ("CIFAR10", "CIFAR100", "FMNIST")


def train_transform(config: Config) -> Callable[[Any], Tensor]:
    """Return the random transform of training images, to (in_chans, input_size, input_size) floats.

    The fields that shape it: aa, color_jitter, reprob, remode, recount, train_interpolation, traditional_preprocess
    and imagenet_default_mean_and_std. DIGITS know only reprob, remode and recount of them.

    Raises:
        ConfigError: Photographs and thumbnails for a network that takes neither 1 nor 3 channels, or an augmentation
            policy that timm does not know.
    """
    run, size = config.run, config.model.input_size
    erase = 0.0 if run.traditional_preprocess else run.reprob
    erasing = [RandomErasing(erase, mode=run.remode, max_count=run.recount, device="cpu")] if erase else []
    if run.data_set == "DIGITS":
        move = T.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=T.InterpolationMode.BILINEAR)
        return T.Compose([T.Resize(size), move, T.Normalize(digits.MEAN, digits.STD), *erasing, _Channels(config)])
    augment = None if run.traditional_preprocess else run.aa
    jitter = None if run.traditional_preprocess else (run.color_jitter or None)
    try:
        _, policy, _ = create_transform(
            size,
            is_training=True,
            auto_augment=augment,
            color_jitter=jitter,
            interpolation=run.train_interpolation,
            separate=True,
            **_statistics(run),
        )
    except (AssertionError, KeyError, ValueError, IndexError) as e:
        raise ConfigError(f"field 'aa': timm knows no augmentation policy {run.aa!r} ({e})") from e
    for step in policy.transforms:
        _replace_operations(step)
    if run.data_set in THUMBNAILS:
        crop = [T.Resize(size), T.RandomCrop(size, padding=size // 8)]
    else:
        crop = [_to_tensor, RandomResizedCrop(size, interpolation=run.train_interpolation)]
    # The policies draw on Pillow's images; without one, an image stays a tensor.
    policy = [_to_pil, *policy.transforms] if policy.transforms else []
    finish = [_Normalise(**_statistics(run)), *erasing, _Channels(config)]
    return T.Compose([*crop, T.RandomHorizontalFlip(), *policy, *finish])


def eval_transform(config: Config) -> Callable[[Any], Tensor]:
    """Return the fixed transform of evaluation images, to (in_chans, input_size, input_size) floats.

    Photographs are resized to input_size / crop_pct on their short side and cropped in the centre; from 384 pixels,
    where crop_pct is not given, they are squeezed to the square as a whole.

    Raises:
        ConfigError: Photographs and thumbnails for a network that takes neither 1 nor 3 channels.
    """
    run, size = config.run, config.model.input_size
    if run.data_set == "DIGITS":
        return T.Compose([T.Resize(size), T.Normalize(digits.MEAN, digits.STD), _Channels(config)])
    whole = run.crop_pct is None and (size >= 384 or run.data_set in THUMBNAILS)
    evaluate = create_transform(
        size,
        interpolation="bicubic",
        crop_pct=1.0 if whole else run.crop_pct or 224 / 256,
        crop_mode="squash" if whole else "center",
        **_statistics(run),
    )
    return T.Compose([_to_pil, evaluate, _Channels(config)])


def viewable(images: Tensor, config: Config) -> Tensor:
    """Undo the normalisation of network inputs, for people: (B, in_chans, H, W) → (B, 1 or 3, H, W), from 0 to 1."""
    images = images[:, : 3 if images.shape[1] == 3 else 1].float()
    if config.run.data_set == "DIGITS":
        mean, std = torch.tensor([digits.MEAN]), torch.tensor([digits.STD])
    else:
        mean, std = (torch.tensor(values) for values in _statistics(config.run).values())
    if images.shape[1] == 1:  # the average of the colours
        mean, std = mean.mean(), std.mean()
    mean, std = (values.to(images.device).view(-1, 1, 1) for values in (mean, std))
    return (images * std + mean).clamp(0, 1)


def _statistics(run: RunConfig) -> dict[str, tuple[float, ...]]:
    if run.imagenet_default_mean_and_std:
        return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, drawn the same way and resized by torch: to the values of Pillow, in a third of its time."""

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) → (3, *size), bytes."""
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        modes = self.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple) else modes
        return resized_crop(image, top, left, height, width, list(self.size), mode, antialias=True)


class _Normalise:
    """From an image of bytes to floats of mean 0 and deviation 1, in one pass."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        return _to_tensor(image).contiguous().float().mul_(self.scale).add_(self.shift)


def _to_tensor(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else pil_to_tensor(image.convert("RGB"))


def _to_pil(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        return Image.merge("RGB", [Image.fromarray(channel) for channel in image.numpy()])
    return image.convert("RGB")


class _Channels:
    """Gives a normalised image the channels that the network takes: grey repeated, or colours averaged to grey."""

    def __init__(self, config: Config):
        self.channels = config.model.in_chans
        if config.run.data_set != "DIGITS" and self.channels not in (1, 3):
            raise ConfigError(f"field 'in_chans': images have 1 or 3 channels, the model takes {self.channels}")

    def __call__(self, image: Tensor) -> Tensor:
        if self.channels == 1:
            return image.mean(0, keepdim=True)
        return image.expand(self.channels, -1, -1)


def _replace_operations(step: Any) -> None:
    """Let a timm policy shear and translate faster, and posterize to 0 bits, as it asks for and Pillow 13 refuses."""
    if isinstance(step, RandAugment):
        operations = step.ops
    elif isinstance(step, AutoAugment):
        operations = [op for pair in step.policy for op in pair]
    else:
        operations = getattr(step, "ops", [])  # AugMix
    for op in operations:
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
        elif op.kwargs["resample"] == Image.Resampling.BICUBIC:
            op.aug_fn = FASTER.get(op.aug_fn, op.aug_fn)


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep == 0:  # black, as in the Pillow that the published recipes ran on
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep)
