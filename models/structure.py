"""What a network does with an input, by running copies of it on meta: `trace_layers`, `why_not_run`."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .trial import Notes, try_out
from .twin import CopyError, unchanged

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GUESSES = 4  # numbers of channels that are tried
_MOST = 8  # layers that a network does not run without, before it is given up


@dataclass(frozen=True)
class Trace:
    """How a network ran.

    Attributes:
        shapes: By layer, the shape of its first input, in the order of execution.
        repeats: By layer, how many times the batch the first dimension of its inputs is; 0 where it is no multiple of
            it.
        uses: By layer, how it is used otherwise than by calling it with a batch, if so.
        error: Why it did not run, if so.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)
    error: str | None = None


def trace_layers(
    net: nn.Module, layers: Mapping[str, nn.Module], replaceable: Collection[str], example_input: Tensor | None = None
) -> Trace:
    """Run copies of `net` on the meta device, which leaves it as it was.

    The first run shows what the network does. In two more, in evaluation and in training, stand-ins take the places of
    layers: what the network then asks for that a converted layer does not have is found. They have one sample more:
    only then does a dimension that follows the batch show.

    Args:
        net: Any network.
        layers: Those to watch, by name.
        replaceable: The names of those that may be converted.
        example_input: An input, of which shape and type are used; None tries timm's default input, then 256, 224×224 or
            32×64×64 positions according to the first convolution.

    Raises:
        ValueError: The example is no tensor with samples.
    """
    if example_input is not None and not _has_samples(example_input):
        raise ValueError(f"example_input must be a tensor with a sample or more, found {_describe(example_input)}")
    with unchanged(net):
        runs = _Runs(net, layers, replaceable)
        error = None
        for x in guess_inputs(net, layers) if example_input is None else [example_input]:
            try:
                natural = runs.run(x.new_empty(x.shape, device="meta"), False, ())
            except CopyError as e:
                return Trace(error=f"it cannot be copied to be run ({e})")
            except Exception as e:  # whatever a network raises
                error = error or f"it does not run on an input of shape {tuple(x.shape)} ({e})"
            else:
                return runs.trace(x, natural)
    first = next(iter(layers.values()))
    return Trace(error=error or f"its input cannot be guessed from its first layer, a {type(first).__name__}")


def why_not_run(net: nn.Module, x: Tensor) -> str | None:
    """What a copy of `net` raises on meta for an input like x; None where it runs. The network stays as it was."""
    with unchanged(net):
        try:
            try_out(net, (), x)
        except Exception as e:  # whatever a network raises
            return str(e)
    return None


def guess_inputs(net: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    """Inputs of two samples on meta that `net` may take, by timm's default configuration and by its convolutions."""
    first = next(iter(layers.values()))
    dtype = next((p.dtype for p in first.parameters()), None)
    convolutions = [layer for layer in layers.values() if isinstance(layer, CONVOLUTIONS)]
    channels = [(layer.in_channels, len(layer.kernel_size)) for layer in convolutions]
    cfg = getattr(net, "default_cfg", None)
    size = tuple(cfg.get("input_size") or ()) if isinstance(cfg, Mapping) else ()
    if len(size) == 3:
        known = [(size[0], 2)]
        channels = channels[:1] + known + channels if isinstance(first, CONVOLUTIONS) else known + channels
        sizes = {2: size[1:]}
    else:
        sizes = {1: (256,), 2: (224, 224), 3: (32, 64, 64)}
    shapes = dict.fromkeys((count, *sizes[dimensions]) for count, dimensions in channels if dimensions in sizes)
    for shape in list(shapes)[:_GUESSES]:
        yield torch.empty(2, *shape, dtype=dtype, device="meta")


class _Runs:
    """Runs of copies of one network."""

    def __init__(self, net: nn.Module, layers: Mapping[str, nn.Module], replaceable: Collection[str]):
        self.net, self.layers = net, layers
        self.replaceable = list(replaceable)
        self.uses: dict[str, str] = {}

    def run(self, x: Tensor, training: bool, stand_ins: Collection[str]) -> Notes:
        return try_out(self.net, self.layers, x, training=training, stand_ins=stand_ins)

    def trace(self, x: Tensor, natural: Notes) -> Trace:
        """What is known after a first run, and two or more."""
        batch = len(x)
        same, more = (x.new_empty(count, *x.shape[1:], device="meta") for count in (batch, batch + 1))
        larger = self._replaced(more, False)
        replaced = larger or self._replaced(same, False)
        for name in self.replaceable:
            if replaced is not None and name in natural.inputs and name not in replaced.inputs:
                kind = type(self.layers[name]).__name__
                self.uses.setdefault(name, f"the network calls it only because it is a {kind}")
        if self._replaced(more, True) is None:
            self._replaced(same, True)
        repeats = {
            name: _repeats(shapes, None if larger is None else larger.inputs.get(name, []), batch)
            for name, shapes in natural.inputs.items()
        }
        return Trace({name: shapes[0] for name, shapes in natural.inputs.items()}, repeats, self.uses)

    def _replaced(self, x: Tensor, training: bool) -> Notes | None:
        """A run with stand-ins for the layers that the network can do without; None where it does not run anyway."""
        try:
            notes = self.run(x, training, self.replaceable)
        except Exception as e:
            try:
                self.run(x, training, ())
            except Exception:  # it was made for one batch, or to be used otherwise in training
                return None
            needed = self._needed(x, training, self.replaceable, [])
            for name in needed:
                kind = type(self.layers[name]).__name__
                self.uses.setdefault(name, f"the network does not run with another layer in place of the {kind} ({e})")
            self.replaceable = [name for name in self.replaceable if name not in needed]
            return self._replaced(x, training)
        for name, fault in notes.faults.items():
            self.uses.setdefault(name, fault)
        return notes

    def _needed(self, x: Tensor, training: bool, names: list[str], found: list[str]) -> list[str]:
        """Names of the layers without which the network does not run, by halves; of all of them where they are many."""
        if len(found) > _MOST:
            return names
        try:
            self.run(x, training, names)
        except Exception:
            if len(names) == 1:
                return names
            half = len(names) // 2
            first = self._needed(x, training, names[:half], found)
            second = self._needed(x, training, names[half:], [*found, *first])
            return [*first, *second] or names
        return []


def _repeats(shapes: list[tuple[int, ...]], larger: list[tuple[int, ...]] | None, batch: int) -> int:
    """How many times the batch some inputs' first dimension is, given the inputs for one sample more, if known."""
    found = []
    for i, shape in enumerate(shapes):
        times, rest = divmod(shape[0] if shape else 1, batch)
        grown = times * (batch + 1)
        if rest or (larger is not None and (len(larger) != len(shapes) or larger[i][:1] != (grown,))):
            return 0
        found.append(times)
    return max(found)


def _has_samples(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() > 0


def _describe(value: object) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
