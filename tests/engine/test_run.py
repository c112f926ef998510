"""Whole runs: what is kept of them, and that stopping and continuing leaves no trace."""

import json
import os
import types

import pytest
import torch

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import evaluate_run, keeper, train, train_run
from kernelwarehouse.engine import run as run_module
from kernelwarehouse.engine.checkpoint import read_state
from kernelwarehouse.models import CheckpointError, build_model

CONVERTED = {"model": "kw_resnet18", "sharing_range": "layer_conv", "batch_size": 256, "lr": 4e-3}


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_the_best_checkpoint_continues_a_training(tiny_config, cpu, tmp_path):
    fields = {"output_dir": str(tmp_path), "epochs": 2}
    train_run(tiny_config(**fields), cpu)
    best = tmp_path / "checkpoint-best.pth"
    done = read_state(best)["epoch"] + 1
    training = train_run(tiny_config(epochs=3, resume=str(best)), cpu)
    assert training.epoch == 3
    assert training.step == 3 * 11
    assert training.best["model"] >= read_state(best)["best"]["model"]
    assert done in (1, 2)


def test_a_run_keeps_its_last_checkpoints_its_best_its_log_and_its_configuration(tiny_config, cpu, tmp_path):
    config = tiny_config(output_dir=str(tmp_path), log_dir=str(tmp_path / "tb"), epochs=3, save_ckpt_num=2)
    train_run(config, cpu)
    kept = ["checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-best.pth", "config.json", "log.txt", "tb"]
    assert sorted(os.listdir(tmp_path)) == kept
    assert json.loads((tmp_path / "config.json").read_text())["save_ckpt_num"] == 2
    lines = log_lines(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    names = "epoch n_parameters train_loss train_lr test_acc1 test_acc5 test_loss"
    assert lines[0].keys() == set(names.split())
    assert max(line["test_acc1"] for line in lines) == read_state(tmp_path / "checkpoint-2.pth")["best"]["model"]
    assert os.listdir(tmp_path / "tb")


def test_checkpoints_can_be_rare_but_the_last_epoch_is_always_saved(tiny_config, cpu, tmp_path):
    train_run(tiny_config(output_dir=str(tmp_path), epochs=3, save_ckpt_freq=2, disable_eval=True), cpu)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["checkpoint-1.pth", "checkpoint-2.pth"]


def test_a_checkpoint_is_written_every_so_many_minutes(tiny_config, cpu, tmp_path, monkeypatch):
    """By a clock on which a step takes twenty seconds. Eleven steps make an epoch; a step asks when it begins."""
    update_weights, steps = train.update_weights, []
    monkeypatch.setattr(
        train, "update_weights", lambda training, norm: (update_weights(training, norm), steps.append(training))
    )
    monkeypatch.setattr(keeper, "time", types.SimpleNamespace(monotonic=lambda: 20.0 * len(steps)))
    train_run(tiny_config(output_dir=str(tmp_path), epochs=1, save_ckpt_minutes=1, save_ckpt_num=9), cpu)
    assert len(steps) == 11
    assert sorted(read_state(path)["step"] for path in tmp_path.glob("checkpoint-0-*.pth")) == [4, 8]


@pytest.mark.parametrize("epoch", [0, 2], ids=["while_annealing", "after"])
def test_evaluating_a_checkpoint_gives_the_accuracy_that_training_logged(tiny_config, cpu, tmp_path, epoch, capsys):
    average = {"model_ema": True, "model_ema_decay": 0.5}
    fields = CONVERTED | average | {"output_dir": str(tmp_path), "epochs": 3, "temp_epoch": 2}
    train_run(tiny_config(**fields, model_ema_eval=True), cpu)
    logged = log_lines(tmp_path)[epoch]
    assert (logged["train_temperature"] > 0) == (epoch == 0)
    path = str(tmp_path / f"checkpoint-{epoch}.pth")
    for key, suffix in (("model", ""), ("model_ema", "_ema")):
        metrics = evaluate_run(tiny_config(**fields, eval=True, resume=path, model_key=key), cpu)
        for name in ("acc1", "acc5", "loss"):
            assert getattr(metrics, name) == logged[f"test_{name}{suffix}"]
        assert capsys.readouterr().out.splitlines()[-1] == str(metrics)
    assert json.loads((tmp_path / "eval.json").read_text())["acc1"] == logged["test_acc1_ema"]
    assert (tmp_path / "checkpoint-best-ema.pth").exists()


def test_accuracies_reached_while_annealing_are_not_the_best(tiny_config, cpu, tmp_path, monkeypatch):
    accuracies = iter([90.0, 80.0, 70.0])

    def evaluate(*args):
        metrics = run_evaluate(*args)
        object.__setattr__(metrics, "acc1", next(accuracies))
        return metrics

    run_evaluate = run_module.evaluate
    monkeypatch.setattr(run_module, "evaluate", evaluate)
    train_run(tiny_config(**CONVERTED, output_dir=str(tmp_path), epochs=3, temp_epoch=2), cpu)
    best = read_state(tmp_path / "checkpoint-best.pth")
    assert (best["epoch"], best["best"]) == (1, {"model": 80.0})
    assert best["model"]["layer1.0.conv2.temperature.value"] == 0


def test_finetuning_starts_from_the_weights_and_replaces_another_classifier(tiny_config, cpu, tmp_path):
    weights = build_model(tiny_config().model, nb_classes=7).state_dict()
    torch.save({"model": weights}, tmp_path / "seven.pth")
    config = tiny_config(finetune=str(tmp_path / "seven.pth"), epochs=1, lr=1e-12, min_lr=0, weight_decay=0)
    found = train_run(config, cpu).model.state_dict()
    torch.testing.assert_close(found["conv1.weight"], weights["conv1.weight"])
    assert found["fc.weight"].shape[0] == 10


def test_a_checkpoint_of_another_model_is_refused_by_name(tiny_config, cpu, tmp_path):
    train_run(tiny_config(output_dir=str(tmp_path), epochs=1), cpu)
    with pytest.raises(CheckpointError, match=r"checkpoint-0\.pth.*another model"):
        train_run(tiny_config(**CONVERTED, output_dir=str(tmp_path)), cpu)


def test_there_must_be_something_to_evaluate(tiny_config, cpu):
    with pytest.raises(ConfigError, match=r"--resume CHECKPOINT, or --pretrained"):
        evaluate_run(tiny_config(eval=True), cpu)


def test_a_conversion_that_cannot_be_is_a_configuration_error(tiny_config, cpu):
    with pytest.raises(ConfigError, match="warehouse"):
        train_run(tiny_config(**CONVERTED | {"cell_num_ratio": 1e-4}), cpu)


def test_an_evaluation_is_in_channels_last_too(tiny_config, cpu, tmp_path, monkeypatch):
    fields = {"output_dir": str(tmp_path), "in_chans": 3}
    train_run(tiny_config(**fields, epochs=1), cpu)
    layouts, predict = [], run_module.predict

    def look(model, *args):
        layouts.append(model.conv1.weight.is_contiguous(memory_format=torch.channels_last))
        model.register_forward_pre_hook(
            lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        return predict(model, *args)

    monkeypatch.setattr(run_module, "predict", look)
    found = []
    for channels_last in (False, True):
        layouts.clear()
        run = {"eval": True, "resume": str(tmp_path / "checkpoint-0.pth"), "channels_last": channels_last}
        found.append(evaluate_run(tiny_config(**fields, **run), cpu))
        assert set(layouts) == {channels_last}
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
