"""The README's figures of GPUs, made of the reports that are kept in results/."""

from collections.abc import Iterator
from pathlib import Path

from .journal import Journal, find_result
from .machine import STAGE
from .report import layer_lines, network_lines

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- figures: written by scripts/gpu_report.py --readme -->", "<!-- end of figures -->"
NONE = "No GPU has been measured yet."


def lines() -> Iterator[str]:
    """Markdown: a section for each report, named as its file and the machine."""
    paths = sorted(RESULTS.glob("*.jsonl"))
    if not paths:
        yield NONE
    for path in paths:
        records = Journal(path).read()
        description = find_result(records, STAGE, "description") or {}
        yield f"### {description.get('name', path.stem)}"
        yield ""
        about = [f"{name} {description[name]}" for name in ("torch", "triton", "driver") if description.get(name)]
        yield f"`{path.name}`: {', '.join(about) or 'nothing is known of the machine'}."
        yield ""
        yield from network_lines(records)
        yield ""
        yield from layer_lines(records)


def with_figures(text: str) -> str:
    """The README's text with the figures of now.

    Raises:
        ValueError: It has no place for them.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README}: there must be lines {BEGIN!r} and {END!r}")
    figures = "\n".join(lines()).rstrip()
    return f"{head}{BEGIN}\n\n{figures}\n\n{END}{tail}"


def write_readme() -> None:
    """Write the figures into the README."""
    README.write_text(with_figures(README.read_text(encoding="utf-8")), encoding="utf-8")
