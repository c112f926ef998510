"""Disks that are full, have become read-only or refuse: one line says which file, and what was there is as it was."""

import ctypes
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import SaveError, evaluate_run, train_run
from kernelwarehouse.engine.checkpoint import newest_checkpoint, save_checkpoint
from kernelwarehouse.engine.log import RunLog
from kernelwarehouse.engine.outputs import KEPT, check_file, check_outputs, replacing
from kernelwarehouse.models import build_model

WORDS = "could not be written, and is as it was before: "


def in_a_child(work):
    """Do something in a process of its own; return what it returned, or the SaveError that it raised."""
    read, write = multiprocessing.get_context("fork").Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - in place of pytest's files
        try:
            write.send(work())
        except SaveError as e:
            write.send(e)
        finally:
            os._exit(0)
    write.close()
    try:
        return read.recv()
    finally:
        os.waitpid(pid, 0)


def with_small_files(work, size):
    """Do something in a process whose files can have so many bytes; this stands for a full disk."""
    resource = pytest.importorskip("resource")

    def limited():
        sys.dont_write_bytecode = True  # a module's would be cut off, and be read by all who import it later
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return work()

    return in_a_child(limited)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"old": "x" * 300}))
    (folder / "eval.json").write_text(json.dumps({"old": "y" * 300}))
    (folder / "log.txt").write_text("".join(json.dumps({"epoch": e, "loss": 1 / 3}) + "\n" for e in range(20)))
    return folder


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("config.json", lambda log: log.keep("config.json", {"new": "z" * 500})),
        ("eval.json", lambda log: log.keep("eval.json", {"new": "z" * 500})),
        ("log.txt", lambda log: log.start(19)),
    ],
)
def test_what_a_run_rewrites_survives_a_full_disk(tiny_config, cpu, run_folder, name, work):
    before = contents(run_folder)
    log = RunLog(tiny_config(output_dir=str(run_folder)).run, cpu)
    error = with_small_files(lambda: work(log), 200)
    assert str(error) == f"{run_folder / name}: {WORDS}File too large"
    assert contents(run_folder) == before
    work(log)
    assert contents(run_folder).keys() == before.keys()
    assert contents(run_folder)[name] != before[name]


@pytest.mark.parametrize(("field", "name"), [("predictions", "p.csv"), ("per_class", "c.csv"), ("confusion", "c.svg")])
def test_reports_survive_a_full_disk_too(tiny_config, cpu, tmp_path, field, name):
    torch.save({"model": build_model(tiny_config().model).state_dict()}, tmp_path / "weights.pth")
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / name).write_text("as it was")
    (tmp_path / name).symlink_to(folder / name)
    config = tiny_config(eval=True, resume=str(tmp_path / "weights.pth"), **{field: str(tmp_path / name)})
    error = with_small_files(lambda: evaluate_run(config, cpu), 100)
    assert str(error) == f"{folder / name}: {WORDS}File too large"
    assert contents(folder) == {name: b"as it was"}
    evaluate_run(config, cpu)
    assert contents(folder).keys() == {name}
    assert len(contents(folder)[name]) > 100
    assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("size", [0, 60, 1000, 5000])
def test_tensorboard_on_a_full_disk_is_an_error_and_no_thread_fails(tiny_config, cpu, tmp_path, size):
    def work():
        config = tiny_config(log_dir=str(tmp_path), epochs=10, disable_eval=True)
        train_run(config, cpu)

    error = with_small_files(work, size)
    assert isinstance(error, SaveError)
    assert str(error).endswith(": could not be written: File too large")
    assert str(error).startswith(f"{tmp_path}/events.out.tfevents.")


# A file system that becomes read-only.


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_becomes_read_only_in_the_middle_of_a_training(tiny_config, cpu, disk):
    config = tiny_config(output_dir=str(disk), save_ckpt_steps=1, disable_eval=True, epochs=1000, num_workers=0)

    def work():
        if (watcher := os.fork()) == 0:
            end = time.monotonic() + 60
            while not list(disk.glob("checkpoint-*.pth")) and time.monotonic() < end:
                time.sleep(0.01)
            while time.monotonic() < end:  # it is refused while a file is being written
                if subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode == 0:
                    break
            os._exit(0)
        try:
            train_run(config, cpu)
        finally:
            os.waitpid(watcher, 0)

    error = in_a_child(work)
    assert isinstance(error, SaveError)
    assert str(error).endswith("Read-only file system")
    with pytest.raises(ConfigError, match=r"'output_dir': .* cannot be written: Read-only file system"):
        check_outputs(config.run, cpu)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(disk)


def test_a_disk_that_becomes_read_only_in_the_middle_of_a_save(tmp_path, monkeypatch):
    """Not even the half-written file can be deleted then. No file system does so at a test's command."""
    path = tmp_path / "checkpoint-0.pth"
    save_checkpoint(path, {"model": torch.zeros(3)})
    before = path.read_bytes()

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(SaveError) as error:
        save_checkpoint(path, {"model": torch.ones(3)})
    assert str(error.value) == f"{path}: {WORDS}Read-only file system"
    assert path.read_bytes() == before


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_only_a_folder_that_cannot_be_made_durable_at_all_is_no_error(tmp_path, monkeypatch, number, fails):
    real = os.fsync

    def sync_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to ask what a descriptor is")
    monkeypatch.setattr(os, "fsync", sync_files_only)
    with pytest.raises(SaveError) if fails else nullcontext(), replacing(tmp_path / "file") as path:
        path.write_text("new")
    assert (tmp_path / "file").read_text() == "new"


# What is no file, or may not be read.


@pytest.mark.parametrize("kind", ["folder", "fifo"])
@pytest.mark.parametrize("name", [*KEPT, "checkpoint-best.pth", "checkpoint-best-ema.pth", "checkpoint-0.pth"])
def test_something_else_where_a_run_keeps_a_file_is_named_before_the_work(tiny_config, cpu, run_folder, name, kind):
    (run_folder / name).unlink(missing_ok=True)
    if kind == "folder":
        (run_folder / name).mkdir()
    else:
        os.mkfifo(run_folder / name)
    found = "a folder" if kind == "folder" else "no file"
    with pytest.raises(ConfigError, match=rf"'output_dir': {run_folder / name} is {found}, .*; move it away"):
        train_run(tiny_config(output_dir=str(run_folder)), cpu)


def test_an_evaluation_tries_its_own_file_only(tiny_config, cpu, run_folder):
    (run_folder / "train.lock").mkdir()
    run = tiny_config(eval=True, resume="weights.pth", output_dir=str(run_folder)).run
    check_outputs(run, cpu)
    (run_folder / "eval.json").unlink()
    (run_folder / "eval.json").mkdir()
    with pytest.raises(ConfigError, match=r"eval\.json is a folder"):
        check_outputs(run, cpu)


def test_a_fifo_for_a_report_is_not_opened_before_the_report(tmp_path):
    """Without a reader, that would wait for one."""
    os.mkfifo(tmp_path / "fifo")
    check_file("field 'predictions'", tmp_path / "fifo")


def without_rights(work):
    """Do something as a user who has to ask files for permission, which root has not: Linux lets it give that up."""

    def unprivileged():
        if os.getuid() == 0:
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0, os.strerror(ctypes.get_errno())
        return work()

    return in_a_child(unprivileged)


def test_a_checkpoint_that_may_not_be_read_is_passed_over_with_a_warning(tiny_config, cpu, tmp_path):
    train_run(tiny_config(output_dir=str(tmp_path / "run"), disable_eval=True), cpu)
    (tmp_path / "run" / "checkpoint-1.pth").chmod(0)

    def find():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path, _ = newest_checkpoint(tmp_path / "run")
        return path.name, [str(w.message) for w in caught]

    name, messages = without_rights(find)
    assert name == "checkpoint-0.pth"
    (message,) = messages
    assert message.endswith("run/checkpoint-1.pth: cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["config.json", "log.txt"])
def test_a_file_that_may_not_be_rewritten_is_named_before_the_work(tiny_config, cpu, run_folder, name):
    (run_folder / name).chmod(0)
    run = tiny_config(output_dir=str(run_folder)).run

    def check():
        try:
            check_outputs(run, cpu)
        except ConfigError as e:
            return str(e)

    message = without_rights(check)
    assert message == f"field 'output_dir': {run_folder / name} cannot be read and written: Permission denied"
