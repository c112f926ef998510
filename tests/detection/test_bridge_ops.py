"""mmcv's own wrappers on the bridge, against loops over the definitions, torchvision, and compiled mmcv."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from torch.autograd import gradcheck

from kernelwarehouse.detection.bridge import OPERATORS, MissingOperatorError
from kernelwarehouse.detection.bridge.finder import BridgeFinder

# isort: split
# Only now can mmcv's operators be imported.
import mmcv.ops
from mmcv import _ext
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

COMPILED = not isinstance(_ext.__loader__, BridgeFinder)


def use(operators, monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
            monkeypatch.setattr(module, "ext_module", operators)


@pytest.fixture(autouse=True)
def bridge(monkeypatch):
    """The bridge, even where a compiled mmcv is installed."""
    torch.manual_seed(0)
    use(SimpleNamespace(**OPERATORS), monkeypatch)


def random_boxes(n, dtype=torch.float32, size=40):
    corner = torch.rand(n, 2, dtype=dtype) * size
    return torch.cat([corner, corner + torch.rand(n, 2, dtype=dtype) * size / 2], dim=1)


def iou(a, b, offset=0):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


# Non-maximum suppression


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [1, 61])
def test_nms_keeps_boxes_that_no_better_one_overlaps(n, offset):
    boxes, scores = random_boxes(n), torch.rand(n)
    expected = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.3 for j in expected):
            expected.append(i)
    dets, kept = mmcv.ops.nms(boxes, scores, 0.3, offset=offset)
    assert kept.tolist() == expected
    assert n == 1 or len(kept) < n
    torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_nms_filters_by_score_and_number_and_takes_arrays():
    boxes, scores = random_boxes(30), torch.rand(30)
    _, kept = mmcv.ops.nms(boxes, scores, 0.5, score_threshold=0.4, max_num=5)
    all_kept = torchvision.ops.nms(boxes, scores, 0.5)
    assert kept.tolist() == [i for i in all_kept.tolist() if scores[i] > 0.4][:5]
    dets, from_arrays = mmcv.ops.nms(boxes.numpy(), scores.numpy(), 0.5)
    assert isinstance(dets, np.ndarray)
    assert from_arrays.tolist() == all_kept.tolist()


def test_at_the_threshold_nms_keeps_and_nms_match_groups():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])  # their overlap is a half, exactly
    dets = torch.cat([boxes, torch.tensor([[0.9], [0.8]])], dim=1)
    assert mmcv.ops.nms(boxes, dets[:, 4].contiguous(), 0.5)[1].tolist() == [0, 1]
    assert [m.tolist() for m in mmcv.ops.nms_match(dets, 0.5)] == [[0, 1]]


def test_nms_computes_in_float32_what_comes_in_half_precision():
    boxes, scores = random_boxes(50, size=2000).half(), torch.rand(50).half()
    dets, kept = mmcv.ops.nms(boxes, scores, 0.3)
    assert dets.dtype == torch.float16
    assert kept.tolist() == torchvision.ops.nms(boxes.float(), scores.float(), 0.3).tolist()


@pytest.mark.parametrize("split", [10000, 10])
def test_batched_nms_separates_classes(split):
    boxes, scores, classes = random_boxes(50), torch.rand(50), torch.randint(3, (50,))
    config = {"type": "nms", "iou_threshold": 0.3, "split_thr": split}
    dets, kept = mmcv.ops.batched_nms(boxes, scores, classes, config)
    assert kept.tolist() == torchvision.ops.batched_nms(boxes, scores, classes, 0.3).tolist()
    torch.testing.assert_close(dets[:, 4], scores[kept])
    together = mmcv.ops.batched_nms(boxes, scores, classes, config | {"split_thr": 10000}, class_agnostic=True)[1]
    assert together.tolist() == torchvision.ops.nms(boxes, scores, 0.3).tolist()


def soft_nms_by_loops(boxes, scores, threshold, sigma, min_score, method, offset):
    left = dict(enumerate(scores.tolist()))
    result = []
    while left:
        best = max(left, key=left.get)
        result.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[best].tolist(), boxes[i].tolist(), offset)
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[i] *= 0 if method == "naive" else 1 - overlap
            if left[i] < min_score:
                del left[i]
    return result


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_lowers_scores(method, offset):
    boxes, scores = random_boxes(40, torch.float64), torch.rand(40, dtype=torch.float64)
    expected = soft_nms_by_loops(boxes, scores, 0.2, 0.5, 0.05, method, offset)
    dets, kept = mmcv.ops.soft_nms(boxes, scores, 0.2, 0.5, 0.05, method, offset)
    assert 1 < len(kept) < 40
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected], dtype=torch.float64))


def test_soft_nms_serves_batched_nms_and_boxes_without_area():
    boxes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 8, 8]])
    config = {"type": "soft_nms", "iou_threshold": 0.5, "method": "gaussian"}
    dets, kept = mmcv.ops.batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]), config)
    assert kept.tolist() == [0, 1, 2]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.8, 0.7]))


def test_nms_match_groups_what_is_suppressed():
    boxes, scores = random_boxes(40), torch.rand(40)
    left = scores.argsort(descending=True).tolist()
    expected = []
    while left:
        best, rest = left[0], left[1:]
        group = [i for i in rest if iou(boxes[best].tolist(), boxes[i].tolist()) >= 0.3]
        expected.append([best, *group])
        left = [i for i in rest if i not in group]
    groups = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.3)
    assert [g.tolist() for g in groups] == expected
    assert max(map(len, expected)) > 1


def test_no_boxes():
    boxes, scores = torch.zeros(0, 4), torch.zeros(0)
    for function in (mmcv.ops.nms, mmcv.ops.soft_nms):
        dets, kept = function(boxes, scores, 0.5)
        assert dets.shape == (0, 5)
        assert kept.shape == (0,)
        assert kept.dtype == torch.long
    assert OPERATORS["nms_match"](torch.zeros(0, 5), 0.5) == []


# Regions of interest

REGIONS = torch.tensor([[1, 1.3, 2.1, 9.7, 6.2], [0, -3.0, 4.0, 5.5, 14.0], [1, 4.2, 3.3, 4.9, 3.6]]).double()


def bilinear(plane, y, x):
    """The value of a plane (H, W) at a place, as RoIAlign reads it: its edge reaches one pixel further."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    top = (1 - fx) * plane[y0, x0] + fx * plane[y0, x1]
    bottom = (1 - fx) * plane[y1, x0] + fx * plane[y1, x1]
    return float((1 - fy) * top + fy * bottom)


def roi_align_by_loops(features, rois, size, scale, sampling, aligned):
    result = torch.zeros(len(rois), features.shape[1], *size, dtype=features.dtype)
    for r, roi in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0) for v in roi[1:])
        sides = [(y2 - y1), (x2 - x1)]
        if not aligned:
            sides = [max(side, 1.0) for side in sides]
        bins = [side / n for side, n in zip(sides, size, strict=True)]
        samples = [sampling or math.ceil(b) for b in bins]
        for c, i, j in itertools.product(range(features.shape[1]), range(size[0]), range(size[1])):
            values = [
                bilinear(
                    features[int(roi[0]), c],
                    y1 + (i + (a + 0.5) / samples[0]) * bins[0],
                    x1 + (j + (b + 0.5) / samples[1]) * bins[1],
                )
                for a, b in itertools.product(range(samples[0]), range(samples[1]))
            ]
            result[r, c, i, j] = sum(values) / max(len(values), 1)
    return result


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 1, 3])
def test_roi_align_averages_samples(sampling, aligned):
    features = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    layer = mmcv.ops.RoIAlign((3, 2), spatial_scale=0.8, sampling_ratio=sampling, aligned=aligned)
    expected = roi_align_by_loops(features, REGIONS, (3, 2), 0.8, sampling, aligned)
    torch.testing.assert_close(layer(features, REGIONS), expected)
    assert gradcheck(lambda x: layer(x, REGIONS), features.requires_grad_())


def test_roi_align_has_no_maximum():
    with pytest.raises(MissingOperatorError, match=r"pool_mode='max'.*compiled mmcv"):
        mmcv.ops.RoIAlign(2, pool_mode="max")(torch.rand(2, 1, 4, 4), REGIONS.float())


def roi_pool_by_loops(features, rois, size, scale):
    result = torch.zeros(len(rois), features.shape[1], *size, dtype=features.dtype)
    for r, roi in enumerate(rois.tolist()):
        x1, y1, x2, y2 = roi[1] * scale, roi[2] * scale, (roi[3] + 1) * scale, (roi[4] + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for i, j in itertools.product(range(size[0]), range(size[1])):
            rows = (math.floor(y1 + i * (y2 - y1) / size[0]), math.ceil(y1 + (i + 1) * (y2 - y1) / size[0]))
            columns = (math.floor(x1 + j * (x2 - x1) / size[1]), math.ceil(x1 + (j + 1) * (x2 - x1) / size[1]))
            window = features[int(roi[0]), :, max(rows[0], 0) : rows[1], max(columns[0], 0) : columns[1]]
            if rows[1] > 0 and columns[1] > 0 and window.numel():
                result[r, :, i, j] = window.amax(dim=(1, 2))
    return result


def test_roi_pool_takes_the_maximum_of_each_bin():
    outside = torch.tensor([[0, 20.0, 1, 30, 5], [1, -9, -9, -5, -5], [0, 6, 6, 2, 2]]).double()
    rois = torch.cat([REGIONS, outside])
    features = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    layer = mmcv.ops.RoIPool((3, 2), spatial_scale=0.8)
    pooled = layer(features, rois)
    torch.testing.assert_close(pooled, roi_pool_by_loops(features, rois, (3, 2), 0.8))
    assert not pooled[3:].any()
    assert gradcheck(lambda x: layer(x, rois), features.requires_grad_())


def test_roi_pool_is_torchvisions_on_whole_pixels():
    rois = torch.tensor([[0, 1.0, 2, 8, 7], [1, 0, 0, 10, 8], [1, 3, 3, 3, 3]])
    features = torch.randn(2, 3, 9, 11)
    expected = torchvision.ops.roi_pool(features, rois, (2, 3))
    torch.testing.assert_close(mmcv.ops.RoIPool((2, 3))(features, rois), expected)


def test_among_equal_values_roi_pool_passes_the_gradient_to_the_first():
    features = torch.zeros(1, 1, 3, 4, requires_grad=True)
    mmcv.ops.RoIPool(1)(features, torch.tensor([[0, 1.0, 1, 3, 2]])).sum().backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("layer", [mmcv.ops.RoIAlign(3), mmcv.ops.RoIPool(3)], ids=lambda layer: type(layer).__name__)
def test_no_regions_and_half_precision(layer):
    features = torch.rand(2, 3, 9, 11, requires_grad=True)
    pooled = layer(features, torch.zeros(0, 5))
    assert pooled.shape == (0, 3, 3, 3)
    pooled.sum().backward()
    assert not features.grad.any()
    half = features.detach().half().requires_grad_()
    pooled = layer(half, REGIONS.half())
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.float(), layer(half.float(), REGIONS.half().float()), rtol=1e-3, atol=1e-3)
    pooled.sum().backward()
    assert half.grad.dtype == torch.float16
    assert half.grad.any()


# Focal loss


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_and_its_gradient(gamma, weighted):
    logits, target = torch.randn(7, 3, dtype=torch.float64) * 3, torch.tensor([0, 1, 2, 3, 3, 1, 0])  # 3 is background
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    expected = torch.zeros_like(logits)
    for n, c in itertools.product(range(7), range(3)):
        p = 1 / (1 + math.exp(-logits[n, c]))
        loss = -0.3 * (1 - p) ** gamma * math.log(p) if target[n] == c else -0.7 * p**gamma * math.log(1 - p)
        expected[n, c] = loss * (float(weight[target[n]]) if weighted and target[n] < 3 else 1)

    def loss(x, reduction="none"):
        return mmcv.ops.SigmoidFocalLoss(gamma, 0.3, weight, reduction)(x, target)

    torch.testing.assert_close(loss(logits), expected)
    torch.testing.assert_close(loss(logits, "mean"), expected.sum() / 7)
    logits.requires_grad_()
    assert gradcheck(loss, logits)
    assert gradcheck(lambda x: loss(x, "mean"), logits)


def test_focal_loss_is_torchvisions_and_finite_at_the_ends():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [-3.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 0, 2])
    one_hot = F.one_hot(target, 3)[:, :2].float()
    loss = mmcv.ops.sigmoid_focal_loss(logits, target, 0.5, 0.25, None, "none")
    torch.testing.assert_close(loss, torchvision.ops.sigmoid_focal_loss(logits, one_hot, 0.25, 0.5))
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    half = mmcv.ops.sigmoid_focal_loss(logits.half(), target, 2.0, 0.25, None, "sum")
    assert half.dtype == torch.float16
    assert mmcv.ops.sigmoid_focal_loss(torch.zeros(0, 2), torch.zeros(0).long(), 2.0, 0.25, None, "sum") == 0


# Deformable convolution

GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def deform_by_loops(x, offset, mask, weight, groups, deform_groups):
    (sh, sw), (ph, pw), (dh, dw) = GEOMETRY.values()
    batch, channels, height, width = x.shape
    filters, per_group, kh, kw = weight.shape
    result = torch.zeros(batch, filters, *offset.shape[2:], dtype=x.dtype)

    def at(b, c, y, w):
        y0, x0 = math.floor(y), math.floor(w)
        corners = itertools.product((y0, y0 + 1), (x0, x0 + 1))
        return sum(
            (1 - abs(y - i)) * (1 - abs(w - j)) * x[b, c, i, j]
            for i, j in corners
            if 0 <= i < height and 0 <= j < width
        )

    for b, f, i, j in itertools.product(*map(range, result.shape)):
        first = f // (filters // groups) * per_group
        for c, k in itertools.product(range(per_group), range(kh * kw)):
            place = (first + c) // (channels // deform_groups) * kh * kw + k
            y = i * sh - ph + k // kw * dh + float(offset[b, 2 * place, i, j])
            w = j * sw - pw + k % kw * dw + float(offset[b, 2 * place + 1, i, j])
            result[b, f, i, j] += weight[f, c, k // kw, k % kw] * mask[b, place, i, j] * at(b, first + c, y, w)
    return result


def deform_inputs(deform_groups, dtype=torch.float64):
    x = torch.randn(2, 4, 5, 6, dtype=dtype)
    shape = (2, 3 * 2 * deform_groups, 3, 8)  # kernels of 3 × 2
    offset = torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
    return x, offset, torch.rand(shape, dtype=dtype)


@pytest.mark.parametrize(("groups", "deform_groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_deformable_convolution(groups, deform_groups):
    x, offset, _ = deform_inputs(deform_groups)
    options = {"groups": groups, "deform_groups": deform_groups, "im2col_step": 1} | GEOMETRY
    layer = mmcv.ops.DeformConv2d(4, 6, (3, 2), **options).double()
    expected = deform_by_loops(x, offset, torch.ones(2, 99, 3, 8), layer.weight.detach(), groups, deform_groups)
    torch.testing.assert_close(layer(x, offset), expected)

    def apply(x, offset, weight):
        return mmcv.ops.deform_conv2d(x, offset, weight, *GEOMETRY.values(), groups, deform_groups)

    assert gradcheck(apply, [t.requires_grad_() for t in (x, offset)] + [layer.weight], fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "deform_groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_modulated_deformable_convolution(groups, deform_groups, bias):
    x, offset, mask = deform_inputs(deform_groups)
    layer = mmcv.ops.ModulatedDeformConv2d(4, 6, (3, 2), *GEOMETRY.values(), groups, deform_groups, bias).double()
    if bias:
        torch.nn.init.normal_(layer.bias)
    expected = deform_by_loops(x, offset, mask, layer.weight.detach(), groups, deform_groups)
    expected += layer.bias.detach()[:, None, None] if bias else 0
    torch.testing.assert_close(layer(x, offset, mask), expected)

    def apply(x, offset, mask, weight, bias):
        arguments = (weight, bias, *GEOMETRY.values(), groups, deform_groups)
        return mmcv.ops.modulated_deform_conv2d(x, offset, mask, *arguments)

    assert gradcheck(
        apply, [t.requires_grad_() for t in (x, offset, mask)] + [layer.weight, layer.bias], fast_mode=True
    )


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_deformable_convolution_with_one_part_frozen(frozen):
    x, offset, _ = deform_inputs(1)
    layer = mmcv.ops.DeformConv2d(4, 6, (3, 2), **GEOMETRY).double()
    x.requires_grad_(frozen != "x")
    layer.weight.requires_grad_(frozen != "weight")
    layer(x, offset).sum().backward()
    grads = {"x": x.grad, "weight": layer.weight.grad}
    assert grads.pop(frozen) is None
    assert all(g.any() for g in grads.values())


def test_without_offsets_it_is_a_convolution_in_half_precision_too():
    x, weight = torch.randn(2, 4, 7, 5), torch.randn(6, 4, 3, 3)
    offset = torch.zeros(2, 18, 7, 5)
    expected = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(mmcv.ops.deform_conv2d(x, offset, weight, 1, 1), expected, rtol=1e-4, atol=1e-4)
    half = mmcv.ops.deform_conv2d(x, offset.half(), weight, 1, 1)  # as in AMP, where only the offsets are so
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=2e-2)


def test_packs_that_predict_their_offsets_learn():
    x = torch.randn(2, 4, 7, 5)
    for pack in (mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack):
        layer = pack(4, 6, 3, padding=1)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert layer.conv_offset.weight.grad.any()


# Deformable attention


def test_deformable_attention_where_mmcv_asks_for_its_kernel():
    shapes = torch.tensor([[3, 4], [2, 2]])
    value = torch.randn(2, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def apply(value, locations, weights):
        return MultiScaleDeformableAttnFunction.apply(value, shapes, torch.tensor([0, 12]), locations, weights, 64)

    expected = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    torch.testing.assert_close(apply(value, locations, weights), expected)
    assert gradcheck(apply, (value, locations, weights), fast_mode=True)


# Compiled mmcv, on the CPU


def deform(modulated):
    x, offset, mask = deform_inputs(2, torch.float32)
    weight, bias = torch.randn(6, 2, 3, 2), torch.randn(6)
    inputs = (x, offset, mask, weight, bias) if modulated else (x, offset, weight)
    inputs = [t.requires_grad_() for t in inputs]
    function = mmcv.ops.modulated_deform_conv2d if modulated else mmcv.ops.deform_conv2d
    output = function(*inputs, *GEOMETRY.values(), 2, 2)
    return output, *torch.autograd.grad(output.square().sum(), inputs)


def align(**options):
    features = torch.rand(2, 3, 9, 11, requires_grad=True)
    output = mmcv.ops.RoIAlign((3, 2), 0.8, **options)(features, REGIONS.float())
    return output, *torch.autograd.grad(output.square().sum(), features)


AGAINST_COMPILED = {
    **{f"nms offset {o}": (lambda o=o: mmcv.ops.nms(random_boxes(200), torch.rand(200), 0.3, o), 0) for o in (0, 1)},
    **{
        f"soft_nms {m} offset {o}": (
            lambda m=m, o=o: mmcv.ops.soft_nms(random_boxes(200), torch.rand(200), 0.3, 0.5, 1e-3, m, o),
            1e-6,
        )
        for m in ("naive", "linear", "gaussian")
        for o in (0, 1)
    },
    "nms_match": (
        lambda: mmcv.ops.nms_match(torch.cat([random_boxes(200), torch.rand(200, 1)], 1), 0.3),
        0,
    ),
    **{
        f"roi_align {s} {a}": (lambda s=s, a=a: align(sampling_ratio=s, aligned=a), 1e-6)
        for s in (0, 2)
        for a in (True, False)
    },
    "deform_conv": (lambda: deform(modulated=False), 1e-4),
    "modulated_deform_conv": (lambda: deform(modulated=True), 1e-4),
}


@pytest.mark.skipif(not COMPILED, reason="mmcv-lite is installed, which has no compiled operators to compare with")
@pytest.mark.parametrize("name", AGAINST_COMPILED)
def test_compiled_mmcv_agrees(name, monkeypatch):
    run, tolerance = AGAINST_COMPILED[name]
    results = []
    for operators in (SimpleNamespace(**OPERATORS), _ext):
        use(operators, monkeypatch)
        torch.manual_seed(1)
        results.append(list(run()))
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
