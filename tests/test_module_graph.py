"""Who imports whom: relative within the package, one way between its folders, and each file under one name only."""

import ast
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import kernelwarehouse.engine  # noqa: F401 - so that all folders but detection are loaded

ROOT = Path(__file__).resolve().parent.parent
# What a folder may import, beside itself.
MAY_IMPORT = {
    "configs": set(),
    "models": {"configs"},
    "datasets": {"configs"},
    "engine": {"configs", "models", "datasets"},
    "detection": {"configs", "models", "datasets", "engine"},
}
MODULES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(source, path):
    """Each import of the file `path` in the package, at its top or within a function: (line, absolute name).

    Of ``from .x import y``, the name is that of the module x.y if there is one, else x.

    Raises:
        ImportError: A relative import leads out of the package.
    """
    package = ".".join(("kernelwarehouse", *path.relative_to(ROOT).parent.parts))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package).rstrip(".")
            yield from ((node.lineno, member(base, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in ("import_module", "__import__"):
                yield node.lineno, importlib.util.resolve_name(node.args[0].value, package)


def member(module, name):
    """The module `name` of a package of ours if there is one, else the package, which then holds the name itself."""
    top, *parts = f"{module}.{name}".split(".")
    file = ROOT.joinpath(*parts)
    is_module = top == "kernelwarehouse" and (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file())
    return f"{module}.{name}" if is_module else module


def imports_of(path):
    return list(imported(path.read_text(encoding="utf-8"), path))


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("from ..engine import train_run", ["kernelwarehouse.engine"]),
        ("from .. import engine, datasets", ["kernelwarehouse.engine", "kernelwarehouse.datasets"]),
        ("from ..engine import train", ["kernelwarehouse.engine.train"]),
        ("from . import plan", ["kernelwarehouse.models.plan"]),
        ("def f():\n    from ..engine.run import fit", ["kernelwarehouse.engine.run"]),
        ("import kernelwarehouse.engine.run as r", ["kernelwarehouse.engine.run"]),
        ("importlib.import_module('..engine', __package__)", ["kernelwarehouse.engine"]),
        ("import torch", ["torch"]),
    ],
)
def test_an_import_is_followed_to_its_module(line, names):
    assert [name for _, name in imported(line, ROOT / "models" / "x.py")] == names


def test_an_import_out_of_the_package_is_noticed():
    with pytest.raises(ImportError):
        list(imported("from ... import x", ROOT / "models" / "x.py"))


def test_folders_import_one_way():
    """configs knows nobody, models and datasets know configs, engine all three, and only detection knows engine."""
    assert len(MODULES) > 80
    for path in MODULES:
        folder = path.relative_to(ROOT).parts[0]
        for line, name in imports_of(path):
            top, *parts = name.split(".")
            if top == "kernelwarehouse":
                assert parts, f"{path}:{line} imports the package itself"
                assert parts[0] in MAY_IMPORT[folder] | {folder}, f"{path}:{line} imports {name}"


def test_the_engine_and_the_data_know_no_operator():
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "datasets").rglob("*.py"), ROOT / "main.py"]:
        for line, name in imports_of(path):
            assert not name.startswith("kernelwarehouse.models.ops"), f"{path}:{line} imports {name}"


def test_nothing_imports_a_bare_folder_name():
    for path in [*MODULES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "main.py"]:
        for line, name in imports_of(path):
            assert name.split(".")[0] not in MAY_IMPORT, f"{path}:{line} imports {name}"


def names_of_files():
    """Each of our files that this process has loaded as modules, whatever link led to it, and their names.

    An environment inside the checkout holds files of others.
    """
    names = defaultdict(set)
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/").resolve()
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            names[file].add(name)
    return names


def test_each_file_is_loaded_under_one_name():
    """pytest may load a file by its path beside our import; then all its classes exist twice."""
    names = names_of_files()
    assert names[ROOT / "__init__.py"] == {"kernelwarehouse"}
    assert names[ROOT / "engine" / "train.py"] == {"kernelwarehouse.engine.train"}
    assert {file: found for file, found in names.items() if len(found) > 1} == {}


def test_a_file_loaded_a_second_time_is_noticed(monkeypatch):
    """As pytest would do it, under the name of the checkout."""
    file = ROOT / "configs" / "__init__.py"
    spec = importlib.util.spec_from_file_location(f"{ROOT.name}.configs", file)
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    assert names_of_files()[file] == {"kernelwarehouse.configs", spec.name}
