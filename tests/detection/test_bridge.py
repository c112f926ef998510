"""The bridge stands in for mmcv's compiled operators, and only where there are none."""

import re
import subprocess
import sys
from importlib import invalidate_caches
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kernelwarehouse.detection.bridge import OPERATORS, MissingOperatorError, install
from kernelwarehouse.detection.bridge.finder import BridgeFinder

# isort: split
# Only now can mmcv's operators be imported.
import mmcv.ops
from mmcv.utils import ext_loader

SOURCES = "".join(path.read_text(encoding="utf-8") for path in (Path(mmcv.__file__).parent / "ops").glob("*.py"))
NAMES = sorted(set(re.findall(r"ext_module\.(\w+)", SOURCES)))


@pytest.fixture
def extension(monkeypatch):
    """A fresh `mmcv._ext` of the bridge, whatever is installed."""
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(sys, "meta_path", [BridgeFinder()])
    module = ext_loader.load_ext("_ext", NAMES)
    monkeypatch.setattr(mmcv, "_ext", module)
    return module


def test_installing_twice_is_installing_once():
    install()
    install()
    finders = [isinstance(finder, BridgeFinder) for finder in sys.meta_path]
    assert sum(finders) == 1
    assert finders.index(True) > sys.meta_path.index(PathFinder)


@pytest.fixture
def compiled(tmp_path):
    """A folder with what Python takes for a compiled `_ext`."""
    (tmp_path / "_ext.py").write_text("def __getattr__(name):\n    return lambda *a, **k: 'compiled ' + name\n")
    return tmp_path


def test_a_compiled_extension_wins(compiled, monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(mmcv, "__path__", [str(compiled)])
    assert find_spec("mmcv._ext").origin == str(compiled / "_ext.py")
    (compiled / "_ext.py").unlink()
    invalidate_caches()
    assert isinstance(find_spec("mmcv._ext").loader, BridgeFinder)


def test_mmcv_runs_the_compiled_extension(compiled):
    code = (
        f"import sys, mmcv; mmcv.__path__.append({str(compiled)!r})\n"
        "import kernelwarehouse.detection, mmcv.ops\n"
        "print(sys.modules['mmcv.ops.nms'].ext_module.nms())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "compiled nms\n", result.stderr


def test_every_operator_of_mmcv_is_there_and_the_lacking_ones_say_what_to_install(extension):
    assert len(NAMES) > 100
    assert set(OPERATORS) <= set(NAMES)
    for name in set(NAMES) - set(OPERATORS):
        with pytest.raises(MissingOperatorError, match=rf"'{name}'.*mim install mmcv==2\.1\.0"):
            getattr(extension, name)(torch.zeros(1))
    assert not hasattr(extension, "__path__")


def test_a_layer_on_a_lacking_operator_builds_and_raises_when_called(extension, monkeypatch):
    monkeypatch.setattr(sys.modules["mmcv.ops.carafe"], "ext_module", extension)
    layer = mmcv.ops.CARAFE(kernel_size=5, group_size=1, scale_factor=2)
    with pytest.raises(MissingOperatorError, match="carafe_forward"):
        layer(torch.zeros(1, 4, 3, 3), torch.zeros(1, 25, 6, 6))


def test_reports_of_the_environment_say_what_the_operators_run_on(extension):
    assert "torchvision" in extension.get_compiler_version()
    assert "torchvision" in extension.get_compiling_cuda_version()
