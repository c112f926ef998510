"""One table of all operators: rows come from what is registered and shipped, figures from what was compared first."""

import csv
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import toy_operator
from matplotlib.text import Text
from PIL import Image

from kernelwarehouse.models import operators
from kernelwarehouse.models.ops.mixture_conv import IMPLEMENTATIONS

SCRIPTS = Path(__file__).parents[1] / "scripts"
# Rounds of each network in each layout: the faster one counts.
SECONDS = {
    ("static", "NCHW"): [3.0, 3.0, 3.0],
    ("static", "NHWC"): [1.0, 2.0, 2.0],
    ("upstream", "NCHW"): [5.0, 7.0, 6.0],
    ("ours", "NCHW"): [2.5, 3.0, 5.0],
    ("ours", "NHWC"): [9.0, 9.0, 9.0],
}
STUBBORN = '''
from toy_operator import Toy, ToyConfig
from kernelwarehouse.models import register

class StubbornConfig(ToyConfig):
    """Refuses.

    Attributes:
        hidden_gates: As there.
        include: As there.
    """
    operator = "stubborn"

@register
class Stubborn(Toy):
    name, prefix, Config = "stubborn", "stubborn", StubbornConfig

    def plan(self, sites, config):
        raise ValueError("layer1: found what it does not like,\\n take another")
'''


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # where Python looks when the file is run
    monkeypatch.setattr(operators, "_registered", {**operators._registered, "toy": toy_operator.Toy()})
    return importlib.import_module("table")


@pytest.fixture
def known_times(table, monkeypatch):
    """Known times in place of measured ones; every network runs once."""

    def measure(steps, *_):
        for run in steps.values():
            run()
        return {contender: SECONDS[contender.name, contender.layout] for contender in steps}

    sizes = {"static": 100 << 20, "upstream": 300 << 20, "ours": 110 << 20}
    monkeypatch.setattr(sys.modules["timing.rounds"], "measure", measure)
    monkeypatch.setattr(sys.modules["timing.survey"], "working_bytes", lambda contender, *_: sizes[contender.name])


def run(table, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["table.py", "--device", "cpu", *map(str, arguments)])
    return table.main()


def rows(text):
    """The cells of a Markdown table's rows by column, by the first of them."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_every_configuration_has_a_row(table, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(table.shipped, "folders", lambda: ["quickstart", "resnet18"])
    assert run(table, monkeypatch, "--json", tmp_path / "all.json", "--csv", tmp_path / "all.csv") == 0
    shown = rows(capsys.readouterr().out)
    files = {file.relative_to(table.shipped.ROOT).with_suffix("") for file in table.shipped.ROOT.glob("*/*.json")}
    assert [*shown] == [*dict.fromkeys(shown)]
    assert {*shown} == {str(file) for file in files if file.parent.name in ("quickstart", "resnet18")}
    assert next(iter(shown)) == "quickstart/resnet18"  # the static one first
    assert [*shown["resnet18/kw1x_resnet18"].values()][2:] == ["11.93", "11.93", "1.814", "0.385", "74.77"]
    assert [*shown["resnet18/resnet18"].values()][1:] == ["–", "11.69", "11.69", "1.814", "–", "70.44"]
    assert [*shown["quickstart/resnet18"].values()][3] == "–"  # of the same name, but nothing that was published
    kept = {record["name"]: record for record in json.loads((tmp_path / "all.json").read_text())}
    with (tmp_path / "all.csv").open(newline="") as file:
        written = {record["name"]: record for record in csv.DictReader(file)}
    assert [*written] == [*kept] == [*shown]
    assert kept["resnet18/resnet18"]["parameters"] == int(written["resnet18/resnet18"]["parameters"]) == 11_689_512


def test_published_figures_belong_to_configurations(table):
    names = {file.stem for file in table.shipped.ROOT.glob("*/*.json")}
    assert {*table.shipped.PUBLISHED} <= names
    for folder in ("configs", "quickstart", "resnet18"):
        assert (folder in table.shipped.folders()) == (folder != "configs")


@pytest.mark.usefixtures("known_times")
def test_operators_have_rows_on_a_backbone(table, monkeypatch, capsys, tmp_path):
    (tmp_path / "stubborn_operator.py").write_text(STUBBORN)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {kind: tmp_path / f"all.{kind}" for kind in ("json", "csv", "png")}
    options = ["--json", files["json"], "--csv", files["csv"], "--plot", files["png"], "--import", "stubborn_operator"]
    options += ["--cases", "infer:1", "train:2", "--operators", "kernel_warehouse", "toy", "stubborn"]
    assert run(table, monkeypatch, "--backbone", "quickstart", *options) == 0
    said = capsys.readouterr().out
    shown = rows(said)
    assert [*shown] == ["quickstart (static)", "kw1x_resnet18", "toy", "stubborn"]
    assert float(said.split("parity ")[1].split()[0]) < 1e-6
    ours = shown["kw1x_resnet18"]
    assert ours["inference, 1"] == ours["training, 2"] == "1.50 ± 0.50 (3.00 ± 1.00)"
    assert ours["memory, training, 2"] == "1.10 (3.00)"
    assert (ours["params (M)"], ours["remark"]) == ("0.32", "")
    assert shown["toy"]["inference, 1"] == "1.50 ± 0.50"  # which has no formulation of its authors
    assert "no implementation 'grouped'" in shown["toy"]["remark"]
    refused = "not converted: layer1: found what it does not like, take another"
    assert [*shown["stubborn"].values()] == ["stubborn", *["–"] * 5, refused]
    assert shown["quickstart (static)"]["inference, 1"] == "2000.0 ± 500.0 ms"
    kept = {record["network"]: record for record in json.loads(files["json"].read_text())}
    assert kept["kw1x_resnet18"]["train_2_upstream_seconds"] == SECONDS["upstream", "NCHW"]
    assert kept["stubborn"]["remark"] == refused
    with files["csv"].open(newline="") as file:
        written = {record["network"]: record for record in csv.DictReader(file)}
    assert float(written["toy"]["infer_1_ours"]) == 1.5
    assert Image.open(files["png"]).size[0] > 800


@pytest.mark.usefixtures("known_times")
def test_a_backbone_without_configurations_has_the_operators_defaults(table, monkeypatch, capsys):
    names = ["toy", "kernel_warehouse"]
    options = ["--backbone", "resnet10t", "--size", 32, "--cases", "infer:1", "--operators", *names]
    assert run(table, monkeypatch, *options) == 0
    shown = rows(capsys.readouterr().out)
    assert [*shown] == ["resnet10t (static)", *names]
    assert shown["toy"]["inference, 1"] == "1.50 ± 0.50"


def test_every_registered_operator_has_a_row(table):
    _, found = sys.modules["timing.survey"].find_rows("resnet10t", 32)
    assert [row.name for row in found] == operators.operator_names()
    assert all(row.pair is not None for row in found)


def test_nothing_is_timed_or_printed_of_results_that_differ(table, monkeypatch, capsys):
    grouped = type(IMPLEMENTATIONS["grouped"])
    right = grouped.__call__
    monkeypatch.setattr(grouped, "__call__", lambda *a: right(*a) * (1 + 1e-6))
    monkeypatch.setattr(table, "measure", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(SystemExit, match="no figure is printed"):
        run(table, monkeypatch, "--backbone", "quickstart", "--operators", "kernel_warehouse")
    assert not capsys.readouterr().out


def test_what_a_step_holds_is_taken_from_both_passes(table, monkeypatch):
    memory = sys.modules["timing.memory"]
    for peaks, working in (((50, 60, 20), 30), ((25, 60, 20), 20)):
        monkeypatch.setattr(memory, "_in_fresh_process", lambda *_, peaks=peaks: peaks)
        assert memory.working_bytes(None, "fp32", 8, torch.device("cpu")) == working


def survey_rows(table, count):
    """Rows whose points lie close together, as configurations of one size do."""
    survey, cost = sys.modules["timing.survey"], table.shipped.Cost
    case, found = survey.Case("infer", 1), []
    for number in range(count):
        row = survey.Row(f"op{number % 3}_variant{number}_resnet18", f"operator{number % 3}")
        row.cost = cost(11_000_000 + 400_000 * (number % 4), 1, 1)
        ours, theirs = 1.2 + 0.03 * number, 2.0 + 0.1 * number
        row.ratios[case] = {"ours": survey.Ratio(ours, 0.1, []), "upstream": survey.Ratio(theirs, 0.1, [])}
        found.append(row)
    return found, case


def test_labels_of_the_picture_do_not_overlap(table):
    found, case = survey_rows(table, 10)
    figure = table.scatter.draw(found, [case], 11_690_000, "resnet18", "title")
    (axis,) = figure.axes
    renderer = sys.modules["timing.labels"].renderer_of(figure)
    boxes = {text.get_text(): Text.get_window_extent(text, renderer) for text in axis.texts}  # without lines
    assert {*boxes} == {f"op{number % 3}_variant{number}" for number in range(10)}
    frame = axis.get_window_extent(renderer)
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)
    points = [(row.cost.parameters / 1e6, ratio.median) for row in found for ratio in row.ratios[case].values()]
    for name, box in boxes.items():
        assert frame.contains(box.x0, box.y0), name
        assert frame.contains(box.x1, box.y1), name
        assert not any(box.contains(*axis.transData.transform(point)) for point in points), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "no_such_network"], "timm has no network 'no_such_network'"),
        (["--backbone", "vit_tiny_patch16_224", "--size", "8"], "cannot take images of 8×8"),
        (["--backbone", "quickstart", "--operators", "toys"], "did you mean 'toy'"),
        (["--import", "no_such_module"], "--import no_such_module: "),
        (["--plot", "all.png"], "name a --backbone"),
        (["--backbone", "resnet18", "--plot", "all.tiff2"], "must end with the name of a picture's format"),
        (["--json", "no/such/folder/all.json"], "cannot be written"),
        (["--precision", "tf32"], "tf32 is of GPUs"),
        (["--rounds", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(table, monkeypatch, capsys, arguments, message):
    assert run(table, monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("text", ["infer", "infer:0", "test:1", "train:x"])
def test_a_wrong_case_is_refused(table, monkeypatch, capsys, text):
    with pytest.raises(SystemExit) as caught:
        run(table, monkeypatch, "--backbone", "resnet18", "--cases", text)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
