"""Mask R-CNN on DeiT-Tiny with KernelWarehouse at a budget of 4."""

_base_ = "mask_rcnn_deit_tiny.py"

model = dict(backbone=dict(config="configs/deit_tiny/kw4x_deit_tiny.json"))
