"""Mask R-CNN on a static MobileNetV2, with its last convolution as the coarsest map."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "_base_/coco_instance.py", "_base_/recipe.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="DynamicBackbone",
        config="configs/mobilenetv2_100/mobilenetv2_100.json",
        final_features=True,
        frozen_stages=1,
    ),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
