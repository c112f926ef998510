"""Mask R-CNN on ResNet50 with KernelWarehouse at a budget of 4."""

_base_ = "mask_rcnn_resnet50.py"

model = dict(backbone=dict(config="configs/resnet50/kw4x_resnet50.json"))
