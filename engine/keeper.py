"""When a checkpoint is due, and what is kept of them."""

import time
from pathlib import Path

from ..models import KEPT_FOR
from .checkpoint import NAME, prune_checkpoints, save_checkpoint
from .signals import Notice
from .state import NonFiniteLossError, Training

BEST = {"model": "checkpoint-best.pth", "model_ema": "checkpoint-best-ema.pth"}


class Keeper:
    """Writes the checkpoints of a training to its `output_dir`, if it has one.

    Every process has to call `step_done` and `epoch_done` alike; the main one writes. Weights that are not finite are
    refused with a NonFiniteLossError.

    Args:
        training: What is kept.
        notice: Says whether the process has been told to end.
        newest: The checkpoint that it continues from.

    Attributes:
        newest: The last checkpoint written, or else the one that the training continues from.
    """

    def __init__(self, training: Training, notice: Notice, newest: Path | None = None):
        run = training.run
        self.training, self.notice, self.newest = training, notice, newest
        self.folder = Path(run.output_dir) if run.output_dir and run.save_ckpt else None
        self.last_save = time.monotonic()

    @property
    def told_to_end(self) -> bool:
        """Whether this process has been told to end."""
        return self.notice.received is not None

    def save_is_due(self, step: int) -> bool:
        """Whether this process finds that a checkpoint should follow update number `step`, counted from 1."""
        run = self.training.run
        minutes = (time.monotonic() - self.last_save) / 60
        by_clock = self.training.world.is_main and 0 < run.save_ckpt_minutes <= minutes
        return by_clock or (run.save_ckpt_steps > 0 and step % run.save_ckpt_steps == 0)

    def step_done(self, save: bool) -> None:
        """Write a checkpoint within the epoch, if `save`; all processes have to agree on that."""
        if save:
            self._save(f"checkpoint-{self.training.epoch}-{self.training.step}.pth")

    def epoch_done(self, improved: list[str]) -> None:
        """Save the epoch just done: as the best of its kind, and by its number when that is due.

        The number comes last, since it is what a restart continues from: until then the epoch counts as not done.
        """
        training, run = self.training, self.training.run
        names = [BEST[key] for key in improved]
        if training.epoch % run.save_ckpt_freq == 0 or training.epoch == run.epochs:
            names.append(f"checkpoint-{training.epoch - 1}.pth")
        self._save(*names)

    def _save(self, *names: str) -> None:
        if self.folder is None or not names:
            return
        self.last_save = time.monotonic()
        if not all(p.isfinite().all() for p in self.training.model.parameters()):
            raise NonFiniteLossError("the weights are not finite any more, and were not saved")
        state = self.training.state_dict()
        if self.training.world.is_main:
            kept_for = {name: key for key, name in BEST.items()}
            for name in names:
                save_checkpoint(self.folder / name, {**state, KEPT_FOR: kept_for.get(name, "model")})
            if NAME.fullmatch(names[-1]):
                prune_checkpoints(self.folder, self.training.run.save_ckpt_num, names[-1])
        self.newest = self.folder / names[-1]
        self.training.world.gather(None)  # no process ends before the checkpoint is written
