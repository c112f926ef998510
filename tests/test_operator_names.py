"""No module outside of models/ops knows an operator: none of their names stands in the code.

That is, no identifier and no text but a docstring is an operator's key or the name of one of its classes, or begins
with its prefix followed by ``_`` or a digit, as the names of its models and configurations do.
"""

import ast
import re
from pathlib import Path

import pytest

from kernelwarehouse.models.operators import built_in_operators, get_operator

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "models", "engine", "datasets", "detection", "scripts")
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = [path for path in MODULES if not path.is_relative_to(ROOT / "models" / "ops")]
MODULES += [ROOT / "main.py", ROOT / "__init__.py"]
OPTION = "kw_config"  # of the command line, in use since the authors' code


def forbidden():
    """What a name must not be: (words, beginnings) of all operators of this package."""
    words, beginnings = set(built_in_operators()), []
    for operator in map(get_operator, built_in_operators()):
        classes = type(operator), operator.Config, operator.Plan, operator.Plan.layer_type
        words |= {cls.__name__ for cls in classes if cls.__module__.startswith("kernelwarehouse.models.ops.")}
        beginnings.append(re.compile(rf"{operator.prefix}[_\d]"))
    return words, beginnings


def exempt(tree, path):
    """Nodes of a module in which operators may be named."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            yield node.body[0]
        elif path == ROOT / "__init__.py" and (isinstance(node, ast.ImportFrom) or targets(node) == ["__all__"]):
            yield node  # what the root offers its user
        elif path == ROOT / "models" / "operators.py" and targets(node) == ["_TABLE"]:
            yield node  # the registry
        elif (
            path.is_relative_to(ROOT / "scripts") and getattr(getattr(node, "func", None), "attr", "") == "add_argument"
        ):
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "default")


def targets(node):
    """The names that a statement assigns to."""
    found = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for name in found if isinstance(name, ast.Name)]


def names(node, skipped):
    """Every identifier and text of a tree, with its line; of dotted ones each part."""
    if node in skipped:
        return
    for _, content in ast.iter_fields(node):
        for value in content if isinstance(content, list) else [content]:
            if isinstance(value, ast.AST):
                yield from names(value, skipped)
            elif isinstance(value, str):
                yield from ((getattr(node, "lineno", 0), part) for part in (value, *re.split("[.:]", value)))


def violations(source, path):
    """Each name of an operator in a module: (line, name)."""
    tree, (words, beginnings) = ast.parse(source), forbidden()
    found = names(tree, set(exempt(tree, path)))
    named = {(line, name) for line, name in found if name in words or any(b.match(name) for b in beginnings)}
    return sorted(item for item in named if item[1] != OPTION)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_outside_of_the_operators_names_one(path):
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from .ops.kernel_warehouse import x", "kernel_warehouse"),
        ("import kernelwarehouse.models.ops.kernel_warehouse.layer as x", "kernel_warehouse"),
        ("x = import_module('.ops.kernel_warehouse', __package__)", "kernel_warehouse"),
        ("if plan.operator == 'kernel_warehouse': pass", "kernel_warehouse"),
        ("from .ops import KernelWarehouse", "KernelWarehouse"),
        ("def f(config: KWConfig): pass", "KWConfig"),
        ("def f(kw_ratio): pass", "kw_ratio"),
        ("f(kw_ratio=1)", "kw_ratio"),
        ("x.kw_ratio = 1", "kw_ratio"),
        ("kw2 = 1", "kw2"),
        ("def kw_f(): pass", "kw_f"),
        ("class kw_C: pass", "kw_C"),
        ("x = 'kw1x_resnet18'", "kw1x_resnet18"),
        ("x = f'kw_{y}'", "kw_"),
        ("x = {'kw_resnet18': 1}", "kw_resnet18"),
        ("def f():\n    global kw_x", "kw_x"),
        ("'''A docstring.'''\n'kw_x'", "kw_x"),
        ("parser.add_argument('--model', default='kw_resnet18')", "kw_resnet18"),
        ("_TABLE = {'kernel_warehouse': 1}", "kernel_warehouse"),
    ],
)
def test_a_name_is_noticed(line, name):
    assert name in [found for _, found in violations(line, ROOT / "engine" / "x.py")]


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("'''Of KernelWarehouse: kw_resnet18.'''", "engine/x.py"),
        ("def f():\n    '''kernel_warehouse'''", "engine/x.py"),
        ("class C:\n    '''kw_x'''\n    # kw_y", "engine/x.py"),
        ("f(options.kw_config, '--kw_config', kw_config=1)", "engine/x.py"),
        ("import kernelwarehouse", "engine/x.py"),
        ("kwargs = {'kwargs': 'configs/resnet18/kw1x_resnet18'}", "engine/x.py"),
        ("KWBackbone = DynamicBackbone", "detection/backbone.py"),
        ("parser.add_argument('--model', default='kw_resnet18')", "scripts/x.py"),
        ("_TABLE: dict[str, str] = {'kernel_warehouse': 'kw_'}", "models/operators.py"),
        ("from .models.ops.kernel_warehouse import KWConfig\n__all__ = ['KWConfig']", "__init__.py"),
    ],
)
def test_what_may_be_named(line, path):
    assert violations(line, ROOT / path) == []
