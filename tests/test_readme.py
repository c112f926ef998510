"""What the pages of the project claim, link to and tell to type."""

import re
import sys
import types
from itertools import chain
from pathlib import Path

import pytest
import timm
import torch
from networks import narrow_resnet

from kernelwarehouse import convert_, plans
from kernelwarehouse.configs.schema import field_names, known_fields
from kernelwarehouse.models import SCHEMAS, create_model, operator_names, operators

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted(ROOT.rglob("README.md"))
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def slugs(text):
    """The anchors of a page's headings, as they are made from their words."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_feature_of_ours_names_a_test_that_exists():
    page = PAGES["engine/README.md"]
    table = page[page.index("\n| feature | ours |") :].strip().split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    existing = set(re.findall(r"^ *def (test_\w+)\(", "\n".join(sources), re.MULTILINE))
    assert len(rows) > 40
    for feature, ours, *_, test in rows:
        assert ours == "✓", feature
        assert test.strip("`") in existing, feature


def test_links_lead_to_files_and_headings_that_exist():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", text)]
    links = [(page, link) for page, link in links if "://" not in link]
    assert len(links) > 30
    for page, link in links:
        file, _, anchor = link.partition("#")
        path = ROOT / page if not file else (ROOT / page).parent / file
        assert path.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{page}: {link}"


def test_commands_use_files_and_options_that_exist():
    fields = chain(*(field_names(SCHEMAS[name]) for name in operator_names()))
    known = {*known_fields(None), *fields, "kw_config", "import", "strength", "help"}
    words = [
        (page, line.split(" #")[0].split())
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    files = [(page, word) for page, line in words for word in line if re.search(r"\w\.(py|sh|json)$", word)]
    made_elsewhere = {"tools/train.py", "tools/test.py", "speed.json"}
    assert len(files) > 20
    for page, file in files:
        assert file in made_elsewhere or (ROOT / file).is_file(), f"{page}: {file}"
    options = [(page, word) for page, line in words if "main.py" in line for word in line[line.index("main.py") :]]
    for page, word in options:
        if word.startswith("--"):
            assert word.removeprefix("--") in known, f"{page}: {word}"


def test_the_first_example_runs(monkeypatch):
    """As it is printed, but for weights that would be downloaded."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **kwargs: create(*args, **kwargs))
    (example,) = blocks("README.md", "python")
    names = {}
    exec(example, names)
    assert plans(names["net"]) == [names["plan"]]


@pytest.fixture
def gated(monkeypatch):
    """The module of the page's example, forgotten afterwards."""
    (example,) = blocks("models/ops/README.md", "python")
    module = types.ModuleType("gated")
    monkeypatch.setitem(sys.modules, "gated", module)  # where dataclasses look for annotations
    monkeypatch.setattr(operators, "_registered", dict(operators._registered))
    exec(example, vars(module))
    return module


def test_the_operator_of_the_page_converts_a_network(gated):
    net, x = narrow_resnet().eval(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before, parameters = net(x), sum(p.numel() for p in net.parameters())
    convert_(net, gated.GatedConfig(strength=0.3))
    torch.testing.assert_close(net(x), before)
    (plan,) = plans(net)
    assert sum(p.numel() for p in net.parameters()) == plan.parameters_after > parameters
    for layer in net.modules():
        if isinstance(layer, gated.GatedConv):
            torch.nn.init.normal_(layer.attention.weight)
    assert not torch.allclose(net(x), before, rtol=0.01)
    with pytest.raises(ValueError, match="strength"):
        gated.GatedConfig(strength=2)
    assert create_model("gated_resnet10t", strength=0.2).conv1[0].weight.shape[1] == 3


def files_described(page):
    """The code spans in the first columns of a page's tables of files."""
    tables = re.findall(r"^\| (?:file|place) \|.*\n\|.*\n((?:\|.*\n?)+)", PAGES[page], re.MULTILINE)
    return [name for table in tables for row in table.splitlines() for name in re.findall("`(.*?)`", row.split("|")[1])]


def test_tables_of_files_name_files_that_exist():
    described = {page: files_described(page) for page in PAGES}
    assert sum(map(len, described.values())) > 100
    for page, names in described.items():
        for name in names:
            assert ((ROOT / page).parent / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("folder", ["models", "models/ops", "engine", "datasets", "detection"])
def test_each_module_and_folder_is_described(folder):
    described = {name.rstrip("/") for name in files_described(f"{folder}/README.md")}
    there = {
        path.name for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - {"__init__.py"} <= described


def test_each_folder_is_on_the_map():
    there = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/__init__.py")} | {"scripts", "tests"}
    assert {f"{folder}/" for folder in there} <= set(files_described("README.md"))
