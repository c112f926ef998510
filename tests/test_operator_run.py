"""The whole way of an operator that the package does not know, by main.py: train, kill, resume, evaluate, deploy."""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_operator
from networks import TINY

from kernelwarehouse import build_model, load_checkpoint, merge_, plans, tune
from kernelwarehouse.engine import join, train_run
from kernelwarehouse.engine.checkpoint import read_state
from kernelwarehouse.models import operators, read_config, sharing, temperatures

ROOT = Path(__file__).parents[1]
HELPERS = Path(toy_operator.__file__).parent
FIELDS = {
    **{name: value for name, value in TINY.items() if name != "sharing_range"},
    "model": "toy_resnet18",
    "hidden_gates": 3,
    "temp_epoch": 1.5,
    "save_ckpt_steps": 1,
    "model_ema": True,
}
STEPS = 5  # of an epoch

# A second module to import, which ends the process in the middle of its second epoch as a machine would.
KILLER = f"""
import os
import signal

from kernelwarehouse.engine.keeper import Keeper

step_done = Keeper.step_done


def step_done_or_killed(self, save):
    step_done(self, save)
    if self.training.step == {STEPS + 2}:
        os.kill(os.getpid(), signal.SIGKILL)


Keeper.step_done = step_done_or_killed
"""


def main(folder, *words):
    """main.py in a process of its own, which finds modules in the helpers' folder and in `folder`."""
    path = os.pathsep.join([str(HELPERS), str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "main.py", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "killer.py").write_text(KILLER)
    (folder / "toy.json").write_text(json.dumps(FIELDS))
    return folder


@pytest.fixture(scope="module")
def command_line():
    """main.py's function, in this process."""
    spec = importlib.util.spec_from_file_location("main", ROOT / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def killed(folder):
    """What was there when the process was gone."""
    run = folder / "run"
    words = ["--import", "toy_operator", "--import", "killer", "--kw_config", str(folder / "toy.json")]
    done = main(folder, *words, "--output_dir", str(run))
    assert done.returncode == -signal.SIGKILL, done.stderr
    return sorted(path.name for path in run.glob("checkpoint-*.pth"))


@pytest.fixture(scope="module")
def resumed(folder, killed):
    """What the same command printed when it was given again."""
    words = ["--import", "toy_operator", "--kw_config", str(folder / "toy.json")]
    done = main(folder, *words, "--output_dir", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The folder of the same run in one piece, by a process that need not import torch again."""

    def train(run):
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
        config = read_config(FIELDS, {"output_dir": run})
        with join(config.run) as world:
            train_run(config, world)

    process = multiprocessing.get_context("fork").Process(target=train, args=(str(folder / "whole"),))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    return folder / "whole"


@pytest.fixture(scope="module")
def model(folder, resumed):
    """The trained network."""
    net = build_model(folder / "run" / "config.json").eval()
    load_checkpoint(net, folder / "run" / "checkpoint-1.pth")
    return net


def images(count):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(count))


def test_killed_and_started_again_it_ends_where_it_would_have(folder, killed, resumed, uninterrupted):
    run, newest = folder / "run", f"checkpoint-1-{STEPS + 2}.pth"
    assert newest in killed
    assert "checkpoint-1.pth" not in killed
    assert f"continuing from {run / newest}: 1 of 2 epochs and 2 of the next one's {STEPS} iterations" in resumed
    assert (run / "log.txt").read_text() == (uninterrupted / "log.txt").read_text()
    states = [read_state(path / "checkpoint-1.pth") for path in (run, uninterrupted)]
    for entry in ("model", "model_ema"):
        assert states[0][entry].keys() == states[1][entry].keys()
        assert all(torch.equal(value, states[1][entry][name]) for name, value in states[0][entry].items())


def test_it_has_learned_at_its_own_temperatures(folder, resumed):
    first, last = (json.loads(line) for line in (folder / "run" / "log.txt").read_text().splitlines())
    assert last["train_loss"] < first["train_loss"]
    assert [line["train_temperature"] for line in (first, last)] == [pytest.approx(2.0), 1.0]
    state = read_state(folder / "run" / "checkpoint-1.pth")
    (name,) = (name for name in state["model"] if name.endswith("mixture.weight"))
    assert not torch.equal(state["model"][name], torch.ones(3))
    assert state["config"]["operator"] == "toy"
    assert [plan["operator"] for plan in state["plans"]] == ["toy"]


def test_the_kept_configuration_evaluates_it(folder, resumed):
    run = folder / "run"
    words = ["--kw_config", str(run / "config.json"), "--eval", "--resume", str(run / "checkpoint-1.pth")]
    done = main(folder, "--import", "toy_operator", *words)
    assert done.returncode == 0, done.stderr
    last = json.loads((run / "log.txt").read_text().splitlines()[-1])
    line = f"Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}"
    assert done.stdout.splitlines()[-1] == line


@pytest.mark.parametrize("words", ["--eval --resume {run}/checkpoint-1.pth", "", "--dry_run"])
def test_without_its_import_one_line_says_what_is_missing(folder, resumed, command_line, monkeypatch, capsys, words):
    monkeypatch.setattr(operators, "_registered", {})
    words = words.format(run=folder / "run").split()
    assert command_line(["--kw_config", str(folder / "run" / "config.json"), *words]) == 2
    error = capsys.readouterr().err
    assert "config.json: model 'toy_resnet18': no operator has the prefix of 'toy'. One of another package" in error
    assert error.count("\n") == 1


def test_a_dry_run_shows_its_plan(folder, command_line, capsys):
    words = ["--kw_config", str(folder / "toy.json"), "--dry_run", "--hidden_gates", "2"]
    assert command_line(["--import", "toy_operator", *words]) == 0
    text = capsys.readouterr().out
    assert "layer2.0.downsample.0  Conv2d  8×8×1×1   mixture" in text
    assert '"hidden_gates": 2' in text


def test_what_layers_share_is_frozen_by_the_name_in_the_plan(folder, command_line, tmp_path):
    words = ["--kw_config", str(folder / "toy.json"), "--epochs", "1", "--temp_epoch", "0.5", "--freeze", "mixture"]
    assert command_line([*words, "--output_dir", str(tmp_path), "--save_ckpt_steps", "0"]) == 0
    state = read_state(tmp_path / "checkpoint-0.pth")["model"]
    (name,) = (name for name in state if name.endswith("mixture.weight"))
    assert torch.equal(state[name], torch.ones(3))


def test_it_is_exported_for_any_batch(model):
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for count in (1, 2, 5):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images(count)), model(images(count)))


def test_it_has_nothing_to_merge_or_to_tune(model):
    with pytest.raises(ValueError, match=r"^toy has nothing that could be merged: its layers depend on the input"):
        merge_(model, images(2))
    with pytest.raises(ValueError, match="to tune"):
        tune(model, images(2), training=False)
    assert temperatures(model) == {"toy": 1.0}
    assert [len(users) for users in sharing(model).values()] == [len(plans(model)[0].layers)]
