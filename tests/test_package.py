"""The package as published: everything in the wheel, in short files."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "models", "engine", "datasets", "detection")
SOURCES = [p for f in (*FOLDERS, "scripts", "tests") for p in (ROOT / f).rglob("*.py")]
SOURCES += [ROOT / "main.py", ROOT / "__init__.py"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_every_module_and_configuration(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [ROOT / "__init__.py", ROOT / "py.typed"]
    files += [p for f in FOLDERS for s in ("*.py", "*.json", "*.cpp", "*.h", "*.md") for p in (ROOT / f).rglob(s)]
    assert {f"kernelwarehouse/{path.relative_to(ROOT).as_posix()}" for path in files} - packed == set()
    assert {name.split("/")[0] for name in packed} == {"kernelwarehouse", wheel.name.rsplit("-", 3)[0] + ".dist-info"}


def test_installed_wheel_works_from_anywhere(wheel, tmp_path):
    """Unpacked beside nothing else of the project, so that a missing file cannot be found in the checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import kernelwarehouse, timm; "
        f"assert kernelwarehouse.__file__.startswith({str(tmp_path)!r}); "
        "net = kernelwarehouse.build_model('configs/resnet18/kw1x_resnet18.json'); "
        "print(sum(p.numel() for p in net.parameters()), 'kw_resnet18' in timm.list_models('kw*'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == ["11932148", "True"], result.stderr


def test_files_are_short():
    for path in SOURCES:
        if "tests" not in path.parts:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path


def test_pre_commit_configuration_is_yaml():
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
