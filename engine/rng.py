"""The random generators of a process: seeded for each epoch, kept in checkpoints, and restored."""

import random
from typing import Any

import numpy as np
import torch
from timm.utils.random import random_seed


def seed_generators(*entropy: int) -> None:
    """Seed Python, NumPy and torch on all devices from several numbers, such as a seed, an epoch and a rank."""
    random_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def generator_states() -> dict[str, Any]:
    """Return the state of every generator that training draws from, in plain values and tensors."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - mixup draws from it
    twister = numpy["state"]
    states = {
        "python": [version, list(internal), gauss],
        "numpy": [numpy["bit_generator"], twister["key"].tolist(), twister["pos"], numpy["has_gauss"], numpy["gauss"]],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Continue from what `generator_states` returned; a GPU's state is left aside where there is no GPU."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
