"""Killed at any instant and started again, a training ends as if nothing had happened."""

import ctypes
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import EXIT_INTERRUPTED, Interrupted, SaveError, World, join, train_run
from kernelwarehouse.engine.checkpoint import read_state
from kernelwarehouse.engine.resume import keep_total_batch
from kernelwarehouse.models import CheckpointError

ROOT = Path(__file__).parents[2]
# Everything that draws at random or has a state: augmentation, mixing, dropout, annealing, momenta, averages.
FIELDS = {
    "model": "kw_resnet18",
    "sharing_range": "layer_conv",
    "batch_size": 128,
    "update_freq": 2,
    "epochs": 2,
    "temp_epoch": 1.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "reprob": 0.5,
    "dropout": 0.1,
    "drop_path": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.9,
    "model_ema_eval": True,
    "save_ckpt_steps": 1,
}


def train(config, **environment):
    """The work of one process; its exit status is main.py's."""
    torch.set_num_threads(1)  # a forked process has lost the threads of its parent
    os.environ.update(environment)
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
    warnings.simplefilter("error")  # no checkpoint is ever damaged
    try:
        with join(config.run) as world:
            train_run(config, world)
    except Interrupted:
        raise SystemExit(EXIT_INTERRUPTED) from None


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


STARTED = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """After a test that failed in the midst of a run."""
    yield
    for process in STARTED:
        for pid in children(process.pid) if process.is_alive() else ():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.join()
    STARTED.clear()


def fork(target, *arguments, **options):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, kwargs=options)
    process.start()
    STARTED.append(process)
    return process


def start(config, **environment):
    return fork(train, config, **environment)


def finish(*processes):
    for process in processes:
        process.join(timeout=300)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def wait_until(happened, *processes, seconds=300):
    """Wait until something has happened while the processes live."""
    end = time.monotonic() + seconds
    while not happened():
        for process in processes:
            assert process.is_alive(), f"process {process.pid} ended before that, with status {process.exitcode}"
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(0.01)


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same_run(folder, expected, names=("checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth")):
    assert (folder / "log.txt").read_text() == (expected / "log.txt").read_text()
    for name in names:
        states = [read_state(f / name) for f in (folder, expected)]
        for state in states:
            del state["config"]["output_dir"]
        assert_equal(*states)


@pytest.fixture(scope="module")
def configure(tiny_config):
    return lambda folder, **fields: tiny_config(**FIELDS | fields, output_dir=str(folder))


@pytest.fixture(scope="module")
def uninterrupted(configure, tmp_path_factory):
    """Folder of a whole run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    assert finish(start(configure(folder))) == [0]
    return folder, time.monotonic() - began


@pytest.mark.parametrize("most", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants(configure, uninterrupted, tmp_path, most):
    """Each start lives a random time, a sixth of a whole run on average, and so a run is killed several times."""
    expected, seconds = uninterrupted
    instants = random.Random(0)
    kills, runs, places = 0, 0, set()
    while kills < most:
        runs += 1
        folder = tmp_path / str(runs)
        while True:
            process = start(configure(folder))
            if kills < most:
                process.join(instants.uniform(0, seconds / 3))
                process.kill()
            (status,) = finish(process)
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
            places.add(max((path.name for path in folder.glob("checkpoint-?-*.pth")), default=None))
        assert_same_run(folder, expected)
        assert len(list(folder.glob("checkpoint-*.pth"))) == 3 + 2
    assert len(places) > most // 4, f"all struck in the same steps: {places}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_and_gives_the_documented_status(configure, uninterrupted, tmp_path, number):
    """No checkpoint is due within an epoch: the signal alone makes one."""
    fields = {"save_ckpt_steps": 0, "num_workers": 1}
    process = start(configure(tmp_path, **fields))
    wait_until((tmp_path / "checkpoint-0.pth").exists, process)
    os.kill(process.pid, number)
    assert finish(process) == [EXIT_INTERRUPTED]
    (within,) = tmp_path.glob("checkpoint-1-*.pth")
    assert read_state(within)["iteration"] > 0
    assert finish(start(configure(tmp_path, **fields))) == [0]
    logs = [(folder / "log.txt").read_text() for folder in (tmp_path, uninterrupted[0])]
    assert logs[0] == logs[1]


def elastic(config, restarts, namespace=None, nodes=1, processes=2, **options):
    """What torchrun does, with workers that are forked from this process and so need not import torch again."""
    if namespace is not None:
        enter(namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    launch = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        start_method="fork",
        max_restarts=restarts,
        monitor_interval=0.05,
        **{"rdzv_endpoint": "localhost:0", **options},
    )
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "2"
    elastic_launch(launch, train)(config)


def enter(namespace):
    """Move this process into a network namespace that `ip` has made; os.setns came with Python 3.12."""
    with open(f"/run/netns/{namespace}") as file:
        assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())


def children(pid):
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def newest(folder):
    return max((p.stat().st_mtime for p in folder.glob("checkpoint-*.pth")), default=0)


def run_elastic(config, restarts, **options):
    return fork(elastic, config, restarts, **options)


@pytest.fixture(scope="module")
def uninterrupted_pair(configure, tmp_path_factory):
    """Folder of a whole run of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    assert finish(run_elastic(configure(folder, batch_size=64), 0)) == [0]
    return folder


@pytest.mark.parametrize("instant", [1, 2])
def test_two_processes_killed_and_started_again(configure, uninterrupted_pair, tmp_path, instant):
    """Everything dies at once, as with a node: both processes and the launcher above them."""
    agent = run_elastic(configure(tmp_path, batch_size=64), 0)
    wait_until(lambda: newest(tmp_path), agent)  # they have connected, and work
    time.sleep(random.Random(instant).uniform(0, 0.2))
    for pid in [agent.pid, *children(agent.pid)]:
        os.kill(pid, signal.SIGKILL)
    assert finish(agent) == [-signal.SIGKILL]
    assert finish(run_elastic(configure(tmp_path, batch_size=64), 0)) == [0]
    assert_same_run(tmp_path, uninterrupted_pair)


def test_torchrun_starts_again_when_one_of_two_processes_is_killed(configure, uninterrupted_pair, tmp_path):
    """Twice; the processes of each attempt meet afresh, though torchrun's store remembers the killed one's address."""
    agent = run_elastic(configure(tmp_path, batch_size=64), 2)
    draw, killed = random.Random(0), set()
    for _ in range(2):
        before = newest(tmp_path)
        wait_until(lambda: len(children(agent.pid) - killed) == 2 and newest(tmp_path) > before, agent)  # noqa: B023
        workers = children(agent.pid) - killed
        os.kill(draw.choice(sorted(workers)), signal.SIGKILL)
        killed |= workers
    assert finish(agent) == [0]
    assert_same_run(tmp_path, uninterrupted_pair)


@pytest.fixture
def two_machines():
    """Two network namespaces with a cable between them: the name of each, and its address."""
    if not shutil.which("ip"):
        pytest.skip("no ip command to make network namespaces with")
    names = [f"kw{os.getpid()}{side}" for side in "ab"]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"network namespaces are not permitted here: ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.0.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield [(name, f"10.0.0.{number}") for number, name in enumerate(names, 1)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines_start_again_when_one_loses_its_process(configure, uninterrupted_pair, two_machines, tmp_path):
    """Each launcher counts its own restarts: one and none. The machines share a name, and so are told who is host."""
    run, config = tmp_path / "run", configure(tmp_path / "run", batch_size=64)
    meeting = {"run_id": "two", "nodes": 2, "processes": 1, "rdzv_endpoint": f"{two_machines[0][1]}:29400"}
    launchers = [
        run_elastic(config, 1, namespace=name, local_addr=address, rdzv_configs={"is_host": i == 0}, **meeting)
        for i, (name, address) in enumerate(two_machines)
    ]
    wait_until(lambda: newest(run), *launchers)
    (worker,) = children(launchers[1].pid)
    os.kill(worker, signal.SIGKILL)
    assert finish(*launchers) == [0, 0]
    assert_same_run(run, uninterrupted_pair)


@pytest.mark.parametrize("processes", [1, 2])
def test_other_processes_keep_the_total_batch(configure, tmp_path, processes):
    """A run of one process with two micro-batches goes on as two of one, within an epoch, and the other way round."""
    fields = {"update_freq": 3 - processes, "epochs": 1, "temp_epoch": 0.5, "batch_size": 64}

    def run(count, **more):
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
        if count == 1:
            return finish(start(configure(tmp_path, **fields | more)))
        ranks = [start(configure(tmp_path, **fields | more), RANK=str(r), **env) for r in range(count)]
        return finish(*ranks)

    assert run(processes) == [0] * processes
    whole = read_state(tmp_path / "checkpoint-0.pth")
    (tmp_path / "checkpoint-0.pth").unlink()
    steps = whole["step"]
    (tmp_path / f"checkpoint-0-{steps}.pth").unlink()
    assert read_state(tmp_path / f"checkpoint-0-{steps - 1}.pth")["iteration"] > 0
    others = 3 - processes
    assert run(others, update_freq=3 - processes) == [0] * others
    state = read_state(tmp_path / "checkpoint-0.pth")
    assert state["step"] == steps
    assert state["config"]["update_freq"] == 3 - others
    (line,) = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert 2 < line["train_loss"] < 3


def test_a_total_batch_that_cannot_be_kept_says_what_to_pass(tiny_config):
    state = {"config": {"batch_size": 96, "update_freq": 1}, "processes": [{}] * 2, "iteration": 0}
    config = tiny_config(batch_size=128)

    def fit(size, **fields):
        return keep_total_batch(tiny_config(**{"batch_size": 128} | fields), state, World(torch.device("cpu"), 0, size))

    with pytest.raises(ConfigError, match=r"'batch_size': 1 process.*total batch of 192; pass --batch_size 96"):
        fit(1)
    assert fit(1, batch_size=96).run.update_freq == 2
    assert fit(4, batch_size=48).run.update_freq == 1
    with pytest.raises(ConfigError, match="take a number of processes that divides it"):
        fit(5)
    assert fit(2) == config  # the same processes: as the user says
    state["iteration"] = 3
    with pytest.raises(ConfigError, match="pass --batch_size 96 --update_freq 1"):
        fit(2)


def test_a_full_disk_fails_clearly_and_loses_nothing(configure, uninterrupted, tmp_path):
    """The limit on a file's size, which no checkpoint fits from the second epoch on, stands for the disk."""
    resource = pytest.importorskip("resource")
    assert finish(start(configure(tmp_path, epochs=1, temp_epoch=0.5))) == [0]
    for path in tmp_path.glob("checkpoint-0-*.pth"):
        path.unlink()

    def train_on_a_full_disk(config):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(SaveError, match=r"checkpoint-1-\d+\.pth: could not be written, and is as it was before"):
            train(config)

    assert finish(fork(train_on_a_full_disk, configure(tmp_path))) == [0]
    assert not list(tmp_path.glob("*.tmp"))
    assert read_state(tmp_path / "checkpoint-0.pth")["epoch"] == 0
    assert finish(start(configure(tmp_path))) == [0]


def test_every_damage_is_refused_or_does_not_matter(uninterrupted, tmp_path):
    content = (uninterrupted[0] / "checkpoint-1.pth").read_bytes()
    expected = read_state(uninterrupted[0] / "checkpoint-1.pth")
    draw = random.Random(0)
    tail = len(content) - 40_000  # half of the damage strikes the headers at the end
    places = [draw.randrange(start, len(content)) for start in (0, tail) for _ in range(100)]
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= draw.randrange(1, 256)
        (tmp_path / "checkpoint-0.pth").write_bytes(damaged)
        try:
            state = read_state(tmp_path / "checkpoint-0.pth")
        except CheckpointError:
            refused += 1
        else:
            assert_equal(state, expected)
    assert refused > 190
