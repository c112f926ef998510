"""Kernels a tile at a time, and the adjoint, by either order of contracting hidden vector, attention and cells.

Both orders offer the same: `shape` (B, blocks of output channels, rows of a block, K) of all kernels, with K = parts ·
cin and parts = taps · blocks of input channels; `kernels` of some samples and rows; `room` for the gradient of these;
`receive`, which takes it in; and `gradients` of the factors they were made of, in the end. `needs` says which of the
factors want one.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .applied import Workspace
from .mixing import mix_rows


class CellsFirst:
    """W_i = Σ_j α_ij e_j: n · |W| multiply-adds for a sample.

    Args:
        alpha: α, (B, blocks of output channels, parts, n).
        cells: (n, cout, cin, *ones).
        needs: Which of the two want a gradient.
    """

    def __init__(self, alpha: Tensor, cells: Tensor, needs: tuple[bool, ...] = (False, False)):
        self._alpha, self._cells = alpha, cells
        self._needs_alpha, self._needs_cells = needs
        self.shape = (*alpha.shape[:2], cells.shape[1], alpha.shape[2] * cells[0, 0].numel())
        if self._needs_alpha:
            self._grad_alpha = torch.zeros_like(alpha, dtype=torch.promote_types(alpha.dtype, torch.float32))
        if self._needs_cells:
            self._grad_cells = cells.new_empty(cells.shape[1], len(cells), cells[0, 0].numel())

    def kernels(self, samples: slice, channels: slice, space: Workspace) -> Tensor:
        """(samples, blocks, channels, K)."""
        coefficients, cells = self._alpha[samples].flatten(0, 2), self._cells[:, channels]
        out = space.take("kernels", cells.shape[1], len(coefficients), cells[0, 0].numel())
        rows = mix_rows(coefficients, cells, out)
        return rows.view(len(rows), *self._alpha[samples].shape[:2], -1).permute(1, 2, 0, 3)

    def room(self, samples: slice, channels: slice, space: Workspace) -> Tensor:
        """Where to write the gradient of such kernels."""
        rows = self._cells[0, channels].shape[0]
        return space.take("gradients", rows, *self._alpha[samples].shape[:2], self.shape[3]).permute(1, 2, 0, 3)

    def receive(self, samples: slice, channels: slice, grad: Tensor) -> None:
        """Take in the gradient that lies in `room`."""
        coefficients, cells = self._alpha[samples].flatten(0, 2), self._cells[:, channels]
        rows = grad.permute(2, 0, 1, 3).view(cells.shape[1], len(coefficients), -1)
        if self._needs_alpha:
            products = torch.bmm(rows, cells.transpose(0, 1).flatten(2).to(grad.dtype).mT)
            own = self._grad_alpha[samples]
            own += products.sum(0, dtype=own.dtype).view_as(own)
        if self._needs_cells:
            left = coefficients.mT.expand(len(rows), -1, -1)
            _add_product(self._grad_cells[channels], left, rows, first=samples.start == 0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of α and of the cells."""
        grad_cells = None
        if self._needs_cells:
            grad_cells = self._grad_cells.transpose(0, 1).unflatten(2, self._cells.shape[2:])
        return self._grad_alpha.to(self._alpha.dtype) if self._needs_alpha else None, grad_cells


class KernelsFirst:
    """W_i = Σ_k α_ik G_ik: r · |W| multiply-adds for a sample; every mixture i has r terms G of its own.

    Args:
        alpha: (B, blocks of output channels, parts, r).
        products: G, (blocks, rows, r, K).
        needs: Which of the two want a gradient.
    """

    def __init__(self, alpha: Tensor, products: Tensor, needs: tuple[bool, ...] = (False, False)):
        self._alpha, self._products = alpha, products
        self._needs_alpha, self._needs_products = needs
        self.shape = (*alpha.shape[:2], products.shape[1], products.shape[3])
        exact = torch.promote_types(alpha.dtype, torch.float32)
        if self._needs_alpha:
            self._grad_alpha = torch.zeros_like(alpha, dtype=exact)
        if self._needs_products:
            self._grad_products = torch.zeros_like(products, dtype=exact)

    def kernels(self, samples: slice, channels: slice, space: Workspace) -> Tensor:
        """(samples, blocks, channels, K)."""
        out = self.room(samples, channels, space, "kernels")
        for block, part, own in self._mixtures():
            products = self._products[block, channels, :, own].to(out.dtype)
            coefficients = self._alpha[samples, block, part].expand(len(products), -1, -1)
            _multiply(coefficients, products, out[:, block, :, own].transpose(0, 1))
        return out

    def room(self, samples: slice, channels: slice, space: Workspace, purpose: str = "gradients") -> Tensor:
        """Where to write the gradient of such kernels."""
        blocks, rows = self._products[:, channels].shape[:2]
        return space.take(purpose, blocks, rows, len(self._alpha[samples]), self.shape[3]).permute(2, 0, 1, 3)

    def receive(self, samples: slice, channels: slice, grad: Tensor) -> None:
        """Take in the gradient that lies in `room`."""
        for block, part, own in self._mixtures():
            received = grad[:, block, :, own].transpose(0, 1)
            if self._needs_alpha:
                products = self._products[block, channels, :, own].to(grad.dtype)
                total = self._grad_alpha[samples, block, part]
                total += torch.bmm(received, products.mT).sum(0, dtype=total.dtype)
            if self._needs_products:
                left = self._alpha[samples, block, part].mT.expand(len(received), -1, -1)
                _add_product(self._grad_products[block, channels, :, own], left, received, first=False)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of α and of the products."""
        grad_alpha = self._grad_alpha.to(self._alpha.dtype) if self._needs_alpha else None
        return grad_alpha, self._grad_products if self._needs_products else None

    def _mixtures(self) -> Iterator[tuple[int, int, slice]]:
        """Block and part of each, and its share of K."""
        _, blocks, parts, _ = self._alpha.shape
        width = self.shape[3] // parts
        for block, part in itertools.product(range(blocks), range(parts)):
            yield block, part, slice(part * width, (part + 1) * width)


class Chained(KernelsFirst):
    """The same where the products, of weights of an attention and cells, are made here and not kept.

    Args:
        alpha: (B, blocks of output channels, parts, r).
        weights: (blocks, r, parts, n).
        cells: (n, cout, cin, *ones).
        needs: Which of the three want a gradient.
    """

    def __init__(self, alpha: Tensor, weights: Tensor, cells: Tensor, needs: tuple[bool, ...] = (False,) * 3):
        self._weights, self._cells = weights, cells
        self._needs_weights, self._needs_cells = needs[1:]
        super().__init__(alpha, products_of(weights, cells), (needs[0], any(needs[1:])))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of α, of the weights and of the cells."""
        grad_alpha, grad_products = super().gradients()
        grad_weights = grad_cells = None
        weights = self._weights.flatten(0, 2)
        if grad_products is not None:
            rows = grad_products.transpose(0, 1).reshape(len(grad_products[0]), len(weights), -1).to(weights.dtype)
        if self._needs_weights:
            products = torch.bmm(rows, self._cells.transpose(0, 1).flatten(2).to(rows.dtype).mT)
            exact = torch.promote_types(products.dtype, torch.float32)
            grad_weights = products.sum(0, dtype=exact).view_as(self._weights).to(weights.dtype)
        if self._needs_cells:
            grad_rows = torch.bmm(weights.mT.expand(len(rows), -1, -1), rows).to(self._cells.dtype)
            grad_cells = grad_rows.transpose(0, 1).unflatten(2, self._cells.shape[2:])
        return grad_alpha, grad_weights, grad_cells


Order = type[CellsFirst] | type[KernelsFirst]


def products_of(weights: Tensor, cells: Tensor) -> Tensor:
    """G: weights (blocks, r, parts, n) and cells (n, cout, cin, *ones) → (blocks, cout, r, parts · cin), a view."""
    blocks, width = weights.shape[:2]
    rows = mix_rows(weights.flatten(0, 2), cells)
    return rows.reshape(len(rows), blocks, width, -1).transpose(0, 1)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out ← left @ right, where it lies but for a compiler, which would have to see through the view."""
    if torch.compiler.is_compiling():
        out.copy_(torch.bmm(left, right))
    else:
        torch.bmm(left, right, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total ← left @ right the first time, total += left @ right after it, in the type of total."""
    if total.dtype != left.dtype:
        product = torch.bmm(left, right)
        total.copy_(product) if first else total.add_(product)
    else:
        total.baddbmm_(left, right, beta=0 if first else 1)
