"""Everything that a training changes, in one place: what a step updates, and what a checkpoint holds."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, cast

import torch
from timm.data.mixup import Mixup
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..configs.schema import Config, ConfigError, RunConfig
from ..models import MisfitError, anneals, copy_weights, fit_weights, plans, set_temperature
from ..models.tuning import recall, tuned_layers
from .amp import grad_scaler
from .distributed import World
from .freeze import freeze_parameters
from .moments import check_moments
from .optim import build_optimizer, optimizer_state_for
from .rng import generator_states, restore_generators, seed_generators
from .schedule import Schedule


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became infinite or not a number, again and again."""


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
        losses: Sum and number of the finite losses of this process in the epoch, on the device; float64.
        epoch: Epochs done.
        iteration: Micro-batches of the next epoch that are done; between steps it counts whole steps.
        skipped: Steps of this epoch that were skipped because their loss or gradient was not finite.
        bad_steps: How many of them came in a row, up to now.
        best: Best top-1 so far, in percent, of "model" and of "model_ema".
        generators: Random states with which to continue an epoch; None at its beginning.
    """

    model: nn.Module
    parallel: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    config: Config
    world: World
    losses: Tensor
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    iteration: int = 0
    skipped: int = 0
    bad_steps: int = 0
    best: dict[str, float] = field(default_factory=dict)
    generators: dict[str, Any] | None = None

    @classmethod
    def build(cls, model: nn.Module, config: Config, world: World, iterations_per_epoch: int) -> "Training":
        """Prepare to train `model`, which is on its device already, as `config` says.

        Raises:
            ConfigError: An optimizer, warm-up, mixing, freezing or normalisation that cannot be.
        """
        run = config.run
        freeze_parameters(model, run.freeze)
        if run.sync_bn:
            model = synchronise_norms(model, world.device)
        if run.channels_last:
            model = model.to(memory_format=torch.channels_last)
        schedule = Schedule.build(run, iterations_per_epoch, anneals(model))
        training = cls(
            model=model,
            parallel=world.wrap(
                cast("nn.Module", torch.compile(model)) if run.compile else model, run.update_freq == 1
            ),
            optimizer=build_optimizer(model, run),
            scaler=grad_scaler(run, world.device),
            schedule=schedule,
            config=config,
            world=world,
            losses=torch.zeros(2, dtype=torch.float64, device=world.device),
            mixup=_mixup(config),
            ema=ModelEmaV3(model, decay=run.model_ema_decay) if run.model_ema else None,
            epoch=run.start_epoch,
        )
        training.set_temperature()
        return training

    @property
    def run(self) -> RunConfig:
        """The run's part of the configuration."""
        return self.config.run

    @property
    def step(self) -> int:
        """Updates done, skipped ones among them."""
        return self.epoch * self.schedule.steps_per_epoch + math.ceil(self.iteration / self.run.update_freq)

    @property
    def iterations(self) -> int:
        """Micro-batches done in all epochs."""
        return self.epoch * self.schedule.iterations_per_epoch + self.iteration

    @property
    def temperatures(self) -> dict[str, float]:
        """Each operator's temperature at the last micro-batch done."""
        return self.schedule.temperatures(self.iterations)

    def set_temperature(self) -> None:
        """Give the model and its moving average the temperature of the last micro-batch done."""
        for operator, value in self.temperatures.items():
            set_temperature(self.model, value, operator)
            if self.ema is not None:
                set_temperature(self.ema.module, value, operator)

    def no_sync(self) -> AbstractContextManager:
        """Return the context of a micro-batch whose gradients stay in this process."""
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def begin_epoch(self) -> None:
        """Seed this process for its next epoch, or restore it where an epoch goes on."""
        if self.generators is not None:
            restore_generators(self.generators)
            self.generators = None
        else:
            seed_generators(self.run.seed, self.epoch, self.world.rank, self.iteration)

    def end_epoch(self) -> None:
        """Count the epoch as done."""
        self.epoch, self.iteration, self.skipped = self.epoch + 1, 0, 0
        self.losses.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, in plain values and tensors; every process has to call it at the same step.

        `epoch` in it is the number of the last epoch done, counted from 0; `processes` holds what differs between
        the processes, in the order of their ranks.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "iteration": self.iteration,
            "iterations_per_epoch": self.schedule.iterations_per_epoch,
            "step": self.step,
            "skipped": self.skipped,
            "bad_steps": self.bad_steps,
            "best": dict(self.best),
            "processes": self.world.gather({"generators": generator_states(), "losses": self.losses.tolist()}),
            "config": self.config.to_fields(),
            "plans": [plan.to_dict() for plan in plans(self.model)],
            "tuned": tuned_layers() if self.run.tune else {},
            "versions": {name: version(name) for name in ("torch", "timm", "kernelwarehouse")},
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; a moving average that it lacks starts from its weights.

        With another number of processes than it was written by, the total batch has to be the same. Each process then
        draws from generators of its own; otherwise everything goes on as it would have. All is checked before anything
        is changed.

        Args:
            state: What `state_dict` returned; it passed `check_state`.

        Raises:
            MisfitError: It belongs to another model, optimizer or data set.
            CheckpointError: It is no state that this training could go on from.
        """
        weights = _fitted(self.model, state["model"], "its weights")
        average = None
        if self.ema is not None:
            average = _fitted(self.ema.module, state.get("model_ema", state["model"]), "its average")
        try:
            saved = optimizer_state_for(self.model, state["model"], state["optimizer"], self.run)
        except (RuntimeError, ValueError, KeyError) as e:
            raise MisfitError(f"it belongs to another optimizer: {e}") from e
        check_moments(self.optimizer, saved, self.run, updated=_has_updated(state))
        steps = math.ceil(state["iteration"] / state["config"]["update_freq"])
        whole = self.schedule.iterations_per_epoch
        iteration = whole if state["iteration"] == state["iterations_per_epoch"] else steps * self.run.update_freq
        if iteration > whole + self.run.update_freq - 1:
            raise MisfitError(f"it belongs to other data: {iteration} iterations are done in an epoch of {whole}")
        copy_weights(self.model, weights, "its weights")
        if self.ema is not None and average is not None:
            copy_weights(self.ema.module, average, "its average")
        self.optimizer.load_state_dict(saved)
        if self.run.tune:
            recall(state.get("tuned", {}))
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best = state["epoch"] + 1, dict(state["best"])
        self.skipped, self.bad_steps = state["skipped"], state["bad_steps"]
        self.iteration = iteration
        if self.iteration:
            self._restore_process(state["processes"])
        self.set_temperature()

    def _restore_process(self, processes: list[dict[str, Any]]) -> None:
        """Take over what this process, or all together, had when the epoch was interrupted."""
        if len(processes) == self.world.size:
            mine = processes[self.world.rank]
            self.generators = mine["generators"]
            self.losses.copy_(torch.tensor(mine["losses"], dtype=torch.float64))
        elif self.world.is_main:
            self.losses.copy_(torch.tensor([p["losses"] for p in processes], dtype=torch.float64).sum(0))


def _fitted(model: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    try:
        return fit_weights(model, weights, source=source).state
    except MisfitError as e:
        raise MisfitError(f"it belongs to another model: {e}") from e


def _has_updated(state: dict[str, Any]) -> bool:
    """Whether a step before a checkpoint has changed the weights: one whose loss and scaled gradients were finite."""
    scaler = state["scaler"]
    if not scaler:
        return state["step"] > state["bad_steps"]
    return scaler["scale"] > torch.amp.GradScaler("cpu").get_scale() * scaler["backoff_factor"] ** state["step"]


def synchronise_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm in `model`, those of attentions too, normalise over the batches of all processes together.

    Raises:
        ConfigError: `device` is no GPU, or there is no BatchNorm.
    """
    if device.type != "cuda":  # torch's SyncBatchNorm refuses other tensors, also over gloo
        raise ConfigError("field 'sync_bn': torch normalises over processes on GPUs only; pass --sync_bn false")
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ConfigError("field 'sync_bn': the network has no BatchNorm; pass --sync_bn false")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


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
