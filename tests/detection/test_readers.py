"""The backbone and the detector read as everything else does: damage is noticed, and a refused load changes nothing."""

import pytest
import torch
from faults import ENTRIES, KEYS, VALUES, WARNED
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from kernelwarehouse.detection import DynamicBackbone
from kernelwarehouse.detection.test import load_detector
from kernelwarehouse.models import CheckpointError, seal

NET = {"model": "convnext_tiny", "model_kwargs": {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 4]}, "nb_classes": 3}


def convnext(path=None, **options):
    torch.manual_seed(0)
    return DynamicBackbone(NET, out_norm=True, checkpoint=path, **options)


def others(body):
    """Other weights than those of the backbone."""
    return {k: v + 1 for k, v in body.state_dict().items()}


def copied(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_equal(module, state):
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


NORMS = {
    "one number": ({"norm0.weight": torch.ones(1)}, r"shape: norm0\.weight is \(1,\) in the file, \(4,\) in the model"),
    "no number": ({"norm2.bias": torch.ones(())}, r"shape: norm2\.bias is \(\)"),
    "too many": ({"norm3.bias": torch.ones(5)}, r"shape: norm3\.bias is \(5,\)"),
    "another name": ({"norm3.scale": torch.ones(4)}, r"unexpected: norm3\.scale \(4,\)"),
    "one missing": ({"norm1.weight": None}, r"missing: norm1\.weight"),
    "complex": ({"norm1.weight": torch.ones(4) * 1j}, r"norm1\.weight is complex"),
    "beyond": ({"norm1.weight": torch.full((4,), 1e300, dtype=torch.float64)}, "beyond the range of float32"),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("way", ["file", "detector"])
def test_output_norms_are_checked(tmp_path, name, way):
    change, message = NORMS[name]
    body = convnext(str(tmp_path / "c.pth"))
    state = {k: v for k, v in {**others(body), **change}.items() if v is not None}
    before = copied(body)
    if way == "file":
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            body.init_weights()
    else:
        detector = torch.nn.ModuleDict({"backbone": body})
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            detector.load_state_dict({f"backbone.{k}": v for k, v in state.items()}, strict=False)
    assert_equal(body, before)


def test_output_norms_warn_of_nan_and_are_loaded(tmp_path):
    body = convnext(str(tmp_path / "c.pth"))
    state = others(body)
    state["norm1.weight"][1] = torch.nan
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match=r"c\.pth: has NaN or infinite values.*: norm1\.weight"):
        body.init_weights()
    assert body.norm1.weight.isnan().sum() == 1
    assert torch.equal(body.norm2.bias, state["norm2.bias"])


def test_a_file_says_which_weights_the_backbone_takes(tmp_path):
    body = convnext(str(tmp_path / "c.pth"))
    raw = {k.removeprefix("net."): v for k, v in copied(body).items() if k.startswith("net.")}
    torch.save(
        {"model": raw, "model_ema": {k: v + 1 for k, v in raw.items()}, "kept_for": "model_ema"}, tmp_path / "c.pth"
    )
    name = "stem.0.weight"
    body.init_weights()
    assert torch.equal(body.net.state_dict()[name], raw[name] + 1)
    body = convnext(str(tmp_path / "c.pth"), model_key="model")
    body.init_weights()
    assert torch.equal(body.net.state_dict()[name], raw[name])


@pytest.mark.parametrize("sealed", [True, False])
def test_a_flipped_bit_is_noticed(tmp_path, sealed):
    path = tmp_path / "c.pth"
    body = convnext(str(path))
    state = others(body)
    with path.open("w+b") as file:
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, file)
        if sealed:
            seal(file)
    content = bytearray(path.read_bytes())
    content[content.find(state["net.stem.0.weight"].numpy().tobytes()) + 3] ^= 0x20
    path.write_bytes(content)
    before = copied(body)
    with pytest.raises(CheckpointError, match=r"c\.pth: damaged"):
        body.init_weights()
    assert_equal(body, before)
    with pytest.raises(CheckpointError, match=r"c\.pth: damaged"):  # by mmengine, for --resume and load_from
        CheckpointLoader.load_checkpoint(str(path))


@pytest.fixture(scope="module")
def detector(tiny_config):
    return MODELS.build(Config.fromfile(tiny_config).model)


def refuse(detector, state, message):
    before = copied(detector)
    with pytest.raises(CheckpointError, match=rf"(?s)d\.pth.*{message}"):
        load_detector(detector, {"state_dict": state}, "d.pth")
    assert_equal(detector, before)


@pytest.mark.parametrize("part", ["backbone.net.conv1.weight", "rpn_head.rpn_conv.weight"])
def test_a_detector_refuses_what_is_no_weight(detector, part):
    good = others(detector)
    for entry, text in ENTRIES.values():
        refuse(detector, good | {part: entry}, text.replace("(", r"\("))
    for key in KEYS:
        refuse(detector, good | {key: torch.zeros(1)}, "not a name")


def test_a_detector_refuses_values_that_it_cannot_hold(detector):
    good = others(detector)
    for leaf, make, text in VALUES.values():
        key = f"backbone.net.bn1.{leaf}"
        refuse(detector, good | {key: make(good[key])}, text)
    key = "roi_head.bbox_head.fc_cls.weight"
    refuse(detector, good | {key: good[key].double() * 1e300}, "beyond the range")
    refuse(detector, good | {key: good[key] * 1j}, "is complex")


def test_what_does_not_fit_leaves_a_detector_unchanged(detector):
    good = others(detector)
    for key in ("roi_head.mask_head.conv_logits.weight", "backbone.net.bn1.weight", "neck.lateral_convs.0.conv.bias"):
        refuse(detector, {k: v for k, v in good.items() if k != key}, key.removeprefix("backbone.net."))
        refuse(detector, good | {key: good[key].flatten()[:1]}, key.removeprefix("backbone.net."))


def test_a_number_is_not_taken_from_a_list():
    """As torch does, which takes the first."""
    detector = torch.nn.ModuleDict({"backbone": torch.nn.BatchNorm2d(2)})
    refuse(
        detector, others(detector) | {"backbone.num_batches_tracked": torch.arange(5)}, r"has shape \(5,\), not \(\)"
    )


def test_a_detector_warns_of_nan(detector):
    good = {k: v.clone() for k, v in detector.state_dict().items()}
    key = "roi_head.bbox_head.fc_cls.weight"
    for make in WARNED.values():
        with pytest.warns(UserWarning, match=rf"d\.pth: has NaN or infinite values.*{key}"):
            load_detector(detector, {"state_dict": good | {key: make(good[key])}}, "d.pth")
        load_detector(detector, {"state_dict": good}, "d.pth")
    assert_equal(detector, good)
