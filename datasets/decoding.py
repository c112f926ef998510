"""From the bytes of an image file to pixels of 8 bits, whatever its format, the depth of its samples and its EXIF."""

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor

JPEG = b"\xff\xd8\xff"
ORIENTATION, SAMPLE_FORMAT, UNSIGNED, WHITE_IS_ZERO = 274, 339, (1, 4), 0
# Formats, and Pillow's modes in them, whose samples fill 16 bits: Pillow scales those of 9 to 15 bits itself.
SIXTEEN_BITS = {("PNG", "I"), ("PNG", "I;16"), ("PPM", "I"), ("JPEG2000", "I;16"), ("IM", "I;16")}
SIXTEEN_BITS |= {("IM", "I;16L"), ("IM", "I;16B")}
# What makes of an image that was turned by its EXIF orientation the stored one again.
UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def decode(data: bytes, exif: Literal["apply", "ignore"] = "ignore") -> Tensor:
    """Decode an image of any format to a tensor (3, H, W) of bytes.

    JPEG goes through torchvision, which is faster than Pillow and gives the same values. Samples of more than 8 bits
    are scaled by the white that their format states.

    Args:
        data: The file's content.
        exif: Turn and mirror the image as its EXIF orientation says, or give it as it is stored; in every format.

    Raises:
        ValueError: Its samples are signed, floats, or of a format that states no white.
        Exception: It is damaged; of the decoder's own type.
    """
    if data.startswith(JPEG):
        pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_image(pixels, mode=ImageReadMode.RGB, apply_exif_orientation=exif == "apply")
    image = Image.open(io.BytesIO(data))
    tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    stored = image.tag_v2.get(ORIENTATION) if tiff else None
    result = _to_rgb(image)
    if tiff and exif == "ignore" and stored in UNTURN:  # Pillow turns TIFF, and no other format, when it loads it
        result = result.transpose(UNTURN[stored])
    elif not tiff and exif == "apply":
        result.info = image.info
        result = ImageOps.exif_transpose(result)
    return pil_to_tensor(result)


def _to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in 8 bits for each of three colours; Pillow's own conversion would clip wider samples at 255."""
    wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        signed = not set(image.tag_v2.get(SAMPLE_FORMAT, (1,))) <= set(UNSIGNED)
        white = 0 if signed else 2 ** max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) - 1
        inverted = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    else:
        signed, inverted = False, False
        white = 65535 if (image.format, image.mode) in SIXTEEN_BITS else 0
    if not (wide or signed):
        return image.convert("RGB")
    if not white:
        raise ValueError(
            f"{image.format} of Pillow's mode {image.mode!r}: its samples are signed or floats or of a range that the "
            "format does not state; convert them to 8 or 16 unsigned bits"
        )
    samples = np.asarray(image)
    # Pillow holds 32 unsigned bits as signed ones.
    samples = (samples.view(np.uint32) if samples.dtype == np.int32 else samples).astype(np.uint64)
    grey = ((samples * 255 + white // 2) // white).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB")
