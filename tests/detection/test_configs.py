"""The configurations for COCO: what they build, and upstream's recipe in them."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope

import kernelwarehouse.detection

FOLDER = Path(kernelwarehouse.detection.__file__).parent / "configs"
# Parameters of the detector and of its backbone. A backbone has what `table.py` counts less the classifier.
COUNTS = {
    "mask_rcnn_resnet50": (44_396_336, 23_508_032),
    "mask_rcnn_kw1x_resnet50": (46_891_614, 26_003_310),
    "mask_rcnn_kw4x_resnet50": (120_854_448, 99_966_144),
    "mask_rcnn_mobilenetv2_100": (22_495_728, 2_223_872),
    "mask_rcnn_kw1x_mobilenetv2_100": (24_159_002, 3_887_146),
    "mask_rcnn_kw4x_mobilenetv2_100": (30_370_238, 10_098_382),
    "mask_rcnn_convnext_tiny": (48_095_376, 27_821_472),
    "mask_rcnn_kw1x_convnext_tiny": (58_876_922, 38_603_018),
    "mask_rcnn_deit_tiny": (25_732_832, 5_524_032),
    "mask_rcnn_kw4x_deit_tiny": (42_561_776, 22_352_976),
    "faster_rcnn_kw1x_resnet50": (44_248_334, 26_003_310),
    "retinanet_kw1x_resnet50": (40_463_970, 26_003_310),
}


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")
    yield
    DefaultScope._instance_dict.clear()


def read(name):
    return Config.fromfile(FOLDER / f"{name}.py")


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_every_configuration_for_coco_is_counted():
    assert {p.stem for p in FOLDER.glob("*.py")} - {"quickstart", "quickstart_static"} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_builds_and_makes_a_step(name):
    config = read(name)
    if "rcnn" in name:  # fewer regions than images of this size need
        config.model.train_cfg.rpn_proposal.max_per_img = config.model.train_cfg.rcnn.sampler.num = 32
    model = MODELS.build(config.model).train()
    assert (count(model), count(model.backbone)) == COUNTS[name]
    inputs = demo_mm_inputs(2, [(3, 64, 96), (3, 96, 64)], num_items=[1, 2], num_classes=80, with_mask="mask" in name)
    data = model.data_preprocessor(inputs, True)
    losses = model.parse_losses(model(**data, mode="loss"))[0]
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    losses.backward()
    assert torch.isfinite(losses)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and n.startswith("b")] == []
    optimizer.step()


@pytest.mark.parametrize("name", COUNTS)
def test_the_recipe_is_upstreams(name):
    config = read(name)
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.betas, optimizer.weight_decay) == (
        "AdamW",
        1e-4,
        (0.9, 0.999),
        0.05,
    )
    warmup, steps = config.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end) == ("LinearLR", 0.001, 500)
    assert steps.milestones == ([9, 11] if "convnext" in name else [8, 11])
    assert (config.train_cfg.max_epochs, config.train_dataloader.batch_size) == (12, 2)
    assert config.auto_scale_lr.base_batch_size == 16
    *_, flip, choice, _ = config.train_dataloader.dataset.pipeline
    assert (flip.type, flip.prob) == ("RandomFlip", 0.5)
    (whole,), (first, crop, last) = choice.transforms
    assert whole.scales == last.scales == [(s, 1333) for s in range(480, 801, 32)]
    assert [s for s, _ in first.scales] == [400, 500, 600]
    assert crop.crop_size == (384, 600)
    backbone = config.model.backbone
    assert backbone.get("frozen_stages", -1) == (1 if "resnet" in name or "mobilenet" in name else -1)
    assert backbone.get("drop_path", 0) == {"convnext": 0.4, "deit": 0.1}.get(name.split("_")[-2], 0)


def test_rows_differ_in_their_backbone_alone():
    static, converted = read("mask_rcnn_resnet50"), read("mask_rcnn_kw4x_resnet50")
    assert converted.model.backbone.pop("config") == "configs/resnet50/kw4x_resnet50.json"
    static.model.backbone.pop("config")
    assert static.to_dict() == converted.to_dict()
