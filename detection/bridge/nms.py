"""Non-maximum suppression: hard, soft, and with the groups of what was suppressed."""

import torch
from torch import Tensor
from torchvision import ops

from .precision import widen

NAIVE, LINEAR, GAUSSIAN = range(3)


def _as_continuous(boxes: Tensor, offset: int) -> Tensor:
    """Boxes whose width is x2 − x1 + offset (N, 4) → the same boxes with width x2 − x1."""
    return boxes + boxes.new_tensor([0, 0, offset, offset])


def _iou(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box (4,) with others (N, 4), 0 where both are empty."""
    return ops.box_iou(box[None], boxes)[0].nan_to_num(0.0)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Keep each box that overlaps no better one by more than the threshold.

    Args:
        boxes: (N, 4), corners x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: Intersection over union above which a box is suppressed.
        offset: 0, or 1 for boxes in whole pixels, whose width is x2 − x1 + 1.

    Returns:
        Indexes of the boxes kept, best first.
    """
    boxes, scores = widen(boxes, scores)
    return ops.nms(_as_continuous(boxes, offset), scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the score of each box that overlaps a better one (Bodla et al., ICCV 2017).

    Args:
        boxes: (N, 4), corners.
        scores: (N,).
        dets: (N, 5), overwritten from the top by the boxes kept with their new scores, best first.
        iou_threshold: Overlap from which the naive and linear methods act; the gaussian one always does.
        sigma: Width of the gaussian method.
        min_score: Boxes whose score falls below this are dropped.
        method: 0 naive (score to 0), 1 linear (× 1 − IoU), 2 gaussian (× exp(−IoU² / sigma)).
        offset: As in `nms`.

    Returns:
        Indexes of the boxes kept, in the order of `dets`.
    """
    wide, scores = widen(boxes, scores)
    wide = _as_continuous(wide, offset)
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left):
        best = scores.argmax()
        index = left[best]
        dets[len(kept), :4] = boxes[index]
        dets[len(kept), 4] = scores[best]
        kept.append(index)
        iou = _iou(wide[index], wide[left])
        if method == GAUSSIAN:
            scores = scores * torch.exp(-(iou**2) / sigma)
        else:
            scores = torch.where(iou < iou_threshold, scores, scores * (1 - iou if method == LINEAR else 0))
        stays = scores >= min_score
        stays[best] = False
        left, scores = left[stays], scores[stays]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Group each box kept with those that it suppresses.

    Args:
        dets: (N, 5), corners and score.
        iou_threshold: Intersection over union from which a box is suppressed.

    Returns:
        The groups, each a list of indexes of which the first is the box kept; groups and their members by score.
    """
    (dets,) = widen(dets)
    left = dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(left):
        matched = _iou(dets[left[0], :4], dets[left, :4]) >= iou_threshold
        matched[0] = True
        groups.append(left[matched].tolist())
        left = left[~matched]
    return groups
