"""A run of a copy of a network that notes what its layers read and how they are used: `Trial`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .twin import copy_to_meta

LONGEST = 50_000  # calls of torch's functions in a run; a network of a thousand layers needs a tenth of it

# What a layer is made with: those that `convert_` makes have it as well.
ARGUMENTS = frozenset((*nn.Conv2d.__constants__, *nn.Linear.__constants__))


class Trial:
    """A copy of a network on meta, to be run once.

    Attributes:
        inputs: By layer, the shape of the input of each of its calls, in the order of their first calls.
        faults: By layer, how it is used otherwise than by calling it with a batch, of those that `stand_in` replaced.

    Raises:
        CopyError: The network cannot be copied.
    """

    def __init__(self, net: nn.Module, names: Iterable[str]):
        self.net, originals = copy_to_meta(net)
        self.inputs: dict[str, list[tuple[int, ...]]] = {}
        self.faults: dict[str, str] = {}
        self.mode = _Mode(self, originals)
        for name in names:
            layer = self.net.get_submodule(name)
            layer.register_forward_pre_hook(partial(self._note_input, name), with_kwargs=True)

    def stand_in(self, names: Iterable[str]) -> None:
        """Let modules that are no layers of torch.nn take the places of layers, as converted ones will."""
        for name in names:
            layer = self.net.get_submodule(name)
            for kind, parameter in layer.named_parameters(recurse=False):
                self.mode.owners[id(parameter)] = name, kind
            self.net.set_submodule(name, _StandIn(name, layer, self))

    def run(self, x: Tensor, training: bool = False) -> None:
        """Run the copy on an input like x, in training or in evaluation; raises whatever it raises."""
        fast = torch.backends.mha.get_fastpath_enabled()  # which does not call the layers of torch's transformers
        compiled = "torch._dynamo" in sys.modules
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), torch.no_grad(), self.mode:
                self.net.train(training)
                self.net(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def blame(self, name: str, fault: str) -> None:
        """Note how a layer is used."""
        self.faults.setdefault(name, fault)

    def _note_input(self, name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.inputs.setdefault(name, []).append(() if x is None else tuple(x.shape))


class _StandIn(nn.Module):
    """Takes the place of a layer, which it calls; what is asked of it that a converted layer may not have is noted."""

    def __init__(self, name: str, layer: nn.Module, trial: Trial):
        super().__init__()
        batched = (2, None) if isinstance(layer, nn.Linear) else (layer.weight.ndim, layer.weight.ndim)
        vars(self).update(_name=name, _trial=trial, _dimensions=batched)
        self._modules["layer"] = layer

    @property
    def _layer(self) -> nn.Module:
        return cast("nn.Module", self._modules["layer"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        least, most = self._dimensions
        if kwargs or len(args) != 1 or not isinstance(x, Tensor):
            self._trial.blame(self._name, "it is called with something else than one tensor")
        elif x.ndim < least or (most and x.ndim > most):
            self._trial.blame(self._name, f"it is called without a batch, with an input of shape {tuple(x.shape)}")
        with self._trial.mode.inside(self._name):
            return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        if name not in ARGUMENTS:
            self._trial.blame(self._name, f"its {name} is read")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" and "_trial" in vars(self) and hasattr(self._layer, name):
            self._trial.blame(self._name, f"its {name} is set")
            setattr(self._layer, name, value)
        else:
            super().__setattr__(name, value)


class _Mode(TorchFunctionMode):
    """Sees every call of torch's functions in a run.

    Attributes:
        owners: Layer and name of each parameter, by its id, whose uses are noted.
    """

    def __init__(self, trial: Trial, originals: dict[int, Tensor]):
        super().__init__()
        self.trial, self.originals = trial, originals
        self.owners: dict[int, tuple[str, str]] = {}
        self._storages = {_storage(tensor) for tensor in originals.values()}
        self._calls = 0
        self._running: list[str] = []

    def inside(self, name: str) -> "_Running":
        """While a layer runs, by its stand-in, it may use its parameters."""
        return _Running(self._running, name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._calls += 1
        if self._calls > LONGEST:
            raise RuntimeError(f"it calls more than {LONGEST} functions of torch for one input: try a smaller one")
        if func in _RECURRENCES:
            return _RECURRENCES[func](*args, **kwargs)
        for tensor in _tensors((*args, *kwargs.values())):
            if tensor.device.type != "meta":
                if _storage(tensor) in self._storages:
                    raise RuntimeError("by a reference that is not its own, it reaches tensors of the original network")
            elif (owner := self.owners.get(id(tensor))) and owner[0] not in self._running and func not in _DESCRIBING:
                self.trial.blame(owner[0], f"its {owner[1]} is used outside of it")
        if func in _READING and id(args[0]) in self.originals:
            return func(self.originals[id(args[0])], *args[1:], **kwargs)
        return func(*args, **kwargs)


class _Running:
    def __init__(self, running: list[str], name: str):
        self.running, self.name = running, name

    def __enter__(self) -> None:
        self.running.append(self.name)

    def __exit__(self, *_: object) -> None:
        self.running.pop()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _storage(tensor: Tensor) -> int:
    """Tells the memory of one tensor from that of others."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse one has several
        return id(tensor)


def _recurrent(*args: Any, states: int) -> Any:
    """What torch's recurrent functions return, by shape alone: they would go through the tokens one by one.

    Args:
        *args: Input, the sizes of batches if it is packed, states, weights, and so on.
        states: How many tensors are a state.
    """
    packed = isinstance(args[3], list | tuple)
    x, hidden, bidirectional = args[0], args[1 + packed], args[7 + packed]
    hidden = tuple(hidden) if states > 1 else (hidden,)
    y = x.new_empty(*x.shape[:-1], hidden[0].shape[-1] * (2 if bidirectional else 1))
    return y, *(torch.empty_like(state) for state in hidden)


def _cell(*args: Any, states: int) -> Any:
    if states == 2:
        return tuple(torch.empty_like(state) for state in args[1])
    return torch.empty_like(args[1])


_RECURRENCES: dict[Any, Callable[..., Any]] = {
    torch.lstm: partial(_recurrent, states=2),
    torch.lstm_cell: partial(_cell, states=2),
    **{f: partial(_recurrent, states=1) for f in (torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **{f: partial(_cell, states=1) for f in (torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)},
}

# Functions that read values, which a tensor on meta does not have, though the one that it stands for does.
_READING = frozenset((Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__))

# Functions that say of a parameter what is the same for those of a converted layer.
_DESCRIBING = frozenset(
    (
        *(
            getattr(Tensor, name).__get__
            for name in ("device", "dtype", "layout", "requires_grad", "is_leaf", "is_cuda")
        ),
        Tensor.is_floating_point,
        Tensor.is_complex,
    )
)
