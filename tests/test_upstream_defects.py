"""The defects of upstream that a user of the foundation meets, by their number in the project's list; each is gone.

The tests of the parts go deeper; these show each defect from the outside.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import TINY

from kernelwarehouse import build_model, load_checkpoint, set_temperature
from kernelwarehouse.engine import World, evaluate_run, parse_arguments, train_run

ROOT = Path(__file__).parents[1]
NARROW = {"model": "kw_resnet18", "model_kwargs": {"channels": [8, 8, 16, 16]}, "nb_classes": 5}
WORLD = World(torch.device("cpu"))


@pytest.fixture
def command(tmp_path):
    """A function from options to the configuration that a command line with them makes."""
    (tmp_path / "tiny.json").write_text(json.dumps({**TINY, "epochs": 1}))
    return lambda *options: parse_arguments(["--kw_config", str(tmp_path / "tiny.json"), *options])


def test_1_a_single_process_trains_on_a_cpu(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({**TINY, "epochs": 1}))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = [sys.executable, str(ROOT / "main.py"), "--kw_config", str(tmp_path / "tiny.json")]
    result = subprocess.run(words, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert "epoch 1/1" in result.stdout


def test_2_it_imports_and_runs_on_current_libraries():
    assert build_model(NARROW).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_3_a_batch_of_one_trains():
    net = build_model(NARROW).train()
    net(torch.randn(1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_4_half_precision_and_a_temperature_that_moves_with_the_model(dtype):
    net = build_model(NARROW).eval()
    set_temperature(net, 0.5)
    x = torch.randn(2, 3, 32, 32)
    expected = net(x)
    y = net.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)
    assert net.layer1[0].conv2.temperature.value.dtype == dtype
    assert {t.device.type for t in net.to("meta").buffers()} == {"meta"}


def test_5_a_graph_serves_every_batch_size():
    """ONNX, torch.jit.trace and torch.jit.script are in models/test_export.py."""
    net = build_model(NARROW).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    program = torch.export.export(
        net, (torch.randn(3, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    for batch in (1, 4):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [1.5, 1 / 3, 0.75, 0.5])
def test_6_awkward_budgets(ratio):
    net = build_model({**NARROW, "cell_num_ratio": ratio}).train()
    set_temperature(net, 1.0)
    assert net(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_7_nonlocal_basis_ratio_on_the_command_line(command):
    config = command("--nonlocal_basis_ratio", "0.0625", "--sharing_range", "layer", "conv")
    assert config.model.operator_fields["nonlocal_basis_ratio"] == 0.0625
    assert any(k.endswith("attention.fc3.weight") for k in build_model(config.model).state_dict())


def test_8_clipping_without_amp_and_layer_decay(command, tmp_path):
    start = build_model(command().model)
    torch.save(start.state_dict(), tmp_path / "start.pth")

    def moved(*options):
        options = ("--finetune", str(tmp_path / "start.pth"), "--opt", "sgd", "--weight_decay", "0", *options)
        trained = dict(train_run(command(*options), WORLD).model.named_parameters())
        return sum((trained[name] - p).norm().item() for name, p in start.named_parameters())

    assert moved("--clip_grad", "1e-6") < 1e-3 * moved()
    decayed = train_run(command("--layer_decay", "0.5"), WORLD)
    assert len({group["lr_scale"] for group in decayed.optimizer.param_groups}) > 2


def test_10_finetuning_replaces_a_classifier_of_another_size_whatever_its_name(command, tmp_path):
    torch.save({"model": build_model(command("--nb_classes", "3").model).state_dict()}, tmp_path / "three.pth")
    training = train_run(command("--finetune", str(tmp_path / "three.pth")), WORLD)
    assert training.model.fc.weight.shape[0] == 10


def test_11_checkpoints_hold_nothing_that_must_be_unpickled(command, tmp_path):
    config = command("--output_dir", str(tmp_path / "run"))
    train_run(config, WORLD)
    torch.load(tmp_path / "run" / "checkpoint-0.pth", weights_only=True)
    net = build_model(config.model)
    torch.save({"model": net.state_dict(), "args": argparse.Namespace(lr=1.0), "epoch": "best"}, tmp_path / "up.pth")
    load_checkpoint(build_model(config.model), tmp_path / "up.pth")
    assert evaluate_run(command("--eval", "true", "--resume", str(tmp_path / "up.pth")), WORLD).images == 360
