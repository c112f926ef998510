"""COCO with boxes, in data/coco; train.py and test.py take another folder by --data-root."""

_base_ = ["mmdet::_base_/datasets/coco_detection.py", "multi_scale.py"]

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomFlip", prob=0.5),
            _base_.multi_scale,  # pyright: ignore[reportAttributeAccessIssue] - mmengine reads it from that file
            dict(type="PackDetInputs"),
        ]
    )
)
