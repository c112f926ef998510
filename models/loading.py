"""Loading weights into a network: all is checked, then all is copied; and our weights under the authors' names."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoints import CheckpointError, MisfitError, check_entries, find_state_dict, read_checkpoint
from .convert import dynamic_layers, plans, sharing
from .operators import get_operator
from .ops.tied import Temperature
from .translation import Translation, canonical_names, original_translation
from .values import cannot_hold, has_negative, is_finite

VARIANCE = "running_var"
TEMPERATURE = ".temperature.value"  # how the names of temperatures end in a state dict


class Fitted(NamedTuple):
    """Weights that were checked: a whole state dict for one network, and which names keep their initialisation."""

    state: dict[str, Tensor]
    new: tuple[str, ...]


def load_checkpoint(
    model: nn.Module, path: str | Path, key: str | None = None, *, allow_new_head: bool = False
) -> tuple[str, ...]:
    """Load weights into `model`, recognising the format: ours, upstream's, a bare state dict, or safetensors.

    Args:
        model: The network that the weights were made for.
        path: The file.
        key: Entry that holds the weights, such as "model_ema"; several, separated by "|", in order of preference. None
            takes those that the file was kept for: the averaged ones of checkpoint-best-ema.pth, else the model's.
        allow_new_head: Leave a classifier of another shape at its initialisation.

    Returns:
        Names of the parameters and buffers that were left at their initialisation: the new classifier's, or none.

    Raises:
        CheckpointError: An unreadable file, weights that do not fit, with all differences, or values that the network
            cannot hold; the model is then unchanged. NaN and infinite values are loaded with a warning.
    """
    return load_content(model, read_checkpoint(path), key, source=str(path), allow_new_head=allow_new_head)


def load_content(
    model: nn.Module, content: Mapping[str, Any], key: str | None = None, *, source: str, allow_new_head: bool = False
) -> tuple[str, ...]:
    """`load_checkpoint` for what `read_checkpoint` returned; `source` names the file in errors."""
    state = find_state_dict(content, key, source)
    state |= _older_temperature(model, content.get("temperature"), state, source)
    return load_weights(model, state, source=source, allow_new_head=allow_new_head)


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "weights",
    allow_new_head: bool = False,
    known: Sequence[Translation] | None = None,
) -> tuple[str, ...]:
    """`load_checkpoint` for a state dict that was read before; the arguments are those of `fit_weights`."""
    fitted = fit_weights(model, state, source=source, allow_new_head=allow_new_head, known=known)
    copy_weights(model, fitted.state, source)
    return fitted.new


def fit_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "weights",
    allow_new_head: bool = False,
    known: Sequence[Translation] | None = None,
) -> Fitted:
    """Check weights against a network, and give them its names and shapes; the network is not changed.

    Args:
        model: As for `load_checkpoint`.
        state: The weights.
        source: What to call them in errors.
        allow_new_head: As there.
        known: The `translations` of the network before parts of it were removed; None for those of `model`.

    Raises:
        MisfitError: They are those of another network.
        CheckpointError: No weights at all, or values that the network cannot hold.
    """
    check_entries(state, source)
    target = model.state_dict()
    _check_target(target, source)
    try:
        for translation in translations(model) if known is None else known:
            if translation.recognises(state):
                state = translation.from_authors(state)
                break
        state = canonical_names(model, state)
    except (ValueError, RuntimeError, IndexError) as e:  # of shapes that a translation does not expect
        raise MisfitError(f"{source}: {e}") from e
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
        raise MisfitError("\n  ".join([f"{source}: the weights do not fit this {type(model).__name__}:", *lines]))
    new_head = tuple(k for k in target if k.startswith(head)) if wrong else ()
    kept = {k: v for k, v in state.items() if not (wrong and k.startswith(head))}
    _check_temperatures(model, kept, source)
    check_values(kept, target, source)
    return Fitted({**kept, **{k: target[k] for k in new_head}}, new_head)


def copy_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a whole state dict that was checked; should torch refuse it in the middle, the model is as it was.

    Raises:
        CheckpointError: Torch, or a module's own loading, refuses it.
    """
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    try:
        model.load_state_dict(state)
    except BaseException as e:
        now = model.state_dict()
        with torch.no_grad():
            for name, value in before.items():
                now[name].copy_(value)
        if not isinstance(e, Exception) or isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{source}: {e}") from e


def check_values(state: Mapping[str, Tensor], target: Mapping[str, Any], source: str) -> None:
    """Make sure that a network can hold the values of those weights that it has; NaN and infinity give a warning.

    Args:
        state: The weights.
        target: The network's own.
        source: What to call them.

    Raises:
        CheckpointError: Complex values for real weights, values beyond the range of the weights' type, fractions for
            whole numbers, or negative variances.
    """
    pairs = {k: (v, target[k]) for k, v in state.items() if isinstance(target.get(k), Tensor)}
    wrong = [f"{k} {problem}" for k, (v, t) in pairs.items() if (problem := _problem(k, v, t)) is not None]
    if wrong:
        raise CheckpointError(f"{source}: values that the network cannot hold: {_some(wrong)}")
    broken = [k for k, (v, _) in pairs.items() if not is_finite(v)]
    if broken:
        warnings.warn(f"{source}: has NaN or infinite values, and is loaded with them: {_some(broken)}", stacklevel=4)


def _problem(name: str, value: Tensor, target: Tensor) -> str | None:
    if target.ndim == 0 and value.ndim != 0:  # of which torch would take the first
        return f"has shape {tuple(value.shape)}, not ()"
    problem = cannot_hold(value, target.dtype)
    if problem is None and name.endswith(VARIANCE) and has_negative(value):
        return "has negative variances"
    return problem


def translations(model: nn.Module) -> list[Translation]:
    """What other names a network's weights are known under: of its operators' authors, or of its original code."""
    found = [get_operator(plan.operator).translation(model, plan) for plan in plans(model)]
    return found or [original_translation(model)]


def to_upstream(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights with the names and in the layouts of the authors' code."""
    return translations(model)[0].to_authors(model.state_dict())


def _older_temperature(model: nn.Module, value: object, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The temperature that older checkpoints of a training have beside the weights; newer ones have it among them."""
    names = list(_temperatures(model))
    if value is None or not names or any(k.endswith(TEMPERATURE) for k in state):
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{source}: 'temperature' is a {type(value).__name__}, not a number")
    return dict.fromkeys(names, torch.tensor(float(value)))


def _temperatures(model: nn.Module) -> dict[str, Temperature]:
    """Name of each temperature in the state dict → its module."""
    return {f"{name}.value": m for name, m in model.named_modules() if isinstance(m, Temperature)}


def _check_temperatures(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    for name, temperature in _temperatures(model).items():
        if name in state:
            try:
                temperature.check(float(state[name]))
            except (ValueError, RuntimeError) as e:  # complex values among them
                raise CheckpointError(f"{source}: {name}: {e}") from e


def _check_target(target: Mapping[str, Any], source: str) -> None:
    """Refuse networks into which values cannot be copied."""
    for name, value in target.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: the network keeps more than tensors ({name}); use its load_state_dict")
        if value.is_meta:
            raise CheckpointError(f"{source}: {name} of the network is on meta; call its to_empty first")


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


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
