"""The command line, as its user meets it."""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import TINY

from kernelwarehouse.configs.schema import ConfigError, known_fields
from kernelwarehouse.engine import EXIT_INTERRUPTED, parse_arguments
from kernelwarehouse.engine.checkpoint import newest_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("main", ROOT / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_the_file_wins_over_defaults_and_the_command_line_over_the_file(file):
    config = parse_arguments(["--kw_config", file, "--epochs", "5", "--cell_num_ratio", "2"])
    assert (config.run.lr, config.run.batch_size, config.run.epochs) == (4e-3, 256, 5)
    assert config.model.operator_fields["cell_num_ratio"] == 2.0
    assert config.model.operator_fields["sharing_range"] == ("layer", "conv")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--eval", "eval", True),
        ("--eval true", "eval", True),
        ("--eval False", "eval", False),
        ("--lr 1e-3", "lr", 1e-3),
        ("--clip_grad none", "clip_grad", None),
        ("--opt_betas 0.9 0.95", "opt_betas", (0.9, 0.95)),
        ("--warmup_steps -1", "warmup_steps", -1),
        ("--local_rank 3", "local_rank", 3),
        ("--local-rank=3", "local_rank", 3),
        ("--aa=null", "aa", None),
    ],
)
def test_values_have_the_type_of_their_field(file, words, field, value):
    assert getattr(parse_arguments(["--kw_config", file, *words.split()]).run, field) == value


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--nonlocal_basis_ratio 0.0625", "nonlocal_basis_ratio", 0.0625),  # upstream makes it a list, and fails
        ("--cell_num_ratio 1 1 0.5 4", "cell_num_ratio", (1.0, 1.0, 0.5, 4.0)),
        ("--sharing_range layer pwconv", "sharing_range", ("layer", "pwconv")),
    ],
)
def test_one_ratio_is_a_number_and_several_are_one_for_each_warehouse(file, words, field, value):
    assert parse_arguments(["--kw_config", file, *words.split()]).model.operator_fields[field] == value


def test_a_mapping_is_written_as_json(file):
    words = ["--kw_config", file, "--model_kwargs", '{"channels": [4, 4, 4, 4]}']
    assert parse_arguments(words).model.model_kwargs == {"channels": [4, 4, 4, 4]}


def test_every_field_is_an_option_with_a_description(capsys):
    with pytest.raises(SystemExit) as done:
        parse_arguments(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in known_fields())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epoch 3", "command line: unknown field 'epoch'; did you mean 'epochs'?"),
        ("--bach_size=3", "command line: unknown field 'bach_size'; did you mean 'batch_size'?"),
        ("extra", "command line: unexpected argument 'extra'"),
    ],
)
def test_a_mistyped_option_is_named_with_its_nearest(file, words, message):
    with pytest.raises(ConfigError) as error:
        parse_arguments(["--kw_config", file, *words.split()])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs many", "field 'epochs': expected a whole number, found 'many'"),
        ("--kw_config absent.json", "absent.json: no such configuration file"),
        ("--device cuda:7", "field 'device'"),
        ("--data_set IMNET", "pass --data_path FOLDER"),
        ("--data_set IMNET --data_path /nowhere", "no folder /nowhere/train"),
        ("--nb_classes 7", "pass --nb_classes 10"),
        ("--batch_size 5000", "more than the 1437 training images"),
        ("--warmup_epochs 3", "pass a smaller --warmup_epochs"),
        ("--model kw_resnet19", "kw_resnet18"),
        ("--opt adamx", "adamx"),
        ("--eval", "--resume CHECKPOINT"),
        ("--eval --resume absent.pth", "absent.pth: no such checkpoint"),
        ("--resume absent.pth", "absent.pth: no such checkpoint"),
        ("--finetune absent.pth", "absent.pth: no such checkpoint"),
        ("--output_dir /dev/null/run", "field 'output_dir': /dev/null/run cannot be written"),
        ("--eval --resume absent.pth --predictions /nowhere/p.csv", "field 'predictions': /nowhere/p.csv cannot be"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(main, file, words, message, capsys):
    assert main(["--kw_config", file, *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_training_and_then_evaluating_its_checkpoint(main, file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["--kw_config", file, "--output_dir", str(run)]) == 0
    last = json.loads((run / "log.txt").read_text().splitlines()[-1])
    capsys.readouterr()
    assert main(["--kw_config", file, "--eval", "true", "--resume", str(run / "checkpoint-1.pth")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}"


def test_the_kept_configuration_starts_the_same_run(main, file, tmp_path):
    assert main(["--kw_config", file, "--epochs", "1", "--output_dir", str(tmp_path / "run")]) == 0
    kept = parse_arguments(["--kw_config", str(tmp_path / "run" / "config.json")])
    assert kept == parse_arguments(["--kw_config", file, "--epochs", "1", "--output_dir", str(tmp_path / "run")])


@pytest.fixture
def start(main, tmp_path):
    """A function that runs main.py's main in a process of its own, which writes its errors into a file."""
    processes, errors = [], tmp_path / "errors"

    def work(prepare, words):
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
        with errors.open("w") as file, open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # in place of pytest's
        prepare()
        raise SystemExit(main(words))

    def begin(*words, prepare=lambda: None):
        processes.append(multiprocessing.get_context("fork").Process(target=work, args=(prepare, words)))
        processes[-1].start()
        return processes[-1], errors

    yield begin
    for process in processes:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_process_with_its_state_saved_and_status_75(start, file, tmp_path, number):
    run = tmp_path / "run"
    process, errors = start("--kw_config", file, "--epochs", "10000", "--output_dir", str(run), "--disable_eval")
    end = time.monotonic() + 300
    while not list(run.glob("checkpoint-*.pth")):
        assert process.is_alive(), errors.read_text()
        assert time.monotonic() < end, "no checkpoint within 300 s"
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(300)
    assert process.exitcode == EXIT_INTERRUPTED == 75
    assert errors.read_text() == "told to end by a signal\n"
    path, state = newest_checkpoint(run)
    assert state["iteration"] > 0
    assert path.name == f"checkpoint-{state['epoch'] + 1}-{state['step']}.pth"


def test_a_save_that_fails_is_one_line_and_status_1_and_loses_nothing(start, main, file, tmp_path, capsys):
    """A limit on the size of files, which the second epoch's checkpoint does not fit, stands for a full disk."""
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    words = ["--kw_config", file, "--output_dir", str(run)]
    assert main([*words, "--epochs", "1"]) == 0
    before = {path.name: path.read_bytes() for path in run.glob("checkpoint-*")}
    process, errors = start(*words, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    process.join(300)
    error = errors.read_text()
    assert process.exitcode == 1, error
    assert error.startswith("error: ")
    assert "could not be written, and is as it was before" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.glob("checkpoint-*")} == before
    assert main(words) == 0
    assert "continuing from" in capsys.readouterr().out
    assert [json.loads(line)["epoch"] for line in (run / "log.txt").read_text().splitlines()] == [0, 1]


def test_a_terminal_that_closes_ends_the_process_with_its_state_saved_and_status_75(main, file, tmp_path):
    """The kernel sends SIGHUP, and from then on refuses what is written there: the bar and the last line."""
    pty, run = pytest.importorskip("pty"), tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os._exit(main(["--kw_config", file, "--epochs", "10000", "--output_dir", str(run), "--num_workers", "1"]))
    end, status = time.monotonic() + 300, None
    while not list(run.glob("checkpoint-*.pth")):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), os.read(terminal, 10_000).decode()
        assert time.monotonic() < end, "no checkpoint within 300 s"
        time.sleep(0.05)
    os.close(terminal)
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.05)
    if status is None:
        os.kill(pid, signal.SIGKILL)
    assert status == EXIT_INTERRUPTED
    assert newest_checkpoint(run)[1]["iteration"] > 0


def test_an_interrupt_outside_of_a_training_ends_the_script_as_sigterm_does(tmp_path):
    """Here while it imports this project; the site's module sends the signal, when the import begins."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        name == 'kernelwarehouse' and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "main.py"], cwd=ROOT, env=environment, capture_output=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def limit_files(size):
    resource = pytest.importorskip("resource")
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_output():
    sys.stdout = open("/dev/full", "w")  # noqa: SIM115 - main.py's until it ends


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("words", "prepare", "message"),
    [
        ("--log_dir {0}/tb", limit_files(1000), "/tb/events.out.tfevents."),
        ("--output_dir {0}/run", limit_files(1000), "/run/config.json: could not be written, and is as it was before"),
        ("", fill_output, "standard output: could not be written: No space left on device"),
    ],
    ids=["tensorboard", "config.json", "output"],
)
def test_what_cannot_be_written_is_one_line_and_status_1(start, file, tmp_path, words, prepare, message):
    process, errors = start("--kw_config", file, *words.format(tmp_path).split(), prepare=prepare)
    process.join(300)
    error = errors.read_text()
    assert process.exitcode == 1, error
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", ["--model kw_resnet19", "--epochs 1"])
def test_errors_that_cannot_be_printed_leave_the_status(start, file, words):
    def fill_errors():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)

    process, _ = start("--kw_config", file, *words.split(), prepare=fill_errors)
    process.join(300)
    assert process.exitcode == (2 if "19" in words else 0)


def test_the_script_hides_its_folders_and_prints_no_traceback(tmp_path):
    """`import datasets` must not find this project's folder, whose name is also Hugging Face's."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, importlib.util as u\natexit.register(lambda: print('datasets:', u.find_spec('datasets')))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "main.py", "--kw_config", "resnet18/kw1x_resnet18", "--epoch", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown field 'epoch'; did you mean 'epochs'?\n"
    assert str(ROOT / "datasets") not in done.stdout
    assert "datasets:" in done.stdout
