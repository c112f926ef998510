"""A run of a copy of a network, which notes what its layers read and how they are used: `try_out`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .twin import copy_to_meta

LONGEST = 20_000  # calls of torch's functions in a run; a network of a thousand layers needs a quarter of it

# What a layer is made with: those that `convert_` makes have it as well.
ARGUMENTS = frozenset((*nn.Conv2d.__constants__, *nn.Linear.__constants__))


@dataclass
class Notes:
    """What was seen in a run.

    Attributes:
        inputs: By layer, the shape of the input of each of its calls, in the order of their first calls.
        faults: By layer, how it is used otherwise than by calling it with a batch; of those only that have stand-ins.
    """

    inputs: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def blame(self, name: str, fault: str) -> None:
        """Note how a layer is used."""
        self.faults.setdefault(name, fault)

    def note_input(self, name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note a call; a forward pre-hook."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.inputs.setdefault(name, []).append(() if x is None else tuple(x.shape))


def try_out(
    net: nn.Module, names: Iterable[str], x: Tensor, *, training: bool = False, stand_ins: Iterable[str] = ()
) -> Notes:
    """Run a copy of `net` on meta.

    Args:
        net: Any network.
        names: The layers to watch.
        x: Its input, on meta.
        training: Whether it is run as in training.
        stand_ins: Names of layers whose places are taken by modules that are no layers of torch.nn, as converted ones
            will be.

    Raises:
        CopyError: The network cannot be copied.
        Exception: Whatever the network raises.
    """
    copied, twins = copy_to_meta(net)
    notes = Notes()
    mode = _Mode(notes, twins)
    modules = dict(copied.named_modules())
    for name in names:
        modules[name].register_forward_pre_hook(partial(notes.note_input, name), with_kwargs=True)
    for name in stand_ins:
        for kind, parameter in modules[name].named_parameters(recurse=False):
            mode.owners[id(parameter)] = name, kind
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, _StandIn(name, modules[name], mode))
    fast = torch.backends.mha.get_fastpath_enabled()  # which does not call the layers of torch's transformers
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), mode:
            copied.train(training)
            copied(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return notes


class _StandIn(nn.Module):
    """Takes the place of a layer, which it calls; what is asked of it that a converted layer may not have is noted."""

    def __init__(self, name: str, layer: nn.Module, mode: "_Mode"):
        super().__init__()
        batched = (2, None) if isinstance(layer, nn.Linear) else (layer.weight.ndim, layer.weight.ndim)
        vars(self).update(_name=name, _mode=mode, _dimensions=batched)
        self._modules["layer"] = layer

    @property
    def _layer(self) -> nn.Module:
        return cast("nn.Module", self._modules["layer"])

    def _blame(self, fault: str) -> None:
        self._mode.notes.blame(self._name, fault)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        least, most = self._dimensions
        if kwargs or len(args) != 1 or not isinstance(x, Tensor):
            self._blame("the network calls it with something else than one tensor")
        elif x.ndim < least or (most and x.ndim > most):
            self._blame(f"the network calls it without a batch, with an input of shape {tuple(x.shape)}")
        with self._mode.inside(self._name):
            return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        if name not in ARGUMENTS:
            self._blame(f"the network reads its {name}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        layer = vars(self).get("_mode") and self._layer
        if layer and (name in ARGUMENTS or name in layer._parameters or hasattr(type(layer), name)):
            self._blame(f"the network sets its {name}")
            setattr(layer, name, value)
        else:
            super().__setattr__(name, value)


class _Mode(TorchFunctionMode):
    """Sees every call of torch's functions in a run.

    Attributes:
        notes: What was seen.
        owners: Layer and name of each parameter, by its id, whose uses are noted.
    """

    def __init__(self, notes: Notes, twins: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.notes = notes
        self.owners: dict[int, tuple[str, str]] = {}
        self._twins = twins  # held, so that no other tensor comes to have the identity of one
        self._originals = {id(twin): tensor for tensor, twin in twins}
        self._storages = {_storage(tensor) for tensor, _ in twins}
        self._calls = 0
        self._running: list[str] = []

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """While a layer runs, by its stand-in, it may use its parameters."""
        self._running.append(name)
        try:
            yield
        finally:
            self._running.pop()

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
                self.notes.blame(owner[0], f"the network uses its {owner[1]} outside of it")
        if func in _READING and id(args[0]) in self._originals:
            return func(self._originals[id(args[0])], *args[1:], **kwargs)
        return func(*args, **kwargs)


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
