"""A whole run of a tiny Mask R-CNN: training, checkpoints, resuming, evaluation, and mmengine's options."""

import runpy
import sys

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection import test, train
from kernelwarehouse.models import build_model, read_checkpoint

NO_VAL = ("val_dataloader=None", "val_evaluator=None", "val_cfg=None")


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """The work folder of two epochs."""
    folder = tmp_path_factory.mktemp("work")
    train.main([str(tiny_config), "--work-dir", str(folder)])
    return folder


@pytest.fixture
def train_once(tiny_config, tmp_path):
    """A function that trains one epoch with options; returns the checkpoint's content."""

    def run(*arguments, options=()):
        command = [str(tiny_config), "--work-dir", str(tmp_path), *arguments]
        train.main([*command, "--cfg-options", "train_cfg.max_epochs=1", *NO_VAL, *options])
        return read_checkpoint(tmp_path / "epoch_1.pth")

    return run


def steps(content):
    """How many steps the optimizer of a checkpoint has taken."""
    return int(next(iter(content["optimizer"]["state"].values()))["step"])


def test_a_run_leaves_checkpoints_that_evaluate_to_a_finite_ap(trained, tiny_config, capsys, tmp_path):
    first, second = (read_checkpoint(trained / f"epoch_{i}.pth")["state_dict"] for i in (1, 2))
    assert not torch.equal(first["backbone.net.conv1.weight"], second["backbone.net.conv1.weight"])
    drawn = tmp_path / "drawn"
    test.main(
        [
            str(tiny_config),
            str(trained / "epoch_2.pth"),
            "--work-dir",
            str(tmp_path),
            "--show-dir",
            str(drawn),
            "--cfg-options",
            "default_hooks.visualization.score_thr=0",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    for name in ("box", "mask"):
        (line,) = [line for line in lines if line.startswith(f"{name} AP ")]
        assert 0 <= float(line.split()[2]) <= 100
    assert {p.name for p in drawn.iterdir()} == {f"{i}.png" for i in range(4)}


def test_a_resumed_run_continues_where_it_was(trained, tiny_config, tmp_path):
    """Epoch, optimizer and schedule; mmengine keeps no state of the random numbers, so not bit for bit."""
    train.main([str(tiny_config), "--work-dir", str(tmp_path), "--resume", str(trained / "epoch_1.pth")])
    assert not (tmp_path / "epoch_1.pth").exists()
    resumed, whole = (read_checkpoint(folder / "epoch_2.pth") for folder in (tmp_path, trained))
    assert steps(resumed) == steps(whole) == 4
    assert resumed["meta"]["iter"] == whole["meta"]["iter"] == 4
    rates = [content["optimizer"]["param_groups"][0]["lr"] for content in (resumed, whole)]
    assert rates == [pytest.approx(1e-4)] * 2
    train.main([str(tiny_config), "--work-dir", str(tmp_path), "--resume", "--cfg-options", "train_cfg.max_epochs=3"])
    assert steps(read_checkpoint(tmp_path / "epoch_3.pth")) == 6


def test_a_run_starts_from_a_classifier_of_ours(train_once, tmp_path):
    fields = {"model": "kw_resnet18", "nb_classes": 10}
    fields["model_kwargs"] = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}
    classifier = build_model(fields)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    frozen = ["model.backbone.frozen_stages=4", "model.backbone.norm_eval=True"]
    state = train_once("--checkpoint", str(tmp_path / "classifier.pth"), options=frozen)["state_dict"]
    kept = {k.removeprefix("backbone.net."): v for k, v in state.items() if k.startswith("backbone.net.")}
    assert len(kept) > 50
    for name, value in kept.items():
        assert torch.equal(value, classifier.state_dict()[name]), name


def test_amp_trains_where_there_is_an_accelerator_and_is_refused_elsewhere(train_once):
    if torch.cuda.is_available():
        assert steps(train_once("--amp")) == 2
    else:
        with pytest.raises(ConfigError, match="only available training on gpu"):
            train_once("--amp")


def test_half_precision_gives_finite_gradients(tiny_config):
    init_default_scope("mmdet")
    model = MODELS.build(Config.fromfile(tiny_config).model).train()
    data = model.data_preprocessor(demo_mm_inputs(2, [(3, 64, 64)] * 2, num_classes=2, with_mask=True), True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())


def test_gradients_accumulate(train_once):
    assert steps(train_once(options=["optim_wrapper.accumulative_counts=2"])) == 1


def test_the_rate_scales_with_the_batch(train_once):
    content = train_once("--auto-scale-lr", options=["param_scheduler=None"])
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 2 / 16)


def test_moving_averages_are_what_a_checkpoint_holds_and_what_is_evaluated(tiny_config, tmp_path, capsys):
    path = tmp_path / "ema.py"
    path.write_text(f'_base_ = "{tiny_config}"\ncustom_hooks = [dict(type="EMAHook", momentum=0.5)]\n')
    train.main([str(path), "--work-dir", str(tmp_path), "--cfg-options", "train_cfg.max_epochs=1"])
    content = read_checkpoint(tmp_path / "epoch_1.pth")
    name = "backbone.net.conv1.weight"
    assert not torch.equal(content["state_dict"][name], content["ema_state_dict"][f"module.{name}"])
    capsys.readouterr()
    test.main([str(path), str(tmp_path / "epoch_1.pth"), "--work-dir", str(tmp_path)])
    assert "box AP " in capsys.readouterr().out


def test_tools_of_mmdetection_run(trained, tiny_config, tmp_path, monkeypatch, capfd):
    """In this process; tests/detection/test_init.py has the order of imports in one of its own."""
    arguments = ["tools/test.py", str(tiny_config), str(trained / "epoch_2.pth"), "--work-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kernelwarehouse.detection", *arguments])
    runpy.run_module("kernelwarehouse.detection", run_name="__main__")
    out, err = capfd.readouterr()
    assert "coco/segm_mAP: " in out + err
