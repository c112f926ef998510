"""The table: which function stands for which operator of mmcv."""

from collections.abc import Callable
from typing import Any

import torchvision

from . import attention, deform, focal, nms, roi


def get_compiler_version() -> str:
    """What mmcv's report of the environment prints for the compiler of its operators."""
    return f"none (torchvision {torchvision.__version__} by kernelwarehouse.detection.bridge)"


OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": nms.nms,
    "softnms": nms.softnms,
    "nms_match": nms.nms_match,
    "roi_align_forward": roi.roi_align_forward,
    "roi_align_backward": roi.roi_align_backward,
    "roi_pool_forward": roi.roi_pool_forward,
    "roi_pool_backward": roi.roi_pool_backward,
    "sigmoid_focal_loss_forward": focal.sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": focal.sigmoid_focal_loss_backward,
    "deform_conv_forward": deform.deform_conv_forward,
    "deform_conv_backward_input": deform.deform_conv_backward_input,
    "deform_conv_backward_parameters": deform.deform_conv_backward_parameters,
    "modulated_deform_conv_forward": deform.modulated_deform_conv_forward,
    "modulated_deform_conv_backward": deform.modulated_deform_conv_backward,
    "ms_deform_attn_forward": attention.ms_deform_attn_forward,
    "ms_deform_attn_backward": attention.ms_deform_attn_backward,
    "get_compiler_version": get_compiler_version,
    "get_compiling_cuda_version": get_compiler_version,
}
