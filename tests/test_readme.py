"""What the README claims is tested by what it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def features():
    """The rows of the table of features, without its two lines of heading."""
    table = README[README.index("\n| feature | ours |") :].strip().split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_each_feature_of_ours_names_a_test_that_exists():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    existing = set(re.findall(r"^def (test_\w+)\(", "\n".join(sources), re.MULTILINE))
    rows = features()
    assert len(rows) > 40
    for feature, ours, *_, test in rows:
        assert ours == "✓", feature
        assert test.strip("`") in existing, feature


def test_links_to_files_lead_to_them():
    pages = [page for page in ROOT.rglob("README.md") if ".venv" not in page.parts]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    ]
    files = [(page, link) for page, link in links if "://" not in link]
    assert len(files) > 10
    for page, link in files:
        assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"
