"""The detection quickstart: from a classifier of the digits, on scenes of digits."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kernelwarehouse.detection import test, train
from kernelwarehouse.models import build_model, read_checkpoint, read_config

ROOT = Path(__file__).parents[2]
CONFIGS = {"quickstart": "kw1x_resnet18", "quickstart_static": "resnet18"}


def config_file(name):
    return ROOT / "detection" / "configs" / f"{name}.py"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "out"
    spec = importlib.util.spec_from_file_location("make_scenes", ROOT / "scripts" / "make_scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_scenes.py", str(folder), "--images", "8", "--val", "3", "--size", "64"])
        assert module.main() == 0
    return folder


@pytest.fixture
def classifiers(tmp_path):
    """Checkpoints as main.py leaves them after the commands in the configurations."""
    paths = {}
    for name, classifier in CONFIGS.items():
        overrides = Config.fromfile(config_file(name)).model.backbone.overrides.to_dict()
        config = read_config(f"quickstart/{classifier}", overrides)
        torch.manual_seed(1)
        paths[name] = tmp_path / f"{name}.pth"
        torch.save({"model": build_model(config.model).state_dict(), "config": config.to_fields()}, paths[name])
    return paths


def test_the_twins_differ_in_their_backbones_alone():
    converted, static = (Config.fromfile(config_file(name)).to_dict() for name in CONFIGS)
    assert converted["model"]["backbone"].pop("config") != static["model"]["backbone"].pop("config")
    assert converted == static


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_from_a_classifier_and_evaluates_on_held_out_scenes(name, scenes, classifiers, tmp_path, capsys):
    paths = [str(config_file(name)), "--work-dir", str(tmp_path / "run"), "--data-root", str(scenes)]
    still = ["optim_wrapper.optimizer.lr=0.0", "optim_wrapper.optimizer.weight_decay=0.0"]
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1", *still]
    train.main([*paths, "--checkpoint", str(classifiers[name]), "--cfg-options", *options])
    trained = read_checkpoint(tmp_path / "run" / "epoch_1.pth")["state_dict"]
    classifier = read_checkpoint(classifiers[name])["model"]
    learned = {k for k in classifier if not k.startswith("fc.") and "running" not in k and "num_batches" not in k}
    assert len(learned) > 40
    for key in learned:
        # The schedule ends at a rate that is not quite 0.
        torch.testing.assert_close(trained[f"backbone.net.{key}"], classifier[key], rtol=0, atol=1e-5)
    test.main([*paths[:1], str(tmp_path / "run" / "epoch_1.pth"), *paths[1:]])
    lines = capsys.readouterr().out.splitlines()
    for kind in ("box", "mask"):
        (line,) = [line for line in lines if line.startswith(f"{kind} AP ")]
        assert 0 <= float(line.split()[2]) <= 100


def test_its_classes_are_those_of_the_scenes(scenes):
    """In the order of the annotations, so that a label is a digit."""
    content = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    config = Config.fromfile(config_file("quickstart"))
    assert list(config.val_dataloader.dataset.metainfo.classes) == [c["name"] for c in content["categories"]]
    assert config.model.roi_head.bbox_head.num_classes == config.model.roi_head.mask_head.num_classes == 10
