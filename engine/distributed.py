"""One process or many: where this process computes, and what it does together with the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..configs.schema import ConfigError, RunConfig
from .rendezvous import meet


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

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, which can be pickled, in the order of ranks."""
        if not dist.is_initialized():
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module, static_graph: bool) -> nn.Module:
        """Return `model` such that backward averages gradients over the processes.

        Args:
            model: A network on this process's device.
            static_graph: The same operations come at every step, each with all gradients: with that known, torch
                communicates better. It fails on a first backward pass within `no_sync`; to synchronise that one would
                round its step otherwise in a run that was interrupted before it.
        """
        if not dist.is_initialized():
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, static_graph=static_graph
        )

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of the main one: each has updated its own normalisation statistics."""
        if dist.is_initialized():
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def join(run: RunConfig) -> Iterator[World]:
    """Enter the run that torchrun, torch.distributed.launch or SLURM's srun started, or one of a single process.

    The processes talk through NCCL on GPUs and gloo on CPUs.

    Raises:
        ConfigError: `--device cuda` without a GPU, more processes on this machine than GPUs, several tasks of srun that
            are not told where to meet, or processes that do not find each other.
    """
    rank, size, local_rank = _place(run)
    device = _device(run.device, local_rank)
    if size is None:
        yield World(device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = meet(run.dist_url, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(f"field 'dist_url': process {rank} of {size} does not find the others: {reason}") from e
    try:
        yield World(device, rank, size)
    finally:
        dist.destroy_process_group()


def _place(run: RunConfig) -> tuple[int, int | None, int]:
    """This process's rank, the number of processes (None: nobody launched several), and its number on this machine."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", max(run.local_rank, 0)))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if run.dist_url == "env://" and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
            raise ConfigError(
                "field 'dist_url': srun started several tasks; export MASTER_ADDR and MASTER_PORT before it, as "
                "scripts/slurm_train.sh does"
            )
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, None, max(run.local_rank, 0)


def _device(name: str, local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ConfigError(f"field 'device': process {local_rank} of this machine needs a GPU of its own, found {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
