"""mmengine's checkpoints, read without running anything that they hold.

torch.load's safe default refuses the logs that mmengine writes into its own checkpoints. `admit_logs` adds what such a
log is made of, and nothing more: numpy's own unpickling is not among it, since a forged type of an array corrupts
memory. Who trusts a file that holds more can name its types with `torch.serialization.add_safe_globals`, or set the
environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD to 1 for one run, which lets the file run any code.
"""

import pickle
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint

from ..models import CheckpointError, check_file

NUMBERS = ("b1", "i4", "i8", "f2", "f4", "f8")


class PlainType:
    """What stands for `numpy.dtype` in a pickle: a type of numbers, whose state can only order their bytes."""

    def __init__(self, code: str, *_options: bool) -> None:
        if code not in NUMBERS:
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}.")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class PlainArray(np.ndarray):
    """An array of a `PlainType`; pickled again, it is one of numpy's."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        super().__setstate__((1, shape, kind.dtype, fortran, data))

    def __reduce__(self) -> str | tuple:
        return np.asarray(self).__reduce__()


def _rebuild_array(*_initial: Any) -> PlainArray:
    return np.empty(0).view(PlainArray)


def _rebuild_number(kind: PlainType, data: bytes) -> np.generic:
    return np.frombuffer(data, kind.dtype, count=1)[0]


def _statistics_method(owner: object, name: str) -> Callable[..., Any]:
    """The only attributes that a log asks for by getattr."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {owner!r}.")
    return getattr(owner, name)


def admit_logs() -> None:
    """Let torch.load read the logs in mmengine's checkpoints."""
    admitted: list[Any] = [
        HistoryBuffer,
        PlainArray,
        (PlainType, "numpy.dtype"),
        (None, "numpy.ndarray"),  # named, and not used
        (_statistics_method, "builtins.getattr"),
        *((_rebuild_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # numpy 1 and 2
        *((_rebuild_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]
    torch.serialization.add_safe_globals(admitted)


def guard_loaders() -> None:
    """Have mmengine read downloads as safely as files, and name the file and the way out when it reads none.

    Its loaders raise CheckpointError from then on.
    """
    checkpoint.load_url = partial(checkpoint.load_url, weights_only=True)  # pyright: ignore[reportCallIssue] - torch's
    load = checkpoint.CheckpointLoader.load_checkpoint

    @wraps(load)
    def load_checkpoint(filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            if "://" not in filename:
                check_file(filename)
            return load(filename, *args, **kwargs)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as e:
            reason = str(e).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
            raise CheckpointError(
                f"{filename}: not read, since it is damaged or could run code: {reason} If you trust whoever made it, "
                "read it from a file with the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD set to 1"
            ) from e
        except Exception as e:  # a damaged file may make an unpickler raise anything
            raise CheckpointError(f"{filename}: not read: {e!r}") from e

    checkpoint.CheckpointLoader.load_checkpoint = staticmethod(load_checkpoint)
