"""Why a layer cannot be replaced: what a conversion would lose, or break elsewhere."""

from torch import nn
from torch.nn.utils import parametrize

from .layers import LAYERS, Layer

# Where torch keeps what users hang onto a module; it has no public way to ask.
_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks, as pruning, weight_norm and spectral_norm leave them",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_state_dict_hooks": "state-dict hooks",
    "_state_dict_pre_hooks": "state-dict pre-hooks",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hooks",
    "_load_state_dict_post_hooks": "load-state-dict post-hooks",
}


class Obstacles:
    """Finds what stands in the way of replacing the layers of one network."""

    def __init__(self, net: nn.Module):
        self._paths: dict[int, list[str]] = {}
        self._owners: dict[int, list[str]] = {}
        for name, module in net.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(name)
            if len(self._paths[id(module)]) == 1:
                for parameter in module.parameters(recurse=False):
                    self._owners.setdefault(id(parameter), []).append(name)

    def find(self, name: str, layer: Layer) -> str | None:
        """Why the layer called `name` cannot be replaced, if so, with what would help."""
        paths = self._paths[id(layer)]
        if len(paths) > 1:
            return f"{' and '.join(paths)} are one module: untie or exclude them"
        if parametrize.is_parametrized(layer):
            return f"{name} is parametrized: remove that (torch.nn.utils.parametrize) or exclude the layer"
        if hooks := hooks_of(layer):
            return f"{name} has {hooks}, which a conversion would lose: remove or exclude it"
        if "forward" in vars(layer):
            return f"{name} has a forward of its own, set on the instance, which a conversion would lose: exclude it"
        owners = self._owners[id(layer.weight)]
        if len(owners) > 1:
            return f"{' and '.join(owners)} share one weight: untie or exclude them"
        if min(layer.weight.shape) < 1:
            return f"{name} has a kernel without elements: {tuple(layer.weight.shape)}"
        return None

    def foreign(self, layer: Layer) -> str | None:
        """What the layer is, if it is not simply a layer of torch.nn."""
        if type(layer) in LAYERS or parametrize.is_parametrized(layer):
            return None
        return f"it is a {type(layer).__name__}, whose arithmetic may be its own"


def hooks_of(module: nn.Module, parameters: bool = True) -> str | None:
    """What hooks a module has, or its parameters too, in words."""
    found = [words for attribute, words in _HOOKS.items() if getattr(module, attribute, None)]
    for name, parameter in module.named_parameters(recurse=False) if parameters else ():
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            found.append(f"hooks on its {name}")
    return " and ".join(found) or None
