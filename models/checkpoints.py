"""Reading any checkpoint safely into a model, ours and upstream's, and writing our weights for upstream."""

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .convert import dynamic_layers, plans, set_temperature, sharing
from .operators import get_operator
from .translation import Translation, canonical_names, original_translation

# Where ours and upstream's, older ones, and timm's checkpoints keep their weights.
DEFAULT_KEY = "model|module|state_dict"
TEMPERATURE = ".temperature.value"  # how the names of temperatures end in a state dict


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
    state = find_state_dict(content, key, source)
    new = load_weights(model, state, source=source, allow_new_head=allow_new_head)
    # Older checkpoints of a training have the temperature beside the weights, newer ones among them.
    before = content.get("temperature")
    if isinstance(before, float) and not any(k.endswith(TEMPERATURE) for k in state):
        set_temperature(model, before)
    return new


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "weights",
    allow_new_head: bool = False,
    known: Sequence[Translation] | None = None,
) -> tuple[str, ...]:
    """`load_checkpoint` for a state dict that was read before.

    Args:
        model: As there.
        state: The weights.
        source: What to call them in errors.
        allow_new_head: As there.
        known: The `translations` of the network before parts of it were removed; None for those of `model`.
    """
    target = model.state_dict()
    for translation in translations(model) if known is None else known:
        if translation.recognises(state):
            state = translation.from_authors(state)
            break
    try:
        state = canonical_names(model, state)
    except ValueError as e:
        raise CheckpointError(f"{source}: {e}") from e
    state = {k: _fit(v, target[k]) if k in target else v for k, v in state.items()}
    head = _head_prefixes(model)
    wrong = _differences(state, target, _optional(model))
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


def translations(model: nn.Module) -> list[Translation]:
    """What other names a network's weights are known under: of its operators' authors, or of its original code."""
    found = [get_operator(plan.operator).translation(model, plan) for plan in plans(model)]
    return found or [original_translation(model)]


def to_upstream(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights with the names and in the layouts of the authors' code."""
    return translations(model)[0].to_authors(model.state_dict())


def _fit(value: Tensor, target: Tensor) -> Tensor:
    """Reshape a tensor whose shape differs by ones at its end only, as that of a 1×1 kernel kept as a matrix."""
    sizes, wanted = list(value.shape), list(target.shape)
    short, long = sorted((sizes, wanted), key=len)
    return value.reshape(target.shape) if long == short + [1] * (len(long) - len(short)) else value


def _optional(model: nn.Module) -> set[str]:
    """Entries of the state dict that a file may lack."""
    shared = {layer.temperature for layer in dynamic_layers(model).values()} - {None}
    return {f"{name}.value" for name, m in model.named_modules() if m in shared}


def _differences(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], optional: set[str]
) -> list[tuple[str, str]]:
    """Each key that does not fit, and what is wrong with it."""
    missing = [(k, f"missing: {k} {tuple(v.shape)}") for k, v in target.items() if k not in state and k not in optional]
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
    network: Any = model
    classifiers = network.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    heads = [name for name, module in model.named_modules() if any(module is c for c in classifiers)]
    cells = [shared for shared, users in sharing(model).items() if all(user in heads for user in users)]
    return (*(f"{name}." for name in heads), *cells)
