"""The report as Markdown, made of the records there are so far."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from timing.results import table_head, table_row

from . import correctness, layers, machine, networks, training
from .journal import Journal, Record, failures, find_result, results

_MOST_FAILURES = 20  # are listed of a stage


def write(journal: Journal, path: Path) -> None:
    """Write the report anew, in one go."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text(journal.read()), encoding="utf-8")
    temporary.replace(path)


def text(records: Sequence[Record]) -> str:
    """The whole report."""
    sections: list[tuple[str, str, Callable[[Sequence[Record]], Iterator[str]]]] = [
        (machine.STAGE, "Machine", _machine),
        (correctness.STAGE, "Correctness", _correctness),
        (layers.COMPILATION, "Compilation by Triton", _compilation),
        (layers.STAGE, "Layers", layer_lines),
        (networks.STAGE, "Networks", network_lines),
        (training.STAGE, "Training by main.py", _training),
    ]
    lines = ["# Report", ""]
    for stage, title, content in sections:
        ends = [r for r in records if r.get("stage") == stage and "ended" in r]
        begun = any(r.get("stage") == stage for r in records)
        if not begun:
            continue
        state = f"{ends[-1]['ended']}, {ends[-1]['seconds']:.1f} s" if ends else "going on"
        lines += [f"## {title}", "", f"Stage `{stage}`: {state}.", "", *content(records), ""]
        failed = list(failures(records, stage))
        lines += [f"- failed: `{name}`: {why}" for name, why in failed[:_MOST_FAILURES]]
        lines += [f"- and {len(failed) - _MOST_FAILURES} more failed"] * (len(failed) > _MOST_FAILURES)
        lines += [""] * bool(failed)
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table, aligned; without rows a sentence that says so."""
    if not rows:
        return ["There is nothing yet."]
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    columns = dict(zip(head, widths, strict=True))
    return [*table_head(columns).split("\n"), *(table_row(row, widths) for row in cells)]


def _machine(records: Sequence[Record]) -> Iterator[str]:
    for name, value in (find_result(records, machine.STAGE, "description") or {}).items():
        yield f"- {name}: {value}"
    rates = find_result(records, machine.STAGE, "rates")
    if rates:
        products = ", ".join(f"{name} {2e-12 * rate:,.1f} TFLOP/s" for name, rate in rates["products"].items())
        yield f"- products of large matrices: {products}"
        yield f"- memory: {1e-9 * rates['read']:,.0f} GB/s read, {1e-9 * rates['copy']:,.0f} GB/s read and written"


def _correctness(records: Sequence[Record]) -> Iterator[str]:
    found = defaultdict(list)
    for name, result in results(records, correctness.STAGE):
        found[tuple(name.split(" ")[:2])].append((name, result))
    failed: dict[tuple[str, ...], int] = defaultdict(int)
    for name, _ in failures(records, correctness.STAGE):
        failed[tuple(name.split(" ")[:2])] += 1
    rows = []
    for key in dict.fromkeys([*found, *failed]):
        of = found[key]
        worst = max((result for _, result in of), key=lambda r: r["share"], default=None)
        wrong = sum(result["wrong"] for _, result in of)
        share = f"{worst['error']:.1e} of {worst['bound']:.1e}, {worst['of']}" if worst else "–"
        rows.append([*key, len(of) - wrong, wrong, failed[key], share])
    yield from table(["implementation", "precision", "right", "wrong", "failed", "worst error of its bound"], rows)
    wrong_ones = [(name, r) for pairs in found.values() for name, r in pairs if r["wrong"]]
    for name, r in wrong_ones[:_MOST_FAILURES]:
        yield f"- wrong: `{name}`: {r['of']} ({r['mode']}, {r['layout']}, tile {r['tile']}) off by {r['error']:.1e}"
    if len(wrong_ones) > _MOST_FAILURES:
        yield f"- and {len(wrong_ones) - _MOST_FAILURES} more are wrong"


def _compilation(records: Sequence[Record]) -> Iterator[str]:
    seconds = [result["seconds"] for _, result in results(records, layers.COMPILATION)]
    if seconds:
        yield f"{len(seconds)} cases, {sum(seconds):.0f} s of all processes together, {max(seconds):.1f} s at most."


def layer_lines(records: Sequence[Record]) -> Iterator[str]:
    """A table of the layers that were timed, for each precision, mode and batch, by worth: milliseconds."""
    groups = defaultdict(list)
    for _, result in results(records, layers.STAGE):
        groups[result["precision"], result["mode"], result["batch"]].append(result)
    if not groups:
        yield "There is nothing yet."
    for (precision, mode, batch), rows in groups.items():
        timed = dict.fromkeys(name for row in rows for name in row["seconds"])
        head = ["network", "layer", "count", "input", *timed, "auto takes", "floor", "static floor", "best / static"]
        lines = []
        for row in rows:
            ours = [value for name, value in row["seconds"].items() if name != layers.STATIC]
            static = row["seconds"].get(layers.STATIC)
            ratio = f"{min(ours) / static:.2f}" if ours and static else "–"
            size = "×".join(map(str, row["input"][1:]))
            times = [_milliseconds(row["seconds"].get(name)) for name in timed]
            floors = [_milliseconds(row["floor"]), _milliseconds(row["static_floor"])]
            network = row["network"].rpartition("/")[2]
            lines.append([network, row["layer"], row["count"], size, *times, row["estimated"], *floors, ratio])
        yield f"{'Training' if mode == 'train' else 'Inference'}, batch {batch}, {precision}, milliseconds:"
        yield ""
        yield from table(head, lines)
        yield ""


def network_lines(records: Sequence[Record]) -> Iterator[str]:
    """A table of the networks that were timed."""
    found = [result for _, result in results(records, networks.STAGE)]
    static = {_case(r): r["seconds"] for r in found if r["contender"] == "static"}
    rows = []
    for r in found:
        base = static.get(_case(r))
        graph, peak = r.get("graph_seconds"), r.get("peak_bytes")
        network = r["network"].rpartition("/")[2]
        row = [network, r["mode"], r["batch"], r["precision"], r["side"], r["contender"]]
        row += [_milliseconds(r["seconds"]), f"{r['batch'] / r['seconds']:,.0f}"]
        row += [f"{r['seconds'] / base:.2f}" if base else "–", _milliseconds(graph)]
        rows.append([*row, f"{peak / 2**20:,.0f}" if peak else "–"])
    head = [
        "network",
        "mode",
        "batch",
        "precision",
        "side",
        "",
        "ms",
        "images/s",
        "/ static",
        "ms by graph",
        "peak (MiB)",
    ]
    yield from table(head, rows)


def _case(r: Record) -> tuple[object, ...]:
    return r["network"], r["mode"], r["batch"]


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _training(records: Sequence[Record]) -> Iterator[str]:
    for name, result in results(records, training.STAGE):
        if "resumed_as_uninterrupted" in result:
            losses = ", ".join(f"{value:.3f}" for value in result["losses"]["whole"])
            good = {True: "yes", False: "NO", None: "too few steps to tell"}
            finite, falling = good[result["finite"]], good[result["falling"]]
            yield f"- {result['steps']} steps: losses {losses}; finite: {finite}; falling: {falling}"
            yield (
                f"- killed after {result['killed_after']} steps and resumed: as an uninterrupted run: "
                f"{good[result['resumed_as_uninterrupted']]}; losses differ by at most "
                f"{max(result['differences_before'], default=0):.1e} before and {max(result['differences_after']):.1e} "
                f"afterwards, weights by {result['weights_differ']:.1e} at the end (relatively)"
            )
        else:
            compared = result["compared"] or {}
            figures = "; ".join(
                f"{figure} {c['found']:.3f} ({'within' if c['within'] else 'OUTSIDE'} "
                f"{', '.join(f'{v:.3f}' for v in c['packed'])})"
                for figure, c in compared.items()
            )
            yield f"- {name}: {result['main_seconds']:.0f} s; {figures or 'too short a run to compare'}"


def status(records: Sequence[Record]) -> int:
    """0 if nothing has failed or was found to be wrong, else 1; a stage that its limit has ended is no failure."""
    ends = [record["ended"] for record in records if "ended" in record]
    broken = any(end not in ("done", "stopped at its limit") for end in ends)
    wrong = any(result["wrong"] for _, result in results(records, correctness.STAGE))
    apart = any(
        False in (result.get(name) for name in ("finite", "falling", "resumed_as_uninterrupted"))
        or any(not compared["within"] for compared in (result.get("compared") or {}).values())
        for _, result in results(records, training.STAGE)
    )
    return int(broken or wrong or apart or any("error" in record for record in records))
