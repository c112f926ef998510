"""The weights of layers of experts as authors' code names and lays them out."""

from collections.abc import Mapping

from torch import Tensor, nn

from ...names import original_names
from ...translation import State, Translation
from ..tied import Temperature
from .layer import ExpertsConv


class ExpertsTranslation(Translation):
    """Names of the backbone's original code, and within a layer those that the operator gives.

    Args:
        net: A converted network.
        inside: Our name of an entry within a layer → the authors', where they differ.
        pointwise: Whether authors keep the attention's matrices as 1×1 kernels; ours are matrices.
    """

    def __init__(self, net: nn.Module, inside: Mapping[str, str] | None = None, pointwise: bool = True):
        inside = inside or {}
        taus = {f"{name}.value" for name, m in net.named_modules(remove_duplicate=False) if isinstance(m, Temperature)}
        layers = {name for name, m in net.named_modules() if isinstance(m, ExpertsConv)}
        original = original_names(net)
        names: dict[str, str] = {}
        matrices = []
        for key, value in net.state_dict().items():
            if key in taus:
                continue
            module, _, leaf = key.rpartition(".")
            layer = next((name for name in _beginnings(module) if name in layers), None)
            if layer is None:
                names[key] = ".".join(filter(None, (original(module), leaf)))
                continue
            within = key.removeprefix(f"{layer}.")
            names[key] = f"{original(layer)}.{inside.get(within, within)}"
            if pointwise and within.startswith("attention.") and value.ndim == 2:
                matrices.append(key)
        super().__init__(names, dict.fromkeys(matrices, _as_matrix), dict.fromkeys(matrices, _as_kernel))
        self._matrices = [self.names[key] for key in matrices]

    def recognises(self, state: State) -> bool:
        """The authors' names; or, where those are ours too, their layout."""
        return super().recognises(state) or any(key in state and state[key].ndim == 4 for key in self._matrices)


def _beginnings(name: str) -> list[str]:
    """a.b.c → a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _as_matrix(kernel: Tensor) -> Tensor:
    return kernel.flatten(2).squeeze(2) if kernel.ndim > 2 and kernel[0, 0].numel() == 1 else kernel


def _as_kernel(matrix: Tensor) -> Tensor:
    return matrix[..., None, None]
