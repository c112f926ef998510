"""Mask R-CNN on ConvNeXt-T with KernelWarehouse at a budget of 1."""

_base_ = "mask_rcnn_convnext_tiny.py"

model = dict(backbone=dict(config="configs/convnext/kw1x_convnext_tiny.json"))
