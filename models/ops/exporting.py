"""Graphs that will run elsewhere."""

import torch


def exporting() -> bool:
    """Whether a graph is made that will run elsewhere, for any batch."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # pyright: ignore[reportPrivateImportUsage]
