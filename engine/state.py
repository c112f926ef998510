"""Everything that a training changes, in one place: what a step updates, and what a checkpoint holds."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kernelwarehouse.models import CheckpointError, set_temperature, warehouse_users
from kernelwarehouse.schema import Config, ConfigError, RunConfig

from .amp import grad_scaler
from .distributed import World
from .optim import build_optimizer
from .schedule import Schedule


@dataclass
class Training:
    """A training in progress.

    Attributes:
        model: The network itself.
        parallel: The same network as training calls it; with several processes it averages their gradients.
        optimizer: Its optimizer.
        scaler: The loss scaler of float16.
        schedule: Learning rate and temperature over time.
        config: What the training was started with.
        world: This process's place.
        mixup: Mixes images and targets of a batch; None without mixup and cutmix.
        ema: The moving average of the weights; None without.
        epoch: Epochs done.
        step: Updates done.
        best: Best top-1 so far, in percent, of "model" and of "model_ema".
    """

    model: nn.Module
    parallel: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    config: Config
    world: World
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(cls, model: nn.Module, config: Config, world: World, iterations_per_epoch: int) -> "Training":
        """Prepare to train `model`, which is on its device already, as `config` says.

        Raises:
            ConfigError: An optimizer, warm-up or mixing that cannot be.
        """
        run = config.run
        schedule = Schedule.build(run, iterations_per_epoch)
        if not warehouse_users(model):  # a static network has no temperature
            schedule = replace(schedule, anneal_iterations=0)
        training = cls(
            model=model,
            parallel=world.wrap(model),
            optimizer=build_optimizer(model, run),
            scaler=grad_scaler(run, world.device),
            schedule=schedule,
            config=config,
            world=world,
            mixup=_mixup(config),
            ema=ModelEmaV3(model, decay=run.model_ema_decay) if run.model_ema else None,
            epoch=run.start_epoch,
            step=run.start_epoch * schedule.steps_per_epoch,
        )
        training.set_temperature()
        return training

    @property
    def run(self) -> RunConfig:
        """The run's part of the configuration."""
        return self.config.run

    @property
    def temperature(self) -> float:
        """The temperature at the end of the last epoch done."""
        return self.schedule.temperature(self.epoch * self.schedule.iterations_per_epoch)

    def set_temperature(self) -> None:
        """Give the model and its moving average the temperature at the end of the last epoch done."""
        set_temperature(self.model, self.temperature)
        if self.ema is not None:
            set_temperature(self.ema.module, self.temperature)

    def no_sync(self) -> AbstractContextManager:
        """Return the context of a micro-batch whose gradients stay in this process."""
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint; `epoch` in it is the number of the last epoch done, counted from 0."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "best": dict(self.best),
            "temperature": self.temperature,
            "config": self.config.to_fields(),
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; a moving average that it lacks starts from its weights.

        Raises:
            CheckpointError: It belongs to another model or optimizer.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state.get("model_ema", state["model"]))
        except (RuntimeError, ValueError) as e:
            raise CheckpointError(f"the checkpoint belongs to another model or optimizer: {e}") from e
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best = state["epoch"] + 1, state["step"], dict(state["best"])
        self.set_temperature()


def _mixup(config: Config) -> Mixup | None:
    run = config.run
    if run.mixup == 0 and run.cutmix == 0:
        return None
    if run.batch_size % 2:
        raise ConfigError(
            f"field 'batch_size': mixup and cutmix mix images in pairs, {run.batch_size} is odd; pass an even "
            "--batch_size, or --mixup 0 --cutmix 0"
        )
    return Mixup(
        mixup_alpha=run.mixup,
        cutmix_alpha=run.cutmix,
        prob=run.mixup_prob,
        switch_prob=run.mixup_switch_prob,
        mode=run.mixup_mode,
        label_smoothing=run.smoothing,
        num_classes=config.model.nb_classes,
    )
