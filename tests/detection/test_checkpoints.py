"""mmengine's checkpoints are read and resumed, and never run."""

import os
import pickle
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader, load_from_http
from torch import nn
from torch.utils.data import DataLoader

import kernelwarehouse.detection  # noqa: F401 (makes mmengine read so)
from kernelwarehouse.models import CheckpointError, read_checkpoint


class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, mode="loss"):
        return {"loss": self.linear(x).mean()} if mode == "loss" else [self.linear(x)]


class Score:
    """An evaluator's metric whose result is a number of numpy, as COCO's are."""

    def __call__(self, *_args, **_kwargs):
        return np.float32(0.5)


def train(folder, epochs, resume=False):
    runner = Runner(
        Tiny(),
        str(folder),
        train_dataloader=DataLoader(torch.rand(8, 3), 2, collate_fn=lambda x: {"x": torch.stack(x)}),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": 0.1},
            "clip_grad": {"max_norm": 1.0},
            "accumulative_counts": 2,
        },
        param_scheduler=[
            {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "end": 4},
            {"type": "MultiStepLR", "milestones": [1]},
        ],
        custom_hooks=[{"type": "EMAHook"}],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "max_keep_ckpts": 2}},
        resume=resume,
        experiment_name=f"{folder.name}_{epochs}",
        log_level="WARNING",
    )
    runner.message_hub.update_info("score", Score()())
    runner.train()
    return runner


def test_what_mmengine_saves_is_read_and_resumed(tmp_path):
    first = train(tmp_path, 1)
    content = CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_1.pth"))
    loss = content["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(loss, HistoryBuffer)
    assert loss.data[0].tolist() == first.message_hub.get_scalar("train/loss").data[0].tolist()
    assert loss.statistics("mean", 2) == loss.data[0][-2:].mean()
    assert content["message_hub"]["runtime_info"]["score"] == 0.5
    assert read_checkpoint(tmp_path / "epoch_1.pth").keys() == content.keys()
    second = train(tmp_path, 2, resume=True)
    assert (second.epoch, second.iter) == (2, 8)
    losses = second.message_hub.get_scalar("train/loss").data[0]
    assert losses[:4].tolist() == loss.data[0].tolist()
    assert len(losses) == 8


def test_what_mmengine_saved_with_another_numpy_is_read(tmp_path):
    path, other = tmp_path / "model.pth", tmp_path / "other.pth"
    torch.save({"log": HistoryBuffer([0.5, 1.5], [1, 1]), "score": np.float64(2.5)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            core, another = (b"numpy._core.", b"numpy.core.")[:: 1 if b"numpy._core." in content else -1]
            target.writestr(name, content.replace(core, another))
    for file in (path, other):
        content = CheckpointLoader.load_checkpoint(str(file))
        assert content["log"].data[0].tolist() == [0.5, 1.5]
        assert content["score"] == 2.5
        assert isinstance(content["score"], np.float64)


def test_arrays_that_were_read_are_saved_as_numpys_own(tmp_path):
    path, again = tmp_path / "model.pth", tmp_path / "again.pth"
    torch.save({"array": np.arange(6, dtype=">i4").reshape(2, 3).T}, path)
    content = CheckpointLoader.load_checkpoint(str(path))
    assert content["array"].tolist() == [[0, 3], [1, 4], [2, 5]]
    torch.save(content, again)
    assert b"kernelwarehouse" not in again.read_bytes()
    assert CheckpointLoader.load_checkpoint(str(again))["array"].tolist() == content["array"].tolist()


def test_a_forged_type_of_an_array_has_no_effect(tmp_path):
    """With the flag of a Python object, numpy's own unpickling would take the bytes of numbers for pointers."""
    rebuild, arguments, (*state, _) = np.dtype("f8").__reduce__()
    forged = Payload(rebuild, *arguments, state=(*state, 1))
    assert pickle.loads(pickle.dumps(forged)).hasobject
    rebuild, arguments, _ = np.zeros(1).__reduce__()
    torch.save(
        {"array": Payload(rebuild, *arguments, state=(1, (1,), forged, False, b"\1" * 8))}, tmp_path / "model.pth"
    )
    array = CheckpointLoader.load_checkpoint(str(tmp_path / "model.pth"))["array"]
    assert array.dtype == np.float64
    assert not array.dtype.hasobject


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


def payloads(victim):
    return {
        "open": Payload(open, str(victim), "w"),
        "system": Payload(os.system, f"touch {victim}"),
        "eval": Payload(eval, f"open({str(victim)!r}, 'w')"),
        "method of the log": Payload(getattr, HistoryBuffer, "register_statistics"),
        "method of an array": Payload(getattr, np.ndarray(1), "tofile"),
        "array of objects": np.array([Payload(open, str(victim), "w")], dtype=object),
        "array of strings": np.array(["mean"]),
    }


@pytest.mark.parametrize("name", payloads(""))
@pytest.mark.parametrize("load", ["file", "download"])
def test_a_checkpoint_that_would_run_code_is_refused(name, load, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "model.pth"
    payload = payloads(victim)[name]
    torch.save({"state_dict": {"w": torch.ones(1)}, "message_hub": {"log_scalars": payload}}, path)
    if load == "file":
        with pytest.raises(CheckpointError, match=r"model\.pth: not read.*FORCE_NO_WEIGHTS_ONLY_LOAD"):
            CheckpointLoader.load_checkpoint(str(path))
    else:  # a download that is in the folder of downloads already
        with pytest.raises(pickle.UnpicklingError):
            load_from_http("https://example.invalid/model.pth", model_dir=str(tmp_path))
    assert not victim.exists()


@pytest.mark.parametrize("name", ["open", "system", "eval", "array of objects"])
def test_the_payloads_would_have_run(name, tmp_path):
    pickle.loads(pickle.dumps(payloads(tmp_path / "victim")[name]))
    assert (tmp_path / "victim").exists()


def test_a_trusted_file_is_read_when_the_environment_says_so(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {}, "meta": Fraction(1, 3)}, path)
    with pytest.raises(CheckpointError, match=r"fractions\.Fraction"):
        CheckpointLoader.load_checkpoint(str(path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert CheckpointLoader.load_checkpoint(str(path))["meta"] == Fraction(1, 3)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip file"])
def test_a_damaged_or_missing_file_is_named(content, tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(CheckpointError, match=r"model\.pth: no such checkpoint"):
        CheckpointLoader.load_checkpoint(str(path))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pth: (not read|damaged)"):
        CheckpointLoader.load_checkpoint(str(path))
