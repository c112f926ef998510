"""mmengine on a current Python: versions, and the functions that are replaced."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mmcv
import mmdet
import mmengine.model
import mmengine.optim.optimizer.default_constructor
import pytest
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from kernelwarehouse.detection import compat


def test_the_configurations_of_a_package_are_found():
    config = Config.fromstring("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'", ".py")
    assert config.model.type == "MaskRCNN"


def test_packages_are_found_by_their_own_name_and_by_that_of_their_module():
    assert compat.is_installed("mmdet")
    assert Path(compat.get_installed_path("mmdet")) == Path(mmdet.__file__).parent
    assert Path(compat.get_installed_path("scikit-learn")).name == "sklearn"
    assert not compat.is_installed("no_such_package")
    with pytest.raises(PackageNotFoundError, match="no_such_package"):
        compat.get_installed_path("no_such_package")


def test_a_function_is_replaced_wherever_mmengine_holds_it(monkeypatch):
    holders = [mmengine.utils.dl_utils.misc, mmengine.model.utils, mmengine.optim.optimizer.default_constructor]
    for holder in holders:
        monkeypatch.setattr(holder, "mmcv_full_available", holder.mmcv_full_available)
    compat._replace("mmengine.utils.dl_utils.misc", "mmcv_full_available", compat.mmcv_full_available)
    assert all(holder.mmcv_full_available is compat.mmcv_full_available for holder in holders)
    assert compat.mmcv_full_available()
    assert isinstance(mmengine.model.revert_sync_batchnorm(nn.SyncBatchNorm(2)), nn.Module)


def test_preparing_twice_is_preparing_once():
    load = CheckpointLoader.load_checkpoint
    compat.prepare()
    assert CheckpointLoader.load_checkpoint is load


@pytest.mark.parametrize(
    ("module", "version", "message"),
    [
        ("mmcv", "2.2.0", r"mmcv >=2\.0\.0rc4,<2\.2, and mmcv 2\.2\.0.*uninstall mmcv mmcv-lite; .*mmcv-lite==2\.1\.0"),
        ("mmengine", "0.7.4", r"mmengine >=0\.10,<1, and mmengine 0\.7\.4 is installed.*mmengine==0\.10\.7"),
    ],
)
def test_an_unsuitable_version_is_named_with_what_to_install(module, version, message, monkeypatch):
    monkeypatch.setattr(sys.modules[module], "__version__", version)
    with pytest.raises(ImportError, match=message):
        compat.check_versions()


def test_another_mmdet_is_named(monkeypatch):
    monkeypatch.setattr(compat.metadata, "version", lambda name: {"mmdet": "2.11.0"}[name])
    with pytest.raises(ImportError, match=r"mmdet 2\.11\.0 is installed.*mmdet==3\.3\.0"):
        compat.check_versions()


def test_the_installed_versions_suit():
    compat.check_versions()
    assert mmcv.__version__ in compat.SpecifierSet(compat.VERSIONS["mmcv"])


def test_without_mmdetection_only_the_detection_package_is_refused():
    code = (
        "import sys\n"
        "sys.modules.update(mmcv=None, mmdet=None, mmengine=None)\n"
        "import kernelwarehouse, kernelwarehouse.models, kernelwarehouse.engine, kernelwarehouse.datasets\n"
        "try: import kernelwarehouse.detection\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs mmcv, which is not installed: pip install mmdet==3.3.0" in result.stdout, result.stderr
