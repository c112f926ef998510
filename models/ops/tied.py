"""What several layers share: a module that each of them registers, saved once and loaded under any of its names.

Whatever torch or a tool does to modules and parameters (copies, parts of networks, wrappers, conversions of type and
device), it then does to shared tensors as well, and keeps them shared.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """A module of parameters and buffers, no children, that several modules register as their child.

    A state dict holds it under the first of its names. Loading takes it from any of its names, reports it missing once,
    and refuses different values under two names.

    Attributes:
        label: What the plan calls it.
    """

    optional: ClassVar[bool] = False  # whether a state dict may lack it

    def __init__(self):
        super().__init__()
        self.label = ""
        self._forget_call()

    def _forget_call(self) -> None:
        # What the load_state_dict call in progress has brought, by tensor; the call is known by its list of missing
        # keys, to which a reference is held so that no later list can have its identity.
        self._call: list[str] | None = None
        self._loaded: dict[str, tuple[str, Tensor]] = {}
        self._reported: dict[str, str] = {}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own = next(self._tensors(), None)
        known = (value for value in destination.values() if isinstance(value, Tensor))
        everywhere = "_fsdp_wrapped_module." in prefix  # FSDP's first version looks for each of its names
        if own is None or everywhere or not any(same_tensor(value, own[1]) for value in known):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._call is not missing_keys:
            self._forget_call()
            self._call = missing_keys
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, found, unexpected_keys, error_msgs)
        for name, _ in self._tensors():
            key = prefix + name
            if key in state_dict:
                self._check_agreement(name, key, state_dict[key], error_msgs)
                if name in self._reported:
                    missing_keys.remove(self._reported.pop(name))
            elif name not in self._loaded and name not in self._reported and key in found and not self.optional:
                self._reported[name] = key
                missing_keys.append(key)

    def _check_agreement(self, name: str, key: str, value: Tensor, error_msgs: list[str]) -> None:
        first, known = self._loaded.setdefault(name, (key, value))
        if first != key and not (known.shape == value.shape and torch.equal(known, value)):
            error_msgs.append(f"{first} and {key} are one tensor in this network, and hold different values")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters(recurse=False)
        yield from self.named_buffers(recurse=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_call": None, "_loaded": {}, "_reported": {}}


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, plain, on meta or distributed, are one.

    Under flat storage, as `torch.nn.utils.vector_to_parameters` makes it, tensors share memory without being one.
    """
    a, b = _local(a), _local(b)
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) or a.storage_offset() != b.storage_offset():
        return False
    return a.stride() == b.stride() and torch._C._is_alias_of(a, b)  # pyright: ignore[reportAttributeAccessIssue]


def _local(t: Any) -> Tensor:
    """The part of a distributed tensor that is here, or a plain tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def state_aliases(model: nn.Module) -> dict[str, str]:
    """Every name under which a shared tensor of `model` may be loaded → the name under which it is saved."""
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Tied):
            first = names.setdefault(id(module), path)
            for name, _ in module._tensors():
                aliases[f"{path}.{name}"] = f"{first}.{name}"
    return aliases


class Temperature(Tied):
    """The temperature τ of all layers that one operator has put into a network, a scalar.

    It is part of the state dict; one that lacks it, as older and authors' files do, leaves a trained network: its
    layers are then at the end of the annealing.

    Attributes:
        value: τ, a buffer.
        end: τ of a trained network.
        limits: The least and the greatest value.
        driven: Whether somebody has set τ, or loaded the weights of a network, since the layers were made.
    """

    optional = True
    value: Tensor

    def __init__(self, end: float, limits: tuple[float, float], **kwargs: Any):
        super().__init__()
        self.end, self.limits = end, limits
        self._driven = [False]  # a list, which replicas of DataParallel share
        self.register_buffer("value", torch.full((), end, **kwargs))

    @property
    def driven(self) -> bool:
        """See the class."""
        return self._driven[0]

    @driven.setter
    def driven(self, value: bool) -> None:
        self._driven[0] = value

    def check(self, value: float) -> None:
        """Raise a ValueError when τ cannot be `value`."""
        low, high = self.limits
        if not low <= value <= high:
            raise ValueError(f"the temperature must be between {low:g} and {high:g}, found {value}")

    @torch.no_grad()
    def fill(self, value: float) -> None:
        """Set τ."""
        self.check(value)
        self.value.fill_(value)
        self.driven = True

    def expect(self, missing_keys: list[str]) -> None:
        """Called in a load_state_dict call, known by its missing keys, that brings weights of a layer with this τ."""
        if self._call is not missing_keys:
            self._forget_call()
            self._call = missing_keys
            self.driven = True
            with torch.no_grad():
                self.value.fill_(self.end)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"end={self.end:g}"
