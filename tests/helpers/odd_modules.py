"""Modules that keep, share or change what a copy of a network easily shares with the network; and what a network is."""

import random
import threading
import weakref
from collections import deque, namedtuple
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

CHANNELS = 6
Pair = namedtuple("Pair", "mask rest")


class Part(nn.Module):
    """(B, 6, H, W) → the same, by a convolution; a base of those below."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class TwoNames(Part):
    """One normalisation and one block of layers, each under two names."""

    def __init__(self):
        super().__init__()
        self.norm = self.again = nn.BatchNorm2d(CHANNELS)
        self.block = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.other = self.block

    def forward(self, x):
        return self.other(self.again(self.block(self.norm(self.conv(x)))))


@dataclass
class Memory:
    mask: Tensor = field(default_factory=lambda: torch.ones(CHANNELS))
    seen: list = field(default_factory=list)


class Caches(Part):
    """Attributes of all kinds that the forward makes and changes."""

    def __init__(self):
        super().__init__()
        self.mask = None
        self.positions = torch.arange(CHANNELS)
        self.calls = 0
        self.by_size, self.history, self.recent, self.names = {}, [torch.zeros(2)], deque(maxlen=3), {"a"}
        self.pair = Pair(torch.ones(CHANNELS), [torch.zeros(1)])
        self.memory = Memory()
        self.scales = [nn.Parameter(torch.ones(CHANNELS)), {"deep": (torch.ones(1),)}]
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.counter += 1
        self.mask = torch.ones_like(x[:1])
        self.by_size[tuple(x.shape)] = self.mask
        self.history.append(x.mean())
        self.recent.append(x)
        self.names.add(self.calls)
        self.pair.rest.append(x)
        self.memory.seen.append(x)
        self.memory.mask = self.memory.mask * 1
        self.scratch = x.sum((0, 2, 3))[:2]
        scale = self.scales[0] * self.pair.mask * self.memory.mask * self.scales[1]["deep"][0]
        return self.conv(x) * self.mask * scale[:, None, None] + self.positions[:, None, None]


class Draws(Part):
    """Random numbers of every kind."""

    def forward(self, x):
        noise = torch.rand(1).item() + random.random() + np.random.rand()  # noqa: NPY002
        return self.conv(x) * (1 + 0 * noise)


class Closures(Part):
    """Functions that hold the module, a part of it, or a forward that they stand in for."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.calls = 0
        self.call = lambda x: self.norm(self.conv(x))
        self.default = lambda x, norm=self.norm: norm(x)
        self.bound = self.conv.forward
        self.part = partial(_count, self)
        self.listed = [lambda x: self.norm(x)]
        old = self.norm.forward
        self.norm.forward = lambda x: old(x) * 1

    def forward(self, x):
        return self.part(self.bound(self.call(x)) + self.default(x) + self.listed[0](x))


def _count(module, x):
    module.calls += 1
    return x


class Child(nn.Module):
    """Counts the calls of its parent, to which it has a weak reference."""

    def forward(self, x):
        parent = self.parent()
        parent.calls = parent.calls + 1
        parent.log.append(1)
        return x


class WeakReference(Part):
    def __init__(self):
        super().__init__()
        self.child, self.calls, self.log = Child(), 0, []
        self.child.parent = weakref.ref(self)

    def forward(self, x):
        return self.child(self.conv(x))


REGISTRY = {}


class Registered(Part):
    """Calls the one of its name in a global registry, which no copy is in."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.key = len(REGISTRY)
        REGISTRY[self.key] = self

    def forward(self, x):
        original = REGISTRY[self.key]
        original.count = getattr(original, "count", 0) + 1
        original.norm.num_batches_tracked.add_(1)
        return self.conv(original.norm(x))


class OfTheClass(Part):
    """What belongs to the class: a cache, a counter and a tensor."""

    masks: dict = {}  # noqa: RUF012
    calls = 0
    steps = torch.zeros(1)

    def forward(self, x):
        self.masks[x.shape] = torch.ones_like(x)
        type(self).calls += 1
        type(self).last = x
        self.steps.add_(1)
        return self.conv(x) * self.masks[x.shape]


class Itself:
    """An object that is its own copy."""

    def __init__(self):
        self.seen = []

    def __deepcopy__(self, memo):
        return self


class SharedObject(Part):
    def __init__(self):
        super().__init__()
        self.shared = Itself()

    def forward(self, x):
        self.shared.seen.append(x)
        self.shared.last = x
        return self.conv(x)


class SharedModule(Part):
    """A module that is its own copy."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        return self.norm(self.conv(x))

    def __deepcopy__(self, memo):
        return self


class Uncopyable(Part):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Hooks(Part):
    """Hooks of all kinds that note what they see, and two that compute a weight."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.norm.register_forward_hook(lambda m, x, y: self.seen.append(y))
        self.register_forward_pre_hook(lambda m, x: self.seen.append(x))
        self.register_full_backward_hook(lambda *_: None)
        self.register_state_dict_post_hook(lambda *_: None)
        self.conv.weight.register_hook(lambda g: g)
        self.normed = weight_norm(nn.Conv2d(CHANNELS, CHANNELS, 1))
        self.spectral = spectral_norm(nn.Conv2d(CHANNELS, CHANNELS, 1))
        self.pruned = prune.l1_unstructured(nn.Conv2d(CHANNELS, CHANNELS, 1), "weight", amount=0.5)
        self.parametrized = parametrizations.spectral_norm(nn.Conv2d(CHANNELS, CHANNELS, 1))

    def forward(self, x):
        return self.parametrized(self.pruned(self.spectral(self.normed(self.norm(self.conv(x))))))


class Tensors(Part):
    """Tensors of every kind, and gradients."""

    def __init__(self):
        super().__init__()
        self.register_buffer("waves", torch.ones(CHANNELS, dtype=torch.complex64))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("view", self.conv.weight.detach()[0])
        self.result = self.conv.weight * 2  # no leaf, which deepcopy refuses
        self.generator = torch.Generator()
        self.conv.weight.grad = torch.ones_like(self.conv.weight)
        self.conv.bias.requires_grad_(False)
        self.register_buffer("ready", torch.ones((), dtype=torch.bool))
        self.times = torch.tensor([1, 2])

    def forward(self, x):
        assert self.ready
        for _ in range(self.times.tolist()[1]):
            x = self.conv(x)
        return x * self.waves.real[:, None, None] + self.result.mean() + self.view.mean()


class Modes(Part):
    """Counts what its mode is set to, and keeps its normalisation as it is in training."""

    def __init__(self):
        super().__init__()
        self.norm, self.changes = nn.BatchNorm2d(CHANNELS), []
        self.norm.eval()

    def train(self, mode=True):
        self.changes.append(mode)
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.norm(self.conv(x))


class Scripted(Part):
    def __init__(self):
        super().__init__()
        self.inner = torch.jit.trace(nn.Conv2d(CHANNELS, CHANNELS, 1), torch.zeros(1, CHANNELS, 4, 4))

    def forward(self, x):
        return self.inner(self.conv(x))


class Recurrent(Part):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(CHANNELS, 4, 2, batch_first=True, bidirectional=True, proj_size=3)
        self.gru, self.rnn = nn.GRU(CHANNELS, CHANNELS), nn.RNN(CHANNELS, CHANNELS)
        self.cells = nn.ModuleList((nn.LSTMCell(CHANNELS, CHANNELS), nn.GRUCell(CHANNELS, CHANNELS)))

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        tokens, (h, c) = self.lstm(tokens)
        assert h.shape == (4, len(x), 3)
        assert c.shape == (4, len(x), 4)
        tokens = self.rnn(self.gru(tokens.transpose(0, 1))[0])[0].transpose(0, 1)
        first = self.cells[1](self.cells[0](tokens[:, 0])[0])
        return (tokens + first[:, None]).transpose(1, 2).reshape(x.shape)


class Fails(nn.Module):
    """Raises what it is told to."""

    def __init__(self, error=RuntimeError):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error("told to")


RUNNING = (
    Part,
    TwoNames,
    Caches,
    Draws,
    Closures,
    WeakReference,
    OfTheClass,
    SharedObject,
    Hooks,
    Tensors,
    Modes,
    Recurrent,
)
PARTS = (*RUNNING, Registered, SharedModule, Uncopyable, Scripted)  # of the last, no copy runs


class Chain(nn.Module):
    """A convolution of an image (B, 3, H, W), and some parts, one after the other."""

    def __init__(self, *parts):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(self.stem(x))


def description(net):
    """What a network is: modules, attributes, containers, tensors with their bytes, hooks; and the states around it."""
    seen = {}
    own = {type(m) for m in net.modules() if type(m).__module__ == __name__}
    classes = [{k: v for k, v in vars(cls).items() if not k.startswith("__")} for cls in sorted(own, key=id)]
    found = _describe(net, seen), _describe(REGISTRY, seen), [_describe(c, seen)[1] for c in classes]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    return found, states, torch.backends.mha.get_fastpath_enabled()


def _describe(value, seen):
    if id(value) in seen:
        return id(value)
    if isinstance(value, Tensor | nn.Module | Memory | Itself | dict | list | tuple | deque | set):
        seen[id(value)] = value
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        kinds = type(value), value.device, value.dtype, value.shape, value.requires_grad, value._version
        return id(value), *kinds, _content(value), None if grad is None else _describe(grad, seen)
    if isinstance(value, nn.Module | Memory | Itself):
        return id(value), type(value), [(name, _describe(item, seen)) for name, item in vars(value).items()]
    if isinstance(value, dict):
        return id(value), [(key, _describe(item, seen)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | set):
        return id(value), [_describe(item, seen) for item in value]
    return id(value), value if isinstance(value, int | float | str) else None


def _content(tensor):
    if tensor.is_meta:
        return None
    values = tensor.detach().to_dense()
    return (torch.view_as_real(values) if values.is_complex() else values).numpy().tobytes()
