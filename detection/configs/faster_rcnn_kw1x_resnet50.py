"""Faster R-CNN on ResNet50 with KernelWarehouse at a budget of 1."""

_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "_base_/coco_detection.py", "_base_/recipe.py"]

model = dict(
    backbone=dict(_delete_=True, type="DynamicBackbone", config="configs/resnet50/kw1x_resnet50.json", frozen_stages=1),
)
