"""One choice among the implementations of a layer: by name, by measurement, or by what should cost least."""

import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol, TypeVar

import torch


class Signature(Protocol):
    """What decides how a layer is computed: hashable, with a text of its own that `repr` gives.

    Attributes:
        device: Type of the device.
        exporting: Whether a graph is made that will run elsewhere. It holds no sizes then.
    """

    @property
    def device(self) -> str:
        """See above."""
        ...

    @property
    def exporting(self) -> bool:
        """See above."""
        ...


class Implementation(ABC):
    """One way to compute what a layer computes; called with what the layer's operator says.

    Attributes:
        name: By which it is asked for.
        operators: What the rest of a layer, such as its attention, is computed by: "torch" for differentiable operators
            alone, "cpp" for C++ where that runs, or "triton".
    """

    name: ClassVar[str]
    operators: ClassVar[str] = "cpp"

    @abstractmethod
    def supports(self, signature) -> str | None:
        """Why it cannot compute a case, as a clause that follows its name; None if it can. Sizes do not matter."""

    @abstractmethod
    def cost(self, signature) -> float:
        """Multiply-adds of a large product that a sample should cost; infinite for what is taken by name only."""

    def workspace(self, signature) -> int:
        """Bytes that a call writes besides its output."""
        del signature
        return 0


AnyImplementation = TypeVar("AnyImplementation", bound=Implementation)

_MOST_SELECTED = 4096
_selected: dict[tuple[str, Signature], Implementation] = {}
_measured: dict[str, str] = {}  # names by the text of a case and the machine, which a checkpoint can hold


def select(signature: Signature, candidates: Mapping[str, AnyImplementation], name: str = "auto") -> AnyImplementation:
    """The implementation of a case: the one of that name or, for "auto", what was measured or should cost least.

    It is looked for once for each case.

    Args:
        signature: The case, whose operation has always the same candidates.
        candidates: Implementations by name, in the order in which they are preferred where sizes are unknown.
        name: "auto", or the name of one.

    Raises:
        ValueError: No such name, or one that cannot compute the case; the message says why and what can.
    """
    if torch.compiler.is_compiling():  # sizes may be symbols, and graphs are made of other operators than were measured
        return _find(signature, candidates, name)
    known = _selected.get((name, signature))
    if known is None:
        if len(_selected) >= _MOST_SELECTED:
            _selected.clear()
        measured = "auto" if signature.exporting or name != "auto" else _measured.get(case(signature), "auto")
        known = _find(signature, candidates, name if measured not in candidates else measured)
        _selected[name, signature] = known
    return candidates[known.name]


def _find(signature: Signature, candidates: Mapping[str, AnyImplementation], name: str) -> AnyImplementation:
    if name != "auto":
        if name not in candidates:
            raise ValueError(f"implementation must be auto, {', '.join(candidates)}; found {name!r}")
        reason = candidates[name].supports(signature)
        if reason is None:
            return candidates[name]
        others = [other for other, candidate in candidates.items() if candidate.supports(signature) is None]
        raise ValueError(
            f"implementation {name!r} cannot compute this layer: {reason}; {', '.join(others)} can: "
            "set_implementation(net, 'auto') takes one of them"
        )
    best, least = None, math.inf
    for candidate in candidates.values():
        if candidate.supports(signature) is not None:
            continue
        if signature.exporting:
            return candidate
        cost = candidate.cost(signature)
        if cost < least:  # by comparisons, which a compiler can guard where sizes are symbols
            best, least = candidate, cost
    if best is None:
        raise ValueError(f"no implementation can compute {signature}")
    return best


def estimate(signature: Signature, candidates: Mapping[str, Implementation]) -> Implementation:
    """The implementation that should cost least, whatever was measured."""
    return _find(signature, candidates, "auto")


def case(signature: Signature) -> str:
    """A case as the text by which measurements are remembered, with all that times depend on."""
    return f"{signature} on {machine(signature.device)}"


def measured(signature: Signature) -> str | None:
    """The name that was measured to be the fastest, "auto" where it was what is estimated, or None."""
    return _measured.get(case(signature))


def remember(found: Mapping[str, str]) -> None:
    """Let "auto" take these names by the text of a case, as `remembered` gives them."""
    _measured.update(found)
    _selected.clear()


def remembered() -> dict[str, str]:
    """All names that were measured to be the fastest, by the text of their case."""
    return dict(_measured)


def forget() -> None:
    """Let "auto" take what it estimates again."""
    _measured.clear()
    _selected.clear()


def machine(device: str) -> str:
    """What times are compared on: torch's version, and a GPU's model or the CPU's model, instructions and threads."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device} {processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
