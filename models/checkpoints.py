"""Reading any checkpoint safely: whole, as it was written, without running anything in it; and finding its weights."""

import argparse
import json
import pickle
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .seal import find_damage

# Where ours and upstream's, older ones, and timm's checkpoints keep their weights.
DEFAULT_KEY = "model|module|state_dict"
KEPT_FOR = "kept_for"  # the entry by which a file names the weights that it was kept for
SHOWN = 4  # entries that an error names


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, and what was found."""


class MisfitError(CheckpointError):
    """A checkpoint that may be good, and belongs to another network or another training."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save or safetensors on the CPU, without running anything in it.

    Beside tensors and plain values only `argparse.Namespace` is admitted, in which upstream keeps its arguments.

    Raises:
        CheckpointError: No such file, a damaged one, or one that holds other objects. `find_damage` says what damage
            is seen in which files.
    """
    path = Path(path)
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            _check_header(path)
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(f"{path}: not read, since it is damaged or could run code: {reason}") from e
    except Exception as e:  # a damaged file may make an unpickler raise anything
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one: {_one_line(e)}") from e
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return dict(content)


def check_file(path: str | Path) -> None:
    """Make sure that a checkpoint is there, can be read, and is as it was written, as far as its format shows that.

    Raises:
        CheckpointError: It is not.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is not a file")
        damage = None if path.suffix == ".safetensors" else find_damage(path)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such checkpoint") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    if damage is not None:
        raise CheckpointError(f"{path}: damaged: {damage}")


def find_state_dict(content: Mapping[str, Any], key: str | None, source: str) -> dict[str, Tensor]:
    """Find the weights in what `read_checkpoint` returned.

    Args:
        content: A bare state dict, or a dictionary that holds one.
        key: Its entry there; several may be given in order of preference, separated by "|". None takes the weights
            that the file says it was kept for, and in files that do not say that, `DEFAULT_KEY`.
        source: The file's name for errors.

    Raises:
        CheckpointError: No such entry, or one that holds something else than dense tensors under their names.
    """
    if key is None:
        key = content.get(KEPT_FOR, DEFAULT_KEY)
        if not isinstance(key, str):
            raise CheckpointError(f"{source}: '{KEPT_FOR}' is {_kind(key)}, not the name of an entry")
    keys = key.split("|")
    names = [k for k in keys if isinstance(content.get(k), Mapping)]
    bare = not names and "model" in keys and any(isinstance(v, Tensor) for v in content.values())
    if not names and not bare:
        entries = ", ".join([str(k) for k in content][:10]) + (", …" if len(content) > 10 else "")
        raise CheckpointError(f"{source}: no weights under '{key}'; the entries are {entries}")
    state = content if bare else content[names[0]]
    check_entries(state, source if bare else f"{source}: '{names[0]}'")
    strip = len("module.") if all(k.startswith("module.") for k in state) else 0
    return {k[strip:]: v for k, v in state.items()}


def check_entries(state: Mapping[Any, Any], source: str) -> None:
    """Make sure that a state dict holds nothing but dense tensors with values, under their names.

    Raises:
        CheckpointError: It does not; the message is one line that begins with `source`.
    """
    wrong = [f"{k!r} is {reason}" for k, v in state.items() if (reason := _unusable(k, v)) is not None]
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(f"{source}: not a dictionary of weights: {', '.join(wrong[:SHOWN])}{more}")


def _unusable(key: object, value: object) -> str | None:
    """Why an entry is no weight, None where it is one."""
    if not isinstance(key, str):
        return f"a key of type {type(key).__name__}, not a name"
    if not isinstance(value, Tensor):
        return f"{_kind(value)}, not a tensor"
    if is_lazy(value):
        return "a parameter without a shape"
    kinds = {
        "a nested tensor": value.is_nested,
        f"a sparse tensor ({value.layout})": value.layout != torch.strided,
        "a quantized tensor": value.is_quantized,
        "a tensor on meta, which has no values": value.is_meta,
    }
    return next((kind for kind, is_it in kinds.items() if is_it), None)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _check_header(path: Path) -> None:
    """Refuse a file of safetensors that names a tensor twice; readers differ in which they take."""
    with path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), 10**8))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("it has two entries of one name")
        return found

    json.loads(header, object_pairs_hook=unique)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
