"""Mask R-CNN on a narrow ResNet18 with KernelWarehouse, from a classifier of digits, for two CPU cores.

    python main.py --kw_config configs/quickstart/kw1x_resnet18.json --in_chans 3 \\
        --model_kwargs '{"channels": [16, 32, 64, 128]}' --output_dir output/classifier
    python scripts/make_scenes.py output/scenes
    python detection/train.py detection/configs/quickstart.py --checkpoint output/classifier/checkpoint-best.pth
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["kernelwarehouse.detection"])
data_root = "output/scenes/"
classes = tuple("0123456789")
batch_size = 4
max_epochs = 6
size = (160, 160)
channels = [16, 32, 64, 128]
width = 64  # channels of the pyramid and the heads

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[63.75, 63.75, 63.75]),
    backbone=dict(
        _delete_=True,
        type="DynamicBackbone",
        config="configs/quickstart/kw1x_resnet18.json",
        overrides=dict(in_chans=3, model_kwargs=dict(channels=channels)),
        norm_eval=False,  # the classifier's statistics are those of white digits on black
    ),
    neck=dict(in_channels=channels, out_channels=width, norm_cfg=dict(type="BN"), num_outs=4),
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=28),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=len(classes)),
        mask_roi_extractor=dict(out_channels=width, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width, num_classes=len(classes)),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
)

resize = dict(type="Resize", scale=size, keep_ratio=True)
annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
# No flip: a mirrored digit is another sign.
train_pipeline = [dict(type="LoadImageFromFile"), annotations, resize, dict(type="PackDetInputs")]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    annotations,
    dict(type="PackDetInputs", meta_keys=meta_keys),
]
scenes = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **scenes,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **scenes,
        test_mode=True,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    # Layers share cells, which mmengine would add for each of them.
    paramwise_cfg=dict(norm_decay_mult=0.0, bypass_duplicate=True),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min=1e-5, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=max_epochs))
