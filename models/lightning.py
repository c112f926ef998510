"""The temperature in PyTorch Lightning, which must be installed to import this: ``Trainer(callbacks=[…])``."""

from typing import Any

from .temperature import TemperatureSchedule

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]


class TemperatureCallback(Callback):
    """Lowers the temperature of every operator in a LightningModule after each batch; checkpoints keep how far it is.

    Args:
        anneal_epochs: As for `TemperatureSchedule`.
        epochs: Epochs of the run; None for the trainer's ``max_epochs``, or what its ``max_steps`` make.
    """

    def __init__(self, anneal_epochs: float | None = None, epochs: float | None = None):
        self.anneal_epochs, self.epochs = anneal_epochs, epochs
        self._schedule: TemperatureSchedule | None = None
        self._state: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the schedule, or go on where a checkpoint was."""
        batches = trainer.num_training_batches
        epochs = self.epochs
        if epochs is None and batches != float("inf"):
            limited = trainer.max_epochs is None or trainer.max_epochs < 0
            updates = trainer.max_steps * trainer.accumulate_grad_batches
            epochs = updates / batches if limited else trainer.max_epochs
        if epochs is None or epochs <= 0:
            raise ValueError("the run has no known length: give the trainer max_epochs and batches that can be counted")
        options = {"epochs": epochs, "steps_per_epoch": int(batches), "anneal_epochs": self.anneal_epochs}
        self._schedule = TemperatureSchedule(pl_module, **options)
        if self._state:
            self._schedule.load_state_dict(self._state)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Set the temperature of the next batch."""
        del trainer, pl_module, outputs, batch, batch_idx
        if self._schedule is not None:
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """As `TemperatureSchedule.state_dict`."""
        return self._schedule.state_dict() if self._schedule is not None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when the training starts."""
        self._state = dict(state_dict)
