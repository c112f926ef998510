"""From a stored image to the tensor a network sees, by timm's transforms wherever they apply.

A loader's workers take all steps but the last, which `Finish` does for a whole batch.

Three kinds of images differ in what may be done to them. Photographs are cropped at random, by upstream's recipes.
Thumbnails (CIFAR, Fashion-MNIST) already fill their frame: they are padded and shifted instead, and evaluated whole.
The embedded digits are tensors of 8×8 pixels, which only a slight affine motion leaves legible.
"""

import random
from collections.abc import Callable
from typing import Any, cast

import torch
from PIL import Image
from timm.data import random_erasing
from timm.data.auto_augment import AutoAugment, RandAugment, posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import resize

from ..configs.schema import Config, ConfigError
from . import digits
from .finish import Erasable, Finish, statistics
from .lines import FASTER

THUMBNAILS = ("CIFAR10", "CIFAR100", "FMNIST")


def train_transform(config: Config) -> Callable[[Any], Tensor]:
    """Return the random transform of training images, to (in_chans, input_size, input_size) floats.

    Raises:
        ConfigError: As `train_steps` and `Finish`.
    """
    return T.Compose([train_steps(config), Finish(config)])


def eval_transform(config: Config) -> Callable[[Any], Tensor]:
    """Return the fixed transform of evaluation images, to (in_chans, input_size, input_size) floats.

    Raises:
        ConfigError: As `Finish`.
    """
    return T.Compose([eval_steps(config), Finish(config)])


def train_steps(config: Config) -> Callable[[Any], Tensor | Erasable]:
    """Return the worker's part of `train_transform`: to bytes (3, input_size, input_size), and what to erase of them.

    The fields that shape it: aa, color_jitter, reprob, recount, train_interpolation, traditional_preprocess and
    imagenet_default_mean_and_std. DIGITS know only reprob, remode and recount, and come out finished.

    Raises:
        ConfigError: An augmentation policy that timm does not know.
    """
    run, size = config.run, config.model.input_size
    erase = 0.0 if run.traditional_preprocess else run.reprob
    if run.data_set == "DIGITS":
        erasing = random_erasing.RandomErasing(erase, mode=run.remode, max_count=run.recount, device="cpu")
        move = T.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=T.InterpolationMode.BILINEAR)
        return T.Compose([T.Resize(size), move, T.Normalize(digits.MEAN, digits.STD), erasing, _Repeat(config)])
    augment = None if run.traditional_preprocess else run.aa
    colours = statistics(run)
    jitter = None if run.traditional_preprocess else (run.color_jitter or None)
    try:
        parts = create_transform(
            size,
            is_training=True,
            auto_augment=augment,
            color_jitter=jitter,  # pyright: ignore[reportArgumentType] - None is timm's word for none
            interpolation=run.train_interpolation,
            separate=True,
            mean=colours.mean,  # policies fill what comes from outside with it
            std=colours.std,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as e:
        raise ConfigError(f"field 'aa': timm knows no augmentation policy {run.aa!r} ({e})") from e
    _, policy, _ = cast("tuple[T.Compose, T.Compose, T.Compose]", parts)
    for step in policy.transforms:
        _replace_operations(step)
    if run.data_set in THUMBNAILS:
        crop = [T.Resize(size), T.RandomCrop(size, padding=size // 8)]
    else:
        crop = [_to_tensor, RandomResizedCrop(size, interpolation=run.train_interpolation)]
    # The policies draw on Pillow's images; without one, an image stays a tensor.
    flip, to_policy = T.RandomHorizontalFlip(), [_to_pil] if policy.transforms else []
    erasing = [RandomErasing(erase, max_count=run.recount)] if erase else []
    return T.Compose([*crop, *to_policy, flip, *policy.transforms, _to_tensor, *erasing])


def eval_steps(config: Config) -> Callable[[Any], Tensor]:
    """Return the worker's part of `eval_transform`: to bytes (3, input_size, input_size); DIGITS come out finished.

    Photographs are resized to input_size / crop_pct on their short side and cropped in the centre; from 384 pixels,
    where crop_pct is not given, they are squeezed to the square as a whole.
    """
    run, size = config.run, config.model.input_size
    if run.data_set == "DIGITS":
        return T.Compose([T.Resize(size), T.Normalize(digits.MEAN, digits.STD), _Repeat(config)])
    whole = run.crop_pct is None and (size >= 384 or run.data_set in THUMBNAILS)
    evaluate = create_transform(
        size,
        interpolation="bicubic",
        crop_pct=1.0 if whole else run.crop_pct or 224 / 256,
        crop_mode="squash" if whole else "center",
        use_prefetcher=True,  # stop at bytes
    )
    return T.Compose([_to_pil, evaluate])


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, drawn the same way and resized by torch: as by Pillow, in a fraction of its time."""

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) → (3, *size), bytes."""
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        # timm rounds sides to 0 where an image has a pixel or two.
        height, width = max(height, 1), max(width, 1)
        top, left = min(top, image.shape[-2] - height), min(left, image.shape[-1] - width)
        modes = self.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple) else modes
        crop = image[None, :, top : top + height, left : left + width]
        # With the colours of a pixel side by side, as they are decoded, torch takes its fastest way.
        return resize(crop.contiguous(memory_format=torch.channels_last), list(self.size), mode, antialias=True)[0]


class RandomErasing(random_erasing.RandomErasing):
    """timm's random erasing as far as it draws rectangles; each gets a seed, from which `Finish` fills it."""

    def __init__(self, probability: float, max_count: int):
        super().__init__(probability, mode="const", max_count=max_count, device="cpu")

    def __call__(self, image: Tensor) -> Erasable:
        """Bytes (3, H, W) → the same, and up to `max_count` rectangles."""
        drawn = [(*edges, random.getrandbits(62)) for edges in super().__call__(_Witness(image)).rectangles]
        return Erasable(image, torch.tensor(drawn + [(0,) * 5] * (self.max_count - len(drawn))))


class _Witness:
    """Stands in for an image, and notes which rectangles of it are overwritten."""

    dtype = torch.float32

    def __init__(self, image: Tensor):
        self.size = image.size
        self.rectangles: list[tuple[int, int, int, int]] = []

    def __setitem__(self, where: tuple[slice, slice, slice], _: Tensor) -> None:
        rows, columns = where[1:]
        self.rectangles.append((rows.start, rows.stop, columns.start, columns.stop))


def _to_tensor(image: Image.Image | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def _to_pil(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        return Image.fromarray(image.permute(1, 2, 0).numpy())
    return image.convert("RGB")


class _Repeat:
    """Gives a grey image as many channels as the network takes."""

    def __init__(self, config: Config):
        self.channels = config.model.in_chans

    def __call__(self, image: Tensor) -> Tensor:
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
