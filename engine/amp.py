"""Mixed precision as a run asks for it."""

import torch

from ..configs.schema import RunConfig


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """Return the context in which the forward pass runs; it changes nothing without `use_amp`."""
    return torch.autocast(device.type, getattr(torch, run.amp_dtype), enabled=run.use_amp)


def grad_scaler(run: RunConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, active for float16 only: bfloat16 has the range of float32."""
    return torch.amp.GradScaler(device.type, enabled=run.use_amp and run.amp_dtype == "float16")
