"""The parity harness: outputs and the gradient of every input and parameter, against a reference."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def assert_parity(
    fast: Callable[[], Tensor], reference: Callable[[], Tensor], leaves: Mapping[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Compare two computations of the same leaves by relative error of norms, under one random upstream gradient."""
    outputs = fast(), reference()
    assert outputs[0].shape == outputs[1].shape
    upstream = torch.randn_like(outputs[1])
    gradients = [
        torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype), allow_unused=True) for y in outputs
    ]
    compared = {"output": outputs} | {
        f"gradient of {name}": pair for name, pair in zip(leaves, zip(*gradients, strict=True), strict=True)
    }
    for name, (ours, expected) in compared.items():
        assert (ours is None) == (expected is None), f"{name}: only one of the two has a gradient"
        if expected is None:
            continue
        scale = expected.norm().item()
        error = (ours.to(expected.dtype) - expected).norm().item()
        assert torch.isfinite(ours).all(), f"{name} is not finite"
        assert error <= tolerance * scale + 1e-300, f"{name}: relative error {error / max(scale, 1e-300):.2e}"
