"""What a run says and keeps: lines and a progress bar, log.txt, and TensorBoard's events; by the main process only."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from kernelwarehouse.schema import RunConfig

from .distributed import World

# Without a terminal, a line on the progress within an epoch appears at most this often, in seconds.
LINE_EVERY = 30.0


class Progress:
    """The progress of one epoch: a bar on a terminal, now and then a line elsewhere.

    Args:
        title: What progresses.
        total: Iterations to come.
        batch_size: Images of an iteration, over all processes.
        visible: Whether anything is shown.
    """

    def __init__(self, title: str, total: int, batch_size: int, visible: bool):
        self.title, self.batch_size, self.visible = title, batch_size, visible
        self.bar = tqdm(desc=title, total=total, unit="it", leave=False, disable=not visible or not sys.stderr.isatty())
        self.total, self.done = total, 0
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, iterations: int) -> None:
        """Count iterations as done."""
        self.done += iterations
        self.bar.update(iterations)

    def show(self, **figures: float) -> None:
        """Show the current figures by name, beside the images per second so far."""
        if not self.visible:
            return
        now = time.monotonic()
        rate = self.done * self.batch_size / max(now - self.start, 1e-9)
        text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) + f", {rate:.0f} images/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable and now - self.last_line > LINE_EVERY:
            say(f"{self.title} [{self.done}/{self.total}] {text}")
            self.last_line = now


class RunLog:
    """The record of a run.

    Args:
        run: Names `output_dir` for log.txt and `log_dir` for TensorBoard's events; empty means none.
        world: Only its main process writes.
    """

    def __init__(self, run: RunConfig, world: World):
        self.visible = world.is_main
        self.file = Path(run.output_dir, "log.txt") if run.output_dir and self.visible else None
        self.writer = SummaryWriter(run.log_dir) if run.log_dir and self.visible else None
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def say(self, text: str) -> None:
        """Print a line."""
        if self.visible:
            say(text)

    def keep(self, name: str, fields: dict[str, Any]) -> None:
        """Write a JSON file of that name beside log.txt."""
        if self.file:
            self.file.with_name(name).write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")

    def epoch(self, record: dict[str, Any]) -> None:
        """Record the figures of an epoch, one JSON object a line; a repeated epoch appears again."""
        if self.file:
            with self.file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        if self.writer:
            for name, value in record.items():
                if name.startswith(("train_", "test_")):
                    self.writer.add_scalar(name, value, record["epoch"])
            self.writer.flush()


def say(text: str) -> None:
    """Print a line, above the progress bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()
