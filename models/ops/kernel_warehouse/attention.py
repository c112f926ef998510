"""Contrasting-driven attention: from a layer's input to the coefficients of its mixtures (paper, section 3.4)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporting import exporting
from ..native import can_run, mean

EPSILON = 1e-3
LEAST_HIDDEN = 16


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of x (B, C, *spatial) over space, (B, C), and x, to be used in place of it from here on.

    The gradient of the mean is then added to that of x at once, and never written for every position.
    """
    if torch.is_grad_enabled() and x.requires_grad and not exporting():
        return _Pool.apply(x)
    return _mean(x), x


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor):
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return _mean(x), x.view_as(x)

    @staticmethod
    def backward(ctx, grad_mean: Tensor | None, grad_x: Tensor | None):
        if grad_mean is None:
            return grad_x
        each = (grad_mean / ctx.shape[2:].numel()).reshape(*ctx.shape[:2], *(1,) * (len(ctx.shape) - 2))
        return each.expand(ctx.shape) if grad_x is None else grad_x + each


def _mean(x: Tensor) -> Tensor:
    # One call where torch takes several; and of bfloat16 torch, under autocast, makes a copy before it adds.
    if can_run(x.device.type, x.dtype) and not exporting():
        return mean(x).to(x.dtype)
    return x.flatten(2).mean(dim=2)


class AttentionBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d that can train on a batch of one.

    One value has no variance to normalise by. Such a batch is normalised by the running statistics, as in
    evaluation, and leaves them as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, hidden) → (B, hidden)."""
        if self.training and not self.normalises(x.shape[0]):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)

    def normalises(self, batch: int) -> bool:
        """Whether so many samples are normalised by statistics of their own."""
        return self.training and batch > 1

    def track(self, mean: Tensor, variance: Tensor) -> None:
        """Let the running statistics follow those of a batch, (hidden,), the variance without bias."""
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class Attention(nn.Module):
    """α = (1 − τ) · z / (Σ|z| + 1e-3) + τ · β with z = FC2(ReLU(Norm(FC1(mean of x over space)))).

    z holds, for each of the layer's m mixtures, one logit for each of the warehouse's n cells and one for the zero
    cell, which takes part in the sum and is then dropped. With a non-local basis, FC2 gives logits for the layer's
    own cells, for `num_basis` basis values and for the zero cell; FC3 expands the basis to the other layers' cells.

    Args:
        in_channels: Channels of the layer's input.
        num_cells: n, cells of the warehouse.
        own_cells: The range of them that belongs to this layer.
        assignment: β as the cell that each mixture holds, None for the zero cell; its length is m.
        reduction: Hidden width as a share of `in_channels`; at least 16.
        norm: "batch" or "layer".
        nonlocal_basis_ratio: Below 1, size of the basis as a share of the other layers' cells; at least 16.
        device: Where the parameters are.
        dtype: Their type.
    """

    assignment: Tensor

    def __init__(
        self,
        in_channels: int,
        num_cells: int,
        own_cells: range,
        assignment: Sequence[int | None],
        reduction: float = 0.0625,
        norm: str = "batch",
        nonlocal_basis_ratio: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm must be 'batch' or 'layer', found {norm!r}")
        kwargs = {"device": device, "dtype": dtype}
        self.num_cells = num_cells
        self.mixtures = len(assignment)
        self.own_cells = own_cells
        hidden = hidden_width(in_channels, reduction)
        self.num_basis = basis_size(num_cells - len(own_cells), nonlocal_basis_ratio)
        self.fc1 = nn.Linear(in_channels, hidden, bias=norm != "batch", **kwargs)
        self.norm = (AttentionBatchNorm1d if norm == "batch" else nn.LayerNorm)(hidden, **kwargs)
        if self.num_basis:
            self.fc2 = nn.Linear(hidden, (len(own_cells) + self.num_basis + 1) * self.mixtures, bias=False, **kwargs)
            self.fc3 = nn.Linear(self.num_basis, num_cells - len(own_cells), bias=False, **kwargs)
            self.basis_bias = nn.Parameter(torch.zeros((num_cells + 1) * self.mixtures, **kwargs))
        else:
            self.fc2 = nn.Linear(hidden, (num_cells + 1) * self.mixtures, **kwargs)
        self.held = tuple(assignment)
        self.register_buffer("assignment", self._beta(self.fc1.weight), persistent=False)
        self.register_load_state_dict_post_hook(_restore_assignment)
        self.reset_parameters()

    def _beta(self, like: Tensor) -> Tensor:
        """β as a matrix (m, n), on the device and of the type of a tensor."""
        held = [self.num_cells if cell is None else cell for cell in self.held]
        return F.one_hot(torch.tensor(held), self.num_cells + 1)[:, :-1].to(like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        """What `to_empty` leaves uninitialised and no state dict holds is made again."""
        super()._apply(fn, recurse)
        if not self.assignment.is_meta:
            with torch.no_grad():
                self.assignment.copy_(self._beta(self.assignment))
        return self

    def reset_parameters(self) -> None:
        """Initialise as the paper: Kaiming normal over the fan out for matrices, zero for biases."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.norm.reset_parameters()
        if self.num_basis:
            nn.init.zeros_(self.basis_bias)

    @torch.no_grad()
    def hold_assignment(self) -> None:
        """Let z equal β, and 0 for the zero cell, whatever the input, so that α at τ = 0 is β / (1 + 1e-3).

        From there the layer learns how to depend on its input: the weights that make z depend on it start at zero
        and receive gradients.
        """
        nn.init.zeros_(self.fc2.weight)
        bias = self.basis_bias if self.num_basis else self.fc2.bias
        bias.copy_(F.pad(self.assignment, (0, 1)).flatten())

    def is_linear(self) -> bool:
        """Whether torch's own linear layers make the logits, so that their weights are all that there is to know."""
        layers = (self.fc2, self.fc3) if self.num_basis else (self.fc2,)
        return all(type(layer).forward is nn.Linear.forward for layer in layers)

    def hidden(self, pooled: Tensor) -> Tensor:
        """h = ReLU(Norm(FC1(mean of x over space))): (B, C) → (B, hidden)."""
        return F.relu(self.norm(self.fc1(pooled)))

    def logits(self, h: Tensor, offset: bool = True) -> Tensor:
        """z, with what it has where h is 0 or without: (B, hidden) → (B, m, n + 1)."""
        if not self.num_basis:
            z = self.fc2(h) if offset else F.linear(h, self.fc2.weight)
            return z.reshape(-1, self.mixtures, self.num_cells + 1)
        z = self.fc2(h).reshape(h.shape[0], self.mixtures, -1)
        local, basis, zero = z.split([len(self.own_cells), self.num_basis, 1], dim=2)
        others = self.fc3(basis)
        start = self.own_cells.start
        z = torch.cat([others[..., :start], local, others[..., start:], zero], dim=2)
        return z + self.basis_bias.to(z.dtype).reshape(self.mixtures, -1) if offset else z

    @staticmethod
    def total(z: Tensor) -> Tensor:
        """Σ|z| over n + 1 logits, in fp32 at least: (B, m, n + 1) → (B, m, 1)."""
        return torch.linalg.vector_norm(z, 1, dim=2, keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32))

    def forward(self, pooled: Tensor, temperature: Tensor) -> Tensor:
        """Compute the coefficients.

        Args:
            pooled: Mean of the layer's input over space, (B, C), of `pool`.
            temperature: τ, a scalar tensor.

        Returns:
            α, (B, m, n).
        """
        z = self.logits(self.hidden(pooled))
        alpha = (z[..., :-1] / (self.total(z) + EPSILON)).to(z.dtype)
        return torch.lerp(alpha, self.assignment.to(z.dtype), temperature.to(z.dtype))

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        basis = f", basis={self.num_basis}" if self.num_basis else ""
        return f"mixtures={self.mixtures}, cells={self.num_cells}, own={self.own_cells}{basis}"


def _restore_assignment(attention: Attention, _incompatible_keys: Any) -> None:
    """Make β where weights have come in the place of those on meta (`load_state_dict(assign=True)`)."""
    if attention.assignment.device != attention.fc1.weight.device:
        attention.assignment = attention._beta(attention.fc1.weight)


def hidden_width(in_channels: int, reduction: float) -> int:
    """Width of the attention's hidden layer."""
    return max(int(in_channels * reduction), LEAST_HIDDEN)


def basis_size(nonlocal_cells: int, ratio: float) -> int:
    """Number of basis values for the cells of other layers; 0 where each of them has a logit of its own."""
    return max(int(nonlocal_cells * ratio), 16) if ratio < 1 and nonlocal_cells > 0 else 0


def parameter_count(
    in_channels: int, num_cells: int, own_cells: int, mixtures: int, reduction: float, norm: str, basis_ratio: float
) -> int:
    """Parameters of an `Attention` of these arguments, without building it."""
    hidden = hidden_width(in_channels, reduction)
    basis = basis_size(num_cells - own_cells, basis_ratio)
    count = in_channels * hidden + (2 if norm == "batch" else 3) * hidden
    if basis:
        return (
            count
            + (own_cells + basis + 1) * mixtures * hidden
            + basis * (num_cells - own_cells)
            + (num_cells + 1) * mixtures
        )
    return count + (num_cells + 1) * mixtures * (hidden + 1)
