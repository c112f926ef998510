"""Reading any checkpoint safely into a model, ours and upstream's, and writing our weights for upstream."""

import argparse
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import safetensors.torch
import torch
from torch import Tensor, nn

from .backbones import find_family
from .convert import warehouse_users


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, and what was found."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save or safetensors on the CPU, without running anything in it.

    Beside tensors and plain values only `argparse.Namespace` is admitted, in which upstream keeps its arguments.

    Raises:
        CheckpointError: No such file, a damaged one, or one that holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(f"{path}: not read, since it is damaged or could run code: {reason}") from e
    except (RuntimeError, EOFError, BadZipFile, OSError, ValueError, KeyError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one: {e}") from e
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return dict(content)


def find_state_dict(content: Mapping[str, Any], key: str, source: str) -> dict[str, Tensor]:
    """Find the weights in what `read_checkpoint` returned.

    Args:
        content: A bare state dict, or a dictionary that holds one.
        key: Its entry there; several may be given in order of preference, separated by "|".
        source: The file's name for errors.

    Raises:
        CheckpointError: No such entry.
    """
    if content and all(isinstance(v, Tensor) for v in content.values()):
        state = content
    else:
        names = [k for k in (*key.split("|"), "state_dict") if isinstance(content.get(k), Mapping)]
        if not names or (key == "model_ema" and names[0] != key):
            raise CheckpointError(f"{source}: no weights under '{key}'; the entries are {', '.join(map(str, content))}")
        state = content[names[0]]
    strip = len("module.") if all(k.startswith("module.") for k in state) else 0
    return {k[strip:]: v for k, v in state.items()}


def load_checkpoint(
    model: nn.Module, path: str | Path, key: str = "model", *, allow_new_head: bool = False
) -> tuple[str, ...]:
    """Load weights into `model`, recognising the format: ours, upstream's, a bare state dict, or safetensors.

    Args:
        model: The network that the weights were made for.
        path: The file.
        key: Entry that holds the weights, such as "model" or "model_ema".
        allow_new_head: Leave a classifier of another shape at its initialisation.

    Returns:
        Names of the parameters and buffers that were left at their initialisation: the new classifier's, or none.

    Raises:
        CheckpointError: An unreadable file, or weights that do not fit, with all differences; the model is then
            unchanged.
    """
    state = find_state_dict(read_checkpoint(path), key, str(path))
    return load_weights(model, state, source=str(path), allow_new_head=allow_new_head)


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str = "weights", allow_new_head: bool = False
) -> tuple[str, ...]:
    """`load_checkpoint` for a state dict that was read before."""
    target = model.state_dict()
    names = {theirs: ours for ours, theirs in upstream_names(model).items()}
    if sum(k in names for k in state) > sum(k in target for k in state):
        state = {names.get(k, k): v for k, v in state.items()}
    state = {k: _fit(v, target[k]) if k in target else v for k, v in state.items()}
    head = _head_keys(model)
    wrong = _differences(state, target, target)
    new_head = ()
    if allow_new_head and wrong and all(any(k.startswith(h) for h in head) for k, _ in wrong):
        new_head = tuple(k for k in target if any(k.startswith(h) for h in head))
        state = {k: v for k, v in state.items() if not any(k.startswith(h) for h in head)}
        wrong = []
    if wrong:
        lines = [text for _, text in wrong]
        more = f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else ""
        hint = (
            "\nOnly the classifier differs: fine-tuning can start a new one (--finetune, allow_new_head=True)."
            if all(any(k.startswith(h) for h in head) for k, _ in wrong)
            else ""
        )
        raise CheckpointError(
            f"{source}: the weights do not fit this {type(model).__name__}:\n  " + "\n  ".join(lines[:20]) + more + hint
        )
    model.load_state_dict({**{k: target[k] for k in new_head}, **state})
    return new_head


def upstream_names(model: nn.Module) -> dict[str, str]:
    """Our name of every entry of the state dict → upstream's."""
    family = find_family(model)
    warehouses = getattr(model, "warehouses", None)
    numbers = {name: i for i, name in enumerate(warehouses.names)} if warehouses is not None else {}
    names = {}
    for key in model.state_dict():
        module, _, leaf = key.rpartition(".")
        if module == "warehouses":
            names[key] = f"warehouse_manager.weights.{numbers[leaf]}"
            continue
        module, attention, rest = module.partition(".attention")
        if family is not None:
            module = family.upstream_name(module, model)
        names[key] = ".".join(filter(None, (module + attention + rest.replace(".norm", ".norm1"), leaf)))
    return names


def to_upstream(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights with upstream's names and shapes."""
    state = {}
    for key, theirs in upstream_names(model).items():
        value = model.state_dict()[key]
        converted_gamma = theirs.endswith(".gamma") and hasattr(model, "warehouses")
        state[theirs] = value.reshape(1, -1, 1, 1) if converted_gamma else value
    return state


def _fit(value: Tensor, target: Tensor) -> Tensor:
    """Reshape a tensor whose shape differs by ones only, as a layer scale or a 1×1 kernel kept as a matrix."""
    same = [s for s in value.shape if s != 1] == [s for s in target.shape if s != 1]
    return value.reshape(target.shape) if same else value


def _differences(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], order: Iterable[str]
) -> list[tuple[str, str]]:
    wrong = [(k, f"missing: {k} {tuple(target[k].shape)}") for k in order if k not in state]
    wrong += [(k, f"unexpected: {k} {tuple(v.shape)}") for k, v in state.items() if k not in target]
    wrong += [
        (k, f"shape: {k} is {tuple(state[k].shape)} in the file, {tuple(target[k].shape)} in the model")
        for k in order
        if k in state and state[k].shape != target[k].shape
    ]
    return wrong


def _head_keys(model: nn.Module) -> list[str]:
    """Beginnings of the keys that belong to the classifier, with the cells that it alone uses."""
    if not hasattr(model, "get_classifier"):
        return []
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    heads = [name for name, module in model.named_modules() if any(module is c for c in classifiers)]
    cells = [w for w, users in warehouse_users(model).items() if all(user in heads for user in users)]
    return [f"{name}." for name in heads] + cells
