"""Steps whose loss is not finite: skipped, counted, and too many in a row end the training, as in classification."""

from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from torch import Tensor

from ..configs.schema import ConfigError
from ..engine import NonFiniteLossError
from ..engine.train import BufferCopy


class FiniteSteps(Hook):
    """Lets a step change nothing, neither weights nor running statistics, when its loss is not finite in any process.

    So is one whose gradients are not finite; in mixed precision the loss scaler sees to those.

    Args:
        max_bad_steps: How many steps in a row may be skipped.

    Raises:
        ConfigError: There are several optimizers.
        NonFiniteLossError: One more step was not finite.
    """

    priority = "VERY_HIGH"

    def __init__(self, max_bad_steps: int = 10):
        self.max_bad_steps, self.skipped, self.bad_steps = max_bad_steps, 0, 0
        self.bad = self.within_step = False

    def before_train(self, runner: Runner) -> None:
        """Stand between the runner and its optimizer."""
        wrapper = runner.optim_wrapper
        self.runner, self.buffers = runner, BufferCopy(runner.model)
        if not isinstance(wrapper, OptimWrapper):
            raise ConfigError(f"field 'optim_wrapper': one optimizer is expected, found a {type(wrapper).__name__}")
        self.wrapper: OptimWrapper = wrapper
        wrapper.update_params = self.update_params

    def before_train_iter(self, *_: Any, **__: Any) -> None:
        """Keep the running statistics as they are before a step's first batch."""
        if not self.within_step:
            self.buffers.take()
            self.within_step = True

    def after_train_epoch(self, runner: Runner) -> None:
        """Say how many steps of the epoch were skipped."""
        if self.skipped:
            runner.logger.warning(f"epoch {runner.epoch + 1}: {self.skipped} steps skipped, not finite")
        self.skipped = 0

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        """The optimizer wrapper's method of this name: add up a batch's gradients, and step when it is time."""
        wrapper = self.wrapper
        self.bad |= bool(all_reduce_max(~loss.detach().isfinite().all()))
        if self.bad:
            wrapper._inner_count += 1  # as backward does
        else:
            wrapper.backward(wrapper.scale_loss(loss))
        if not wrapper.should_update():
            return
        if self.bad or not self._gradients_are_finite():
            wrapper.zero_grad(**(zero_kwargs or {}))
            self.buffers.restore()
            self._count(loss)
        else:
            self.bad_steps = 0
            wrapper.step(**(step_kwargs or {}))
            wrapper.zero_grad(**(zero_kwargs or {}))
        self.bad = self.within_step = False

    def _gradients_are_finite(self) -> bool:
        if isinstance(self.wrapper, AmpOptimWrapper):
            return True
        groups = self.wrapper.optimizer.param_groups
        finite = [p.grad.isfinite().all() for group in groups for p in group["params"] if p.grad is not None]
        return not finite or bool(torch.stack(finite).all())

    def _count(self, loss: Tensor) -> None:
        """Count a skipped step, and lower the loss scale of float16."""
        if isinstance(self.wrapper, AmpOptimWrapper):
            scaler = self.wrapper.loss_scaler
            scaler.scale(loss.detach())  # which makes its scale where there is none yet
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        self.skipped, self.bad_steps = self.skipped + 1, self.bad_steps + 1
        place = f"iteration {self.runner.iter + 1}"
        if self.bad_steps > self.max_bad_steps:
            raise NonFiniteLossError(
                f"the loss was not finite in {self.bad_steps} step(s) in a row, the last time in {place}; the weights "
                "are those before them, and the checkpoints good; a lower optim_wrapper.optimizer.lr or "
                "optim_wrapper.clip_grad may help"
            )
        self.runner.logger.warning(f"{place}: the loss is not finite; the step is skipped, {self.bad_steps} in a row")


def all_reduce_max(flag: Tensor) -> Tensor:
    """The flag of any process, in all of them."""
    value = flag.float()
    all_reduce(value, "max")
    return value
