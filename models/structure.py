"""What a network without a table does with an input: `trace_layers` runs it on meta and watches its layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Trace:
    """How a network ran.

    Attributes:
        shapes: By layer, the shape of its first input, in the order of execution.
        repeats: By layer, how many times the batch its input's first dimension is; 0 where it is no multiple of it.
        error: Why it did not run, if so.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    error: str | None = None


def trace_layers(net: nn.Module, layers: Mapping[str, nn.Module], example_input: Tensor | None = None) -> Trace:
    """Run `net` on the meta device, without touching its weights, and leave it as it was.

    It runs twice, the second time with one sample more: only then does a dimension that follows the batch show.

    Args:
        net: Any network.
        layers: Those to watch, by name.
        example_input: An input, of which shape and type are used; None tries timm's default input, then 256, 224×224 or
            32×64×64 positions according to the first convolution.
    """
    try:
        example = guess_input(net, layers) if example_input is None else example_input
    except ValueError as e:
        return Trace(error=str(e))
    batch = max(len(example), 2) if example_input is None else len(example)
    shape = tuple(example.shape[1:])
    try:
        shapes = _input_shapes(net, layers, (batch, *shape), example.dtype)
    except Exception as e:  # whatever a network raises
        return Trace(error=f"it does not run on an input of shape {(batch, *shape)} ({e})")
    try:
        larger = _input_shapes(net, layers, (batch + 1, *shape), example.dtype)
    except Exception:  # it was made for one batch, which then has to tell
        larger = None
    repeats = {
        name: _repeats(seen[0], None if larger is None else larger.get(name, (0,))[0], batch)
        for name, seen in shapes.items()
    }
    return Trace(shapes, repeats)


def guess_input(net: nn.Module, layers: Mapping[str, nn.Module]) -> Tensor:
    """An input of two samples on the meta device, by timm's default configuration or else by the first layer.

    Raises:
        ValueError: The first layer is no convolution, which says nothing.
    """
    cfg = getattr(net, "default_cfg", None)
    first = next(iter(layers.values()))
    if isinstance(cfg, Mapping) and len(cfg.get("input_size") or ()) == 3:
        channels = first.in_channels if isinstance(first, CONVOLUTIONS) else cfg["input_size"][0]
        size = (channels, *cfg["input_size"][1:])
    elif not isinstance(first, CONVOLUTIONS):
        raise ValueError(f"its input cannot be guessed from its first layer, a {type(first).__name__}")
    else:
        sizes = {1: (256,), 2: (224, 224), 3: (32, 64, 64)}
        size = (first.in_channels, *sizes[first.weight.ndim - 2])
    return torch.empty(2, *size, dtype=next(first.parameters()).dtype, device="meta")


def _repeats(first: int, first_of_larger: int | None, batch: int) -> int:
    """How many times the batch a first dimension is, given what it is for one sample more, if that is known."""
    times, rest = divmod(first, batch)
    if rest or (first_of_larger is not None and first_of_larger != times * (batch + 1)):
        return 0
    return times


def _input_shapes(
    net: nn.Module, layers: Mapping[str, nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[int, ...]]:
    """Shape of each layer's first input, in the order in which the layers run."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.setdefault(name, tuple(args[0].shape))

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    modes = {module: module.training for module in net.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()  # which does not call the layers of torch's transformers
    state = _on_meta(net)
    try:
        net.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            torch.func.functional_call(net, state, (torch.empty(shape, dtype=dtype, device="meta"),), tie_weights=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return shapes


def _on_meta(net: nn.Module) -> dict[str, Tensor]:
    """What `net` computes with, on meta, under one name for each module.

    By itself, `functional_call` finds a module that several others share under all of its names, and when it puts back
    what it has replaced, in the order in which it replaced it, the module is left with the replacement.
    """
    tensors: dict[Tensor, Tensor] = {}
    state = {}
    for path, module in net.named_modules():
        for name, tensor in (*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)):
            state[name] = tensors.setdefault(tensor, tensor.to("meta"))
    return state
