"""What the state of a training has to be: one schema, of which all is checked before anything is used.

Whether a state belongs to a certain network and optimizer is for `Training.load_state_dict` to say.
"""

import math
import random
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models import KEPT_FOR, CheckpointError, check_entries, is_finite

# Types that can be compared and that optimizers keep moments in.
NUMBERS = {getattr(torch, name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64")}
NUMBERS |= {getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")}

MOST = 2**40  # steps and samples that a training may count to

Check = Callable[[Any, str], None]  # of a value and its name; raises a CheckpointError


def check_state(state: Mapping[str, Any]) -> None:
    """Check a whole state as `Training.state_dict` gives it; an older version's lacks what is not required.

    Raises:
        CheckpointError: A field is missing, of another type, out of range, or contradicts the others.
    """
    missing = sorted(name for name, (required, _) in SCHEMA.items() if required and name not in state)
    if missing:
        raise CheckpointError(
            f"holds no state to continue a training from (no {', '.join(missing)}); --finetune starts from its weights "
            "alone"
        )
    for name, (_, check) in SCHEMA.items():
        if name in state:
            check(state[name], name)
    _check_position(state)
    _check_scaler(state["scaler"])
    if KEPT_FOR in state and not isinstance(state.get(state[KEPT_FOR]), Mapping):
        raise CheckpointError(f"'{KEPT_FOR}' names weights that are not there: {state[KEPT_FOR]!r}")


def _fail(name: str, wanted: str, found: Any) -> None:
    shown = repr(found) if isinstance(found, str | int | float | None) else f"a {type(found).__name__}"
    raise CheckpointError(f"'{name}' of its state must be {wanted}; found {shown[:80]}")


def _whole(low: int) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not int or not low <= value <= MOST:
            _fail(name, f"a whole number from {low}", value)

    return check


def _number(low: float = -math.inf, high: float = math.inf) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            limits = "" if math.isinf(low) else f" from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
            _fail(name, f"a finite number{limits}", value)

    return check


def _one_of(*types: type) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) not in types:
            _fail(name, " or ".join(t.__name__ for t in types), value)

    return check


def _mapping(of: Check, keys: type = str) -> Check:
    def check(value: Any, name: str) -> None:
        if not isinstance(value, Mapping):
            _fail(name, "a dictionary", value)
        for key, entry in value.items():
            if type(key) is not keys:
                _fail(name, f"a dictionary with keys of type {keys.__name__}", key)
            of(entry, f"{name}.{key}")

    return check


def _sequence(of: Check, length: int | None = None) -> Check:
    def check(value: Any, name: str) -> None:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            _fail(name, "a list" + ("" if length is None else f" of {length}"), value)
        for i, entry in enumerate(value):
            of(entry, f"{name}[{i}]")

    return check


def _fields(required: Mapping[str, Check], others: Check) -> Check:
    """A dictionary with certain entries, and others."""

    def check(value: Any, name: str) -> None:
        _mapping(lambda *_: None)(value, name)
        for key in required:
            if key not in value:
                raise CheckpointError(f"'{name}' of its state has no '{key}'")
        for key, entry in value.items():
            required.get(key, others)(entry, f"{name}.{key}")

    return check


def _anything(value: Any, name: str) -> None:
    """What nothing is done with."""


def _plain(value: Any, name: str) -> None:
    """A setting or a moment of an optimizer: numbers that are numbers, also within lists."""
    if name.endswith(".step"):
        _count(value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value, name)
    elif isinstance(value, Tensor):
        _moment(value, name)
    elif isinstance(value, list | tuple):
        _sequence(_plain)(value, name)
    elif isinstance(value, Mapping):
        _mapping(_plain)(value, name)
    elif type(value) is float:
        _number()(value, name)
    elif not isinstance(value, bool | int | str | None):
        _fail(name, "a tensor or a plain value", value)


def _count(value: Any, name: str) -> None:
    if type(value) not in (int, float) or not 0 <= value <= MOST or value != int(value):
        _fail(name, f"a whole number from 0 to {MOST}", value)


def _moment(value: Tensor, name: str) -> None:
    check_entries({name: value}, "its state")
    if value.dtype not in NUMBERS:
        _fail(name, "a tensor of numbers", value)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        _fail(name, "a tensor with a value for each of its elements", value)
    leaf = name.rpartition(".")[2]
    of_squares = any(part in leaf for part in ("_sq", "square", "_var")) and not value.is_complex()
    if of_squares and (value < 0).any():
        raise CheckpointError(f"'{name}' of its state has negative values, and averages squares")
    # The square of a large gradient may be infinite in a good state.
    if not is_finite(value) and not (of_squares and not value.isnan().any()):
        raise CheckpointError(f"'{name}' of its state has NaN or infinite values")


def _optimizer(value: Any, name: str) -> None:
    group = {
        "params": _sequence(_whole(0)),
        "decays": _one_of(bool),
        "lr_scale": _number(0),
        "lr": _number(0),
        "weight_decay": _number(0),
    }

    groups = _sequence(_fields(group, _plain))
    _fields({"state": _mapping(_mapping(_plain), int), "param_groups": groups}, _plain)(value, name)
    numbers = list(chain.from_iterable(g["params"] for g in value["param_groups"]))
    if sorted(numbers) != list(range(len(numbers))) or not numbers:
        raise CheckpointError(f"'{name}.param_groups' of its state do not number the parameters from 0 on, each once")
    strange = sorted(set(value["state"]) - set(numbers))
    if strange:
        raise CheckpointError(f"'{name}.state' of its state has parameters that no group has, such as {strange[0]}")


def _generators(value: Any, name: str) -> None:
    """Tried in generators of their own."""
    trials: dict[str, Callable[[Any], object]] = {
        "python": lambda v: random.Random().setstate((v[0], tuple(v[1]), None if v[2] is None else float(v[2]))),
        "numpy": lambda v: np.random.RandomState().set_state(tuple(v)),
        "torch": lambda v: torch.Generator().set_state(v),
    }
    _fields(dict.fromkeys(trials, _anything), _anything)(value, name)
    for key, restore in trials.items():
        try:
            restore(value[key])
        except Exception as e:  # each of the libraries has its own
            raise CheckpointError(f"'{name}.{key}' of its state is no state of that generator: {e}") from e
    cuda = value.get("cuda")
    if "cuda" in value and not (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8 and cuda.shape == (16,)):
        _fail(f"{name}.cuda", "a tensor of 16 bytes", cuda)


def _processes(value: Any, name: str) -> None:
    _sequence(_fields({"generators": _generators, "losses": _sequence(_number(), 2)}, _anything))(value, name)
    if not value:
        _fail(name, "a list with an entry for each process", value)
    for i, process in enumerate(value):
        _count(process["losses"][1], f"{name}[{i}].losses[1]")


def _check_scaler(value: Mapping[str, Any]) -> None:
    """Empty where no loss was scaled."""
    if value:
        fields: dict[str, Check] = {
            "scale": _number(math.ulp(0.0)),
            "growth_factor": _number(1),
            "backoff_factor": _number(math.ulp(0.0), 1),
            "growth_interval": _whole(1),
            "_growth_tracker": _whole(0),
        }
        _fields(fields, _anything)(value, "scaler")


def _check_position(state: Mapping[str, Any]) -> None:
    """The place in the training, which is told in several ways that have to agree."""
    update_freq, iterations = state["config"]["update_freq"], state["iterations_per_epoch"]
    epoch, iteration = state["epoch"], state["iteration"]
    if iteration > iterations:
        raise CheckpointError(f"'iteration' of its state is {iteration}, in an epoch of {iterations}")
    within = math.ceil(iteration / update_freq)
    step = (epoch + 1) * math.ceil(iterations / update_freq) + within
    if state["step"] != step:
        raise CheckpointError(
            f"'step' of its state is {state['step']}; epoch {epoch}, iteration {iteration} of the next would be {step}"
        )
    if step == 0:
        raise CheckpointError("'epoch' and 'iteration' of its state say that nothing was done")
    for name, most in (("skipped", within), ("bad_steps", step)):
        if state[name] > most:
            raise CheckpointError(f"'{name}' of its state is {state[name]}, after {most} steps")


def _weights(value: Any, name: str) -> None:
    _mapping(_anything)(value, name)
    check_entries(value, f"'{name}' of its state")


# Name of each field → whether a state must have it, and what it has to be. Values of weights are checked where they are
# loaded, by one rule for all files.
SCHEMA: dict[str, tuple[bool, Check]] = {
    "model": (True, _weights),
    "model_ema": (False, _weights),
    "optimizer": (True, _optimizer),
    "scaler": (True, _mapping(_anything)),
    "epoch": (True, _whole(-1)),
    "iteration": (True, _whole(0)),
    "iterations_per_epoch": (True, _whole(1)),
    "step": (True, _whole(0)),
    "skipped": (True, _whole(0)),
    "bad_steps": (True, _whole(0)),
    "best": (True, _mapping(_number(0, 100))),
    "processes": (True, _processes),
    "config": (True, _fields({"batch_size": _whole(1), "update_freq": _whole(1)}, _anything)),
    "temperature": (False, lambda value, name: None if value is None else _number()(value, name)),
    "plans": (False, _sequence(_mapping(_anything))),
    "tuned": (False, _mapping(_one_of(str))),
    "versions": (False, _mapping(_one_of(str))),
    KEPT_FOR: (False, _one_of(str)),
}
