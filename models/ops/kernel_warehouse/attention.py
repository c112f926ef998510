"""Contrasting-driven attention: from a layer's input to the coefficients of its mixtures (paper, section 3.4)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cpu import unavailable
from ..means import mean
from ..norms import normalised
from ..per_sample_conv import triton_conv
from .coefficients import ATTENTION, COEFFICIENTS, coefficients
from .watched import BatchNorm1d, LayerNorm, Linear, Watched, is_untouched

LEAST_HIDDEN = 16


class Attention(Watched):
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
        self.width = hidden = hidden_width(in_channels, reduction)
        self.num_basis = basis_size(num_cells - len(own_cells), nonlocal_basis_ratio)
        self.fc1 = Linear(in_channels, hidden, bias=norm != "batch", **kwargs)
        self.norm = (BatchNorm1d if norm == "batch" else LayerNorm)(hidden, **kwargs)
        if self.num_basis:
            self.fc2 = Linear(hidden, (len(own_cells) + self.num_basis + 1) * self.mixtures, bias=False, **kwargs)
            self.fc3 = Linear(self.num_basis, num_cells - len(own_cells), bias=False, **kwargs)
            self.basis_bias = nn.Parameter(torch.zeros((num_cells + 1) * self.mixtures, **kwargs))
        else:
            self.fc2 = Linear(hidden, (num_cells + 1) * self.mixtures, **kwargs)
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
        """Whether the logits are linear in the hidden vector as far as anybody can see, so that weights say it all."""
        # Written out, since torch.compile of torch 2.8 cannot follow `all`.
        if self.watched or not is_untouched(self.fc2):
            return False
        return not self.num_basis or is_untouched(self.fc3)

    def hidden(self, pooled: Tensor) -> Tensor:
        """h = ReLU(Norm(FC1(mean of x over space))): (B, C) → (B, hidden)."""
        return F.relu(normalised(self.norm, self.fc1(pooled)))

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

    def forward(self, x: Tensor, temperature: Tensor, operators: str = "cpp") -> Tensor:
        """Compute the coefficients.

        Args:
            x: The layer's input as images, (B, C, *spatial).
            temperature: τ, a scalar tensor.
            operators: "torch" for differentiable operators alone; "cpp" and "triton" for one operator, or a few, where
                that can run and no part is watched or changed.

        Returns:
            α, (B, m, n).
        """
        if operators == "torch":
            return coefficients(self.logits(self.hidden(x.flatten(2).mean(dim=2))), self.assignment, temperature)
        if not torch.is_grad_enabled() and (parameters := self._fixed(x)):
            return ATTENTION.apply(self.norm.eps, x, *parameters, self.assignment, temperature)
        hidden, fc2 = self.hidden(mean(x)), self.fc2
        runs = triton_conv.unavailable if operators == "triton" else unavailable
        if self.num_basis or not is_untouched(fc2) or runs(x.device.type, fc2.weight.dtype) is not None:
            return coefficients(self.logits(hidden), self.assignment, temperature)
        return COEFFICIENTS.apply(None, hidden.to(fc2.weight.dtype), fc2.weight, fc2.bias, self.assignment, temperature)

    def _fixed(self, x: Tensor) -> tuple[Any, ...] | None:
        """What one operator in C++ takes of the parts, if they are as they were made, in evaluation, and it can run."""
        fc1, norm, fc2 = self.fc1, self.norm, self.fc2
        if self.num_basis or norm.training or not (is_untouched(fc1) and is_untouched(norm) and is_untouched(fc2)):
            return None
        layer_norm = type(norm) is LayerNorm
        mean, variance = (None, None) if layer_norm else (norm.running_mean, norm.running_var)
        weight1, weight2, scale, shift = fc1.weight, fc2.weight, norm.weight, norm.bias
        if shift is None or (mean is None and not layer_norm):
            return None
        if not x.dtype == weight1.dtype == weight2.dtype or unavailable(x.device.type, x.dtype) is not None:
            return None
        return weight1, fc1.bias, mean, variance, scale, shift, weight2, fc2.bias

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
