"""A detector on a network that an operator of others has converted: `custom_imports` brings it in."""

import pytest
import torch
from mmengine.config import Config

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection import test, train
from kernelwarehouse.models import build_model, operators, read_checkpoint, set_temperature


def changed(path, folder, *changes):
    """The configuration file `path` with changes in its text, as a file in `folder`."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "toy.py").write_text(text)
    return folder / "toy.py"


MODEL = '"kw_resnet18"', '"toy_resnet18"'
IMPORTS = '"kernelwarehouse.detection"', '"kernelwarehouse.detection", "toy_operator"'


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    return changed(tiny_config, tmp_path_factory.mktemp("toy"), MODEL, IMPORTS)


@pytest.fixture(scope="module")
def classifier(config, tmp_path_factory):
    """Weights of the same network, as from within a training: at another temperature."""
    net = build_model(Config.fromfile(config).model.backbone.config.to_dict())
    set_temperature(net, 3.0)
    path = tmp_path_factory.mktemp("classifier") / "net.pth"
    torch.save({"model": net.state_dict()}, path)
    return path


def test_it_trains_from_a_classifier_and_is_evaluated(config, classifier, tmp_path, capsys):
    words = [str(config), "--work-dir", str(tmp_path)]
    options = ["train_cfg.max_epochs=1", "val_dataloader=None", "val_evaluator=None", "val_cfg=None"]
    train.main([*words, "--checkpoint", str(classifier), "--cfg-options", *options])
    trained, before = read_checkpoint(tmp_path / "epoch_1.pth")["state_dict"], read_checkpoint(classifier)["model"]
    (shared,) = (name for name in before if name.endswith("mixture.weight"))
    assert not torch.equal(trained[f"backbone.net.{shared}"], before[shared])
    assert {value.item() for name, value in trained.items() if "temperature" in name} == {3.0}
    test.main([str(config), str(tmp_path / "epoch_1.pth"), *words[1:]])
    assert "box AP " in capsys.readouterr().out


def test_without_its_import_one_line_says_what_is_missing(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "_registered", {})
    message = (
        r"configuration: model 'toy_resnet18': no operator has the prefix of 'toy'\..*custom_imports in mmdetection"
    )
    with pytest.raises(ConfigError, match=message) as error:
        train.main([str(changed(tiny_config, tmp_path, MODEL)), "--work-dir", str(tmp_path)])
    assert "\n" not in str(error.value)
