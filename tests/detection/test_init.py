"""Importing the package: what it registers, and in which order things may be imported."""

import runpy
import subprocess
import sys

import pytest


def run(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def test_a_configuration_that_imports_it_is_enough_where_mmdet_comes_later(tmp_path):
    (tmp_path / "config.py").write_text(
        'custom_imports = dict(imports=["kernelwarehouse.detection"])\n'
        'model = dict(type="DynamicBackbone", config="configs/resnet18/kw1x_resnet18.json")\n'
    )
    code = (
        "from mmengine.config import Config; config = Config.fromfile('config.py'); "
        "import mmcv.ops; from mmdet.registry import MODELS; print(MODELS.build(config.model).out_channels)"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.stdout.strip().endswith("(64, 128, 256, 512)"), result.stderr


def test_the_package_as_a_command_runs_scripts(tmp_path):
    (tmp_path / "script.py").write_text("import sys, mmcv.ops, mmdet.models; print(sys.argv[1:], __name__)\n")
    result = run("-m", "kernelwarehouse.detection", "script.py", "--option", cwd=tmp_path)
    assert result.stdout.strip().endswith("['--option'] __main__"), result.stderr


def test_a_tool_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernelwarehouse.detection", "tools/trian.py"])
    with pytest.raises(
        SystemExit, match=r"error: tools/trian\.py: no such script, and mmdetection installs no such tool"
    ):
        runpy.run_module("kernelwarehouse.detection", run_name="__main__")
