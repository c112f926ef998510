"""Triton kernels of a 2-D convolution with kernels of its own for every sample, and of both its gradients.

Each is an implicit matrix product: what a tile of it reads of an image is gathered where it lies, and no columns are
written. Images come with any strides. Sums are taken in fp32, or fp64 for such operands. Kernels W are contiguous,
(B, Cout, taps, Cin).

Offsets are 64-bit wherever a dimension's stride is multiplied: kernels of one batch may exceed 2³¹ values.
"""

from collections.abc import Callable

import triton
import triton.language as tl

MULTIPLIES_DOUBLE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)

# Rows, columns and steps of a tile's product, warps, and stages of loading ahead: large tiles, small ones, and thin
# ones for maps of few pixels. The fastest is found by timing, except in the interpreter.
TILES = ((128, 128, 64, 8, 3), (128, 64, 32, 4, 4), (64, 64, 64, 4, 3), (64, 64, 32, 4, 3), (64, 16, 32, 4, 3))
if triton.knobs.runtime.interpret:  # pyright: ignore[reportAttributeAccessIssue]
    TILES = ((16, 32, 8, 1, 1),)


def _tuned(rows: str, columns: str, steps: str) -> Callable:
    """Find a kernel's tile anew for every kind of layer and every order of magnitude of samples and positions."""
    configs = [
        triton.Config({rows: r, columns: c, steps: s}, num_warps=warps, num_stages=stages)
        for r, c, s, warps, stages in TILES
    ]
    return triton.autotune(
        configs, ["in_channels", "out_channels", "size_class", "taps_h", "taps_w", "stride_h", "precision"]
    )


@_tuned("block_o", "block_p", "block_c")
@triton.jit(do_not_specialize=["size_class"])
def convolve(
    x,  # (B, Cin, height, width)
    w,
    y,  # (B, Cout, out_height · out_width)
    height,
    width,
    out_width,
    positions,
    in_channels,
    out_channels,
    x_b,
    x_c,
    x_h,
    x_w,
    y_b,
    y_o,
    y_p,
    size_class,  # noqa: ARG001 (for the tuner alone)
    taps_h: tl.constexpr,
    taps_w: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    padding_h: tl.constexpr,
    padding_w: tl.constexpr,
    dilation_h: tl.constexpr,
    dilation_w: tl.constexpr,
    precision: tl.constexpr,
    block_o: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """y[b, o, p] = Σ over taps and c of W[b, o, tap, c] · x[b, c, p · stride + tap · dilation − padding]."""
    tiles_o = tl.cdiv(out_channels, block_o)
    tiles_p = tl.cdiv(positions, block_p)
    tile = tl.program_id(0)
    b = (tile // (tiles_o * tiles_p)).to(tl.int64)
    o = tile % tiles_o * block_o + tl.arange(0, block_o)
    p = tile // tiles_o % tiles_p * block_p + tl.arange(0, block_p)
    first_h = p // out_width * stride_h - padding_h
    first_w = p % out_width * stride_w - padding_w
    kernels = w + (b * out_channels + o) * (taps_h * taps_w * in_channels)
    total = tl.zeros((block_o, block_p), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    steps = tl.cdiv(in_channels, block_c)
    for step in range(
        taps_h * taps_w * steps
    ):  # one loop over taps and channels, so that loads run ahead across the taps
        tap = step // steps
        c = step % steps * block_c + tl.arange(0, block_c)
        h = first_h + tap // taps_w * dilation_h
        v = first_w + tap % taps_w * dilation_w
        seen = (p < positions) & (h >= 0) & (h < height) & (v >= 0) & (v < width)
        kernel = tl.load(
            kernels[:, None] + (tap * in_channels + c)[None, :],
            mask=(o < out_channels)[:, None] & (c < in_channels)[None, :],
            other=0.0,
        )
        image = tl.load(
            (x + b * x_b + c.to(tl.int64) * x_c)[:, None] + (h.to(tl.int64) * x_h + v.to(tl.int64) * x_w)[None, :],
            mask=(c < in_channels)[:, None] & seen[None, :],
            other=0.0,
        )
        total = tl.dot(kernel, image, total, input_precision=precision, out_dtype=total.dtype)
    tl.store(
        (y + b * y_b + o.to(tl.int64) * y_o)[:, None] + (p.to(tl.int64) * y_p)[None, :],
        total.to(y.dtype.element_ty),
        mask=(o < out_channels)[:, None] & (p < positions)[None, :],
    )


@_tuned("block_c", "block_p", "block_o")
@triton.jit(do_not_specialize=["size_class"])
def convolve_transposed(
    grad,  # (B, Cout, out_height, out_width)
    w,
    grad_x,  # (B, Cin, height, width)
    height,
    width,
    out_height,
    out_width,
    in_channels,
    out_channels,
    g_b,
    g_o,
    g_h,
    g_w,
    x_b,
    x_c,
    x_h,
    x_w,
    size_class,  # noqa: ARG001 (for the tuner alone)
    taps_h: tl.constexpr,
    taps_w: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    padding_h: tl.constexpr,
    padding_w: tl.constexpr,
    dilation_h: tl.constexpr,
    dilation_w: tl.constexpr,
    precision: tl.constexpr,
    block_o: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """∂x[b, c, q] = Σ over o and those taps that some output p reads at q of W[b, o, tap, c] · ∂y[b, o, p].

    The pixels of one tile lie a stride apart, so that a tap reads all of them or none, and is left out if none.
    """
    phase_h = tl.cdiv(height, stride_h)
    phase_w = tl.cdiv(width, stride_w)
    tiles_c = tl.cdiv(in_channels, block_c)
    tiles_p = tl.cdiv(phase_h * phase_w, block_p)
    tile = tl.program_id(0)
    b = (tile // (tiles_c * tiles_p * stride_h * stride_w)).to(tl.int64)
    c = tile % tiles_c * block_c + tl.arange(0, block_c)
    p = tile // tiles_c % tiles_p * block_p + tl.arange(0, block_p)
    phase = tile // (tiles_c * tiles_p) % (stride_h * stride_w)
    h = phase // stride_w + p // phase_w * stride_h
    v = phase % stride_w + p % phase_w * stride_w
    inside = (p < phase_h * phase_w) & (h < height) & (v < width)
    total = tl.zeros((block_c, block_p), tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32)
    for tap in range(taps_h * taps_w):
        shift_h = padding_h - tap // taps_w * dilation_h
        shift_w = padding_w - tap % taps_w * dilation_w  # pyright: ignore[reportOperatorIssue]
        # A negative remainder is as good as a positive one here, and quotients are exact where they count.
        reads = ((phase // stride_w + shift_h) % stride_h == 0) & ((phase % stride_w + shift_w) % stride_w == 0)
        out_h = (h + shift_h) // stride_h
        out_w = (v + shift_w) // stride_w
        read = inside & (h + shift_h >= 0) & (out_h < out_height) & (v + shift_w >= 0) & (out_w < out_width)
        for first in range(0, tl.where(reads, out_channels, 0), block_o):
            o = first + tl.arange(0, block_o)
            kernels = w + (b * out_channels + o) * (taps_h * taps_w * in_channels)
            kernel = tl.load(
                kernels[None, :] + (tap * in_channels + c)[:, None],
                mask=(o < out_channels)[None, :] & (c < in_channels)[:, None],
                other=0.0,
            )
            received = tl.load(
                (grad + b * g_b + o.to(tl.int64) * g_o)[:, None]
                + (out_h.to(tl.int64) * g_h + out_w.to(tl.int64) * g_w)[None, :],
                mask=(o < out_channels)[:, None] & read[None, :],
                other=0.0,
            )
            total = tl.dot(kernel, received, total, input_precision=precision, out_dtype=total.dtype)
    tl.store(
        (grad_x + b * x_b + c.to(tl.int64) * x_c)[:, None] + (h.to(tl.int64) * x_h + v.to(tl.int64) * x_w)[None, :],
        total.to(grad_x.dtype.element_ty),
        mask=(c < in_channels)[:, None] & inside[None, :],
    )


@_tuned("block_o", "block_c", "block_p")
@triton.jit(do_not_specialize=["size_class"])
def correlate(
    x,  # (B, Cin, height, width)
    grad,  # (B, Cout, out_height, out_width)
    grad_w,
    height,
    width,
    out_width,
    positions,
    in_channels,
    out_channels,
    x_b,
    x_c,
    x_h,
    x_w,
    g_b,
    g_o,
    g_h,
    g_w,
    size_class,  # noqa: ARG001 (for the tuner alone)
    taps_h: tl.constexpr,
    taps_w: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    padding_h: tl.constexpr,
    padding_w: tl.constexpr,
    dilation_h: tl.constexpr,
    dilation_w: tl.constexpr,
    precision: tl.constexpr,
    block_o: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """∂W[b, o, tap, c] = Σ over p of ∂y[b, o, p] · x[b, c, p · stride + tap · dilation − padding]."""
    tiles_o = tl.cdiv(out_channels, block_o)
    tiles_c = tl.cdiv(in_channels, block_c)
    tile = tl.program_id(0)
    b = (tile // (tiles_o * tiles_c * taps_h * taps_w)).to(tl.int64)
    o = tile % tiles_o * block_o + tl.arange(0, block_o)
    c = tile // tiles_o % tiles_c * block_c + tl.arange(0, block_c)
    tap = tile // (tiles_o * tiles_c) % (taps_h * taps_w)
    shift_h = tap // taps_w * dilation_h - padding_h
    shift_w = tap % taps_w * dilation_w - padding_w
    channels = grad + b * g_b + o.to(tl.int64) * g_o
    inputs = x + b * x_b + c.to(tl.int64) * x_c
    total = tl.zeros((block_o, block_c), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for first in range(0, positions, block_p):
        p = first + tl.arange(0, block_p)
        out_h = p // out_width
        out_w = p % out_width
        h = out_h * stride_h + shift_h
        v = out_w * stride_w + shift_w
        seen = (p < positions) & (h >= 0) & (h < height) & (v >= 0) & (v < width)
        received = tl.load(
            channels[:, None] + (out_h.to(tl.int64) * g_h + out_w.to(tl.int64) * g_w)[None, :],
            mask=(o < out_channels)[:, None] & (p < positions)[None, :],
            other=0.0,
        )
        image = tl.load(
            inputs[None, :] + (h.to(tl.int64) * x_h + v.to(tl.int64) * x_w)[:, None],
            mask=(c < in_channels)[None, :] & seen[:, None],
            other=0.0,
        )
        total = tl.dot(received, image, total, input_precision=precision, out_dtype=total.dtype)
    rows = grad_w + ((b * out_channels + o) * (taps_h * taps_w) + tap) * in_channels
    tl.store(
        rows[:, None] + c[None, :],
        total.to(grad_w.dtype.element_ty),
        mask=(o < out_channels)[:, None] & (c < in_channels)[None, :],
    )
