"""What a run says and keeps: lines and a progress bar, log.txt, and TensorBoard's events; by the main process only."""

import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from ..configs.schema import ConfigError, RunConfig
from .distributed import World
from .outputs import replacing, writing
from .tensorboard import EventFile
from .terminal import say

try:
    import resource
except ImportError:  # Windows
    resource = None

# Without a terminal, a line on the progress within an epoch appears at most this often, in seconds.
LINE_EVERY = 30.0


class Progress:
    """The progress of one epoch: a bar on a terminal, now and then a line elsewhere.

    Args:
        title: What progresses.
        total: Iterations to come.
        batch_size: Images of an iteration, over all processes.
        visible: Whether anything is shown.
        done: Iterations that an earlier process has done.
        see: Called with the first images as the network gets them.
    """

    def __init__(
        self,
        title: str,
        total: int,
        batch_size: int,
        visible: bool,
        done: int = 0,
        see: Callable[[Tensor], None] | None = None,
    ):
        self.title, self.batch_size, self.visible, self.see = title, batch_size, visible, see
        hidden = not visible or sys.stderr is None or not sys.stderr.isatty()
        self.bar = tqdm(desc=title, initial=done, total=total, unit="it", leave=False, disable=hidden)
        self.total, self.before, self.done = total, done, done
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, iterations: int) -> None:
        """Count iterations as done."""
        self.done += iterations
        self.bar.update(iterations)

    def inputs(self, images: Tensor) -> None:
        """Be told of the images of an iteration."""
        if self.see:
            self.see(images)
            self.see = None

    def show(self, **figures: float) -> None:
        """Show the current figures by name, beside the images per second so far, the memory and the time left."""
        if not self.visible:
            return
        now = time.monotonic()
        rate = (self.done - self.before) * self.batch_size / max(now - self.start, 1e-9)
        text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        text += f", {rate:.0f} images/s, {_memory()}"
        self.bar.set_postfix_str(text)
        if self.bar.disable and now - self.last_line > LINE_EVERY:
            left = (self.total - self.done) * self.batch_size / max(rate, 1e-9)
            say(f"{self.title} [{self.done}/{self.total}] {text}, {tqdm.format_interval(left)} left")
            self.last_line = now


class RunLog:
    """The record of a run.

    Args:
        run: Names `output_dir` for log.txt, which exists, and `log_dir` for TensorBoard's events; empty means none.
        world: Only its main process writes.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, run: RunConfig, world: World):
        self.visible = world.is_main
        self.file = Path(run.output_dir, "log.txt") if run.output_dir and self.visible else None
        self.log_dir = run.log_dir if self.visible else ""
        self.pictures = run.log_images
        self.events: EventFile | None = None
        self.wandb = _wandb() if run.enable_wandb else None
        if self.wandb and self.visible:
            self.wandb.init(project="kernelwarehouse", name=Path(run.output_dir).name or None, config=vars(run))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.events:
            self.events.close()
        if self.wandb and self.visible:
            self.wandb.finish()

    def say(self, text: str) -> None:
        """Print a line."""
        if self.visible:
            say(text)

    def keep(self, name: str, fields: dict[str, Any]) -> None:
        """Write a JSON file of that name beside log.txt."""
        if self.file:
            with replacing(self.file.with_name(name)) as path:
                path.write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")

    def start(self, epoch: int) -> None:
        """Begin at that epoch: the record of it and of later ones, which an earlier process left, is taken back."""
        if self.log_dir:
            self.events = EventFile(self.log_dir, epoch)
        if self.file and self.file.exists():
            with writing(self.file):
                content = self.file.read_bytes()
            lines, cut_short = content.splitlines(), not content.endswith(b"\n")  # by a kill
            kept = []
            for number, line in enumerate(lines, 1):
                found = _epoch(line)
                if found is None and not (cut_short and number == len(lines)):
                    text = line[:60].decode(errors="replace")
                    warnings.warn(
                        f"{self.file}: line {number}, no record of an epoch, is left out: {text!r}", stacklevel=2
                    )
                if found is not None and found < epoch:
                    kept.append(line + b"\n")
            with replacing(self.file) as path:
                path.write_bytes(b"".join(kept))

    def images(self, epoch: int, images: Tensor) -> None:
        """Show the first of an epoch's images, (B, 1 or 3, H, W) with values from 0 to 1, in TensorBoard."""
        if self.events:
            grid = make_grid(images[: self.pictures], nrow=math.isqrt(self.pictures - 1) + 1)
            self.events.image("train_inputs", grid, epoch)

    def epoch(self, record: dict[str, Any]) -> None:
        """Record the figures of an epoch, one JSON object a line."""
        if self.file:
            with writing(self.file), self.file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
                f.flush()
                os.fsync(f.fileno())  # before the checkpoint that makes the epoch done
        if self.events:
            for name, value in record.items():
                if name.startswith(("train_", "test_")):
                    self.events.scalar(name, value, record["epoch"])
            self.events.flush()
        if self.wandb and self.visible:
            self.wandb.log(record)


def _epoch(line: bytes) -> float | None:
    """The epoch that a line of log.txt records, if it is a record of one."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
    return epoch if isinstance(epoch, int | float) and math.isfinite(epoch) else None


def _wandb() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError as e:
        raise ConfigError(f"field 'enable_wandb': {e}; pip install wandb, or leave --enable_wandb out") from e


def _memory() -> str:
    """Most memory that the process has used so far: the GPU's where it has one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        size = torch.cuda.max_memory_allocated()
    elif resource is None:
        return "memory unknown (this Python has no module resource)"
    else:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{size / 2**30:.1f} GiB"
