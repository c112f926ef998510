"""Train a detector, on one process or under torchrun or Slurm.

    python detection/train.py detection/configs/mask_rcnn_kw1x_resnet50.py --checkpoint kw1x_resnet50.pth
    torchrun --nproc_per_node 8 detection/train.py CONFIG --checkpoint FILE --launcher pytorch

See --help, and README.md beside this file.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Python puts this folder first, where test.py would shadow the standard library's package of that name.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from mmengine.config import Config

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection.backbone import BACKBONES
from kernelwarehouse.detection.cli import build_loops, build_parser, build_runner, check_data, read_config, run, unwrap
from kernelwarehouse.detection.finite import FiniteSteps
from kernelwarehouse.detection.labels import check_labels
from kernelwarehouse.models import read_config as read_model_config


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Raises:
        ConfigError, CheckpointError, MissingOperatorError: As the functions of `cli`; before the first step.
        NonFiniteLossError: The training diverged.
    """
    parser = build_parser("Train a detector.")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of the backbone, such as a classifier's")
    parser.add_argument(
        "--resume",
        metavar="FILE|auto",
        nargs="?",
        const="auto",
        help="continue a training; without a file, or with auto, from the newest checkpoint in the work folder",
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the total batch over auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        "--max-bad-steps",
        type=int,
        default=10,
        metavar="N",
        help="steps in a row that may be skipped because the loss is not finite; one more stops the run",
    )
    parser.add_argument("--local_rank", "--local-rank", default="0", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.environ.setdefault("LOCAL_RANK", options.local_rank)
    config = read_config(options)
    _apply(options, config)
    check_data(config, "train", "val")
    runner = build_runner(config)
    loops = ("train", *(["val"] if config.get("val_dataloader") else []))
    build_loops(runner, *loops)
    check_labels(runner, unwrap(runner.model), *loops)
    runner.register_hook(FiniteSteps(options.max_bad_steps))
    runner.train()


def _apply(options: argparse.Namespace, config: Config) -> None:
    """Put the options of training into the configuration."""
    backbone = config.model.get("backbone", {})
    if options.checkpoint:
        if backbone.get("type") not in BACKBONES:
            raise ConfigError(f"--checkpoint: {config.filename} has no DynamicBackbone to load it; use --cfg-options")
        backbone.checkpoint = options.checkpoint
    if backbone.get("checkpoint") and not Path(backbone.checkpoint).is_file():
        raise ConfigError(f"field 'model.backbone.checkpoint': no such file: {backbone.checkpoint}")
    if options.resume:
        config.resume = True
        config.load_from = None if options.resume == "auto" else options.resume
    if config.get("load_from") and "://" not in config.load_from and not Path(config.load_from).is_file():
        raise ConfigError(f"{config.load_from}: no such checkpoint")
    _check_frozen(config)
    if options.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
    if options.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ConfigError(f"--auto-scale-lr: {config.filename} has no auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True


def _check_frozen(config: Config) -> None:
    """Refuse to freeze layers that start at random."""
    backbone = config.model.get("backbone", {})
    continues = config.get("resume") and (Path(config.work_dir) / "last_checkpoint").is_file()
    starts = backbone.get("checkpoint") or config.get("load_from") or continues
    if backbone.get("type") not in BACKBONES or backbone.get("frozen_stages", -1) < 0 or starts:
        return
    if not read_model_config(backbone.config, backbone.get("overrides")).model.pretrained:
        raise ConfigError(
            "field 'model.backbone.frozen_stages': would freeze layers that were never trained; pass --checkpoint "
            "FILE, or --cfg-options model.backbone.frozen_stages=-1 to train all of them from scratch"
        )


if __name__ == "__main__":
    sys.exit(run(main))
