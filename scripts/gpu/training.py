"""Stage 5: main.py with mixed precision: the quickstart's course, and a training that is killed and resumed.

Each run is a process of its own. The images of the second are made here: each class has a colour and a pattern.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kernelwarehouse.models import DEFAULT_KEY, find_state_dict, read_checkpoint

from . import curve
from .cases import Case
from .journal import Record
from .scope import Scope

STAGE = "training"
QUICKSTART = "quickstart/kw1x_resnet18"
CLASSES = 4
_ROOT = Path(__file__).resolve().parents[2]
_FEW = 50  # steps, of which the losses need not fall
# By how much the losses of a resumed run may differ relatively, if those before it was killed do not differ by a tenth
# of that: on a GPU sums are taken in any order.
_NEAR = {"cuda": 0.05, "cpu": 1e-6}


def cases(scope: Scope, folder: Path) -> Iterator[Case]:
    """The killed training first; then the quickstart's runs.

    Args:
        scope: How long they are.
        folder: For the runs and the images; it must be empty.
    """
    yield Case("killed and resumed", partial(_kill_and_resume, scope, folder))
    for seed in range(scope.seeds):
        yield Case(f"quickstart {seed}", partial(_quickstart, scope, folder / f"quickstart{seed}", seed))


def _quickstart(scope: Scope, folder: Path, seed: int) -> Record:
    options = {"seed": seed, "epochs": scope.epochs} if scope.epochs else {"seed": seed}
    seconds = _wait(_start(QUICKSTART, scope, folder, options), folder)
    found = curve.read_run(folder)
    if not np.isfinite(found["train_loss"]).all():
        raise ValueError(f"a loss is not finite: {found['train_loss']}")
    compared = curve.compare(found) if scope.epochs is None else None
    return {"main_seconds": seconds, "curve": found, "compared": compared}


def _kill_and_resume(scope: Scope, folder: Path) -> Record:
    """A run, and one beside it that is killed in its middle and resumed: their losses, and how their weights differ."""
    per_epoch = scope.steps // scope.steps_epochs
    pictures = folder / "pictures"
    make_pictures(pictures, scope.steps_side, per_epoch * scope.steps_batch)
    half = per_epoch * scope.steps_epochs // 2
    options = {
        "data_set": "image_folder",
        "data_path": pictures,
        "eval_data_path": pictures,
        "nb_classes": CLASSES,
        "in_chans": 3,
        "input_size": scope.steps_side,
        "batch_size": scope.steps_batch,
        "epochs": scope.steps_epochs,
        "warmup_epochs": 0,
        "lr": 1e-3,
        "mixup": 0,
        "cutmix": 0,
        "traditional_preprocess": "true",
        "disable_eval": "true",
        "num_workers": min(5, (os.cpu_count() or 1) // 3),
        "save_ckpt_steps": half,
        "save_ckpt_freq": scope.steps_epochs,
    }
    folders = {name: folder / name for name in ("whole", "killed")}
    whole, killed = (_start(scope.steps_network, scope, each, options) for each in folders.values())
    _kill_at_checkpoint(killed, folders["killed"], half)
    seconds = _wait(_start(scope.steps_network, scope, folders["killed"], options), folders["killed"])
    _wait(whole, folders["whole"])
    losses = {name: _losses(each) for name, each in folders.items()}
    before, after = _differences(*losses.values(), half // per_epoch)
    first, last = losses["whole"][0], losses["whole"][-1]
    return {
        "steps": per_epoch * scope.steps_epochs,
        "killed_after": half,
        "losses": losses,
        "finite": bool(np.isfinite(losses["whole"]).all()),
        "falling": None if len(losses["whole"]) * per_epoch < _FEW else last < first,
        "differences_before": before,
        "differences_after": after,
        "weights_differ": _weights_differ(*folders.values()),
        "resumed_as_uninterrupted": max(after) <= max(10 * max(before, default=0.0), _NEAR[scope.device.type]),
        "resumed_seconds": seconds,
    }


def make_pictures(folder: Path, side: int, count: int) -> None:
    """Write so many JPEG files, in a folder for each class, which has a hue and the direction of a wave."""
    drawn = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    for number in range(count):
        kind = number % CLASSES
        angle = np.pi * kind / CLASSES
        wave = np.sin(20 * (rows * np.sin(angle) + columns * np.cos(angle)) + drawn.uniform(0, 6))
        hue = 0.5 + 0.3 * np.cos(2 * np.pi * (kind / CLASSES + np.arange(3) / 3))
        values = hue + 0.2 * wave[..., None] + 0.1 * drawn.standard_normal((side, side, 1))
        path = folder / f"class{kind}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8)).save(path)


def _start(config: str, scope: Scope, folder: Path, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start main.py with mixed precision; it continues what it finds in the folder."""
    gpu = scope.device.type == "cuda"
    precision = {"use_amp": "true", "amp_dtype": "float16" if gpu else "bfloat16", "channels_last": str(gpu).lower()}
    fields = {"kw_config": config, "device": scope.device.type, "output_dir": folder, **precision, **options}
    command = [sys.executable, str(_ROOT / "main.py"), *(f"--{k}={v}" for k, v in fields.items())]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "printed.txt").open("ab") as printed:
        # On a CPU layers this small gain nothing from threads, and lose much when one waits for a busy core.
        environment = os.environ if gpu else os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT)


def _wait(process: subprocess.Popen[bytes], folder: Path) -> float:
    """Seconds until the process has ended.

    Raises:
        RuntimeError: With another status than 0; the message has the end of what it printed.
    """
    start = time.monotonic()
    if status := process.wait():
        raise RuntimeError(f"main.py ended with status {status}: {(folder / 'printed.txt').read_text()[-300:]}")
    return time.monotonic() - start


def _kill_at_checkpoint(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Kill a run as soon as the checkpoint of a step is there.

    Raises:
        RuntimeError: It ended before.
    """
    while not [*folder.glob(f"checkpoint-*-{step}.pth")]:
        if process.poll() is not None:
            printed = (folder / "printed.txt").read_text()[-300:]
            raise RuntimeError(f"main.py ended with status {process.returncode} before step {step}: {printed}")
        time.sleep(0.02)
    process.kill()
    process.wait()


def _losses(folder: Path) -> list[float]:
    lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def _differences(whole: list[float], killed: list[float], epoch: int) -> tuple[list[float], list[float]]:
    """Relative differences of the losses of epochs before that in which the run was killed, and from it on."""
    found = [abs(a - b) / abs(a) for a, b in zip(whole, killed, strict=True)]
    return found[:epoch], found[epoch:]


def _weights_differ(whole: Path, killed: Path) -> float:
    """Relative difference of the norms of all weights at the end."""
    states = []
    for folder in (whole, killed):
        last = max(folder.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime)
        states.append(find_state_dict(read_checkpoint(last), DEFAULT_KEY, str(last)))
    pairs = [(states[0][name].double(), states[1][name].double()) for name in states[0]]
    difference = sum((a - b).square().sum().item() for a, b in pairs)
    return (difference / sum(a.square().sum().item() for a, _ in pairs)) ** 0.5
