"""Parts of an attention that know whether somebody looks at them or has changed them."""

from torch import Tensor, nn


class Watched(nn.Module):
    """A module that remembers whether a hook was ever registered with it."""

    watched = False

    def register_forward_pre_hook(self, *args, **kwargs):
        """As torch's."""
        self.watched = True
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args, **kwargs):
        """As torch's."""
        self.watched = True
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args, **kwargs):
        """As torch's."""
        self.watched = True
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args, **kwargs):
        """As torch's."""
        self.watched = True
        return super().register_full_backward_hook(*args, **kwargs)

    def register_backward_hook(self, *args, **kwargs):
        """As torch's."""
        self.watched = True
        return super().register_backward_hook(*args, **kwargs)


class Linear(Watched, nn.Linear):
    """torch's."""


class LayerNorm(Watched, nn.LayerNorm):
    """torch's."""


class BatchNorm1d(Watched, nn.BatchNorm1d):
    """torch's."""


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module does what its class says to plain weights: nobody waits for it or has patched it.

    Hooks for all modules, of torch.nn.modules.module, are not seen by the parts of an attention.
    """
    if type(module) not in (Linear, LayerNorm, BatchNorm1d) or module.watched or "forward" in module.__dict__:
        return False
    weight = module.weight
    return weight is None or type(weight) in (nn.Parameter, Tensor)
