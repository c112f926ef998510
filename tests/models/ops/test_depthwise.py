"""The depthwise convolution in C++: its runs of pixels, its threads, and where it is taken."""

import itertools

import pytest
import torch
from convolutions import DEPTHWISE, depthwise_leaves
from parity import assert_parity
from processor import needs_compiler

from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.mixture_conv import Partition, mixture_conv
from kernelwarehouse.models.ops.per_sample_conv import depthwise, per_sample_conv

pytestmark = needs_compiler


def assert_equal_to_reference(operands, arguments, tolerance=1e-12):
    def run(implementation):
        return lambda: per_sample_conv(*operands.values(), **arguments, implementation=implementation)

    assert_parity(run("depthwise"), run("reference"), operands, tolerance)


@pytest.fixture
def threads():
    """Set the number of threads, for the time of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (37, 2), (75, 7)])  # registers, and what is left over
@pytest.mark.parametrize("case", DEPTHWISE)
def test_parity(threads, case, channels, count):
    threads(count)
    assert_equal_to_reference(*depthwise_leaves(case, channels))


@pytest.mark.parametrize("case", DEPTHWISE)
def test_parity_in_single_precision(case):
    assert_equal_to_reference(*depthwise_leaves(case, 70, dtype=torch.float32), tolerance=1e-5)


def test_parity_of_one_sample_whose_lines_and_channels_are_shared_out(threads):
    threads(5)
    assert_equal_to_reference(*depthwise_leaves("stride", 100, batch=1))


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
def test_the_layout_is_kept_and_any_input_is_read(last):
    operands, arguments = depthwise_leaves("padding", 12)
    memory_format = torch.channels_last if last else torch.contiguous_format
    operands["x"] = operands["x"].detach().to(memory_format=memory_format).requires_grad_()
    y = per_sample_conv(*operands.values(), **arguments, implementation="depthwise")
    (grad,) = torch.autograd.grad(y.square().sum(), operands["x"])
    assert y.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)
    operands["x"] = torch.randn(2, 12, 14, 5).double()[:, :, ::2].requires_grad_()
    assert_equal_to_reference(operands, arguments)


def test_operators_are_well_formed():
    operands, _ = depthwise_leaves("unequal", 20)
    x, kernels = operands["x"].detach(), torch.randn(2, 6, 20).double()
    window = [1, 3, 2, 1, 2, 3, 0, 4, 0, 1, 3, 1]
    y = depthwise.convolve(x, kernels, window)
    torch.library.opcheck(depthwise.convolve, (x, kernels, window))
    torch.library.opcheck(depthwise.gradient_of_x, (torch.randn_like(y), x, kernels, window))
    torch.library.opcheck(depthwise.gradient_of_kernels, (torch.randn_like(y), x, kernels, window))


def test_input_smaller_than_the_kernel():
    with pytest.raises(ValueError, match=r"an input of \(2, 5\) is too small for a kernel of \(3, 3\)"):
        per_sample_conv(torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 1, 3, 3), groups=4, implementation="depthwise")


def test_auto_takes_it_for_depthwise_convolutions_alone(monkeypatch):
    seen = []
    forward = depthwise.DEPTHWISE.forward
    monkeypatch.setattr(type(depthwise.DEPTHWISE), "forward", lambda _, *a: seen.append(a[1].shape[1]) or forward(*a))
    for channels, out, groups, dtype in itertools.product((4, 6), (4, 6), (2, 4, 6), (torch.float32, torch.float16)):
        if channels % groups == 0 and out % groups == 0:
            x = torch.randn(2, channels, 5, 5, dtype=dtype)
            y = per_sample_conv(x, torch.randn(2, out, channels // groups, 3, 3, dtype=dtype), groups=groups)
            assert y.dtype == dtype
    assert seen == [4, 4, 6, 6]


def test_mixed_kernels_are_not_kept_for_the_backward_pass():
    kept = []
    partition, geometry = Partition((8, 1, 3, 3), (4, 1, 1, 1)), Geometry.of((3, 3), padding=1, groups=8)
    alpha, cells, x = (torch.randn(shape, requires_grad=True) for shape in ((2, 18, 5), (5, 4, 1, 1, 1), (2, 8, 5, 5)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mixture_conv(x, alpha, cells, partition, geometry)
    assert sorted(kept) == sorted((alpha.numel(), cells.numel(), x.numel()))
