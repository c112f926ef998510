"""Mask R-CNN on a static DeiT-Tiny with a simple feature pyramid; the recipe is our own, in the manner of ViTDet."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "_base_/coco_instance.py", "_base_/recipe.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="DynamicBackbone",
        config="configs/deit_tiny/deit_tiny.json",
        out_indices=(-1,),
        drop_path=0.1,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=192, out_channels=256, num_outs=5),
)
optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(_delete_=True, layer_decay=0.7))
