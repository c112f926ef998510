"""The layers of a network that an operator may replace, with what is known about each: `find_sites`.

For the families that papers convert (ResNet, MobileNetV2, ConvNeXt, vision transformers) a table says each layer's
stage, block and role (`families.py`); for any other network they follow from its structure (`structure.py`). No
operator is known here: which layers one replaces, and which share what, is its own business.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .families import Place, find_family
from .layers import LAYERS, Layer, kernel_shape, pads_same
from .obstacles import Obstacles
from .structure import Trace, trace_layers
from .twin import copy_to_meta, unchanged


@dataclass(frozen=True)
class Site:
    """A layer that may be replaced.

    Attributes:
        name: The module's name.
        kind: Class of torch.nn: Conv1d, Conv2d, Conv3d or Linear.
        in_channels: Channels of its input.
        out_channels: Channels of its output.
        kernel: Shape of its weight: (Cout, Cin/groups, *k), (out_features, in_features) for a linear layer.
        groups: Of a convolution.
        bias: Whether it has one.
        dtype: Of its weight.
        stride: Of a convolution.
        padding: Of a convolution, as torch's argument.
        dilation: Of a convolution.
        padding_mode: Of a convolution.
        stage: Where in the network it is: the stage's number, or the resolution that it reads (``r14x14``).
        block: Number of its block in the stage.
        role: What it does there: stem, head, downsample, last, conv1, expand, depthwise, project, qkv, …; by structure
            stem, head (reads a single position), unused (did not run) or body.
        repeats: Its samples for one of the network's: 1 where its input's first dimension is the batch, more where
            it is a multiple of it; 0 where it is neither; None where that is not known.
        input_shape: Shape of its input with the example, and `turn`, its place in the order of execution, where
            the network was run.
        turn: See `input_shape`.
        readers: Names of the sites that read its output with no other site between, where that was asked for.
        parent: Name of the module that it is a part of, the innermost that is no container such as a Sequential; empty
            where that is the network.
        pads_same: Whether it pads as TensorFlow's "same", by the size of its input; it is `foreign` then.
        foreign: Why it is not simply a layer of torch.nn that is called with a batch: a subclass with arithmetic of its
            own, or a layer whose weight the network reads.
        obstacle: Why it cannot be replaced, such as hooks that would be lost.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    groups: int
    bias: bool
    dtype: torch.dtype
    stride: tuple[int, ...] = ()
    padding: str | tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    stage: str = ""
    block: str = ""
    role: str = "body"
    repeats: int | None = None
    input_shape: tuple[int, ...] | None = None
    turn: int | None = None
    readers: tuple[str, ...] = ()
    parent: str = ""
    pads_same: bool = False
    foreign: str | None = None
    obstacle: str | None = None

    @property
    def batch_first(self) -> bool | None:
        """Whether the first dimension of its input is the batch or a multiple of it; None where that is not known."""
        return None if self.repeats is None else self.repeats > 0

    @property
    def positions(self) -> tuple[int, ...] | None:
        """The spatial size, or the numbers of tokens, of its input with the example."""
        if self.input_shape is None:
            return None
        return self.input_shape[1:-1] if self.kind == "Linear" else self.input_shape[2:]


@dataclass(frozen=True)
class Sites:
    """All sites of a network, in the order of ``network.modules()``.

    Attributes:
        network: The network's class.
        family: Name of the table that describes it, None where there is none.
        sites: What there is.
        batch_norm: Whether it normalises over batches.
        parameters: Their number.
        untraced: Why the network, which has no table, could not be run, if it could not.
    """

    network: str
    family: str | None
    sites: tuple[Site, ...]
    batch_norm: bool
    parameters: int
    untraced: str | None = None

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def find_sites(
    net: nn.Module,
    example_input: Tensor | None = None,
    *,
    readers: bool = False,
    converted: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Sites:
    """Find the layers of `net` that may be replaced, changing nothing.

    Args:
        net: Any network.
        example_input: For a network without a table: an input of it, of which shape and type are used. Copies of the
            network are run on the meta device. None guesses one.
        readers: Whether to find out which sites read each one's output.
        converted: Layers of other operators by name: they are no sites, and what is inside of them is theirs.

    Raises:
        ValueError: A wrapped network, a single layer, or one without convolutions and linear layers of torch.nn.
    """
    check_network(net)
    insides = tuple(f"{name}." for name in converted)
    found = {name: m for name, m in net.named_modules() if not name.startswith(insides)}
    layers = {name: m for name, m in found.items() if isinstance(m, LAYERS)}
    if not layers:
        raise ValueError(f"{type(net).__name__} holds no convolution and no linear layer of torch.nn")
    obstacles = Obstacles(net)
    problems = {name: obstacles.find(name, layer) for name, layer in layers.items()}
    foreign = {name: obstacles.foreign(layer) for name, layer in layers.items()}
    family = find_family(net)
    trace = Trace()
    if family is None or not _is_published(found, converted):
        watched = {name: m for name, m in found.items() if name in layers or name in converted}
        replaceable = [
            name
            for name, layer in layers.items()
            if problems[name] is None and (foreign[name] is None or pads_same(layer))
        ]
        trace = trace_layers(net, watched, replaceable, example_input)
    places: dict[str, Place] = {}
    if family is not None:
        places = family.place(list(layers))
    else:
        places = {name: _place_by_structure(name, layers[name], trace) for name in layers}
    reading = _find_readers(net, {*layers, *converted}) if readers else {}
    sites = []
    for name, layer in layers.items():
        stage, block, role = places.get(name, ("", "", "unknown" if family else "body"))
        site = replace(_describe(name, layer), stage=stage, block=block, role=role, readers=reading.get(name, ()))
        known = 1 if family is not None or site.kind != "Linear" else None
        repeats = trace.repeats.get(name, known)
        if site.kind == "Linear" and _is_sequence_first(net, name):
            repeats = 0
        sites.append(
            replace(
                site,
                repeats=repeats,
                input_shape=trace.shapes.get(name),
                turn=list(trace.shapes).index(name) if name in trace.shapes else None,
                parent=_parent(found, name),
                pads_same=pads_same(layer) and name not in trace.uses,
                foreign=foreign[name] or trace.uses.get(name),
                obstacle=problems[name],
            )
        )
    return Sites(
        network=type(net).__name__,
        family=family.name if family else None,
        sites=tuple(sites),
        batch_norm=any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()),
        parameters=sum(p.numel() for p in net.parameters()),
        untraced=trace.error if family is None else None,
    )


def _parent(modules: Mapping[str, nn.Module], name: str) -> str:
    parent = name.rpartition(".")[0]
    while parent and isinstance(modules[parent], nn.Sequential | nn.ModuleList | nn.ModuleDict):
        parent = parent.rpartition(".")[0]
    return parent


def _is_published(modules: Mapping[str, nn.Module], converted: Collection[str]) -> bool:
    """Whether a network computes as its table says: its modules are of the libraries that the tables were made for."""
    own = [m for name, m in modules.items() if name not in converted]
    return all(type(m).__module__.partition(".")[0] in _LIBRARIES and "forward" not in vars(m) for m in own)


_LIBRARIES = ("torch", "timm", "torchvision")


def check_network(net: nn.Module) -> None:
    """Raise a ValueError for what cannot be converted in place: a wrapper, a single layer, or one with lazy modules."""
    wrappers = (
        "DistributedDataParallel",
        "DataParallel",
        "FullyShardedDataParallel",
        "OptimizedModule",
        "ScriptModule",
    )
    if type(net).__name__ in wrappers or isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"the network is wrapped in {type(net).__name__}: convert the network inside, then wrap it")
    if isinstance(net, LAYERS):
        raise ValueError(f"a single {type(net).__name__} cannot be swapped in place: put it into a module first")
    for name, module in net.named_modules():
        if any(is_lazy(t) for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            kind = type(module).__name__
            raise ValueError(f"{name or 'it'} is a {kind} without a shape: call the network on an input first")


def _describe(name: str, layer: Layer) -> Site:
    """What a layer's arguments say; its weight may be computed when it is read, and change something."""
    kind = next(cls.__name__ for cls in LAYERS if isinstance(layer, cls))
    bias = "bias" in layer._parameters and layer._parameters["bias"] is not None
    bias = bias or parametrize.is_parametrized(layer, "bias")
    dtype = next((p.dtype for p in layer.parameters()), torch.get_default_dtype())
    kernel = kernel_shape(layer)
    if isinstance(layer, nn.Linear):
        return Site(name, kind, layer.in_features, layer.out_features, kernel, 1, bias, dtype)
    return Site(
        name,
        kind,
        layer.in_channels,
        layer.out_channels,
        kernel,
        layer.groups,
        bias,
        dtype,
        tuple(layer.stride),
        layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
        tuple(layer.dilation),
        layer.padding_mode,
    )


def _place_by_structure(name: str, layer: Layer, trace: Trace) -> Place:
    """The first layer of all reads the image; what reads a single position works on pooled features."""
    if name not in trace.shapes:
        return "", "", "unused" if trace.error is None else "body"
    shape = trace.shapes[name]
    positions = shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]
    stage = f"r{'x'.join(map(str, positions))}"
    if name == next(iter(trace.shapes)):
        return stage, "", "stem"
    single = all(size <= 1 for size in positions)
    return stage, "", "head" if single else "body"


def _is_sequence_first(net: nn.Module, name: str) -> bool:
    """Whether a layer is part of one of torch's modules that are told to read (tokens, batch, channels)."""
    parents = [net.get_submodule(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)]
    parts = [part for parent in parents for part in (parent, *parent.children())]
    torchs = (nn.MultiheadAttention, nn.RNNBase)
    return any(isinstance(part, torchs) and not part.batch_first for part in parts)


def _find_readers(net: nn.Module, layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Site → the sites that its output reaches through no other site; nothing where the network cannot be traced."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name in layers or super().is_leaf_module(m, module_qualified_name)

    try:
        with unchanged(net):
            graph = Tracer().trace(copy_to_meta(net)[0])
    except Exception:  # control flow that depends on values raises whatever it likes
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in layers:
            seen, reached, queue = set(), [], list(node.users)
            while queue:
                user = queue.pop(0)
                if user in seen:
                    continue
                seen.add(user)
                if user.op == "call_module" and user.target in layers:
                    reached.append(user.target)
                else:
                    queue += user.users
            found[node.target] = tuple(dict.fromkeys(reached))
    return found
