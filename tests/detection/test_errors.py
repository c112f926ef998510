"""Faults made on purpose: one line that names what is wrong, before anything is trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.model import BaseModule
from PIL import Image

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection import test, train
from kernelwarehouse.detection.bridge import MissingOperatorError
from kernelwarehouse.detection.cli import build_parser, read_config, run
from kernelwarehouse.models import CheckpointError, build_model

ROOT = Path(__file__).parent.parent.parent
TINY = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}


@pytest.fixture
def train_with(tiny_config, tmp_path):
    """A function that starts to train with options."""

    def start(*options, arguments=()):
        command = [str(tiny_config), "--work-dir", str(tmp_path / "work"), *arguments]
        train.main([*command, *(["--cfg-options", *options] if options else [])])

    return start


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train_cfg.max_epoch=3", "EpochBasedTrainLoop.*unexpected keyword argument 'max_epoch'"),
        ("model.backbone.droppath=0.1", "DynamicBackbone.*unexpected keyword argument 'droppath'"),
        ("modle.backbone.drop_path=0.1", "--cfg-options .*unknown field 'modle'; did you mean 'model'"),
        ("train_dataloader.batchsize=4", "unknown field 'batchsize'; did you mean 'batch_size'"),
        ("max_epochs=3", "unknown field 'max_epochs'"),
        ("model.backbone.out_indices=(1,2,3,9)", "'out_indices': ResNet has levels 0 to 4"),
        ("model.backbone.out_indices=(0,1,2,3)", r"in_channels': \[8, 16, 16, 32\], .* \[64, 8, 16, 16\]"),
        ("model.backbone.config=configs/resnet18/kw9x_resnet18.json", "kw9x_resnet18.json: no such configuration"),
        ("model.backbone.frozen_stages=1", "'model.backbone.frozen_stages': .*--checkpoint"),
        ("model.backbone.checkpoint=absent.pth", "'model.backbone.checkpoint': no such file: absent.pth"),
        ("model.backbone.type=KWBackbon", "KWBackbon is not in the mmdet::model registry"),
        ("optim_wrapper.optimizer.type=AdamX", "'optim_wrapper.optimizer.type': mmengine has no optimizer 'AdamX'"),
        ("train_dataloader.dataset.ann_file=absent.json", "'train_dataloader.dataset.ann_file': no such .*absent.json"),
        ("val_evaluator.ann_file=absent.json", "'val_evaluator.ann_file': no such .*absent.json"),
        ("train_dataloader.dataset.data_prefix.img=absent", "data_prefix.img': no such .*absent"),
        ("load_from=absent.pth", "absent.pth: no such checkpoint"),
    ],
)
def test_a_wrong_option_is_named(train_with, option, message):
    with pytest.raises(ConfigError, match=message):
        train_with(option)


def test_a_damaged_annotation_file(train_with, tmp_path):
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(ConfigError, match="cannot be built: JSONDecodeError"):
        train_with(f"train_dataloader.dataset.ann_file={tmp_path / 'half.json'}")


def test_a_classifier_of_another_plan(train_with, tmp_path):
    other = build_model({"model": "kw_resnet18", "cell_num_ratio": 2, "nb_classes": 10, "model_kwargs": TINY})
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"(?s)other\.pth: the weights do not fit.*shape: "):
        train_with(arguments=["--checkpoint", str(tmp_path / "other.pth")])


@pytest.mark.parametrize("option", ["--resume", "--cfg-options"])
def test_a_classifier_is_no_detector_to_continue(train_with, tmp_path, option):
    path = tmp_path / "classifier.pth"
    net = build_model({"model": "kw_resnet18", "nb_classes": 10, "model_kwargs": TINY})
    torch.save({"model": net.state_dict(), "epoch": 1}, path)
    with pytest.raises(CheckpointError, match=r"(?s)do not fit.*missing: conv1"):
        train_with(arguments=[option, str(path) if option == "--resume" else f"load_from={path}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"backbone.w": torch.ones(1)}}, r"(?s)wrong\.pth: .*do not fit.*missing: conv1"),
        ({"weights": 1}, r"wrong\.pth: no weights under 'state_dict"),
        (None, r"wrong\.pth: no such checkpoint"),
    ],
)
def test_a_wrong_checkpoint_is_not_evaluated(tiny_config, tmp_path, content, message):
    path = tmp_path / "wrong.pth"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        test.main([str(tiny_config), str(path), "--work-dir", str(tmp_path)])


def test_heads_of_another_detector_are_refused(tiny_config, tmp_path):
    model = MODELS.build(Config.fromfile(tiny_config).model)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("roi_head.mask_head")}
    torch.save({"state_dict": state}, tmp_path / "faster.pth")
    with pytest.raises(CheckpointError, match=r"(?s)faster\.pth: .*Missing key.*roi_head\.mask_head"):
        test.main([str(tiny_config), str(tmp_path / "faster.pth"), "--work-dir", str(tmp_path)])


@MODELS.register_module()
class RotatedNeck(BaseModule):
    """A neck on an operator that only compiled mmcv has."""

    in_channels = (8, 16, 16, 32)

    def forward(self, maps):
        from mmcv.ops import box_iou_rotated

        return box_iou_rotated(maps[0].new_zeros(1, 5), maps[0].new_zeros(1, 5))


def test_an_operator_that_the_bridge_lacks(train_with, tmp_path):
    with pytest.raises(MissingOperatorError, match=r"box_iou_rotated.*compiled mmcv"):
        train_with("model.neck.type=RotatedNeck", "model.neck._delete_=True")


def test_the_data_root_is_replaced_everywhere(tiny_config, scenes, tmp_path):
    moved = tmp_path / "moved"
    (moved / "images").mkdir(parents=True)
    content = json.loads((scenes / "annotations.json").read_text())
    (moved / "annotations.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(ConfigError, match=f"no such file or folder: {tmp_path}/absent"):
        train.main([str(tiny_config), "--work-dir", str(tmp_path), "--data-root", str(tmp_path / "absent")])
    arguments = build_arguments(tiny_config, moved)
    assert read_config(arguments).val_evaluator.ann_file == f"{moved}/annotations.json"
    assert read_config(arguments).train_dataloader.dataset.data_root == f"{moved}/"


@pytest.mark.parametrize(("exif", "size"), [(None, (32, 64)), ("apply", (32, 64)), ("ignore", (64, 32))])
def test_orientation_is_applied_unless_it_is_to_be_ignored(tiny_config, tmp_path, exif, size):
    arguments = build_parser("").parse_args([str(tiny_config), *(["--exif", exif] if exif else [])])
    config = read_config(arguments)
    orientation = Image.Exif()
    orientation[274] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=orientation)
    for loop in ("train", "val", "test"):
        load = TRANSFORMS.build(config[f"{loop}_dataloader"].dataset.pipeline[0])
        height, width = load({"img_path": str(tmp_path / "turned.jpg")})["img_shape"]
        assert (width, height) == size


def build_arguments(config, data_root):
    return build_parser("").parse_args([str(config), "--data-root", str(data_root)])


@pytest.mark.parametrize("error", [ConfigError, CheckpointError, MissingOperatorError])
def test_an_entry_prints_one_line(error, capsys):
    def fail():
        raise error("what_is_wrong")

    assert run(fail) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: what_is_wrong")


def test_a_configuration_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.py: no such configuration file"):
        train.main([str(tmp_path / "absent.py")])
    (tmp_path / "broken.py").write_text("model = dict(\n")
    with pytest.raises(ConfigError, match=r"broken\.py: cannot be read: SyntaxError"):
        train.main([str(tmp_path / "broken.py")])


def test_a_configuration_without_a_detector_or_without_data(tmp_path, tiny_config):
    (tmp_path / "empty.py").write_text("max_epochs = 1\n")
    with pytest.raises(ConfigError, match=r"empty\.py: describes no 'model'"):
        train.main([str(tmp_path / "empty.py")])
    torch.save({"state_dict": MODELS.build(Config.fromfile(tiny_config).model).state_dict()}, tmp_path / "net.pth")
    nothing = ["test_dataloader=None", "test_evaluator=None", "test_cfg=None"]
    with pytest.raises(ConfigError, match="has no test_dataloader"):
        test.main([str(tiny_config), str(tmp_path / "net.pth"), "--cfg-options", *nothing])


def test_words_that_are_no_options(tiny_config, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main([str(tiny_config), "--cfg-options", "max_epochs"])
    assert "argument --cfg-options: expected KEY=VALUE, found 'max_epochs'" in capsys.readouterr().err


def test_a_command_ends_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "detection" / "test.py"), "absent.py", "absent.pth"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: absent.py: no such configuration file; detection/configs has some\n"
