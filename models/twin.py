"""A copy of a network on the meta device, to be run in place of the network: `copy_to_meta`, within `unchanged`."""

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
_DATA = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_LIBRARIES = ("torch", "builtins", "abc")


class CopyError(RuntimeError):
    """A network that cannot be copied."""


def copy_to_meta(net: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A deep copy of `net` without its hooks, whose tensors are on meta.

    Whatever tensors `copy.deepcopy` meets (parameters, buffers, attributes, in containers and objects) it takes for
    their twins on meta, which need no memory; tied ones stay tied.

    Returns:
        The copy, and pairs of a tensor of `net` and its twin.

    Raises:
        CopyError: It cannot be copied, or would have parts in common with `net`.
    """
    memo: dict[int, Any] = {id(vars(m).get(name)): OrderedDict() for m in net.modules() for name in _HOOKS}
    memo.pop(id(None), None)
    to_meta = _ToMeta(memo)
    try:
        for tensor in (*net.parameters(), *net.buffers()):
            to_meta.twin(tensor)
        functions = _Functions(memo)
        functions.find(map(vars, net.modules()))
        with to_meta:
            copied = copy.deepcopy(net, memo)
            functions.bind()
    except Exception as e:  # whatever a part of a network raises
        raise CopyError(f"{type(e).__name__}: {e}") from e
    parts = {id(module) for module in net.modules()}
    for name, module in copied.named_modules():
        if id(module) in parts:
            raise CopyError(f"a copy of {name or 'it'} is the same {type(module).__name__}")
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type != "meta":
                raise CopyError(f"the {type(module).__name__} {name} copies its tensors itself")
    return copied, [(tensor, memo[id(tensor)]) for tensor in to_meta.tensors]


class _ToMeta(TorchFunctionMode):
    """While it is entered, copies of tensors are twins on meta."""

    def __init__(self, memo: dict[int, Any]):
        super().__init__()
        self.memo = memo
        self.tensors: list[Tensor] = []  # what has a twin

    def twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.memo:
            self.memo[id(tensor)] = _on_meta(tensor)
            self.tensors.append(tensor)
        return self.memo[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self.twin(args[0])
        if func == _DATA:  # by which a parameter copies itself
            return self.twin(args[0]).detach()
        return func(*args, **(kwargs or {}))


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided:
        on_meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    else:
        on_meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(on_meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else on_meta


class _Functions:
    """Functions that modules hold, such as a forward set on an instance, and what they close over.

    `copy.deepcopy` takes a function as it is, and it would go on calling the modules of the original.
    """

    def __init__(self, memo: dict[int, Any]):
        self.memo = memo
        self.found: list[tuple[FunctionType, FunctionType]] = []

    def find(self, values: Iterable[Any]) -> None:
        """Put copies of the functions in some values, not bound yet, into the memo."""
        seen: set[int] = set()
        queue = list(values)
        while queue:
            value = queue.pop()
            if id(value) in seen or id(value) in self.memo:
                continue
            if isinstance(value, dict):
                queue += value.values()
            elif isinstance(value, list | tuple):
                queue += value
            elif isinstance(value, partial):
                queue += value.func, value.args, value.keywords
            elif isinstance(value, FunctionType):
                queue += self._rebuild(value)
            elif isinstance(value, torch.Generator):  # whose state must not be on meta
                self.memo[id(value)] = value.clone_state()
            else:
                continue
            seen.add(id(value))

    def _rebuild(self, function: FunctionType) -> list[Any]:
        """Put a copy of a function that holds something into the memo; return what it holds."""
        cells = function.__closure__ or ()
        if not (cells or function.__defaults__ or function.__kwdefaults__):
            return []
        closure = tuple(CellType() for _ in cells)
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        vars(new).update(vars(function))
        self.memo[id(function)] = new
        self.found.append((function, new))
        return [_content(cell) for cell in cells]

    def bind(self) -> None:
        """Let them close over copies of the modules, the tensors and the functions that the originals close over."""
        for old, new in self.found:
            for before, after in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
                if (content := _content(before)) is not _EMPTY:
                    after.cell_contents = self._copy(content)
            new.__defaults__ = old.__defaults__ and tuple(map(self._copy, old.__defaults__))
            new.__kwdefaults__ = old.__kwdefaults__ and {k: self._copy(v) for k, v in old.__kwdefaults__.items()}

    def _copy(self, value: Any) -> Any:
        of_module = isinstance(value, MethodType) and isinstance(value.__self__, nn.Module)
        if of_module or isinstance(value, nn.Module | Tensor | FunctionType):
            return copy.deepcopy(value, self.memo)
        return value


_EMPTY = object()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that has no value yet
        return _EMPTY


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """Undo what is done meanwhile to the attributes of the modules of `net` and of their classes, and to random states.

    A forward that runs in a copy can reach them by what is not copied: a global, a class, a weak reference.
    """
    modules = list(net.modules())
    classes = {cls for m in modules for cls in type(m).__mro__ if cls.__module__.partition(".")[0] not in _LIBRARIES}
    attributes = {cls: dict(vars(cls)) for cls in classes}
    saved = _containers([*map(vars, modules), *attributes.values()])
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        for cls, before in attributes.items():
            for name, value in before.items():
                if isinstance(value, Tensor):
                    with suppress(RuntimeError):  # of a kind that meta does not know, nor the run can use
                        setattr(cls, name, _on_meta(value))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for container, content in saved:
            _restore(container, content)
        for cls, before in attributes.items():
            _restore_class(cls, before)


def _containers(roots: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The dicts, lists, sets and deques in `roots` and in each other, each with a copy."""
    found: dict[int, tuple[Any, Any]] = {}
    queue = list(roots)
    while queue:
        value = queue.pop()
        if id(value) in found:
            continue
        if isinstance(value, dict):
            found[id(value)] = value, dict(value)
            queue += value.values()
        elif isinstance(value, list | set | deque | tuple):
            found[id(value)] = value, tuple(value)
            queue += value
        elif _may_be_its_own_copy(value):
            queue.append(vars(value))
    return list(found.values())


def _may_be_its_own_copy(value: Any) -> bool:
    own = hasattr(type(value), "__deepcopy__") and hasattr(value, "__dict__")
    return own and not isinstance(value, Tensor | nn.Module | type)


def _restore(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        pairs = zip(container.items(), content.items(), strict=False)
        same = all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    else:
        same = all(a is b for a, b in zip(container, content, strict=False))
    if same and len(container) == len(content):
        return
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


def _restore_class(cls: type, before: dict[str, Any]) -> None:
    for name in {*before, *vars(cls)}:
        if name.startswith("__"):
            continue
        if name not in before:
            delattr(cls, name)
        elif vars(cls).get(name) is not before[name]:
            setattr(cls, name, before[name])
