"""Time Mask R-CNN on a static and on converted backbones, interleaved in one process: images per second.

    python scripts/benchmark_detection.py --size 1333 800 --batch 2 --mode infer train

Inference is all of it, from normalised pixels to boxes and masks; training is forward and backward. The weights are
random, but for a bias by which a detector finds 100 objects in an image, the most that a trained one does. Each is
taken in the faster of its two memory layouts. Outputs and gradients of each converted backbone are first compared
with upstream's formulation, in float64; nothing is printed if they differ.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from timing.clock import PRECISIONS, arithmetic, autocast
from timing.networks import LAYOUTS
from timing.parity import check_parity
from torch import nn

import kernelwarehouse.detection  # noqa: F401  # prepares mmdet, which is imported after it
from kernelwarehouse import ConfigError, build_model, plans
from kernelwarehouse.engine.outputs import check_file
from kernelwarehouse.models.tuning import measure

# isort: split
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs

CONFIGS = Path(__file__).resolve().parents[1] / "detection" / "configs"
NAMES = ("mask_rcnn_resnet50", "mask_rcnn_kw1x_resnet50", "mask_rcnn_kw4x_resnet50")
OBJECTS = 10  # annotated in an image of the training batch


def read(name: str) -> Config:
    """Return a configuration from its file or its name.

    Raises:
        ConfigError: No such file, or a detector other than a Mask R-CNN on a `DynamicBackbone`.
    """
    path = next((p for p in (Path(name), CONFIGS / f"{name}.py") if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{name}: no such configuration file, and {CONFIGS} has none of this name")
    config = Config.fromfile(path)
    if config.model.type != "MaskRCNN" or config.model.backbone.type != "DynamicBackbone":
        raise ConfigError(
            f"{path}: is a {config.model.type} on a {config.model.backbone.type}; MaskRCNN on DynamicBackbone is timed"
        )
    return config


def build(config: Config, device: torch.device, layout: str = "NCHW") -> nn.Module:
    """Build a detector with random weights that takes most proposals for an object of the first class."""
    torch.manual_seed(0)
    model = MODELS.build({"_scope_": "mmdet", **config.model}).to(device, memory_format=LAYOUTS[layout])
    classifier = model.roi_head.bbox_head.fc_cls
    with torch.no_grad():
        classifier.bias[0] += torch.tensor(float(len(classifier.bias))).log()
    return model


def make_batch(
    model: nn.Module, batch: int, width: int, height: int, device: torch.device, layout: str = "NCHW"
) -> dict:
    """Return a batch as it reaches the detector: normalised, and padded to a multiple of 32."""
    classes = model.roi_head.bbox_head.num_classes
    data = demo_mm_inputs(batch, (3, height, width), [OBJECTS] * batch, classes, with_mask=True, device=str(device))
    for sample in data["data_samples"]:
        sample.set_metainfo({"scale_factor": (1.0, 1.0)})
    data = model.data_preprocessor(data, training=True)
    return {**data, "inputs": data["inputs"].contiguous(memory_format=LAYOUTS[layout])}


def step(model: nn.Module, data: dict, train: bool, precision: str = "fp32") -> Callable[[], None]:
    """Return a function that runs `model` on a batch once: inference, or forward and backward."""
    images, samples = data["inputs"], data["data_samples"]

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), autocast(precision, images.device):
            model.predict(images, samples, rescale=False)

    def forward_backward() -> None:
        model.train()
        model.zero_grad()
        with autocast(precision, images.device):
            loss, _ = model.parse_losses(model.loss(images, samples))
        loss.backward()

    return forward_backward if train else infer


def check_backbone(config: Config, device: torch.device) -> None:
    """Compare a converted backbone with upstream's formulation, at a small size that is not square.

    Raises:
        SystemExit: They differ.
    """
    backbone = config.model.backbone
    net = build_model(backbone.config, **(backbone.get("overrides") or {})).to(device)
    if plans(net):
        check_parity(net, torch.randn(2, 3, 96, 64, device=device))


def benchmark(arguments: argparse.Namespace) -> list[dict]:
    """Measure, print a row for each detector in each mode, and return what JSON keeps.

    Raises:
        ConfigError: A configuration that is not there, or of another kind.
        SystemExit: A backbone that differs from upstream's formulation.
    """
    device, (width, height) = torch.device(arguments.device), arguments.size
    configs = {Path(name).stem: read(name) for name in arguments.configs}
    for config in configs.values():
        check_backbone(config, device)
    models = {(name, layout): build(configs[name], device, layout) for name in configs for layout in LAYOUTS}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"batches of {arguments.batch} at {width}×{height}, {arguments.precision}, {where}, torch {torch.__version__}"
    )
    print(f"{'mode':5}  {'images/s':>8}  {'s per batch':>17}  {'to static':>9}  layout  configuration")
    kept = []
    for mode in arguments.mode:
        steps = {}
        for (name, layout), model in models.items():
            data = make_batch(model, arguments.batch, width, height, device, layout)
            steps[name, layout] = step(model, data, mode == "train", arguments.precision)
        with arithmetic(arguments.precision):
            seconds = measure(steps, arguments.rounds, device)
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        fastest = {name: min(LAYOUTS, key=lambda layout, name=name: medians[name, layout]) for name in configs}
        static = next(medians[key] for key in fastest.items())
        for name, layout in fastest.items():
            values, median = seconds[name, layout], medians[name, layout]
            spread = (max(values) - min(values)) / 2
            time = f"{median:.3f} ± {spread:.3f}"
            rate = arguments.batch / median
            print(f"{mode:5}  {rate:>8.3f}  {time:>17}  {median / static:>9.2f}  {layout:6}  {name}", flush=True)
        labels = {"mode": mode, "precision": arguments.precision, "batch": arguments.batch, "size": [width, height]}
        kept += [
            {**labels, "device": where, "configuration": name, "layout": layout, "seconds": values}
            for (name, layout), values in seconds.items()
        ]
    return kept


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: A value that makes no sense, or a file that cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configs", nargs="+", default=NAMES, metavar="CONFIG", help="files or names, the static one first")
    add("--size", type=int, nargs=2, default=(1333, 800), metavar=("WIDTH", "HEIGHT"), help="default: 1333 800")
    add("--batch", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--mode", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    add("--precision", default="fp32", choices=PRECISIONS, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the seconds of every round there")
    arguments = parser.parse_args()
    for name, value in (("size", min(arguments.size)), ("batch", arguments.batch), ("rounds", arguments.rounds)):
        least = 32 if name == "size" else 1
        if value < least:
            raise ConfigError(f"--{name}: at least {least} is needed, found {value}")
    if arguments.json:
        check_file("--json", arguments.json)
    return arguments


def main() -> int:
    """Run the command line; return 0, or 2 for a configuration or an option that cannot be used."""
    try:
        arguments = parse_arguments()
        kept = benchmark(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
