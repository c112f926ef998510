"""A checkpoint is whole or absent, and is never run."""

import errno
import os
import pickle

import pytest
import torch

from kernelwarehouse.engine.checkpoint import newest_checkpoint, prune_checkpoints, read_state, save_checkpoint
from kernelwarehouse.engine.rng import generator_states
from kernelwarehouse.models import CheckpointError

GROUP = {"params": [0], "lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.0, "decays": False}


def state_after(epoch):
    """A state after that epoch, counted from 0, of two steps each."""
    return {
        "model": {"w": torch.arange(1000.0)},
        "optimizer": {"state": {}, "param_groups": [GROUP]},
        "scaler": {},
        "epoch": epoch,
        "iteration": 0,
        "iterations_per_epoch": 2,
        "step": 2 * (epoch + 1),
        "skipped": 0,
        "bad_steps": 0,
        "processes": [{"generators": generator_states(), "losses": [0.0, 0.0]}],
        "best": {"model": 97.5},
        "temperature": 0.5,
        "config": {
            "model": "resnet18",
            "opt_betas": (0.9, 0.999),
            "clip_grad": None,
            "batch_size": 8,
            "update_freq": 1,
        },
    }


STATE = state_after(3)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "checkpoint-3.pth"
    save_checkpoint(path, STATE)
    state = read_state(path)
    torch.testing.assert_close(state.pop("model"), STATE["model"])
    generators = state.pop("processes")[0]["generators"]
    assert torch.equal(generators["torch"], STATE["processes"][0]["generators"]["torch"])
    assert state == {k: v for k, v in STATE.items() if k not in ("model", "processes")}
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-3.pth"
    save_checkpoint(path, STATE)

    def disk_full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, state_after(4))
    assert read_state(path)["epoch"] == 3
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_limit_reached_while_writing_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint-3.pth"
    save_checkpoint(path, STATE)
    large = STATE | {"model": {"w": torch.zeros(1_000_000)}}
    child = os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(path, large)
        except (OSError, RuntimeError):
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert read_state(path)["epoch"] == 3
    assert os.listdir(tmp_path) == [path.name]


def save_numbered(folder, epochs):
    for epoch in epochs:
        save_checkpoint(folder / f"checkpoint-{epoch}.pth", state_after(epoch))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit_of_a_weight(path):
    content = bytearray(path.read_bytes())
    at = content.find(STATE["model"]["w"].numpy().tobytes()) + 2000
    content[at] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def hold_a_bad_state(path):
    save_checkpoint(path, STATE | {"epoch": 11})


@pytest.mark.parametrize("damage", [truncate, flip_a_bit_of_a_weight, empty, hold_a_bad_state])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    save_numbered(tmp_path, [8, 9, 10])
    damage(tmp_path / "checkpoint-10.pth")
    with pytest.warns(UserWarning, match=r"passing over.*checkpoint-10\.pth"):
        path, state = newest_checkpoint(tmp_path)
    assert path.name == "checkpoint-9.pth"
    assert state["epoch"] == 9


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    save_numbered(tmp_path, [1])
    truncate(tmp_path / "checkpoint-1.pth")
    with pytest.warns(UserWarning, match="passing over"), pytest.raises(CheckpointError, match="none of its 1"):
        newest_checkpoint(tmp_path)


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    save_checkpoint(tmp_path / "checkpoint-best.pth", STATE)
    assert newest_checkpoint(tmp_path) is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    save_numbered(tmp_path, [8, 9, 10, 11])
    save_checkpoint(tmp_path / "checkpoint-best.pth", STATE)
    prune_checkpoints(tmp_path, keep=2, newest="checkpoint-11.pth")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10.pth", "checkpoint-11.pth", "checkpoint-best.pth"]


class TouchesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, write):
    path, victim = tmp_path / "checkpoint-0.pth", tmp_path / "victim"
    write(STATE | {"config": TouchesAFile(victim)}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint-0\.pth"):
        read_state(path)
    assert not victim.exists()


def test_a_file_of_weights_alone_is_no_state_to_continue_from(tmp_path):
    torch.save(STATE["model"], tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"no bad_steps, best, config.*--finetune"):
        read_state(tmp_path / "weights.pth")
