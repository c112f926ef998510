"""Mask R-CNN on ResNet50 with KernelWarehouse at a budget of 1."""

_base_ = "mask_rcnn_resnet50.py"

model = dict(backbone=dict(config="configs/resnet50/kw1x_resnet50.json"))
