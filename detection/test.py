"""Evaluate a detector: its box and mask AP, and drawings of what it finds.

python detection/test.py detection/configs/mask_rcnn_kw1x_resnet50.py work_dirs/mask_rcnn_kw1x_resnet50/epoch_12.pth
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Python puts this folder first, where this file would shadow the standard library's package of its name.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from mmengine.dist import is_main_process
from torch import nn

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection.backbone import PREFIX, DynamicBackbone
from kernelwarehouse.detection.cli import build_loops, build_parser, build_runner, check_data, read_config, run, unwrap
from kernelwarehouse.detection.labels import check_labels
from kernelwarehouse.models import check_values, copy_weights, find_state_dict, read_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says, and print the result.

    Raises:
        ConfigError, CheckpointError, MissingOperatorError: As the functions of `cli`.
    """
    parser = build_parser("Evaluate a detector.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a detector's weights, ours or upstream's")
    parser.add_argument("--show-dir", metavar="FOLDER", help="draw the predictions on the images, into this folder")
    parser.add_argument("--local_rank", "--local-rank", default="0", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.environ.setdefault("LOCAL_RANK", options.local_rank)
    config = read_config(options)
    # The weights are loaded here, all of them or none: mmengine's own loading accepts any that fit.
    config.load_from, config.resume = None, False
    if options.show_dir:
        hook = config.get("default_hooks", {}).get("visualization")
        if hook is None:
            raise ConfigError(f"--show-dir: {config.filename} has no default_hooks.visualization to draw with")
        hook.update(draw=True, test_out_dir=str(Path(options.show_dir).resolve()))
    check_data(config, "test")
    content = read_checkpoint(options.checkpoint)
    runner = build_runner(config)
    load_detector(unwrap(runner.model), content, options.checkpoint)
    build_loops(runner, "test")
    check_labels(runner, unwrap(runner.model), "test")
    metrics = runner.test()
    if is_main_process():
        sys.stdout.write(summary(metrics) + "\n")


def load_detector(model: nn.Module, content: Mapping[str, object], source: str) -> None:
    """Load all weights of a detector.

    Raises:
        CheckpointError: They do not fit, or have values that it cannot hold; the detector is then unchanged.
    """
    state = find_state_dict(content, "state_dict|model", source)
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, DynamicBackbone):
        own = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
        state = {k: v for k, v in state.items() if not k.startswith(PREFIX)}
        check_values(state, model.state_dict(), source)
        state |= {PREFIX + k: v for k, v in backbone.fit(own, source).items()}
    else:
        check_values(state, model.state_dict(), source)
    copy_weights(model, state, source)


def summary(metrics: Mapping[str, float]) -> str:
    """COCO's figures in per cent, a line for boxes and one for masks; those that the data cannot give are left out."""
    lines = []
    for key, name in (("bbox", "box"), ("segm", "mask")):
        prefix = f"coco/{key}_mAP"
        found = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix) and v >= 0}
        if found:
            lines.append("  ".join(f"{name} AP{suffix.replace('_', ' ')} {100 * v:.1f}" for suffix, v in found.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
