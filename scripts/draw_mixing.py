"""Draw how a dynamic layer mixes its kernel for each input, from sizes small enough to see: draw_mixing.py [PICTURE].

Inputs are real digits. Coefficients follow the equation of KernelWarehouse's attention for logits that are linear in
the digit's pixels with random weights, cells are random, and each kernel is what they make: nothing is drawn by hand.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from sklearn.datasets import load_digits

PICTURE = Path(__file__).resolve().parents[1] / "models/ops/kernel_warehouse/mixing.png"
CELLS, SIDE, GRID = 6, 4, 3  # cells of the warehouse, values along a side of a cell, parts along a side of the kernel
COLORS, FORWARD = "PuOr", {"arrowstyle": "-|>", "color": "0.35", "linewidth": 1.2}


def draw(digits: tuple[int, ...] = (3, 10), seed: int = 1) -> Figure:
    """Draw a row for each digit, given by its number in scikit-learn's data set, and the warehouse above them."""
    generator = np.random.default_rng(seed)
    cells = generator.normal(size=(CELLS, SIDE, SIDE))
    images = np.asarray(load_digits().images)[list(digits)] / 16
    figure = Figure(figsize=(10, 6.2))
    top = [figure.add_axes((0.37 + 0.07 * i, 0.82, 0.055, 0.055 * 10 / 6.2)) for i in range(CELLS)]
    for axis, cell in zip(top, cells, strict=True):
        _show(axis, cell, 2.2)
    _say(figure, 0.575, 0.95, f"warehouse: {CELLS} cells, parameters that all layers of a stage share")
    _say(figure, 0.87, 0.862, "to the other\nlayers", ha="left")
    figure.add_artist(_arrow((0.795, 0.864), (0.86, 0.864)))
    figure.add_artist(_arrow((0.63, 0.81), (0.63, 0.72)))
    project = generator.normal(size=(images[0].size, GRID * GRID * CELLS)) / images[0].size
    for row, image in enumerate(images):
        bottom = 0.4 - 0.32 * row
        alpha = _coefficients((image.ravel() @ project).reshape(GRID * GRID, CELLS))
        kernel = np.einsum("mn,nij->mij", alpha, cells)
        shown = [_axis(figure, left, bottom, width) for left, width in ((0.03, 0.15), (0.29, 0.15), (0.55, 0.17))]
        _show(shown[0], image, None)
        _show(shown[1], alpha, np.abs(alpha).max())
        rows = kernel.reshape(GRID, GRID, SIDE, SIDE).transpose(0, 2, 1, 3).reshape(GRID * SIDE, GRID * SIDE)
        _show(shown[2], rows, np.abs(kernel).max())
        for edge in range(1, GRID):
            shown[2].axhline(edge * SIDE - 0.5, color="white", linewidth=4)
            shown[2].axvline(edge * SIDE - 0.5, color="white", linewidth=4)
        first = kernel[:, 0, 0].reshape(GRID, GRID)  # of the first output and input channel
        _show(_axis(figure, 0.83, bottom, 0.15), _convolve(image, first), None)
        for a, b in ((0.185, 0.285), (0.445, 0.545), (0.725, 0.825)):
            figure.add_artist(_arrow((a, bottom + 0.12), (b, bottom + 0.12)))
        _say(figure, 0.235, bottom + 0.15, "attention")
        _say(figure, 0.495, bottom + 0.15, "mix")
        _say(figure, 0.775, bottom + 0.15, "convolve")
        if row == 0:
            heads = (
                "input $x$",
                f"coefficients α\n{GRID * GRID} parts × {CELLS} cells",
                f"kernel $W(x)$\n{GRID}×{GRID} parts, each a mixture",
                "output $y$\n(one channel)",
            )
            for middle, words in zip((0.105, 0.365, 0.635, 0.905), heads, strict=True):
                _say(figure, middle, bottom + 0.255, words, va="bottom", size=11)
    return figure


def _coefficients(z: np.ndarray) -> np.ndarray:
    """Coefficients of a trained network, at temperature 0, for logits z (parts, cells)."""
    return z / (np.abs(z).sum(axis=1, keepdims=True) + 1e-3)


def _convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The correlation of an image with a 3×3 kernel, zeros around the image."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, 1), kernel.shape)
    return np.einsum("ijkl,kl->ij", windows, kernel)


def _axis(figure: Figure, left: float, bottom: float, width: float) -> Axes:
    return figure.add_axes((left, bottom, width, 0.24))


def _show(axis: Axes, values: np.ndarray, limit: float | None) -> None:
    """Show values in colours whose middle is 0, or in grey where there is no limit."""
    colors = {"cmap": "gray_r"} if limit is None else {"cmap": COLORS, "vmin": -limit, "vmax": limit}
    axis.imshow(values, aspect="auto", interpolation="nearest", **colors)
    axis.set_xticks([])
    axis.set_yticks([])


def _say(figure: Figure, x: float, y: float, words: str, **style) -> None:
    figure.text(x, y, words, **{"ha": "center", "va": "center", "size": 10, **style})


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> ConnectionPatch:
    return ConnectionPatch(start, end, "figure fraction", "figure fraction", mutation_scale=12, **FORWARD)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, default=PICTURE, help="file to write (default: %(default)s)")
    draw().savefig(parser.parse_args().picture, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
