"""How a kernel is cut into equal parts, each of which is mixed by coefficients of its own."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Partition:
    """One kernel cut into equal cells, numbered row-major over (position, block of output, of input channels).

    Attributes:
        kernel: (Cout, Cin/groups, *k).
        cell: (cout, cin, *c), which divides `kernel` entry by entry.
        grid: Cells along (*k, Cout, Cin/groups): the order in which they are numbered.
        mixtures: Number m of cells in the kernel.
        by_positions: Whether cells span one position of the kernel.
    """

    kernel: tuple[int, ...]
    cell: tuple[int, ...]
    grid: tuple[int, ...] = field(init=False, repr=False, compare=False)
    mixtures: int = field(init=False, repr=False, compare=False)
    by_positions: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if len(self.kernel) != len(self.cell) or len(self.kernel) < 3:
            raise ValueError(f"kernel {self.kernel} and cell {self.cell} must have the same number of dimensions, ≥ 3")
        if min(self.kernel) < 1 or min(self.cell) < 1:
            raise ValueError(f"kernel {self.kernel} and cell {self.cell} must have positive sizes")
        if any(k % c for k, c in zip(self.kernel, self.cell, strict=True)):
            raise ValueError(f"cells {self.cell} do not divide the kernel {self.kernel}")
        counts = [k // c for k, c in zip(self.kernel, self.cell, strict=True)]
        derived = {"grid": (*counts[2:], *counts[:2]), "mixtures": math.prod(counts)}
        vars(self).update(derived, by_positions=max(self.cell[2:]) == 1)  # found once, as they are asked for often
