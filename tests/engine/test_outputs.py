"""What cannot be written is said before the work starts, and what fails later names its file."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import SaveError, World, evaluate_run, train_run
from kernelwarehouse.engine.outputs import check_outputs
from kernelwarehouse.models import build_model

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def no_work(monkeypatch):
    """Anything that reads data or builds a network fails."""
    for name in ("build_model", "build_dataset", "build_datasets", "load_checkpoint"):
        monkeypatch.setattr(f"kernelwarehouse.engine.run.{name}", None)


@pytest.mark.parametrize("field", ["output_dir", "log_dir"])
def test_a_folder_that_cannot_be_is_an_error_before_training(tiny_config, cpu, tmp_path, no_work, field):
    (tmp_path / "file").touch()
    config = tiny_config(**{field: str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match=rf"'{field}': .*file/run cannot be written: Not a directory"):
        train_run(config, cpu)


@pytest.mark.parametrize("field", ["output_dir", "per_class", "predictions", "confusion"])
def test_a_file_that_cannot_be_is_an_error_before_evaluation(tiny_config, cpu, tmp_path, no_work, field):
    (tmp_path / "file").touch()
    config = tiny_config(eval=True, resume="weights.pth", **{field: str(tmp_path / "file" / "report.png")})
    with pytest.raises(ConfigError, match=rf"'{field}': .*report\.png cannot be written: Not a directory"):
        evaluate_run(config, cpu)


def test_a_picture_must_have_the_name_of_a_format(tiny_config, cpu, tmp_path, no_work):
    config = tiny_config(eval=True, resume="weights.pth", confusion=str(tmp_path / "confusion.jpgg"))
    with pytest.raises(ConfigError, match=r"'confusion': .*confusion\.jpgg must end with .*\.png"):
        evaluate_run(config, cpu)


def test_trying_a_place_leaves_it_as_it_was(tiny_config, cpu, tmp_path):
    there = tmp_path / "predictions.csv"
    there.write_text("as it was")
    files = {"predictions": str(there), "per_class": str(tmp_path / "per_class.csv"), "log_dir": str(tmp_path / "tb")}
    check_outputs(tiny_config(eval=True, output_dir=str(tmp_path / "run"), **files).run, cpu)
    assert there.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["predictions.csv", "run"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
@pytest.mark.parametrize("name", ["log.txt", "config.json", "eval.json"])
def test_a_pipe_that_nobody_reads_keeps_no_run_waiting(tiny_config, cpu, tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"'output_dir': .*{name} is no file"):
        check_outputs(tiny_config(eval=name == "eval.json", output_dir=str(tmp_path)).run, cpu)


def test_only_the_main_process_tries(tiny_config, cpu, tmp_path):
    check_outputs(tiny_config(output_dir=str(tmp_path / "run")).run, World(cpu.device, rank=1, size=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("field", ["predictions", "per_class"])
def test_a_report_that_fails_while_it_is_written_names_its_file(tiny_config, cpu, tmp_path, field):
    torch.save({"model": build_model(tiny_config().model).state_dict()}, tmp_path / "weights.pth")
    config = tiny_config(eval=True, resume=str(tmp_path / "weights.pth"), **{field: "/dev/full"})
    with pytest.raises(SaveError, match="/dev/full: could not be written: No space left on device"):
        evaluate_run(config, cpu)


def script(name, monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
    return module.main()


@pytest.mark.parametrize("name", ["plot_run", "show_attention"])
@pytest.mark.parametrize("output", ["absent/picture.png", "picture", "."])
def test_scripts_say_in_one_line_that_a_picture_cannot_be(tmp_path, monkeypatch, capsys, name, output):
    inputs = {"plot_run": ["run"], "show_attention": ["checkpoint.pth", "image.png"]}[name]
    assert script(name, monkeypatch, *inputs, "--output", tmp_path / output) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [None, "no JSON\n", '{"loss": 1}\n', "[1]\n"])
def test_a_folder_without_a_log_has_no_curves(tmp_path, monkeypatch, capsys, content):
    if content is not None:
        (tmp_path / "log.txt").write_text(content)
    assert script("plot_run", monkeypatch, tmp_path, "--output", tmp_path / "curves.png") == 2
    assert "log.txt: no log of a run: " in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_a_log_whose_last_line_a_kill_cut_short_has_curves(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text(json.dumps({"epoch": 0, "train_loss": 1.0}) + '\n{"epoch": 1, "tra')
    assert script("plot_run", monkeypatch, tmp_path, "--output", tmp_path / "curves.png") == 0
    assert (tmp_path / "curves.png").exists()
