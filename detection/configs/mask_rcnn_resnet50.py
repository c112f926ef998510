"""Mask R-CNN on a static ResNet50."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "_base_/coco_instance.py", "_base_/recipe.py"]

model = dict(
    backbone=dict(_delete_=True, type="DynamicBackbone", config="configs/resnet50/resnet50.json", frozen_stages=1),
)
