"""What a network's weights are called elsewhere, and how they lie there."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .names import original_names
from .ops.tied import state_aliases

State = Mapping[str, Tensor]
Convert = Callable[[Tensor], Tensor]


class Translation:
    """From a state dict of others to ours and back; taken from a network as it was built.

    It stays valid when parts of the network are removed later.

    Args:
        names: Our name of each entry → theirs.
        reading: Where an entry lies otherwise there: our name → what makes ours of theirs.
        writing: Likewise, what makes theirs of ours.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        reading: Mapping[str, Convert] | None = None,
        writing: Mapping[str, Convert] | None = None,
    ):
        self.names = dict(names)
        self._ours = {theirs: ours for ours, theirs in names.items()}
        self._reading, self._writing = dict(reading or {}), dict(writing or {})

    def recognises(self, state: State) -> bool:
        """Whether more entries have their names than ours."""
        return sum(k in self._ours for k in state) > sum(k in self.names for k in state)

    def from_authors(self, state: State) -> dict[str, Tensor]:
        """A state dict with our names and layouts; entries that are not known keep theirs."""
        read = {}
        for key, value in state.items():
            ours = self._ours.get(key, key)
            read[ours] = self._reading[ours](value) if key in self._ours and ours in self._reading else value
        return read

    def to_authors(self, state: State) -> dict[str, Tensor]:
        """A state dict with their names and layouts; entries that they do not have are left out."""
        same: Convert = lambda value: value  # noqa: E731
        return {self.names[k]: self._writing.get(k, same)(v) for k, v in state.items() if k in self.names}


def original_translation(net: nn.Module) -> Translation:
    """For a static network: the names of its backbone's original code."""
    original = original_names(net)
    names = {}
    for key in net.state_dict():
        module, _, leaf = key.rpartition(".")
        names[key] = f"{original(module)}.{leaf}" if module else leaf
    return Translation(names)


def canonical_names(net: nn.Module, state: State) -> dict[str, Tensor]:
    """The state dict with shared tensors under the names by which `net` saves them.

    Raises:
        ValueError: Two names of one tensor with different values.
    """
    aliases = state_aliases(net)
    sources: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = aliases.get(key, key)
        if name in found and not (found[name].shape == value.shape and bool((found[name] == value).all())):
            raise ValueError(f"{sources[name]} and {key} are one tensor in this network, and hold different values")
        sources.setdefault(name, key)
        found.setdefault(name, value)
    return found
