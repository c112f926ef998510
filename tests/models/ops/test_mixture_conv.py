"""The primitive: both layouts of a bank, scales and bias, every implementation and gradient, by the definition."""

import functools

import pytest
import torch
from convolutions import CONVOLUTIONS, convolution
from parity import assert_parity

from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.mixture_conv import IMPLEMENTATIONS, Partition, cut, mix, mixture_conv, signature_of
from kernelwarehouse.models.ops.per_sample_conv import per_sample_conv

FAST = [name for name in IMPLEMENTATIONS if name not in ("reference", "triton")]  # triton: see test_triton

# kernel, cell, whether the bank is shared, size of the input, arguments; cells of several positions, groups, 1-D to 3-D
BANKS = {
    "cells": ((6, 4, 3, 3), (3, 2, 1, 1), True, (7, 5), {"padding": 1}),
    "blocks": ((4, 4, 2, 2), (2, 2, 2, 1), True, (5, 4), {"stride": (2, 1)}),
    "experts": ((4, 3, 3, 3), (4, 3, 3, 3), False, (5, 4), {"padding": 1}),
    "experts-by-position": ((4, 3, 3, 2), (4, 3, 1, 1), False, (5, 4), {"padding": (1, 0), "dilation": (1, 2)}),
    "experts-by-block": ((4, 6, 3, 1), (2, 3, 3, 1), False, (5, 4), {"stride": 2, "padding": (1, 0)}),
    "grouped": ((6, 2, 3, 3), (3, 2, 1, 1), True, (5, 4), {"padding": 1, "groups": 3}),
    "grouped-experts": ((6, 2, 3, 3), (6, 2, 1, 1), False, (5, 4), {"padding": 1, "groups": 2}),
    "depthwise": ((6, 1, 3, 3), (3, 1, 1, 1), True, (5, 4), {"padding": "same", "groups": 6}),
    "depthwise-experts": (
        (6, 1, 3, 3),
        (6, 1, 3, 3),
        False,
        (5, 4),
        {"padding_mode": "reflect", "padding": 1, "groups": 6},
    ),
    "line": ((4, 3, 5), (2, 3, 1), True, (9,), {"stride": 2, "padding": 2}),
    "line-of-experts": ((4, 3, 5), (4, 3, 5), False, (9,), {"padding": 2}),
    "volume": ((4, 2, 2, 3, 1), (2, 2, 1, 1, 1), True, (4, 3, 5), {"padding": (0, 1, 0)}),
    "volume-of-experts": ((4, 2, 2, 1, 3), (4, 2, 1, 1, 1), False, (4, 3, 5), {}),
}


def operands(case, batch=3, terms=4):
    kernel, cell, shared, size, arguments = BANKS[case]
    torch.manual_seed(0)
    partition, geometry = Partition(kernel, cell), Geometry.of(kernel[2:], **arguments)
    cin = kernel[1] * geometry.groups
    shapes = {
        "x": (batch, cin, *size),
        "alpha": (batch, partition.mixtures, terms),
        "bank": (terms, *(cell if shared else kernel)),
        "bias": (kernel[0],),
        "in_scale": (batch, cin),
        "out_scale": (batch, kernel[0]),
    }
    leaves = {name: torch.randn(s, dtype=torch.float64).requires_grad_() for name, s in shapes.items()}
    return partition, geometry, leaves


@functools.cache
def by_the_definition(case):
    """Output, upstream gradient and every gradient, with scales that multiply kernels, computed once."""
    partition, geometry, leaves = operands(case)
    kernels = torch.stack([by_hand(alpha, leaves["bank"], partition) for alpha in leaves["alpha"]])
    kernels = kernels * leaves["out_scale"][(..., *(None,) * (kernels.ndim - 2))]
    scale = (
        leaves["in_scale"]
        .unflatten(1, (geometry.groups, -1))
        .repeat_interleave(partition.kernel[0] // geometry.groups, 1)
    )
    kernels = kernels * scale[(..., *(None,) * (kernels.ndim - 3))]
    arguments = BANKS[case][4]
    y = per_sample_conv(leaves["x"], kernels, leaves["bias"], **arguments, implementation="reference")
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y.detach(), upstream, torch.autograd.grad(y, list(leaves.values()), upstream)


def by_hand(alpha, bank, partition):
    """W[part] = Σ_r α[part, r] · bank[…, r] for one sample, each value by itself."""
    kernel = torch.zeros(partition.kernel, dtype=bank.dtype)
    shared = tuple(bank.shape[1:]) == partition.cell
    blocks = partition.grid[-2:]
    for index in torch.cartesian_prod(*(torch.arange(size) for size in partition.kernel)).tolist():
        which = [i // c for i, c in zip(index, partition.cell, strict=True)]
        inside = [i % c for i, c in zip(index, partition.cell, strict=True)]
        part = 0
        for place, count in zip(which[2:], partition.grid, strict=False):
            part = part * count + place
        part = (part * blocks[0] + which[0]) * blocks[1] + which[1]
        mask = torch.zeros_like(kernel)
        mask[tuple(index)] = 1
        kernel = kernel + mask * (alpha[part] * bank[(slice(None), *(inside if shared else index))]).sum()
    return kernel


def can(implementation, case, gradients=True):
    partition, geometry, leaves = operands(case)
    with torch.set_grad_enabled(gradients):
        s = signature_of(leaves["x"], 4, BANKS[case][2], partition, geometry, "mixture_conv")
    return IMPLEMENTATIONS[implementation].supports(s) is None


@pytest.mark.parametrize("implementation", ["auto", "reference", *FAST])
@pytest.mark.parametrize("case", BANKS)
def test_every_gradient_by_the_definition(case, implementation):
    partition, geometry, leaves = operands(case)
    y, upstream, gradients = by_the_definition(case)
    if implementation != "auto" and not can(implementation, case):
        with pytest.raises(ValueError, match=f"'{implementation}' cannot compute this layer: .*; .*reference can"):
            mixture_conv(**leaves, partition=partition, geometry=geometry, implementation=implementation)
        return
    found = mixture_conv(**leaves, partition=partition, geometry=geometry, implementation=implementation)
    torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-10)
    for name, ours, expected in zip(
        leaves, torch.autograd.grad(found, list(leaves.values()), upstream), gradients, strict=True
    ):
        assert (ours - expected).norm() <= 1e-10 * expected.norm(), name


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_parity_of_odd_sizes(name, implementation):
    partition, geometry, (alpha, bank, x) = convolution(name)
    if implementation == "cpp" and not can("cpp", "cells"):
        pytest.skip("there is no C++ compiler")

    def run(implementation):
        return mixture_conv(x, alpha, bank, partition, geometry, implementation=implementation)

    assert_parity(lambda: run(implementation), lambda: run("reference"), {"alpha": alpha, "bank": bank, "x": x})


@pytest.mark.parametrize("case", BANKS)
def test_inference_computes_the_same(case):
    partition, geometry, leaves = operands(case)
    y, _, _ = by_the_definition(case)
    with torch.inference_mode():
        for name in ("auto", *(name for name in FAST if can(name, case, False))):
            found = mixture_conv(**leaves, partition=partition, geometry=geometry, implementation=name)
            torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", BANKS)
def test_cut_undoes_mixing(case):
    partition, _, leaves = operands(case)
    kernels = mix(leaves["alpha"], leaves["bank"], partition)
    alpha, bank = leaves["alpha"], leaves["bank"]
    parts = cut(bank, partition) if bank.shape[1:] == partition.kernel else bank[:, None]
    expected = torch.einsum("bmn,nm...->bm...", alpha, parts.expand(-1, partition.mixtures, *partition.cell))
    torch.testing.assert_close(cut(kernels, partition), expected)


@pytest.mark.parametrize("wanted", [("x",), ("alpha",), ("bank",)])
@pytest.mark.parametrize("implementation", FAST)
def test_only_what_is_wanted_has_a_gradient(implementation, wanted):
    if not can(implementation, "cells"):
        pytest.skip("there is no C++ compiler")
    partition, geometry, leaves = operands("cells")
    leaves = {name: leaves[name].detach().requires_grad_(name in wanted) for name in ("x", "alpha", "bank")}
    y = mixture_conv(**leaves, partition=partition, geometry=geometry, implementation=implementation)
    y.square().sum().backward()
    assert tuple(name for name, leaf in leaves.items() if leaf.grad is not None) == wanted


@pytest.mark.parametrize("implementation", ["materialize", "mix_inputs", "cpp"])
def test_nothing_that_grows_with_samples_times_kernel_is_kept_for_backward(implementation):
    if not can(implementation, "cells"):
        pytest.skip("there is no C++ compiler")
    partition, geometry, leaves = operands("cells", batch=7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mixture_conv(
            *(leaves[name] for name in ("x", "alpha", "bank")), partition, geometry, implementation=implementation
        )
    assert sorted(kept) == sorted(leaves[name].numel() for name in ("x", "alpha", "bank"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": torch.zeros(3, 36, 5)}, r"α must be \(B = 3, parts = 36, terms = 4\), found \(3, 36, 5\)"),
        ({"alpha": torch.zeros(2, 36, 4)}, "B = 3"),
        ({"bank": torch.zeros(4, 3, 3, 1, 1)}, r"a bank must be \(n, \*cell\) with cells \(3, 2, 1, 1\)"),
        ({"x": torch.zeros(3, 5, 7, 5)}, r"need an input \(B, 4, 2 sizes\), found \(3, 5, 7, 5\)"),
        ({"x": torch.zeros(3, 4, 7)}, "2 sizes"),
        ({"implementation": "magic"}, "implementation must be auto, materialize, .*; found 'magic'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    partition, geometry, leaves = operands("cells")
    with pytest.raises(ValueError, match=message):
        mixture_conv(**{**leaves, **change}, partition=partition, geometry=geometry)


@pytest.mark.parametrize("implementation", ["materialize", "cpp", "mix_inputs"])
@pytest.mark.parametrize("case", ["cells", "experts-by-position"])
def test_nothing_but_the_arguments_is_kept_for_backward(case, implementation):
    if not can(implementation, case):
        pytest.skip("it cannot compute this")
    partition, geometry, leaves = operands(case)
    if implementation != "materialize":  # which alone scales images in its own backward
        del leaves["in_scale"], leaves["out_scale"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixture_conv(**leaves, partition=partition, geometry=geometry, implementation=implementation)
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    assert kept
    assert all(t.untyped_storage().data_ptr() in own for t in kept)
