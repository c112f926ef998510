"""The editable install: what Python and a type checker find of a checkout by it, whatever the checkout is called."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKED = ("configs", "models", "engine", "datasets", "detection", "scripts", "tests")
FILES = ("__init__.py", "main.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")


class Checkout:
    """A copy of the project, installed in editable mode into an environment of its own.

    The environment has this one's libraries, but not what this one has in editable mode.
    """

    def __init__(self, folder, name):
        self.root, self.environment = folder / name, folder / "environment"
        for part in PACKED:
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in FILES:
            shutil.copy(ROOT / part, self.root)
        self.build("wheel", self.root / "dist")
        (self.root / "build").mkdir()
        self.run(sys.executable, "-m", "venv", "--without-pip", str(self.environment))
        self.python = self.environment / ("Scripts" if os.name == "nt" else "bin") / "python"
        site = self.run(str(self.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        zipfile.ZipFile(self.build("editable", folder)).extractall(site)
        libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        Path(site, "libraries.pth").write_text("\n".join(libraries))  # folders only: files like itself are not read

    def build(self, kind, folder):
        """Have hatchling make a wheel, as pip does it; return its file."""
        folder.mkdir(exist_ok=True)
        code = f"import sys, hatchling.build as b; print(b.build_{kind}(sys.argv[1]))"
        return folder / self.run(sys.executable, "-c", code, str(folder)).split()[-1]

    def run(self, *command):
        """Run a command in the checkout and return what it prints."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
        environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Installed, then changed: build/ and dist/ are gone, and there is a new file."""
    checkout = Checkout(tmp_path_factory.mktemp("editable"), "kernel-warehouse")
    shutil.rmtree(checkout.root / "build")
    shutil.rmtree(checkout.root / "dist")
    (checkout.root / "models" / "new.py").write_text("from .plan import ConversionPlan\n\nANSWER = ConversionPlan\n")
    return checkout


@pytest.fixture(scope="module")
def seen(checkout):
    """What a process finds that starts in another folder."""
    code = """
import json, os, sys
os.chdir(sys.argv[1])
import kernelwarehouse
from kernelwarehouse.configs.schema import find_config
from kernelwarehouse.models import new
from kernelwarehouse.models.ops.cpu import build
print(json.dumps({
    "package": kernelwarehouse.__file__,
    "new": new.ANSWER.__name__,
    "configuration": str(find_config("resnet18/kw1x_resnet18")),
    "sources": list(map(str, build._SOURCES)),
}))
"""
    return json.loads(checkout.run(str(checkout.python), "-c", code, str(checkout.environment)))


def test_the_package_is_the_checkout_itself_without_build_and_dist(checkout, seen):
    assert Path(seen["package"]).samefile(checkout.root / "__init__.py")


def test_a_new_file_is_found_without_installing_again(seen):
    assert seen["new"] == "ConversionPlan"


def test_configurations_and_c_plus_plus_are_found(checkout, seen):
    assert Path(seen["configuration"]).samefile(checkout.root / "configs" / "resnet18" / "kw1x_resnet18.json")
    assert len(seen["sources"]) > 1
    assert all(Path(source).is_file() for source in seen["sources"])


def test_a_type_checker_follows_imports_into_the_checkout(checkout, tmp_path):
    """As an editor does when it goes to a definition: also into a file that is newer than the installation."""
    (tmp_path / "user.py").write_text(
        "import kernelwarehouse.models\n"
        "from kernelwarehouse.models import build_model, new\n"
        "reveal_type(build_model)\nreveal_type(new.ANSWER)\nreveal_type(kernelwarehouse.convert_)\n"
    )
    options = ["--outputjson", "--pythonpath", str(checkout.python), "--project", str(tmp_path)]
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    report = json.loads(checkout.run(sys.executable, "-m", "basedpyright", *options))
    found = [(d["severity"], d["message"].partition(" is ")[2]) for d in report["generalDiagnostics"]]
    assert [severity for severity, _ in found] == ["information"] * 3, report
    build_model, new, convert = (message for _, message in found)
    assert build_model.startswith('"(config: ')
    assert build_model.endswith(' -> Module"')
    assert new == '"type[ConversionPlan]"'
    assert convert.startswith('"(net: Module, ')


@pytest.mark.parametrize("name", ["kernel-warehouse", "main"])
def test_the_suite_runs_in_a_checkout_of_any_name(checkout, tmp_path, name):
    """Under a name with a hyphen pytest could not collect, and as `main` it would have every class twice."""
    if name != checkout.root.name:
        checkout = Checkout(tmp_path, name)
    words = ["-q", "-p", "no:cacheprovider", "tests/test_module_graph.py", "-k", "one_name or one_way"]
    assert "2 passed" in checkout.run(str(checkout.python), "-m", "pytest", *words)
