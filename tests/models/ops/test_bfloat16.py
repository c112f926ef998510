"""The native code in bfloat16: no further from the truth than torch's operators, and where it is taken."""

import pytest
import torch
from convolutions import CONVOLUTIONS, DEPTHWISE, convolution, depthwise_leaves
from processor import needs_bfloat16, needs_compiler

from kernelwarehouse import build_model, set_implementation
from kernelwarehouse.models.ops.dynamic_conv import dynamic_conv
from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.kernel_warehouse import Partition, mixed_conv, native
from kernelwarehouse.models.ops.kernel_warehouse.attention import pool
from kernelwarehouse.models.ops.kernel_warehouse.mixed_conv import choose
from kernelwarehouse.models.ops.kernel_warehouse.native import native_folded_conv
from kernelwarehouse.models.ops.native import call, mean, use_tiles
from kernelwarehouse.models.ops.native.build import instructions
from kernelwarehouse.models.ops.native.library import _obstacle, _warn_once

pytestmark = [needs_compiler, needs_bfloat16]

# kernel, cell, cells, size of the input, batch, and the convolution's arguments
SHAPES = {
    "parts": ((70, 76, 3, 3), (70, 38, 1, 1), 37, (9, 8), 3, {"padding": 1}),  # of rows and of channels
    "sums-in-steps": ((256, 512, 3, 3), (64, 512, 1, 1), 30, (7, 7), 5, {"padding": 1}),  # channels a few at a time
    "stride": ((128, 64, 3, 3), (64, 64, 1, 1), 21, (15, 17), 2, {"padding": 1, "stride": 2}),
    "dilation": ((24, 16, 3, 2), (12, 16, 1, 1), 9, (13, 12), 2, {"padding": (2, 1), "dilation": (2, 1)}),
    "long-lines": ((34, 50, 1, 1), (34, 50, 1, 1), 5, (20, 31), 2, {}),  # pixels a few at a time
    "narrow": ((128, 24, 1, 1), (128, 24, 1, 1), 5, (30, 28), 2, {}),  # gradients of kernels are turned
    "volume": ((32, 48, 3, 3, 3), (16, 24, 1, 1, 1), 9, (5, 6, 7), 2, {"padding": 1}),
    "line": ((6, 4, 5), (2, 2, 1), 8, (40,), 3, {"stride": 2, "padding": 2}),
}


@pytest.fixture
def threads():
    """Set the number of threads, for the time of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def registers():
    """Multiply in registers for the time of the test, also where there are tiles."""
    if not use_tiles(False) and "amx" not in instructions():
        pytest.skip("there are no tiles: all other tests multiply in registers")
    yield
    use_tiles()


def made(name):
    if name in CONVOLUTIONS:  # their channels are odd, mostly
        return convolution(name)
    torch.manual_seed(0)
    kernel, cell, cells, size, batch, arguments = SHAPES[name]
    partition = Partition(kernel, cell)
    shapes = (batch, partition.mixtures, cells), (cells, *cell), (batch, kernel[1], *size)
    operands = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    return partition, Geometry.of(kernel[2:], **arguments), operands


def run(compute, operands, upstream=None):
    """The output and all gradients, and the gradient of the output that they follow from."""
    operands = [operand.detach().requires_grad_() for operand in operands]
    y = compute(*operands)
    if upstream is None:
        upstream = torch.randn_like(y).bfloat16()
    return [y.detach(), *torch.autograd.grad(y, operands, upstream.to(y.dtype))], upstream


def assert_no_further_from(truth, ours, others):
    for name, *values in zip(("output", "α or x", "cells or kernels", "x", "bias"), truth, ours, others):  # noqa: B905
        exact, found, other = (value.double() for value in values)
        assert found.isfinite().all(), name
        errors = [(value - exact).norm() / exact.norm() for value in (found, other)]
        assert errors[0] <= 1.25 * errors[1], f"{name}: {errors[0]:.2e}, and others' {errors[1]:.2e}"


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *SHAPES])
def test_it_is_no_further_from_the_truth_than_whole_kernels(threads, name, count, last):
    threads(count)
    partition, geometry, (alpha, cells, x) = made(name)
    alpha, x, bias = alpha.detach().bfloat16(), x.detach().bfloat16(), torch.randn(partition.kernel[0])
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)

    def compute(implementation):
        return lambda alpha, cells, x, bias: mixed_conv(alpha, cells, x, partition, geometry, implementation, bias)

    truth, upstream = run(compute("grouped"), [alpha.double(), cells, x.double(), bias.double()])
    ours, _ = run(compute("native"), [alpha, cells.float(), x, bias], upstream)
    others, _ = run(compute("grouped"), [alpha, cells.float(), x, bias], upstream)
    half, single = torch.bfloat16, torch.float32
    assert [value.dtype for value in ours] == [half, half, single, half, single]
    assert last or ours[0].is_contiguous()
    assert_no_further_from(truth, ours, others)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *SHAPES])
def test_registers_where_there_are_tiles(threads, registers, name):
    test_it_is_no_further_from_the_truth_than_whole_kernels(threads, name, 3, True)


def test_tiles_are_taken_where_there_are_some(registers):
    """They sum in another order, which the gradient of the cells shows, being in single precision."""
    torch.manual_seed(0)
    window = [1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    alpha, cells = torch.randn(2, 1, 9, 40).bfloat16(), torch.randn(40, 64, 32, 1, 1)
    grad, x = torch.randn(2, 64, 9, 8).bfloat16(), torch.randn(2, 32, 9, 8).bfloat16()
    _, in_registers = native.gradients_of_mixing(grad, alpha, cells, x, window)
    assert use_tiles()
    _, in_tiles = native.gradients_of_mixing(grad, alpha, cells, x, window)
    assert not torch.equal(in_registers, in_tiles)
    assert (in_registers - in_tiles).norm() < 1e-2 * in_tiles.norm()


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_convolutions_are_no_further_from_the_truth_than_grouped_ones(case):
    operands, arguments = depthwise_leaves(case, 75)

    def compute(implementation):
        return lambda *operands: dynamic_conv(*operands, **arguments, implementation=implementation)

    rounded = [operand.detach().bfloat16() for operand in operands.values()]
    truth, upstream = run(compute("naive"), [operand.double() for operand in rounded])
    ours, _ = run(compute("depthwise"), rounded, upstream)
    others, _ = run(compute("grouped"), rounded, upstream)
    assert {value.dtype for value in ours} == {torch.bfloat16}
    assert_no_further_from(truth, ours, others)


def test_networks_under_autocast_are_no_further_from_the_truth():
    errors = {"auto": 0.0, "grouped": 0.0}
    for seed in range(24):  # of one network the errors of two ways differ by a factor of up to 3
        torch.manual_seed(seed)
        net = build_model("configs/mobilenetv2_050/kw1x_mobilenetv2_050.json", nb_classes=10)
        x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
        with torch.no_grad():
            net.train()(x)  # statistics that are not those of the start
            net.eval()
            expected = net.double()(x.double())
            net.float()
            for implementation in errors:
                set_implementation(net, implementation)
                with torch.autocast("cpu", torch.bfloat16):
                    errors[implementation] += ((net(x) - expected).norm() / expected.norm()).item()
    assert errors["auto"] <= 1.2 * errors["grouped"]


def test_a_network_of_bfloat16():
    partition, geometry, operands = made("parts")
    rounded = [operand.detach().bfloat16() for operand in operands]
    y, *gradients = run(lambda *operands: mixed_conv(*operands, partition, geometry, "native"), rounded)[0]
    assert {value.dtype for value in (y, *gradients)} == {torch.bfloat16}
    exact = mixed_conv(*(operand.double() for operand in rounded), partition, geometry, "grouped")
    assert (y - exact).norm() < 4e-3 * exact.norm()


def test_same_digits_every_time(threads):
    threads(4)
    partition, geometry, (alpha, cells, x) = made("parts")
    operands = [alpha.bfloat16(), cells.float(), x.bfloat16()]
    first, upstream = run(lambda *operands: mixed_conv(*operands, partition, geometry, "native"), operands)
    for _ in range(4):
        again, _ = run(lambda *operands: mixed_conv(*operands, partition, geometry, "native"), operands, upstream)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize(("images", "products"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16",) * 2])
@pytest.mark.parametrize("cell", [(35, 38), (70, 76)])  # channels that are read one at a time, and in pairs
def test_products_of_another_type(images, products, cell):
    images, products = getattr(torch, images), getattr(torch, products)
    torch.manual_seed(0)
    partition, geometry = Partition((70, 76, 3, 3), (*cell, 1, 1)), Geometry.of((3, 3), padding=1)
    blocks = 70 // cell[0]
    alpha = torch.randn(3, partition.mixtures, 18).to(images)
    kept = torch.randn(blocks, cell[0], 18, 9 * 76).to(products)
    x = torch.randn(3, 76, 9, 8).to(images, memory_format=torch.channels_last)
    bias = torch.randn(70)
    y = native_folded_conv(alpha, kept, x, partition, geometry, bias)
    assert y.dtype == images
    exact = native_folded_conv(*(t.double() for t in (alpha, kept, x)), partition, geometry)
    exact += bias[:, None, None]
    assert (y - exact).norm() < (1e-6 if images == torch.float32 else 6e-3) * exact.norm()


@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16])
def test_cells_of_bfloat16_are_read_as_they_are(images, monkeypatch):
    partition, geometry, (alpha, cells, x) = made("parts")
    alpha, cells, x = alpha.detach().to(images), cells.detach().bfloat16(), x.detach().to(images)
    read = []
    monkeypatch.setattr(native, "call", lambda *given: (read.append(given[2][1]), call(*given)))
    with torch.no_grad():
        y = mixed_conv(alpha, cells, x, partition, geometry, "native")
        expected = mixed_conv(alpha, cells.float(), x, partition, geometry, "native")
    assert [values.dtype for values in read] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(y, expected)


def test_gradients_of_many_cells():
    """They are written past the caches."""
    torch.manual_seed(0)
    window = [1] * 6 + [0] * 3 + [1] * 3
    alpha, cells = torch.randn(3, 1, 1, 150), torch.randn(128, 150, 128, 1, 1).transpose(0, 1)
    grad, x = torch.randn(2, 3, 128, 4, 3)
    exact = native.gradients_of_mixing(grad.double(), alpha.double(), cells.double(), x.double(), window)
    found = native.gradients_of_mixing(grad.bfloat16(), alpha.bfloat16(), cells, x.bfloat16(), window)
    for ours, truth in zip(found, exact, strict=True):
        assert (ours - truth).norm() < 6e-3 * truth.norm()


def test_operators_are_well_formed():
    partition, _, (alpha, cells, x) = made("parts")
    alpha = alpha.detach().bfloat16().unflatten(1, (9, 1, 2)).transpose(1, 2).flatten(2, 3)
    cells, x = cells.detach().float(), x.detach().bfloat16().to(memory_format=torch.channels_last)
    window = [1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    bias = torch.randn(partition.kernel[0])
    y = native.convolve(alpha, cells.transpose(0, 1), x, bias, window, False)
    grad = torch.randn(y.shape).bfloat16()
    torch.library.opcheck(native.convolve, (alpha, cells.transpose(0, 1), x, bias, window, False))
    torch.library.opcheck(native.gradient_of_x, (grad, alpha, cells, x, window, None))
    torch.library.opcheck(native.gradients_of_mixing, (grad, alpha, cells, x, window))
    torch.library.opcheck(mean, (x,))


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
def test_means_and_their_gradients(last):
    x = (1 + torch.randn(3, 37, 21, 30)).bfloat16()
    x = x.to(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        pooled, _ = pool(x)
    torch.testing.assert_close(pooled.double(), x.double().mean((2, 3)), rtol=2**-8, atol=1e-6)
    (grad,) = torch.autograd.grad(pooled.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / 630))


class TestWhereItIsTaken:
    partition, geometry = Partition((64, 64, 3, 3), (64, 64, 1, 1)), Geometry.of((3, 3), padding=1)

    def chosen(self):
        x = torch.empty(8, 64, 14, 14, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        return choose(self.partition, self.geometry, 27, x)

    def test_it_is_where_it_can_run(self):
        assert self.chosen() == "native"

    def test_a_processor_without_the_instructions(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        _obstacle.cache_clear()
        _warn_once.cache_clear()
        try:
            assert self.chosen() != "native"
            operands = torch.randn(2, 9, 5), torch.randn(5, 64, 64, 1, 1), torch.randn(2, 64, 4, 4)
            operands = [operand.bfloat16() for operand in operands]
            with pytest.warns(UserWarning, match="the processor has no AVX512-BF16"):
                y = mixed_conv(*operands, self.partition, self.geometry, "native")
            assert torch.equal(y, mixed_conv(*operands, self.partition, self.geometry, "streamed"))
        finally:
            _obstacle.cache_clear()
            _warn_once.cache_clear()
