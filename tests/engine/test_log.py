"""What a run says and keeps."""

import io
import json
import multiprocessing
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from kernelwarehouse.configs.schema import ConfigError, RunConfig
from kernelwarehouse.datasets import begin_epoch, build_dataset, build_train_loader, viewable
from kernelwarehouse.engine import log, train_run
from kernelwarehouse.engine.log import Progress, RunLog


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
    (tmp_path / "run").mkdir()
    with RunLog(RunConfig(enable_wandb=True, output_dir=str(tmp_path / "run")), cpu) as run:
        run.epoch(record)
    assert calls == ["run", record, "finish"]


def read_events(folder):
    """The values in a folder of TensorBoard's, as (step, value); a record is its length, a sum, itself and a sum."""
    content, values = b"".join(path.read_bytes() for path in sorted(folder.iterdir())), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        values += [(event.step, value) for value in event.summary.value]
        content = content[16 + length :]
    return values


def test_tensorboard_shows_the_figures_and_the_first_images_of_each_epoch(tiny_config, cpu, tmp_path):
    config = tiny_config(log_dir=str(tmp_path), epochs=2, log_images=9, reprob=0.5, disable_eval=True)
    train_run(config, cpu)
    values = read_events(tmp_path)
    assert {(step, v.tag) for step, v in values if not v.HasField("image")} == {
        (epoch, f"train_{name}") for epoch in (0, 1) for name in ("loss", "lr")
    }
    shown = {step: v for step, v in values if v.HasField("image")}
    assert [v.tag for v in shown.values()] == ["train_inputs"] * 2
    loader = build_train_loader(build_dataset(config, train=True), config.run)
    for epoch in (0, 1):
        begin_epoch(loader, epoch)
        images, _ = next(iter(loader))
        first = (viewable(images, config)[0, 0] * 255).numpy()
        grid = np.asarray(Image.open(io.BytesIO(shown[epoch].image.encoded_image_string)))
        assert grid.shape == (3 * 18 + 2, 3 * 18 + 2, 3)  # three by three images of 16 pixels, with lines of two
        np.testing.assert_allclose(grid[2:18, 2:18, 0], first, atol=1.01)
    assert shown[0] != shown[1]


def test_images_can_be_left_out(tiny_config, cpu, tmp_path):
    train_run(tiny_config(log_dir=str(tmp_path), epochs=1, log_images=0), cpu)
    assert not any(v.HasField("image") for _, v in read_events(tmp_path))


RECORDS = [json.dumps({"epoch": epoch, "train_loss": 1.0}).encode() for epoch in range(3)]


@pytest.mark.parametrize(
    "line",
    [
        b"a note",
        b"",
        b"[1]",
        b"3",
        b"null",
        b'"epoch"',
        b'{"loss": 1}',
        b'{"epoch": "0"}',
        b'{"epoch": null}',
        b'{"epoch": [0]}',
        b'{"epoch": NaN}',
        b'{"epoch": 1e999}',
        b"\xff\xfe",
        b"\0\0\0",
        b"[" * 100_000,
        b"9" * 5000,
    ],
    ids=lambda line: repr(line[:16]),
)
def test_a_strange_line_of_the_log_is_left_out_with_a_warning(cpu, tmp_path, line):
    file = tmp_path / "log.txt"
    file.write_bytes(b"\n".join([RECORDS[0], line, *RECORDS[1:], b""]))
    with pytest.warns(UserWarning, match=r"log\.txt: line 2, no record of an epoch, is left out: '") as warned:
        RunLog(RunConfig(output_dir=str(tmp_path)), cpu).start(2)
    assert len(warned) == 1
    assert len(str(warned[0].message)) < 400
    assert file.read_bytes() == b"\n".join([*RECORDS[:2], b""])


@pytest.mark.parametrize(
    ("last", "left"), [(RECORDS[1][:-3], RECORDS[:1]), (RECORDS[1], RECORDS[:2]), (RECORDS[2], RECORDS[:1]), (b"", [])]
)
def test_a_last_line_that_a_kill_cut_short_is_left_out_and_a_whole_one_kept(cpu, tmp_path, recwarn, last, left):
    file = tmp_path / "log.txt"
    file.write_bytes(RECORDS[0] + b"\n" + last if left else b"")
    RunLog(RunConfig(output_dir=str(tmp_path)), cpu).start(2)
    assert file.read_bytes() == b"".join(line + b"\n" for line in left)
    assert not recwarn.list


def test_a_run_that_starts_again_at_once_leaves_what_tensorboard_has(cpu, tmp_path):
    run = RunConfig(log_dir=str(tmp_path))

    def record(epoch):
        with RunLog(run, cpu) as kept:
            kept.start(epoch)
            kept.epoch({"epoch": epoch, "train_loss": 1.0})

    for epoch in (0, 1):
        process = multiprocessing.get_context("fork").Process(target=record, args=(epoch,))
        process.start()
        process.join(60)
    assert {(step, value.tag) for step, value in read_events(tmp_path)} == {(0, "train_loss"), (1, "train_loss")}
