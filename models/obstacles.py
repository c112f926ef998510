"""Why a layer cannot be replaced: what a conversion would lose, or break elsewhere."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .layers import LAYERS, Layer, kernel_shape

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


# The types that operators compute with.
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Obstacles:
    """Finds what stands in the way of replacing the layers of one network."""

    def __init__(self, net: nn.Module):
        self._paths: dict[int, list[str]] = {}
        self._owners: dict[int, list[str]] = {}
        self._flat: dict[int, list[tuple[int, int, str]]] = {}
        for name, module in net.named_modules(remove_duplicate=True):
            for kind, parameter in module.named_parameters(recurse=False):
                owner = f"{name}.{kind}" if name else kind
                self._owners.setdefault(id(parameter), []).append(owner)
                if (place := _place(parameter)) is not None:
                    self._flat.setdefault(place[0], []).append((*place[1:], owner))
            for child, found in module._modules.items():
                self._paths.setdefault(id(found), []).append(f"{name}.{child}" if name else child)

    def find(self, name: str, layer: Layer) -> str | None:
        """Why the layer called `name` cannot be replaced, if so, with what would help."""
        paths = self._paths.get(id(layer), [name])
        if len(paths) > 1:
            return f"{' and '.join(paths)} are one module: untie or exclude them"
        if parametrize.is_parametrized(layer):
            return f"{name} is parametrized: remove that (torch.nn.utils.parametrize) or exclude the layer"
        if hooks := hooks_of(layer):
            return f"{name} has {hooks}, which a conversion would lose: remove or exclude it"
        if "forward" in vars(layer):
            return f"{name} has a forward of its own, set on the instance, which a conversion would lose: exclude it"
        if problem := _unusual(layer):
            return f"{name} {problem}: exclude it"
        for kind, parameter in layer.named_parameters(recurse=False):
            if len(owners := self._sharing(parameter)) > 1:
                return f"{' and '.join(owners)} share one {kind}: untie or exclude them"
        if min(layer.weight.shape) < 1:
            return f"{name} has a kernel without elements: {tuple(layer.weight.shape)}; exclude it"
        return None

    def _sharing(self, parameter: Tensor) -> list[str]:
        """Names of the parameters that are this one, or overlap it in memory."""
        owners = list(self._owners[id(parameter)])
        if (place := _place(parameter)) is not None:
            storage, start, end = place
            owners += [o for first, last, o in self._flat[storage] if first < end and start < last and o not in owners]
        return owners

    def foreign(self, layer: Layer) -> str | None:
        """What the layer is, if it is not simply a layer of torch.nn."""
        if type(layer) in LAYERS or parametrize.is_parametrized(layer):
            return None
        return f"it is a {type(layer).__name__}, whose arithmetic may be its own"


def _unusual(layer: Layer) -> str | None:
    """How a layer is not as its class makes it, if so; the end of a sentence that begins with its name."""
    extra = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    if extra:
        return f"has {' and '.join(sorted(extra))} beside its weight and bias, which a conversion would lose"
    shape = kernel_shape(layer)
    shapes = {"weight": shape, "bias": shape[:1]}
    for kind, shape in shapes.items():
        parameter = getattr(layer, kind)
        if parameter is None and kind == "bias":
            continue
        if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
            return f"has a {kind} that is no plain parameter, but a {type(parameter).__name__}"
        if tuple(parameter.shape) != shape:
            return f"has a {kind} of {tuple(parameter.shape)} where its arguments say {shape}"
        if parameter.dtype not in _TYPES:
            found, *known = (str(dtype).removeprefix("torch.") for dtype in (parameter.dtype, *_TYPES))
            return f"has a {kind} of {found}; operators know {', '.join(known)}"
    return None


def _place(parameter: Tensor) -> tuple[int, int, int] | None:
    """Where a parameter lies in memory: the storage, its first byte and that after its last; None without elements."""
    if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided or not parameter.numel():
        return None
    size, first = parameter.element_size(), int(parameter.storage_offset())
    last = first + sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.untyped_storage()._cdata, first * size, (last + 1) * size


def hooks_of(module: nn.Module, parameters: bool = True) -> str | None:
    """What hooks a module has, or its parameters too, in words."""
    found = [words for attribute, words in _HOOKS.items() if getattr(module, attribute, None)]
    for name, parameter in module.named_parameters(recurse=False) if parameters else ():
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            found.append(f"hooks on its {name}")
    return " and ".join(found) or None
