"""`import kernelwarehouse` in a process of its own, where not all is as on the machine that it was written on."""

import json
import os
import subprocess
import sys
from pathlib import Path

from networks import TINY

ROOT = Path(__file__).parents[1]


def python(code, *words):
    """Run a program in the checkout, to its good end."""
    command, environment = [sys.executable, "-c", code, *words], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


REGISTERED_BEFORE_US = """
import timm
from timm.models import register_model

def build(pretrained=False, **kwargs):
    raise NotImplementedError

for name in ("resnet18", "convnext_tiny", "kw_resnet18"):
    build.__name__ = name
    register_model(build)
assert timm.get_pretrained_cfg("resnet18") is None

import kernelwarehouse
print(sorted(timm.list_models("kw_resnet*")))
"""


def test_models_without_a_default_configuration_that_others_registered_do_not_stop_the_import():
    """timm's registry is everybody's: another package may have put networks of its own under the same names."""
    assert "kw_resnet18" in python(REGISTERED_BEFORE_US).stdout


# The libraries come first: they have other ways on Windows, which this system does not lead to.
AS_ON_WINDOWS = """
import os, signal, sys
import tensorboardX, timm, torch, torchvision.datasets, webdataset, matplotlib.figure
import torch.distributed.elastic.multiprocessing

for name in ("resource", "fcntl", "pwd"):
    sys.modules[name] = None
for name in ("setpgid", "getpgid", "killpg", "O_DIRECTORY", "pread", "getuid", "geteuid"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL"):
    delattr(signal, name)

from kernelwarehouse.engine import log
log.LINE_EVERY = -1.0  # seconds, so that each step is told of
sys.path.insert(0, ".")
from main import main

assert main(sys.argv[1:]) == 0
assert main([*sys.argv[1:], "--data_set", "WDS", "--data_path", "."]) == 2
"""


def test_a_training_runs_and_saves_without_what_windows_lacks(tmp_path):
    """What is missing is said where it is wanted: the memory in the line of progress, and shards as a data set."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    words = ["--kw_config", str(tmp_path / "tiny.json"), "--epochs", "1", "--num_workers", "1"]
    done = python(AS_ON_WINDOWS, *words, "--output_dir", str(tmp_path / "run"))
    assert "images/s, memory unknown (this Python has no module resource)" in done.stdout
    assert (tmp_path / "run" / "checkpoint-0.pth").is_file()
    error = "error: field 'data_set': WDS needs os.pread, which this system lacks; use image_folder there"
    assert error in done.stderr.splitlines()
