"""The focal loss of sigmoid probabilities (Lin et al., ICCV 2017), whose gradient mmcv asks for separately."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widen


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """−α (1 − p)^γ log p for the class of a row, −(1 − α) p^γ log(1 − p) for the others, p = sigmoid(logit).

    Args:
        logits: (N, C).
        target: (N,), the class of each row; C for the background.
        weight: (C,), a factor for the rows of each class (1 for the background); or empty, for none.
        output: (N, C), overwritten.
        gamma: γ.
        alpha: α.
    """
    (logits,) = widen(logits)
    p, q = logits.sigmoid(), (-logits).sigmoid()
    positive = alpha * q**gamma * F.logsigmoid(logits)
    negative = (1 - alpha) * p**gamma * F.logsigmoid(-logits)
    output.copy_(-_choose(positive, negative, target) * _row_weights(weight, target))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Derivative of each loss of `sigmoid_focal_loss_forward` by its logit, into `grad_input` (N, C)."""
    (logits,) = widen(logits)
    p, q = logits.sigmoid(), (-logits).sigmoid()
    positive = alpha * q**gamma * (q - gamma * p * F.logsigmoid(logits))
    negative = (1 - alpha) * p**gamma * (gamma * q * F.logsigmoid(-logits) - p)
    grad_input.copy_(-_choose(positive, negative, target) * _row_weights(weight, target))


def _choose(positive: Tensor, negative: Tensor, target: Tensor) -> Tensor:
    classes = torch.arange(positive.shape[1], device=target.device)
    return torch.where(target[:, None] == classes, positive, negative)


def _row_weights(weight: Tensor, target: Tensor) -> Tensor | float:
    return F.pad(weight, (0, 1), value=1.0)[target][:, None] if weight.numel() else 1.0
