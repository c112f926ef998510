"""Mask R-CNN on MobileNetV2 with KernelWarehouse at a budget of 1."""

_base_ = "mask_rcnn_mobilenetv2_100.py"

model = dict(backbone=dict(config="configs/mobilenetv2_100/kw1x_mobilenetv2_100.json"))
