"""The report on a GPU: nothing in one stage can stop the next, and all of its stages run, here as small as they go."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def path():
    """Where Python looks when a script is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture
def conduct(tmp_path):
    """Runs stages, given by name, what gives their cases, and arguments of their own; returns the records."""
    conductor, journal = (importlib.import_module(f"gpu.{name}") for name in ("conductor", "journal"))

    def run(*stages, limit=60, changed=lambda: None, **arguments):
        found = journal.Journal(tmp_path / "report.jsonl")
        arguments = {"limit": 30, "case_limit": 10, "patience": 10, **arguments}
        stages = [conductor.Stage(name, cases, **arguments | more) for name, cases, more in stages]
        conductor.conduct(stages, found, tmp_path / "log.txt", limit, changed)
        return list(found.read())

    return run


def case(name, run):
    return importlib.import_module("gpu.cases").Case(name, run)


def fine(*names):
    """What gives cases that find out their name."""
    return lambda: [case(name, lambda name=name: {"found": name}) for name in names]


def found(records):
    return [record["result"]["found"] for record in records if "result" in record]


def errors(records):
    return {record["case"]: record["error"] for record in records if "error" in record}


def ends(records):
    return {record["stage"]: record["ended"] for record in records if "ended" in record}


def fail():
    raise RuntimeError("this kernel cannot run")


def test_a_case_that_fails_costs_itself_alone(conduct, tmp_path):
    records = conduct(("first", lambda: [case("bad", fail), *fine("b")()], {}), ("second", fine("c"), {}))
    assert found(records) == ["b", "c"]
    assert errors(records) == {"bad": "RuntimeError: this kernel cannot run"}
    assert ends(records) == {"first": "done", "second": "done"}
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_a_stage_without_cases_does_not_stop_the_next(conduct):
    def no_cases():
        raise RuntimeError("no network could be built")

    records = conduct(("first", no_cases, {}), ("second", fine("c"), {}))
    assert found(records) == ["c"]
    assert ends(records) == {"first": "its cases could not be made (see the log)", "second": "done"}


def test_a_stage_goes_on_behind_a_case_that_ends_its_process(conduct):
    """As when a GPU's context is broken, or the system kills what takes too much memory."""
    cases = [case("a", lambda: {"found": "a"}), case("deadly", lambda: os._exit(70)), *fine("b", "c")()]
    records = conduct(("first", lambda: cases, {}), ("second", fine("d"), {}))
    assert found(records) == ["a", "b", "c", "d"]
    assert errors(records) == {"deadly": "its process ended with status 70"}
    assert ends(records) == {"first": "done", "second": "done"}


def hang():
    """As in a driver, where Python cannot interrupt it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    while True:
        time.sleep(0.1)


def test_a_case_that_hangs_is_ended_and_the_stage_goes_on(conduct):
    cases = [case("endless", hang), *fine("b")()]
    records = conduct(("first", lambda: cases, {}), ("second", fine("c"), {}), case_limit=0.3, patience=0.7)
    assert found(records) == ["b", "c"]
    assert errors(records) == {"endless": "it hung, and its process was ended"}


def test_a_case_beyond_its_time_is_given_up(conduct):
    cases = [case("slow", lambda: time.sleep(20)), *fine("b")()]
    records = conduct(("first", lambda: cases, {}), case_limit=0.2)
    assert found(records) == ["b"]
    assert errors(records) == {"slow": "OutOfTime: it took more than 0.2 s"}


def test_a_stage_beyond_its_limit_is_ended_with_all_that_it_has_started(conduct, tmp_path):
    sign = tmp_path / "alive"
    code = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(sign)!r}).write_text(str(time.time())); time.sleep(0.05)"
    )

    def start():
        subprocess.Popen([sys.executable, "-c", code])
        while not sign.exists():
            time.sleep(0.05)
        time.sleep(60)

    records = conduct(
        ("first", lambda: [case("endless", start)], {"limit": 3, "case_limit": 60}), ("second", fine("c"), {})
    )
    assert found(records) == ["c"]
    assert ends(records) == {"first": "stopped at its limit", "second": "done"}
    last = sign.read_text()
    time.sleep(0.5)
    assert sign.read_text() == last


def test_what_the_whole_has_no_time_for_is_not_begun(conduct):
    records = conduct(("first", fine("a"), {}), limit=0)
    assert ends(records) == {"first": "no time was left for it"}


def test_results_are_on_disk_before_the_next_stage_starts(conduct, tmp_path):
    report, journal = (importlib.import_module(f"gpu.{name}") for name in ("report", "journal"))
    path = tmp_path / "report.md"
    description = {"name": "this machine"}

    def read():
        records = map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())
        return {"found": [description in (r.get("result") for r in records), "this machine" in path.read_text()]}

    records = conduct(
        ("machine", lambda: [case("description", lambda: description)], {}),
        ("second", lambda: [case("read", read)], {}),
        changed=lambda: report.write(journal.Journal(tmp_path / "report.jsonl"), path),
    )
    assert records[-2]["result"]["found"] == [True, True]


def test_processes_share_the_cases_of_a_stage(conduct):
    def cases():
        return [case(str(i), lambda: {"found": os.getpid()}) for i in range(6)]

    assert len(set(found(conduct(("first", cases, {"shares": 3}))))) == 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The records and the text of the smallest report, and the names of its files."""
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, SCRIPTS / "gpu_report.py", "--tiny", "--device", "cpu", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()
    records = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    assert done.stdout.strip() == (folder / "report.md").read_text().strip()
    return records, done.stdout, sorted(path.name for path in folder.iterdir())


class TestTiny:
    def test_all_stages_are_done(self, tiny):
        records, _, files = tiny
        assert ends(records) == dict.fromkeys(("machine", "correctness", "layers", "networks", "training"), "done")
        assert not errors(records)
        assert files == ["log.txt", "report.jsonl", "report.md"]

    def test_every_implementation_of_every_operator_is_compared(self, tiny):
        odd = importlib.import_module("gpu.odd")
        names = {r["case"] for r in tiny[0] if r["stage"] == "correctness" and "result" in r}
        layers = dict(odd.odd_layers(("layer",)))
        built_in = importlib.import_module("kernelwarehouse.models.operators").built_in_operators()
        assert set(built_in) <= {name.split(" ")[0] for name in layers}
        wanted = {f"{i} fp64 {name}" for name, layer in layers.items() for i in layer.candidates if layer.can_try(i)}
        assert wanted
        assert wanted <= names

    def test_layers_are_timed_in_the_order_of_their_worth(self, tiny):
        rows = [r["result"] for r in tiny[0] if r["stage"] == "layers" and "result" in r]
        worth = [row["count"] * row["floor"] for row in rows]
        assert worth == sorted(worth, reverse=True)
        assert all({"static", "grouped", row["estimated"]} <= set(row["seconds"]) for row in rows)

    def test_networks_are_timed_beside_the_static_one_and_upstreams_formulation(self, tiny):
        rows = [r["result"] for r in tiny[0] if r["stage"] == "networks" and "result" in r]
        for mode in ("infer", "train"):
            names = [row["contender"] for row in rows if row["mode"] == mode]
            assert names == ["static", "ours", "upstream", "ours, tuned"]
        assert "| / static |" in tiny[1]

    def test_a_killed_training_goes_on_as_if_it_was_not(self, tiny):
        (result,) = (r["result"] for r in tiny[0] if r["stage"] == "training" and "result" in r)
        assert result["resumed_as_uninterrupted"]
        assert result["weights_differ"] == 0
        assert len(result["losses"]["killed"]) == 2


def test_a_small_error_is_found_to_be_wrong(monkeypatch):
    torch = importlib.import_module("torch")
    correctness, odd = (importlib.import_module(f"gpu.{name}") for name in ("correctness", "odd"))
    layer = next(iter(odd.odd_layers(("layer",))))[1]
    compared = correctness.Compared(layer, torch.device("cpu"))
    assert not compared.compare("materialize", "fp32", 0)["wrong"]
    run = compared._run

    def with_error(device, dtype, implementation, *rest):
        found = run(device, dtype, implementation, *rest)
        (gradient,) = found["gradients of the input"]
        return {**found, "gradients of the input": [gradient * (1 + 1e-4 * (implementation == "materialize"))]}

    monkeypatch.setattr(compared, "_run", with_error)
    result = compared.compare("materialize", "fp32", 0)
    assert result["wrong"]
    assert result["of"] == "gradients of the input"
    assert not compared.compare("grouped", "fp32", 0)["wrong"]


def test_the_packed_runs_are_within_their_own_spread_and_a_worse_one_is_not():
    curve = importlib.import_module("gpu.curve")
    runs = curve.packed()
    assert len(runs) == 3
    assert all(found["within"] for run in runs for found in curve.compare(run).values())
    worse = {**runs[0], "train_loss": [loss + 0.1 for loss in runs[0]["train_loss"]]}
    assert [found["within"] for found in curve.compare(worse).values()] == [False, True, True]
    with pytest.raises(ValueError, match="a run of 30 epochs is compared, found 2"):
        curve.compare({name: values[:2] for name, values in runs[0].items()})


def test_the_readme_has_the_figures_of_the_reports_that_are_kept():
    figures = importlib.import_module("gpu.figures")
    text = figures.README.read_text(encoding="utf-8")
    assert text == figures.with_figures(text)
    assert (figures.NONE in text) != any(figures.RESULTS.glob("*.jsonl"))


def test_a_report_becomes_a_section_of_the_readme(tiny, tmp_path, monkeypatch):
    figures = importlib.import_module("gpu.figures")
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(record) + "\n" for record in tiny[0]))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    text = figures.with_figures(figures.README.read_text(encoding="utf-8"))
    assert figures.NONE not in text
    assert "`card.jsonl`: torch" in text
    assert "| kw1x_resnet18 | infer |" in text
