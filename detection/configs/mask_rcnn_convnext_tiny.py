"""Mask R-CNN on a static ConvNeXt-T, whose layers learn the slower the lower they are."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "_base_/coco_instance.py", "_base_/recipe.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="DynamicBackbone",
        config="configs/convnext/convnext_tiny.json",
        overrides=dict(layer_scale_init_value=1.0),
        out_norm=True,
        drop_path=0.4,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay=0.95, num_layers=6),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[9, 11], gamma=0.1),
]
