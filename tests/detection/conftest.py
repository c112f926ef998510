"""A Mask R-CNN that trains within seconds, and a few images of coloured shapes with COCO's annotations."""

import json

import numpy as np
import pytest
from PIL import Image

# Before the tests import mmdet, which needs it to be prepared.
import kernelwarehouse.detection  # noqa: F401

# Everything of Mask R-CNN, small: the widths, the proposals and the samples.
CONFIG = """
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["kernelwarehouse.detection"])
data_root = "{data}/"
model = dict(
    backbone=dict(
        _delete_=True,
        type="DynamicBackbone",
        config=dict(
            model="kw_resnet18",
            nb_classes=10,
            model_kwargs=dict(layers=[1, 1, 1, 1], channels=[8, 16, 16, 32]),
        ),
        norm_eval=False,
    ),
    neck=dict(in_channels=[8, 16, 16, 32], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=2),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(max_per_img=10, score_thr=0.0)),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
pipeline.insert(1, dict(type="Resize", scale=(64, 64), keep_ratio=True))
dataset = dict(
    type="CocoDataset",
    data_root=data_root,
    ann_file="annotations.json",
    data_prefix=dict(img="images/"),
    metainfo=dict(classes=("red", "green")),
    pipeline=pipeline,
)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True), dataset=dataset
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**dataset, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
param_scheduler = [dict(type="MultiStepLR", milestones=[1], gamma=0.1)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
randomness = dict(seed=0)
"""


def write_scenes(folder, count=4, side=64):
    """Images with two rectangles each, a red and a green one."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        pixels = rng.integers(100, 140, (side, side, 3), dtype=np.uint8)
        for category in (1, 2):
            x, y = (int(v) for v in rng.integers(0, side // 2, 2))
            w, h = (int(v) for v in rng.integers(side // 4, side // 2, 2))
            pixels[y : y + h, x : x + w] = 0
            pixels[y : y + h, x : x + w, category - 1] = 255
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": side, "height": side})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of images with annotations."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, scenes):
    """A configuration file of a Mask R-CNN on `scenes`."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(data=scenes))
    return path
