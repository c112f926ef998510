"""One process or many: where this process computes, and what it does together with the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kernelwarehouse.schema import ConfigError, RunConfig


@dataclass(frozen=True)
class World:
    """This process's place in a run.

    Attributes:
        device: Where it computes.
        rank: Its number, from 0.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def reduce(self, values: Tensor) -> Tensor:
        """Return the sum of every process's `values`."""
        values = values.clone()
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` such that backward averages gradients over the processes."""
        if not dist.is_initialized():
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of the main one: each has updated its own normalisation statistics."""
        if dist.is_initialized():
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def join(run: RunConfig) -> Iterator[World]:
    """Enter the run that torchrun or torch.distributed.launch started, or one of a single process.

    The processes talk through NCCL on GPUs and gloo on CPUs.

    Raises:
        ConfigError: `--device cuda` without a GPU, or more processes on this machine than GPUs.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", max(run.local_rank, 0)))
    device = _device(run.device, local_rank)
    if not launched:
        yield World(device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=run.dist_url, rank=rank, world_size=size)
    try:
        yield World(device, rank, size)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ConfigError(f"field 'device': process {local_rank} of this machine needs a GPU of its own, found {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
