"""What a run says and keeps."""

import sys
import types

import pytest

from kernelwarehouse.engine import log
from kernelwarehouse.engine.log import Progress, RunLog
from kernelwarehouse.schema import ConfigError, RunConfig


def test_a_line_of_progress_names_rate_memory_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(log, "LINE_EVERY", -1.0)
    now = iter([0.0, 10.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(now))
    with Progress("epoch 0", total=40, batch_size=8, visible=True) as progress:
        progress.advance(10)
        progress.show(loss=1.25)
    line = capsys.readouterr().out
    assert line.startswith("epoch 0 [10/40] loss 1.25, 8 images/s, ")
    assert line.endswith(" GiB, 00:30 left\n")
    assert 0.05 < float(line.split("images/s, ")[1].split()[0]) < 100


def test_weights_and_biases_must_be_installed(cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not
    with pytest.raises(ConfigError, match=r"'enable_wandb': .*wandb.*; pip install wandb"):
        RunLog(RunConfig(enable_wandb=True), cpu)


def test_weights_and_biases_receive_what_the_log_receives(cpu, monkeypatch, tmp_path):
    """By a stand-in: what becomes of it is the library's affair."""
    calls = []
    stand_in = types.SimpleNamespace(
        init=lambda **kwargs: calls.append(kwargs["name"]), log=calls.append, finish=lambda: calls.append("finish")
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    record = {"epoch": 0, "train_loss": 1.0}
    with RunLog(RunConfig(enable_wandb=True, output_dir=str(tmp_path / "run")), cpu) as run:
        run.epoch(record)
    assert calls == ["run", record, "finish"]
