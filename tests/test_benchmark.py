"""Timing networks: every figure is measured or computed, on equal work, and none is shown of results that differ."""

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processor import needs_compiler

from kernelwarehouse.models import read_config, tuning
from kernelwarehouse.models.ops import selection
from kernelwarehouse.models.ops.cpu import unavailable
from kernelwarehouse.models.ops.kernel_warehouse import KWLayer
from kernelwarehouse.models.ops.mixture_conv import IMPLEMENTATIONS

SCRIPTS = Path(__file__).parents[1] / "scripts"
MODEL = "quickstart/kw1x_resnet18"
NETWORKS = ["static", "upstream", "ours"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # where Python looks when the file is run
    return importlib.import_module("benchmark")


@pytest.fixture
def machine(benchmark, monkeypatch):
    """A known machine in place of a measured one."""
    known = benchmark.Machine({"fp32": 1e11, "bf16": 4e11}, read=2e10, copy=2e10)
    monkeypatch.setattr(benchmark.Machine, "measure", lambda device, precisions: known)
    return known


def run(benchmark, monkeypatch, *arguments):
    fixed = ["--device", "cpu", "--rounds", "1", "--batch", "2"]
    model = [] if "--model" in arguments else ["--model", MODEL]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *fixed, *model, *map(str, arguments)])
    return benchmark.main()


def table(text):
    """The cells of a Markdown table's rows, by column."""
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_each_network_has_a_row_in_each_case(benchmark, machine, monkeypatch, capsys, tmp_path):
    arguments = [
        "--batch",
        2,
        3,
        "--precision",
        "fp32",
        "bf16",
        "--rounds",
        3,
        "--implementation",
        "materialize",
        "merged",
    ]
    assert run(benchmark, monkeypatch, *arguments, "--json", tmp_path / "figures.json") == 0
    rows = table(capsys.readouterr().out)
    cases = [(mode, p, batch) for mode in ("infer", "train") for p in ("fp32", "bf16") for batch in ("2", "3")]
    assert [(r["mode"], r["precision"], r["batch"], r["network"]) for r in rows] == [
        (*case, network)
        for case in cases
        for network in (
            *NETWORKS,
            "materialize",
            *(["merged"] if case[0] == "infer" else []),
        )  # which cannot be trained
    ]
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["parity"] < 1e-9
    assert kept["machine"]["products"]["bf16"] == 4e11
    by_name = {}
    for figures in kept["results"]:
        by_name[figures["mode"], figures["precision"], figures["batch"], figures["network"]] = figures
    for row, figures in zip(rows, kept["results"], strict=True):
        case = figures["mode"], figures["precision"], figures["batch"]
        static, ours = by_name[(*case, "static")], by_name[(*case, "ours")]
        seconds = statistics.median(figures["seconds"])
        assert len(figures["seconds"]) == 3
        assert float(row["time (ms)"].split()[0]) == pytest.approx(1e3 * seconds, abs=0.0051)
        assert float(row["images/s"].replace(",", "")) == pytest.approx(int(row["batch"]) / seconds, abs=0.051)
        assert figures["to_static"] == pytest.approx(seconds / statistics.median(static["seconds"]))
        assert figures["to_ours"] == pytest.approx(seconds / statistics.median(ours["seconds"]))
        assert figures["floor_to_static"] == pytest.approx(figures["floor_seconds"] / static["floor_seconds"])
        assert figures["peak_bytes"] is None


def test_the_faster_layout_is_taken(benchmark, monkeypatch):
    contenders = benchmark.Pair.read(MODEL).contenders()
    assert [(c.name, c.layout) for c in contenders] == [
        *(("static", "NCHW"), ("static", "NHWC"), ("upstream", "NCHW"), ("ours", "NCHW"), ("ours", "NHWC"))
    ]
    seconds = [[3.0, 1.0, 3.0], [2.0, 2.0, 2.0], [9.0, 9.0, 9.0], [4.0, 4.0, 4.0], [5.0, 5.0, 1.0]]
    rounds = sys.modules["timing.rounds"]
    monkeypatch.setattr(rounds, "measure", lambda steps, *_: dict(zip(steps, seconds, strict=True)))
    networks = {c: (torch.nn.Identity(), torch.zeros(1)) for c in contenders}
    timed = rounds.time_case(networks, "infer", "fp32", rounds=3)
    assert [(c.name, c.layout) for c in timed] == [("static", "NHWC"), ("upstream", "NCHW"), ("ours", "NCHW")]


def test_networks_compute_the_same_each_in_its_own_way(benchmark):
    contenders = {c.name: c for c in benchmark.Pair.read(MODEL).contenders(["mix_inputs"])}
    networks = {name: c.build(torch.device("cpu")) for name, c in contenders.items()}
    images = {name: c.images(2, torch.device("cpu")) for name, c in contenders.items()}
    assert images["upstream"].is_contiguous()
    assert images["ours"].is_contiguous(memory_format=torch.channels_last)
    layers = {name: [m for m in net.modules() if isinstance(m, KWLayer)] for name, net in networks.items()}
    for name, implementation in (("upstream", "grouped"), ("ours", "auto"), ("mix_inputs", "mix_inputs")):
        assert {layer.implementation for layer in layers[name]} == {implementation}
        for layer, other in zip(layers[name], layers["upstream"], strict=True):
            assert layer.cells.is_contiguous() == (name == "upstream")
            assert torch.equal(layer.cells, other.cells)
    assert not layers["static"]
    folded = benchmark.Pair.read(MODEL).contenders(["merged"])[-1].build_for(images["ours"], "bf16")
    products = [m.products for m in folded.modules() if isinstance(m, KWLayer)]
    assert {p.dtype for p in products if p is not None} == {torch.bfloat16}
    assert networks["static"].conv1.weight.shape == networks["ours"].conv1.weight.shape


@pytest.mark.parametrize("model", [MODEL, "quickstart/resnet18"])
def test_what_is_compared_depends_on_every_weight(benchmark, model):
    """The last norm of a residual branch starts at zero, which would hide the branch."""
    contender, device = benchmark.Contender("ours", read_config(model).model), torch.device("cpu")
    net = contender.build(device).train()
    net(contender.images(2, device)).square().sum().backward()
    unused = [name for name, p in net.named_parameters() if name.endswith("weight") and not p.grad.abs().max() > 0]
    assert not unused


def test_nothing_is_printed_of_results_that_differ(benchmark, monkeypatch, capsys):
    grouped = type(IMPLEMENTATIONS["grouped"])
    right = grouped.__call__
    monkeypatch.setattr(grouped, "__call__", lambda *a: right(*a) * (1 + 1e-6))
    for mode in ([], ["--layers"]):
        with pytest.raises(SystemExit, match=r"error: the two orders differ by \d.*; no figure is printed"):
            run(benchmark, monkeypatch, *mode)
        assert not capsys.readouterr().out


def test_nothing_is_printed_of_a_folded_network_that_differs(benchmark, monkeypatch, capsys):
    def fold_wrong(net, x):
        with torch.no_grad():
            next(m for m in net.modules() if isinstance(m, KWLayer)).warehouse.weight.add_(1e-6)
        return net

    monkeypatch.setattr(benchmark, "merge_", fold_wrong)
    with pytest.raises(SystemExit, match="differ by"):
        run(benchmark, monkeypatch, "--implementation", "merged")
    assert not capsys.readouterr().out


@pytest.fixture
def compilations(monkeypatch):
    """What is compiled, without the minutes that machine code takes."""
    seen, compile_ = [], torch.compile

    def compile_to_graph(net, mode, fullgraph, dynamic):
        seen.append(mode)
        return compile_(net, backend="eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_to_graph)
    return seen


def smaller(path, name, **fields):
    """Write a configuration that differs in some fields."""
    path.write_text(json.dumps(json.loads((SCRIPTS.parent / "configs" / f"{name}.json").read_text()) | fields))
    return path


def test_every_network_is_compiled_if_asked_for(benchmark, machine, monkeypatch, capsys, tmp_path, compilations):
    small = smaller(tmp_path / "small.json", MODEL, model_kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})
    asked = ["--model", small, "--mode", "infer", "--implementation", "merged", "--compile"]
    assert run(benchmark, monkeypatch, *asked) == 0
    shown = capsys.readouterr().out
    assert "torch.compile (default)" in shown
    assert [row["network"] for row in table(shown)] == [*NETWORKS, "merged"]
    assert compilations == ["default"] * 8  # one to compare, then all but upstream's in two layouts


def test_nothing_is_printed_of_a_compiled_network_that_differs(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda net, **_: lambda x: 1.001 * net(x))
    with pytest.raises(SystemExit, match="differ by"):
        run(benchmark, monkeypatch, "--mode", "infer", "--compile")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("errors", "passes"), [(1, True), (1000, False)])
def test_results_may_differ_by_what_a_few_rounding_errors_of_the_input_change(benchmark, monkeypatch, errors, passes):
    monkeypatch.setattr(sys.modules["timing.parity"], "TOLERANCE", 0.0)
    contender, device = benchmark.Pair.read(MODEL).contenders()[-1], torch.device("cpu")
    net, x = contender.build(device).double().eval(), contender.images(2, device).double()
    differing = net, lambda x: net(x * (1 + errors * torch.finfo(x.dtype).eps * torch.randn_like(x)))
    if passes:
        assert 0 < benchmark.check_outputs(net, x, differing) < 1e-9
    else:
        with pytest.raises(SystemExit, match="differ by"):
            benchmark.check_outputs(net, x, differing)


def test_a_gradient_that_is_not_finite_counts_as_different(benchmark, monkeypatch):
    grouped = type(IMPLEMENTATIONS["grouped"])
    right = grouped.__call__
    monkeypatch.setattr(grouped, "__call__", lambda *a: right(*a) * float("nan"))
    with pytest.raises(SystemExit, match="differ by nan"):
        run(benchmark, monkeypatch)


def test_the_floor_counts_what_is_known_of_resnet18(benchmark):
    pair = benchmark.Pair.read("resnet18/kw1x_resnet18")
    static = benchmark.Floor(pair.static, pair.static)
    assert sum(orders[0].operations for orders in static.layers) == pytest.approx(1.814e9, rel=1e-3)
    assert sum(orders[0].values for orders in static.layers) == pytest.approx(11.69e6, rel=1e-3)
    converted = benchmark.Floor(pair.converted, pair.static)
    added = sum(orders[0].operations for orders in converted.layers) - 1.814e9
    assert added == pytest.approx(0.385e9, rel=0.02)  # mixing kernels, and the attentions
    assert sum(orders[0].values for orders in converted.layers) == pytest.approx(11.93e6, rel=2e-3)


def test_the_floor_takes_the_cheapest_order(benchmark):
    pair = benchmark.Pair.read(MODEL)
    floor = benchmark.Floor(pair.converted, pair.static)
    fast_memory = benchmark.Machine({"fp32": 1e9}, read=1e30, copy=1e30)
    least = sum(min(work.operations for work in orders) for orders in floor.layers)
    assert floor.seconds(7, False, "fp32", fast_memory) == pytest.approx(7 * least / 1e9)
    fast_products = benchmark.Machine({"fp32": 1e30}, read=1e9, copy=1e9)
    read = sum(min(work.values for work in orders) for orders in floor.layers)
    assert floor.seconds(7, False, "fp32", fast_products) == pytest.approx(4 * read / 1e9)
    assert floor.seconds(7, True, "fp32", fast_products) == pytest.approx(12 * read / 1e9)


def test_no_network_is_faster_than_its_floor(benchmark, monkeypatch, capsys):
    assert run(benchmark, monkeypatch, "--batch", 16, "--precision", "fp32", "bf16") == 0
    out = capsys.readouterr().out
    assert "GFLOP/s (matrix product)" in out
    for row in table(out):
        assert 0 < float(row["floor (ms)"]) < float(row["time (ms)"].split()[0])
        assert float(row["floor to static"]) >= 1


def test_a_sweep_goes_through_its_values(benchmark, machine, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "cost.png"
    arguments = ["--sweep", "resolution", "--values", 32, 64, "--mode", "infer", "--plot", picture]
    assert run(benchmark, monkeypatch, *arguments) == 0
    rows = table(capsys.readouterr().out)
    assert [(row["side"], row["network"]) for row in rows] == [(s, n) for s in ("32", "64") for n in NETWORKS]
    floors = [float(row["floor (ms)"]) for row in rows if row["network"] == "static"]
    assert floors[1] > floors[0]
    assert Image.open(picture).size[0] > 500
    assert run(benchmark, monkeypatch, "--sweep", "batch", "--values", 1, 4, "--mode", "infer") == 0
    assert [row["batch"] for row in table(capsys.readouterr().out)] == ["1"] * 3 + ["4"] * 3


def test_a_sweep_says_which_budgets_cannot_be_built(benchmark, machine, monkeypatch, capsys):
    arguments = ["--sweep", "budget", "--mode", "infer", "--values"]
    assert run(benchmark, monkeypatch, *arguments, 0.01, 0.5, 2) == 0
    shown = capsys.readouterr()
    assert [row["budget"] for row in table(shown.out)] == ["0.5×"] * 3 + ["2×"] * 3
    assert shown.err.startswith("budget 0.01× is left out: ")
    assert run(benchmark, monkeypatch, *arguments, 0.01) == 2
    assert "error: --sweep budget: none of the budgets can be built" in capsys.readouterr().err


def test_the_chart_has_a_panel_for_each_mode_and_a_line_for_each_network(benchmark):
    results = []
    for mode in ("infer", "train"):
        for batch, slower in ((1, 2.0), (8, 30.0)):
            case = [
                benchmark.Result(mode, "fp32", batch, 32, 1.0, name, "NCHW", [seconds], 0.1)
                for name, seconds in zip((*NETWORKS, "merged"), (1.0, slower, 1.5, 1.2), strict=True)
                if mode == "infer" or name != "merged"
            ]
            benchmark.compare(case)
            results += case
    figure = benchmark.chart.draw(results, "batch", "title")
    assert [axis.get_title() for axis in figure.axes] == ["inference, fp32", "training, fp32"]
    for axis in figure.axes:
        lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}
        assert lines["upstream"] == ([1, 8], [2.0, 30.0])
        assert lines["ours"] == ([1, 8], [1.5, 1.5])
        assert lines["floor"] == ([1, 8], [1.0, 1.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*NETWORKS, "merged", "floor"]
    by_budget = benchmark.chart.draw(
        [benchmark.Result("infer", "fp32", b, 32, 1.0, n, "NCHW", [1.0], 0.1) for b in (1, 8) for n in NETWORKS],
        "budget",
        "title",
    )
    assert [axis.get_title() for axis in by_budget.axes] == ["inference, fp32, batch 1", "inference, fp32, batch 8"]


def test_layers_are_timed_by_every_implementation(benchmark, monkeypatch, capsys, tmp_path):
    assert run(benchmark, monkeypatch, "--layers", "--json", tmp_path / "layers.json") == 0
    rows = table(capsys.readouterr().out.split("train, fp32")[0])
    *layers, total = rows
    assert sum(int(row["count"]) for row in layers) == 18 == int(total["count"])
    names = ["static", "grouped", "materialize", "mix_inputs"]
    if unavailable("cpu", torch.float32) is None:
        names.append("cpp")
    for row in layers:
        assert all(float(row[name]) > 0 for name in names)
        assert row["auto"] in names[1:]
        best = min(float(row[name]) for name in names[1:])
        assert float(row["auto / best"]) == pytest.approx(float(row[row["auto"]]) / best, rel=0.1)
    assert all(float(row["merged"]) > 0 for row in layers)
    for name in (*names, "merged"):
        assert float(total[name]) == pytest.approx(sum(int(r["count"]) * float(r[name]) for r in layers), abs=0.2)
    kept = json.loads((tmp_path / "layers.json").read_text())["layers"]
    assert [record["mode"] for record in kept] == ["infer", "train"]
    assert [layer["auto"] for layer in kept[0]["layers"]] == [row["auto"] for row in layers]


@pytest.mark.usefixtures("untuned")
def test_tuned_networks_take_what_was_measured(benchmark, machine, monkeypatch, capsys):
    monkeypatch.setattr(
        tuning,
        "measure",
        lambda steps, rounds, *_, **__: {name: [1.0 + (name != "materialize")] * rounds for name in steps},
    )
    assert run(benchmark, monkeypatch, "--tune", "--batch", 2, 3, "--mode", "infer") == 0
    said = capsys.readouterr().out
    assert ", tuned; parity" in said
    assert len(table(said)) == 6
    taken = selection.remembered()
    assert {*taken.values()} <= {"materialize", "auto"}  # auto where streamed was estimated already
    for batch in (2, 3):
        assert any(f"images=({batch}, " in call and name == "materialize" for call, name in taken.items())


@needs_compiler
def test_what_would_write_too_much_is_not_tried(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "MOST_BYTES", 0)
    assert run(benchmark, monkeypatch, "--layers", "--mode", "infer") == 0
    *layers, total = table(capsys.readouterr().out)
    for row in (*layers, total):
        assert not {"grouped", "materialize", "mix_inputs"} & row.keys()
        assert float(row["cpp"]) > 0


def test_memory_is_that_of_the_network_alone(benchmark, machine, monkeypatch, capsys):
    held = torch.zeros(200 << 18)  # 200 MiB that a fresh process does not have
    assert run(benchmark, monkeypatch, "--memory", "--mode", "train", "--batch", 64) == 0
    rows = table(capsys.readouterr().out)
    peaks = {row["network"]: float(row["peak (MiB)"]) for row in rows}
    assert peaks["ours"] == pytest.approx(peaks["static"], rel=0.3)
    assert max(peaks["static"], peaks["ours"]) < peaks["upstream"] < held.nbytes / 2**20
    for row in rows:
        assert float(row["peak to static"]) == pytest.approx(peaks[row["network"]] / peaks["static"], rel=0.1)
    contender = benchmark.Pair.read(MODEL).contenders()[0]
    small = benchmark.peak_bytes(contender, True, "fp32", 2, torch.device("cpu"))
    assert 8 * 183_994 < small < peaks["static"] * 2**20 / 2  # parameters and gradients at the least


MOBILENET, DEIT = "mobilenetv2_050/kw1d2x_mobilenetv2_050", "deit_tiny/kw1x_deit_tiny"


@pytest.mark.parametrize("model", [MOBILENET, DEIT, "convnext"])
def test_every_family_can_be_timed(benchmark, machine, monkeypatch, capsys, tmp_path, model):
    if model == "convnext":
        shape = {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]}
        model = smaller(tmp_path / "small.json", "convnext/kw1x_convnext_tiny", model_kwargs=shape)
    assert run(benchmark, monkeypatch, "--model", model, "--size", 32) == 0
    assert len(table(capsys.readouterr().out)) == 6


@pytest.mark.parametrize("model", [MOBILENET, DEIT])
def test_linear_and_depthwise_layers_can_be_timed(benchmark, monkeypatch, capsys, model):
    assert run(benchmark, monkeypatch, "--model", model, "--size", 32, "--layers", "--mode", "infer") == 0
    *layers, _ = table(capsys.readouterr().out)
    for row in layers:
        depthwise = row["kernel"].split("×")[1] == "1"  # whose kernels can only be mixed whole
        assert (row["mix_inputs"] == "–") == depthwise
        assert float(row[row["auto"]]) > 0


def test_a_single_value_per_channel_is_refused_in_one_line(benchmark, machine, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: train with batches of 1: .*more than 1 value per channel"):
        run(benchmark, monkeypatch, "--mode", "train", "--batch", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no_such_model"], "no_such_model"),
        (["--model", "quickstart/resnet18"], "resnet18 is a static network"),
        (["--static", MODEL], "kw_resnet18 is a converted network"),
        (["--static", "no_such_model"], "no_such_model"),
        (["--model", "deit_tiny/kw1x_deit_tiny", "--size", "8"], "cannot take images of 8×8"),
        (["--precision", "tf32"], "tf32 is of GPUs"),
        (["--implementation", "triton"], "triton runs on a GPU only"),
        (["--implementation", "quick"], "there is no 'quick'; there are materialize"),
        (["--values", "1"], "--values means nothing without --sweep"),
        (["--sweep", "resolution", "--values", "32.5"], "a resolution is a whole number"),
        (["--layers", "--plot", "cost.png"], "--layers goes with none of"),
        (["--layers", "--compile"], "--layers goes with none of"),
        (["--compile", "--memory"], "leave out --compile"),
        (["--tune", "--compile"], "--tune goes with none of"),
        (["--tune", "--layers"], "--tune goes with none of"),
        (["--plot", "cost.tiff2"], "must end with the name of a picture's format"),
        (["--json", "no/such/folder/figures.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(benchmark, monkeypatch, capsys, arguments, message):
    assert run(benchmark, monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--size", "-1"]])
def test_a_wrong_option_is_refused(benchmark, monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run(benchmark, monkeypatch, *arguments)
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err
