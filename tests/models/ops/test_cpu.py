"""The C++: its sums, its threads, how it is compiled, and what happens where it cannot be."""

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from convolutions import CONVOLUTIONS, convolution
from parity import assert_parity
from processor import needs_compiler

from kernelwarehouse.models.ops.cpu import BuildError, library
from kernelwarehouse.models.ops.cpu.build import built
from kernelwarehouse.models.ops.cpu.library import _build_error, _unavailable, unavailable
from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.mixture_conv import IMPLEMENTATIONS, Partition, cpp, mixture_conv, signature_of
from kernelwarehouse.models.ops.mixture_conv.cpp import is_of_experts
from kernelwarehouse.models.ops.selection import forget, select

FORGET = _unavailable, _build_error, library


@pytest.fixture
def threads():
    """Set the number of threads, for the time of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def forgotten(monkeypatch, tmp_path):
    """A process that has not looked for the library yet, and a machine that has none."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for function in FORGET:
        function.cache_clear()
    forget()
    yield tmp_path / "kernelwarehouse"
    for function in FORGET:
        function.cache_clear()
    forget()


def assert_equal_to_grouped(partition, geometry, leaves, tolerance=1e-12):
    alpha, bank, x = leaves

    def run(implementation):
        return mixture_conv(x, alpha, bank, partition, geometry, implementation=implementation)

    assert_parity(lambda: run("cpp"), lambda: run("grouped"), {"alpha": alpha, "bank": bank, "x": x}, tolerance)


def chosen_for(x, kernel=(64, 64, 3, 3), terms=27):
    partition, geometry = Partition(kernel, (*kernel[:2], 1, 1)), Geometry.of(kernel[2:], padding=1)
    return select(signature_of(x, terms, True, partition, geometry, "mixture_conv"), IMPLEMENTATIONS).name


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_parity(threads, name, count):
    assert unavailable("cpu", torch.float64) is None
    threads(count)
    assert_equal_to_grouped(*convolution(name))


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "cell", "cells", "size", "batch"),
    [
        ((70, 75, 3, 3), (35, 75, 1, 1), 37, (9, 8), 3),  # several parts of rows and of channels
        ((33, 21, 7, 7), (33, 7, 1, 1), 3, (8, 5), 2),  # more mixtures of one sample than are mixed at once
        ((6, 5, 1, 1), (2, 5, 1, 1), 50, (3, 1), 61),  # samples in many groups
        ((16, 16, 7, 7), (16, 16, 1, 1), 2, (30, 40), 2),  # few samples, whose lines are shared out
        ((24, 16, 3, 3), (8, 16, 1, 1), 5, (9, 7), 4),  # the kernels of narrow blocks are applied side by side
        ((16, 16, 1, 1), (16, 16, 1, 1), 2, (40, 50), 1),  # kernels are mixed first; then pixels are shared out
        ((120, 80, 1, 1), (20, 80, 1, 1), 5, (6, 5), 1),  # blocks of which some lie in two panels
        ((72, 80, 3, 1), (12, 80, 1, 1), 5, (6, 5), 2),  # and narrow ones
        ((10, 83, 1, 1), (10, 83, 1, 1), 7, (3, 4), 1),  # one mixture, in as many registers as there are
        ((10, 203, 1, 1), (5, 203, 1, 1), 7, (3, 4), 1),  # and two
        ((4, 6, 2, 3, 2), (2, 3, 1, 1, 1), 9, (4, 5, 3), 2),  # a volume
        ((4, 6, 3, 3, 3), (2, 3, 1, 1, 1), 9, (1, 1, 1), 2),  # most taps read nothing
        ((130, 3, 5, 5), (130, 3, 1, 1), 4, (9, 11), 2),  # few input channels: the gradient of the kernels is turned
        ((40, 21, 1, 1), (40, 21, 1, 1), 3, (13, 9), 3),  # so it is here, where a register and a half hold them
        ((40, 24, 1, 1), (40, 24, 1, 1), 3, (71, 60), 1),  # a large image is not brought together
        ((128, 128, 3, 3), (128, 128, 1, 1), 150, (4, 3), 2),  # gradients of many cells go past the caches
        ((128, 128, 3, 3), (128, 128, 1, 1), 150, (4, 3), 10),  # and are added to by more mixtures
        ((128, 100, 1, 1), (128, 100, 1, 1), 200, (4, 3), 2),  # or they do not, where rows are no whole registers
        ((61, 384, 1, 1), (61, 384, 1, 1), 95, (4, 3), 5),  # cells are read in longer pieces for the input's gradient
        ((70, 150, 1, 1), (35, 75, 1, 1), 45, (5, 4), 8),  # kernels fill registers when turned, in place of cells
    ],
    ids=[
        "parts",
        "taps",
        "samples",
        "lines",
        "side",
        "pixels",
        "panels",
        "across",
        "one",
        "two",
        "volume",
        "voxel",
        "stem",
        "narrow",
        "image",
        "far",
        "farther",
        "odd",
        "pieces",
        "turned",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_where_the_work_is_cut(threads, kernel, cell, cells, size, batch, dtype):
    threads(3)
    torch.manual_seed(0)
    partition = Partition(kernel, cell)
    geometry = Geometry.of(kernel[2:], stride=1, padding=kernel[-1] // 2)
    shapes = (batch, partition.mixtures, cells), (cells, *cell), (batch, kernel[1], *size)
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    assert_equal_to_grouped(partition, geometry, leaves, 1e-12 if dtype == torch.float64 else 1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, "whole"])
def test_a_bank_for_each_part(threads, name, dtype):
    threads(3)
    partition, geometry, (alpha, _, x) = convolution("several-tiles" if name == "whole" else name)
    if name == "whole":  # one part for the whole kernel
        partition = Partition(partition.kernel, partition.kernel)
        alpha = alpha[:, :1]
    bank = torch.randn(5, *partition.kernel, dtype=dtype)
    alpha, x = alpha.detach().to(dtype), x.detach().to(dtype)
    with torch.no_grad():
        y, expected = (
            mixture_conv(x, alpha, bank, partition, geometry, implementation=i) for i in ("cpp", "reference")
        )
    assert (y - expected).norm() <= (1e-12 if dtype == torch.float64 else 1e-5) * expected.norm()
    if not is_of_experts(partition):
        with pytest.raises(ValueError, match="'cpp' cannot compute this layer: gradients of a bank for each part"):
            mixture_conv(x, alpha, bank, partition, geometry, implementation="cpp")
        return
    leaves = [t.requires_grad_() for t in (x, alpha, bank)]
    found, wanted = (
        torch.autograd.grad(mixture_conv(*leaves, partition, geometry, implementation=i).square().sum(), leaves)
        for i in ("cpp", "reference")
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= (1e-12 if dtype == torch.float64 else 1e-5) * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_digits_every_time(threads, memory_format):
    """Sums are shared among threads in a fixed way."""
    threads(4)
    torch.manual_seed(0)
    partition, geometry = Partition((64, 48, 3, 3), (32, 48, 1, 1)), Geometry.of((3, 3), padding=1)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((5, 18, 21), (21, 32, 48, 1, 1), (5, 48, 13, 11))]
    leaves[2] = leaves[2].detach().to(memory_format=memory_format).requires_grad_()
    alpha, bank, x = leaves

    def run():
        return mixture_conv(x, alpha, bank, partition, geometry, implementation="cpp")

    first, *others = [torch.autograd.grad(run().square().sum(), leaves) for _ in range(5)]
    for gradients in others:
        assert all(map(torch.equal, first, gradients))


@needs_compiler
def test_operators_are_well_formed():
    _partition, _geometry, (alpha, cells, x) = convolution("unequal")
    x = x.detach().to(memory_format=torch.channels_last)
    alpha = alpha.detach().unflatten(1, (9, 2, 2)).transpose(1, 2).flatten(2, 3)
    window = [1, 3, 3, 1, 2, 1, 0, 0, 2, 1, 1, 2]
    arguments = alpha, cells.detach(), x, window
    convolved = alpha, cells.detach().transpose(0, 1), x, window, False
    y = cpp.convolve(*convolved)
    for operator, operands in (
        (cpp.convolve, convolved),
        (cpp.gradient_of_x, (torch.randn_like(y), *arguments)),
        (cpp.gradients_of_mixing, (torch.randn_like(y), *arguments)),
        (cpp.convolve, (alpha, torch.randn(6, 5, 36).double(), x, window, True)),
    ):
        torch.library.opcheck(operator, operands)


@needs_compiler
def test_input_smaller_than_the_kernel():
    partition, geometry, (alpha, cells, x) = convolution("stride")
    with pytest.raises(ValueError, match=r"an input of \(2, 5\) is too small for a kernel of \(3, 3\)"):
        mixture_conv(x[:, :, :2], alpha, cells, partition, geometry, implementation="cpp")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    partition, geometry, (alpha, cells, x) = convolution("padding")
    half = x.detach().to(dtype).requires_grad_()
    expected = mixture_conv(half.double(), alpha.to(dtype).double(), cells, partition, geometry)
    y = mixture_conv(half, alpha.to(dtype), cells, partition, geometry, implementation="cpp")
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= torch.finfo(dtype).eps * expected.norm()
    (grad,) = torch.autograd.grad(y.float().square().sum(), half)
    (truth,) = torch.autograd.grad(expected.square().sum(), half)
    assert grad.dtype == dtype
    assert (grad - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm()


@needs_compiler
def test_auto_takes_it_where_it_can_run():
    x = torch.empty(8, 64, 14, 14).to(memory_format=torch.channels_last)
    assert chosen_for(x) == "cpp"
    assert chosen_for(x.to("meta")) in ("materialize", "mix_inputs")


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "no compiler 'no-such-compiler' was found; install GCC"), ("false", "false could not")],
)
def test_without_a_compiler_it_is_refused_by_name_and_auto_takes_another_and_says_so(
    forgotten, monkeypatch, compiler, message
):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=message):
        library()
    x = torch.empty(8, 64, 14, 14)
    with pytest.warns(UserWarning, match=f"without C\\+\\+, which is slower on a CPU: {message}"):
        assert chosen_for(x) in ("materialize", "mix_inputs")
    partition, geometry, (alpha, cells, x) = convolution("padding")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        mixture_conv(x, alpha, cells, partition, geometry)
        with pytest.raises(ValueError, match=f"'cpp' cannot compute this layer: {message}.*; materialize, mix_inputs"):
            mixture_conv(x, alpha, cells, partition, geometry, implementation="cpp")
    assert not list(forgotten.iterdir())


def compiler_that(tmp_path, monkeypatch, *lines):
    """Make a script the compiler; its output, `$last`, is there already."""
    compiler = tmp_path / "compiler"
    compiler.write_text("\n".join(["#!/bin/sh", 'for last; do :; done; echo half > "$last"', *lines]))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A copy of this machine's library."""
    with built() as path:
        return shutil.copy(path, tmp_path_factory.mktemp("library"))


@pytest.fixture
def quick_compiler(compiled, forgotten, monkeypatch, tmp_path):
    """A compiler that has the library at hand; the file in which it writes down its commands."""
    log = tmp_path / "log"
    compiler_that(
        tmp_path, monkeypatch, f'echo "$*" >> {log}; case " $* " in *" -shared "*) cp {compiled} "$last"; esac'
    )
    return log


@needs_compiler
def test_it_is_compiled_once(quick_compiler, forgotten):
    assert library()["reorder_float"]
    commands = quick_compiler.read_text()
    assert commands.count("-shared") == 1
    assert [path.suffix for path in forgotten.iterdir()] == [".so"]
    library.cache_clear()
    library()
    assert quick_compiler.read_text() == commands


@needs_compiler
def test_a_folder_that_cannot_be_written(quick_compiler, forgotten):
    forgotten.write_text("in the way")
    assert_equal_to_grouped(*convolution("padding"))
    assert quick_compiler.read_text().count("-shared") == 1


@pytest.mark.parametrize("stage", ["-c", "-shared"])
def test_an_interrupted_compilation_leaves_nothing_to_load(forgotten, monkeypatch, tmp_path, stage):
    fail = f'case " $* " in *" {stage} "*) echo "error: no space left" >&2; exit 1;; esac'
    compiler_that(tmp_path, monkeypatch, fail)
    with pytest.raises(BuildError, match="no space left"):
        library()
    assert not list(forgotten.iterdir())


def test_who_needs_it_at_the_same_time_waits_for_one_that_compiles(forgotten, monkeypatch, tmp_path):
    log = tmp_path / "log"
    compiler_that(tmp_path, monkeypatch, f'sleep 0.2; echo "$*" >> {log}')

    def find():
        with built() as path:
            return path, path.read_text()

    with ThreadPoolExecutor() as pool:
        (path, content), *others = [found.result() for found in [pool.submit(find) for _ in range(4)]]
    assert path.parent == forgotten
    assert content == "half\n"
    assert others == [(path, content)] * 3
    assert log.read_text().count("-shared") == 1


def test_a_processor_without_the_instructions(forgotten, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(BuildError, match="the processor needs AVX512 or AVX2, and torch found DEFAULT"):
        library()
    assert not forgotten.exists()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cell", ["whole", "position"])
@pytest.mark.parametrize(
    ("kernel", "experts", "size", "batch"),
    [
        ((70, 75, 3, 3), 4, (9, 8), 3),
        ((33, 21, 7, 7), 3, (8, 5), 5),
        ((130, 3, 5, 5), 1, (9, 11), 2),
        ((61, 200, 1, 1), 5, (4, 3), 9),
        ((72, 80, 3), 4, (40,), 2),
        ((4, 6, 2, 3, 2), 2, (4, 5, 3), 2),
    ],
)
def test_whole_kernels_where_the_work_is_cut(threads, kernel, experts, size, batch, cell, dtype):
    threads(3)
    torch.manual_seed(0)
    cell = kernel if cell == "whole" else (*kernel[:2], *(1,) * (len(kernel) - 2))
    partition, geometry = Partition(kernel, cell), Geometry.of(kernel[2:], padding=kernel[-1] // 2)
    shapes = (batch, kernel[1], *size), (batch, partition.mixtures, experts), (experts, *kernel)
    operands = [torch.randn(shape, dtype=dtype) for shape in shapes]
    with torch.no_grad():
        y, expected = (mixture_conv(*operands, partition, geometry, implementation=i) for i in ("cpp", "grouped"))
    assert (y - expected).norm() <= (1e-12 if dtype == torch.float64 else 1e-5) * expected.norm()
