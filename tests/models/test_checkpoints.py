import argparse
import os
import pickle

import pytest
import safetensors.torch
import torch

from kernelwarehouse import CheckpointError, build_model, load_checkpoint
from kernelwarehouse.models import read_checkpoint, to_upstream

NARROW = {"model": "kw_resnet18", "model_kwargs": {"channels": [8, 8, 16, 16]}, "nb_classes": 5}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_model(NARROW)


def assert_equal_weights(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("layout", ["ours", "bare", "safetensors", "upstream", "ddp", "timm"])
def test_formats_are_recognised(net, tmp_path, layout):
    state, path = net.state_dict(), tmp_path / "weights.pth"
    if layout == "safetensors":
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)  # it takes no other layout
    else:
        content = {
            "ours": {"model": state, "epoch": 3},
            "bare": state,
            "upstream": {"model": to_upstream(net), "epoch": "best", "args": argparse.Namespace(lr=1.0)},
            "ddp": {"model": {f"module.{k}": v for k, v in state.items()}},
            "timm": {"state_dict": state, "arch": "kw_resnet18"},
        }[layout]
        torch.save(content, path)
    other = build_model(NARROW)
    assert load_checkpoint(other, path) == ()
    assert_equal_weights(net, other)


def test_ema_is_read_when_asked_for_and_missed_when_absent(net, tmp_path):
    average = {k: v + 1 for k, v in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "model_ema": average}, tmp_path / "both.pth")
    other = build_model(NARROW)
    load_checkpoint(other, tmp_path / "both.pth", key="model_ema")
    assert torch.equal(other.conv1.weight, net.conv1.weight + 1)
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="no weights under 'model_ema'"):
        load_checkpoint(other, tmp_path / "bare.pth", key="model_ema")
    torch.save({"model": net.state_dict()}, tmp_path / "one.pth")
    with pytest.raises(CheckpointError, match=r"no weights under 'model_ema'; the entries are model"):
        load_checkpoint(other, tmp_path / "one.pth", key="model_ema")


def test_misfits_are_one_error_that_lists_them_and_change_nothing(net, tmp_path):
    state = dict(net.state_dict())
    del state["bn1.weight"]
    state["extra"] = torch.zeros(2)
    state["layer2.0.conv2.warehouse.weight"] = torch.zeros(1, 2, 3, 1, 1)
    torch.save(state, tmp_path / "c.pth")
    other = build_model(NARROW)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(other, tmp_path / "c.pth", allow_new_head=True)
    for text in (
        "c.pth",
        "missing: bn1.weight (64,)",
        "unexpected: extra (2,)",
        "layer2.0.conv2.warehouse.weight is (1, 2, 3, 1, 1)",
    ):
        assert text in str(error.value)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("model", ["kw_resnet18", "resnet18", "kw1d2x_mobilenetv2_050", "kw_deit_tiny"])
def test_another_number_of_classes(model, tmp_path):
    """Upstream's --finetune dropped `head.*` only, so that the `fc` of a ResNet was printed and kept wrong."""
    source = build_model({"model": model, "nb_classes": 5})
    torch.save({"model": source.state_dict()}, tmp_path / "c.pth")
    target = build_model({"model": model, "nb_classes": 7})
    with pytest.raises(CheckpointError, match="allow_new_head"):
        load_checkpoint(target, tmp_path / "c.pth")
    fresh = {k: v.clone() for k, v in target.state_dict().items()}
    new = load_checkpoint(target, tmp_path / "c.pth", allow_new_head=True)
    classifier = {"resnet18": "fc", "kw_resnet18": "fc", "kw_deit_tiny": "head"}.get(model, "classifier")
    assert all(k.startswith(f"{classifier}.") for k in new)
    assert any(k.startswith(f"{classifier}.") for k in new)
    for name, value in target.state_dict().items():
        assert torch.equal(value, fresh[name] if name in new else source.state_dict()[name]), name


def test_equal_heads_are_loaded_also_when_a_new_one_is_allowed(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "c.pth")
    other = build_model(NARROW)
    assert load_checkpoint(other, tmp_path / "c.pth", allow_new_head=True) == ()
    assert_equal_weights(net, other)


@pytest.mark.parametrize("content", [{"model": Exploit()}, Exploit()])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(content))
    torch.save(content, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploited").exists()


def test_damaged_and_missing_files(net, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save(net.state_dict(), tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    for name, content in (
        ("half.pth", whole[: len(whole) // 2]),
        ("empty.pth", b""),
        ("text.pth", b"hello " * 99),
        ("words.pth", b"root:x:0:0"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    (tmp_path / "bad.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        read_checkpoint(tmp_path / "bad.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
