"""KernelWarehouse's weights as its authors' code names and lays them out, and as older versions of this one did."""

from torch import Tensor, nn

from ...names import original_names
from ...translation import Convert, State, Translation
from ..tied import Temperature
from .layer import KWLayer
from .plan import KWPlan
from .warehouse import Warehouse


class KWTranslation(Translation):
    """Upstream's names, with its cells (n, cout, cin, *c); and those of older checkpoints of ours, likewise."""

    def __init__(self, net: nn.Module, plan: KWPlan):
        cells = _cells(net, plan)
        temperatures = {
            f"{n}.value" for n, m in net.named_modules(remove_duplicate=False) if isinstance(m, Temperature)
        }
        numbers = {cells[w.name]: i for i, w in enumerate(plan.warehouses) if w.name in cells}
        original = original_names(net)
        names: dict[str, str] = {}
        gammas = []
        for key in net.state_dict():
            if key in temperatures:
                continue
            if key in numbers:
                names[key] = f"warehouse_manager.weights.{numbers[key]}"
                continue
            module, _, leaf = key.rpartition(".")
            module, attention, rest = module.partition(".attention")
            module = _renamed(original(module), net, module)
            names[key] = ".".join(filter(None, (module + attention + rest.replace(".norm", ".norm1"), leaf)))
            if names[key].endswith(".gamma"):
                gammas.append(key)
        reading: dict[str, Convert] = dict.fromkeys(numbers, _swap)
        writing = dict(reading)
        reading |= dict.fromkeys(gammas, _flatten)
        writing |= dict.fromkeys(gammas, _as_map)
        super().__init__(names, reading, writing)
        self._old = {f"warehouses.{name}": key for name, key in cells.items()}

    def recognises(self, state: State) -> bool:
        """Upstream's, or an older one of ours."""
        return any(key in self._old for key in state) or super().recognises(state)

    def from_authors(self, state: State) -> dict[str, Tensor]:
        """As `Translation.from_authors`; cells at the root of the network are an older version's."""
        if any(key in self._old for key in state):
            return {self._old.get(k, k): _swap(v) if k in self._old else v for k, v in state.items()}
        return super().from_authors(state)


def _cells(net: nn.Module, plan: KWPlan) -> dict[str, str]:
    """Name of each warehouse → name of its cells in the state dict."""
    saved = {id(m): name for name, m in net.named_modules() if isinstance(m, Warehouse)}
    planned = {layer.name: layer.warehouse for layer in plan.layers}
    found: dict[str, str] = {}
    for name, module in net.named_modules():
        if isinstance(module, KWLayer) and module.plan == plan and module.warehouse is not None and name in planned:
            found.setdefault(planned[name], f"{saved[id(module.warehouse)]}.weight")
    return found


def _renamed(original: str, net: nn.Module, module: str) -> str:
    """Upstream's MobileNetV2 has no dropout before a static classifier, and a convolution for a converted one."""
    if original != "classifier.1":
        return original
    return "classifier" if isinstance(net.get_submodule(module), nn.Linear) else "classifier.1.conv"


def _swap(cells: Tensor) -> Tensor:
    """(n, cout, cin, *c) ↔ (cout, n, cin, *c); anything else is left, to be reported."""
    return cells.transpose(0, 1) if cells.ndim >= 4 else cells


def _flatten(gamma: Tensor) -> Tensor:
    return gamma.flatten()


def _as_map(gamma: Tensor) -> Tensor:
    return gamma.reshape(1, -1, 1, 1)
