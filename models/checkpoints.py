"""Reading any checkpoint safely into a model, ours and upstream's, and writing our weights for upstream."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .backbones import find_family
from .convert import warehouse_users

# Where ours and upstream's, older ones, and timm's checkpoints keep their weights.
DEFAULT_KEY = "model|module|state_dict"


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
    except Exception as e:  # a damaged file may make an unpickler raise anything
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one: {e!r}") from e
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
    keys = key.split("|")
    if content and all(isinstance(v, Tensor) for v in content.values()) and "model" in keys:
        state = content
    else:
        names = [k for k in keys if isinstance(content.get(k), Mapping)]
        if not names:
            entries = ", ".join([str(k) for k in content][:10]) + (", …" if len(content) > 10 else "")
            raise CheckpointError(f"{source}: no weights under '{key}'; the entries are {entries}")
        state = content[names[0]]
    strip = len("module.") if all(k.startswith("module.") for k in state) else 0
    return {k[strip:]: v for k, v in state.items()}


def load_checkpoint(
    model: nn.Module, path: str | Path, key: str = DEFAULT_KEY, *, allow_new_head: bool = False
) -> tuple[str, ...]:
    """Load weights into `model`, recognising the format: ours, upstream's, a bare state dict, or safetensors.

    Args:
        model: The network that the weights were made for.
        path: The file.
        key: Entry that holds the weights, such as "model_ema"; several, separated by "|", in order of preference.
        allow_new_head: Leave a classifier of another shape at its initialisation.

    Returns:
        Names of the parameters and buffers that were left at their initialisation: the new classifier's, or none.

    Raises:
        CheckpointError: An unreadable file, or weights that do not fit, with all differences; the model is then
            unchanged.
    """
    return load_content(model, read_checkpoint(path), key, source=str(path), allow_new_head=allow_new_head)


def load_content(
    model: nn.Module, content: Mapping[str, Any], key: str = DEFAULT_KEY, *, source: str, allow_new_head: bool = False
) -> tuple[str, ...]:
    """`load_checkpoint` for what `read_checkpoint` returned; `source` names the file in errors."""
    return load_weights(model, find_state_dict(content, key, source), source=source, allow_new_head=allow_new_head)


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str = "weights", allow_new_head: bool = False
) -> tuple[str, ...]:
    """`load_checkpoint` for a state dict that was read before."""
    target = model.state_dict()
    names = {theirs: ours for ours, theirs in upstream_names(model).items()}
    if sum(k in names for k in state) > sum(k in target for k in state):
        state = {names.get(k, k): v for k, v in state.items()}
    state = {k: _fit(v, target[k]) if k in target else v for k, v in state.items()}
    head = _head_prefixes(model)
    wrong = _differences(state, target)
    only_head = all(k.startswith(head) for k, _ in wrong)
    if wrong and not (allow_new_head and only_head):
        lines = [text for _, text in wrong[:20]]
        if len(wrong) > len(lines):
            lines.append(f"… and {len(wrong) - len(lines)} more")
        if only_head:
            lines.append(
                "Only the classifier differs; fine-tuning can start a new one: --finetune, allow_new_head=True"
            )
        raise CheckpointError("\n  ".join([f"{source}: the weights do not fit this {type(model).__name__}:", *lines]))
    new_head = tuple(k for k in target if k.startswith(head)) if wrong else ()
    kept = {k: v for k, v in state.items() if not (wrong and k.startswith(head))}
    model.load_state_dict({**kept, **{k: target[k] for k in new_head}})
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
    ours = model.state_dict()
    for key, theirs in upstream_names(model).items():
        value = ours[key]
        converted_gamma = theirs.endswith(".gamma") and hasattr(model, "warehouses")
        state[theirs] = value.reshape(1, -1, 1, 1) if converted_gamma else value
    return state


def _fit(value: Tensor, target: Tensor) -> Tensor:
    """Reshape a tensor whose shape differs by ones only, as a layer scale or a 1×1 kernel kept as a matrix."""
    same = [s for s in value.shape if s != 1] == [s for s in target.shape if s != 1]
    return value.reshape(target.shape) if same else value


def _differences(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Each key that does not fit, and what is wrong with it."""
    missing = [(k, f"missing: {k} {tuple(v.shape)}") for k, v in target.items() if k not in state]
    unexpected = [(k, f"unexpected: {k} {tuple(v.shape)}") for k, v in state.items() if k not in target]
    shapes = [
        (k, f"shape: {k} is {tuple(state[k].shape)} in the file, {tuple(v.shape)} in the model")
        for k, v in target.items()
        if k in state and state[k].shape != v.shape
    ]
    return missing + unexpected + shapes


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the keys that belong to the classifier, with the cells that it alone uses."""
    if not hasattr(model, "get_classifier"):
        return ()
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    heads = [name for name, module in model.named_modules() if any(module is c for c in classifiers)]
    cells = [w for w, users in warehouse_users(model).items() if all(user in heads for user in users)]
    return (*(f"{name}." for name in heads), *cells)
