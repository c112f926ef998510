"""timm's checkpoints of ``*_cc_*`` networks: the same names, with each layer's experts as one matrix."""

import math

from torch import Tensor, nn

from ...translation import State, Translation
from .layers import CondConvNd


class CondConvTranslation(Translation):
    """timm's names, which are ours, and its experts (E, Cout · Cin/groups · k · k)."""

    def __init__(self, net: nn.Module):
        layers = [(name, m) for name, m in net.named_modules() if isinstance(m, CondConvNd)]
        self._shapes = {f"{name}.weight": tuple(layer.weight.shape) for name, layer in layers}
        super().__init__(
            {key: key for key in net.state_dict()},
            writing=dict.fromkeys(self._shapes, lambda weight: weight.flatten(1)),
        )

    def recognises(self, state: State) -> bool:
        """Whether experts lie there as matrices."""
        return any(self._is_matrix(key, value) for key, value in state.items())

    def from_authors(self, state: State) -> dict[str, Tensor]:
        """As `Translation.from_authors`."""
        return {k: v.reshape(self._shapes[k]) if self._is_matrix(k, v) else v for k, v in state.items()}

    def _is_matrix(self, key: str, value: Tensor) -> bool:
        shape = self._shapes.get(key, ())
        return len(shape) > 3 and tuple(value.shape) == (shape[0], math.prod(shape[1:]))
