"""Networks timed in turn, of which the faster memory layout counts."""

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernelwarehouse.models.tuning import measure

from .clock import arithmetic, step
from .networks import Contender


def time_case(
    networks: Mapping[Contender, tuple[nn.Module, Tensor]], mode: str, precision: str, rounds: int, warm_up: int = 1
) -> dict[Contender, list[float]]:
    """Seconds of every round of networks on their images; of the layouts of a network, only the faster is kept.

    Raises:
        SystemExit: A batch that does not fit in memory, or that a network cannot train on.
    """
    steps = {contender: step(*network, mode == "train", precision) for contender, network in networks.items()}
    images = next(x for _, x in networks.values())
    try:
        with arithmetic(precision):
            seconds = measure(steps, rounds, images.device, warm_up)
    except (ValueError, torch.OutOfMemoryError) as e:  # BatchNorm refuses a single value per channel
        raise SystemExit(f"error: {mode} with batches of {len(images)}: {e}") from e
    fastest: dict[str, Contender] = {}
    for contender in sorted(seconds, key=lambda c: statistics.median(seconds[c])):
        fastest.setdefault(contender.name, contender)
    return {contender: seconds[contender] for contender in seconds if fastest[contender.name] is contender}
