"""The names that are registered with timm, as cases (name, arguments, side of its images): small, and whole if slow."""

import pytest

from kernelwarehouse.models import get_operator
from kernelwarehouse.models.build import registered_models

# By the beginning of a backbone's name: arguments that make it small, and the side of its images.
SMALL = {
    "resnet": ({"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 64),
    "mobilenetv2": ({}, 32),
    "convnext": ({"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, 64),
    "deit": ({"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 32}, 32),
}
FAMILY = {name: get_operator(operator).presets[name].backbone for name, operator in registered_models().items()}


def _cases():
    seen = set()
    for name, operator in registered_models().items():
        family = next((key for key in SMALL if FAMILY[name].startswith(key)), FAMILY[name])
        if (operator, family) not in seen:
            seen.add((operator, family))
            yield pytest.param((name, *SMALL.get(family, ({}, 64))), id=name)
        yield pytest.param((name, {}, 224 if family == "deit" else 96), id=f"{name}-whole", marks=pytest.mark.slow)


CASES = list(_cases())
