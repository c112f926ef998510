"""Shears and translations are Pillow's."""

import numpy as np
import pytest
from PIL import Image

from kernelwarehouse.datasets.lines import FASTER, shift_columns, shift_rows

FILL = (124, 116, 104)


@pytest.mark.parametrize("slope", [0.0, 0.3, -0.117])
@pytest.mark.parametrize("shift", [0.0, 31.4, -12.5, 5.0, 999.0])
def test_the_values_are_those_of_pillow(slope, shift):
    pixels = np.random.default_rng(0).integers(256, size=(53, 71, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for ours, matrix in ((shift_rows, (1, slope, shift, 0, 1, 0)), (shift_columns, (1, 0, 0, slope, 1, shift))):
        expected = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)
        difference = np.abs(np.asarray(ours(image, slope, shift, FILL)).astype(int) - np.asarray(expected))
        assert difference.max() <= 1  # where a value in float32 falls to the other side of a whole number
        assert difference.mean() < 0.01


@pytest.mark.parametrize("operation", FASTER, ids=lambda operation: operation.__name__)
def test_each_operation_is_that_of_timm(operation):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(53, 71, 3), dtype=np.uint8))
    arguments = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    value = -17.3 if operation.__name__.endswith("abs") else 0.22
    ours, theirs = (np.asarray(f(image, value, **dict(arguments))) for f in (FASTER[operation], operation))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
