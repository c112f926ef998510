"""A folder belongs to one training: none takes another's checkpoints for its own, or deletes what it needs."""

import random
import shutil

import pytest
import torch

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import World, dry_run, train_run
from kernelwarehouse.engine.checkpoint import numbered, position, prune_checkpoints
from kernelwarehouse.engine.resume import find_checkpoint, nearest_divisor
from kernelwarehouse.models import CheckpointError


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """Folder of a run of two epochs of eleven steps."""
    folder = tmp_path_factory.mktemp("trained")
    fields = {"save_ckpt_steps": 16, "save_ckpt_num": 9, "epochs": 2, "disable_eval": True}
    train_run(tiny_config(output_dir=str(folder), **fields), World(torch.device("cpu")))
    assert names(folder) == ["checkpoint-1.pth", "checkpoint-1-16.pth", "checkpoint-0.pth"]
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def names(folder):
    return [path.name for path in numbered(folder)]


def damage(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])


# Which run finds which checkpoint, or is refused, where the folder holds those of the fixture.


@pytest.mark.parametrize("work", [train_run, dry_run])
def test_a_new_run_beside_checkpoints_of_another_is_refused(tiny_config, cpu, folder, work):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = tiny_config(output_dir=str(folder), auto_resume=False, epochs=1)
    with pytest.raises(
        ConfigError, match=r"'output_dir': .*run holds .*\(checkpoint-1\.pth and 2 more\); pass another"
    ):
        work(config, cpu)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_checkpoints_are_another_run_too(tiny_config, folder):
    damage(*numbered(folder))
    with pytest.warns(UserWarning, match="passing over"), pytest.raises(CheckpointError, match="another --output_dir"):
        find_checkpoint(tiny_config(output_dir=str(folder)).run)
    with pytest.raises(ConfigError, match="pass another --output_dir"):
        find_checkpoint(tiny_config(output_dir=str(folder), auto_resume=False).run)


@pytest.mark.parametrize("auto_resume", [True, False])
@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("run/checkpoint-1.pth", None),
        ("run/copy.pth", r"\(checkpoint-1\.pth and 1 more\); .*or move them away"),  # of checkpoint-0
        ("run/checkpoint-1-16.pth", r"\(checkpoint-1\.pth\); .*or move them away"),
        ("elsewhere/checkpoint-1.pth", r"and 2 more\); pass another --output_dir, or leave out --resume"),
    ],
)
def test_a_run_continues_where_nothing_later_than_its_checkpoint_lies(
    tiny_config, folder, auto_resume, resume, message
):
    shutil.copytree(folder, folder.parent / "elsewhere")
    shutil.copy(folder / "checkpoint-0.pth", folder / "copy.pth")
    path = folder.parent / resume
    run = tiny_config(output_dir=str(folder), resume=str(path), auto_resume=auto_resume).run
    if message is None:
        assert find_checkpoint(run).path == path
    else:
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(run)


def test_the_same_command_with_a_checkpoint_of_another_folder_continues_its_own(tiny_config, cpu, folder, capsys):
    new = folder.parent / "new"
    fields = {"resume": str(folder / "checkpoint-0.pth"), "output_dir": str(new), "disable_eval": True}
    train_run(tiny_config(**fields, epochs=2), cpu)
    assert f"continuing from {fields['resume']}" in capsys.readouterr().out
    train_run(tiny_config(**fields, epochs=3), cpu)
    assert f"continuing from {new / 'checkpoint-1.pth'}" in capsys.readouterr().out
    other = tiny_config(**{**fields, "resume": str(folder / "checkpoint-1.pth")}).run
    with pytest.raises(ConfigError, match="leave out --resume"):
        find_checkpoint(other)


# What is deleted.


@pytest.mark.parametrize(
    ("there", "keep", "newest", "left"),
    [
        ("8 9 10 11", 2, "11", "10 11"),
        ("8 9 10 11", 1, "9", "9 10 11"),
        ("7 8 9-900 9", 1, "9-900", "9-900 9"),
        ("8 9-850 9-900 10", 2, "9-900", "9-850 9-900 10"),
        ("0 5 6 7", 3, "0", "0 5 6 7"),
        ("0-3 0", 1, "0", "0"),
    ],
)
def test_pruning_counts_back_from_what_was_written_last(tmp_path, there, keep, newest, left):
    for name in there.split():
        (tmp_path / f"checkpoint-{name}.pth").touch()
    for stray in ("checkpoint-3.pth.tmp", "checkpoint-3.pth.77.tmp", "log.txt.77.tmp"):
        (tmp_path / stray).touch()
    prune_checkpoints(tmp_path, keep, f"checkpoint-{newest}.pth")
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{name}.pth" for name in left.split()}


@pytest.mark.parametrize("damaged", ["checkpoint-1.pth", "checkpoint-1.pth checkpoint-1-16.pth"])
def test_a_run_beside_damaged_later_files_keeps_what_it_writes(tiny_config, cpu, folder, monkeypatch, damaged):
    for path in damaged.split():
        damage(folder / path)
    config = tiny_config(output_dir=str(folder), epochs=2, save_ckpt_steps=1, save_ckpt_num=1, disable_eval=True)
    kept = []

    def keep_names(*arguments):
        prune_checkpoints(*arguments)
        kept.append(({path.name for path in folder.glob("checkpoint-*.pth")}, arguments[2]))

    monkeypatch.setattr("kernelwarehouse.engine.keeper.prune_checkpoints", keep_names)
    with pytest.warns(UserWarning, match="passing over"):
        train_run(config, cpu)
    assert all(newest in left for left, newest in kept)
    assert names(folder) == ["checkpoint-1.pth"]
    assert find_checkpoint(config.run).state["epoch"] == 1


def test_a_checkpoint_that_cannot_be_deleted_is_named_and_no_more(tmp_path):
    for name in ("checkpoint-0.pth", "checkpoint-1.pth"):
        (tmp_path / name).mkdir()
    with pytest.warns(UserWarning, match=r"checkpoint-0\.pth: could not be deleted"):
        prune_checkpoints(tmp_path, 1, "checkpoint-1.pth")


def test_the_end_of_an_epoch_is_later_than_its_steps():
    order = ["checkpoint-0-9.pth", "checkpoint-0-10.pth", "checkpoint-0.pth", "checkpoint-1-11.pth", "checkpoint-1.pth"]
    assert sorted(random.Random(0).sample(order, len(order)), key=position) == order


# Another number of processes.


def test_the_nearest_divisor_is_that_of_a_search():
    for number in (1, 2, 12, 97, 100, 360, 1001, 2**10):
        for wanted in (1, 2, 7, 31, 33, 256, 5000):
            divisors = [n for n in range(1, number + 1) if number % n == 0]
            assert nearest_divisor(number, wanted) == min(divisors, key=lambda n: abs(n - wanted))


@pytest.mark.parametrize(
    ("number", "wanted", "nearest"),
    [
        (10**9, 257, 256),
        (10**18, 10**12 + 1, 10**12),
        (10**18, 3 * 10**17, 25 * 10**16),
        (999_999_937, 64, 1),  # a prime
        (999_999_937 * 2**20, 1000, 1024),
        (10**9, 10**12, 10**9),
    ],
)
def test_large_numbers_are_not_searched_through(number, wanted, nearest):
    assert nearest_divisor(number, wanted) == nearest
