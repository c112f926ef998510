"""Upstream could not be exported with a batch of any size: its grouped convolution bakes the batch in."""

import onnxruntime
import pytest
import timm
import torch
from fill import fill
from registered import CASES
from torch.export import Dim

from kernelwarehouse import build_model

BATCHES = (1, 2, 5)


NETWORKS = {
    "kw_resnet10t": {"channels": [8, 8, 16, 16]},
    "kw_convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},  # depthwise 7×7, strided 2×2, linear layers
}


@pytest.fixture(scope="module", params=NETWORKS)
def net(request):
    net = build_model({"model": request.param, "nb_classes": 5, "model_kwargs": NETWORKS[request.param]})
    # Weights under which no branch is silent, so that a wrong export would show.
    state = net.state_dict()
    net.load_state_dict({k: torch.from_numpy(fill(k, v.shape)) for k, v in state.items() if "temperature" not in k})
    return net.eval()


def images(batch, side=64):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def check(net, run):
    for batch in BATCHES:
        x = images(batch)
        expected = net(x)
        assert expected.std() > 0
        torch.testing.assert_close(run(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_torch_export(net):
    program = torch.export.export(net, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    check(net, program.module())


def test_torch_export_for_images_of_any_size(net):
    """No choice by the size of an input is traced into the graph."""
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    shapes = ({0: batch, 2: 32 * height, 3: 32 * width},)
    program = torch.export.export(net, (images(3, 96),), dynamic_shapes=shapes)
    for batch, side in ((2, 64), (3, 160), (5, 96)):
        x = images(batch, side)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), net(x), rtol=1e-3, atol=1e-3 * net(x).abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False], ids=["named", "automatic"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.marks])
def test_every_family_is_exported_for_images_of_any_size(case, named):
    name, small, _ = case
    changed = {"img_size": 64, "dynamic_img_size": True} if "img_size" in small else {}
    net = timm.create_model(name, **{**small, **changed}).eval()
    shapes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    if named:
        batch, height, width = (Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
        shapes = {0: batch, 2: 32 * height, 3: 32 * width}
    program = torch.export.export(net, (torch.randn(3, 3, 96, 128),), dynamic_shapes=(shapes,)).module()
    for size in ((2, 3, 64, 64), (5, 3, 160, 96)):
        x = torch.randn(size)
        torch.testing.assert_close(program(x), net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_for_images_of_any_size(net, tmp_path, dynamo):
    axes = {0: "batch", 2: "height", 3: "width"}
    dynamic = {"dynamic_shapes": (dict.fromkeys(axes, Dim.DYNAMIC),)} if dynamo else {"dynamic_axes": {"images": axes}}
    path = str(tmp_path / "net.onnx")
    torch.onnx.export(net, (images(3, 96),), path, dynamo=dynamo, input_names=["images"], **dynamic)
    session = onnxruntime.InferenceSession(path)
    for batch, side in ((2, 64), (5, 128)):
        x = images(batch, side)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, net(x), rtol=1e-3, atol=1e-3 * net(x).abs().max().item())


def test_trace(net):
    traced = torch.jit.trace(net, images(3), check_trace=False)
    check(net, traced)
    x = images(2, side=96)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-3, atol=1e-3 * net(x).abs().max().item())


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(net, tmp_path, dynamo):
    path = tmp_path / "net.onnx"
    if dynamo:
        shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    else:
        shapes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(net, (images(3),), path, dynamo=dynamo, **shapes)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    check(net, lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]))


def test_script_says_what_to_use_instead(net):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace gives a ScriptModule"):
        torch.jit.script(net)
