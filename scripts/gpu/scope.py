"""How much is measured: on a GPU or a CPU, in full, quickly, or as little as shows that the report works."""

import os
from dataclasses import dataclass, replace

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU; bfloat16 is not right there


@dataclass(frozen=True, eq=False)
class Scope:
    """What the stages take.

    Attributes:
        device: Where it runs.
        limits: Seconds for each stage, in their order; a stage that is not named is left out.
        limit: Seconds for all of them.
        precisions: In which implementations are compared with the reference.
        odd: The small networks whose layers are compared, names in `odd`.
        shares: How many processes compare, or compile, at a time.
        layers: Configurations whose layers are timed.
        layer_batches: Batches that they are timed with.
        networks: Configurations of whole networks that are timed.
        siblings: Whether a network by each other operator is timed as well.
        batches: Batches that those are timed with.
        precision: In which both are timed.
        side: Of the images in pixels; None for the configurations' own.
        seeds: Runs of the quickstart.
        epochs: Their length; None for the quickstart's own, which alone is compared with the CPU's curve.
        runs: How many of them, and of the trainings on generated images, go on at a time.
        steps_network: Configuration that is trained on generated images.
        steps: Optimizer steps of that; the process is killed after half of them.
        steps_epochs: Epochs that they are.
        steps_batch: Images in each of them.
        steps_side: Side of those images.
    """

    device: torch.device
    limits: dict[str, float]
    limit: float
    precisions: tuple[str, ...] = ("fp64", "fp32", "tf32", "bf16", "fp16")
    odd: tuple[str, ...] = ("residual", "geometry", "tokens", "line")
    shares: int = 12
    layers: tuple[str, ...] = (
        "resnet18/kw4x_resnet18",
        "resnet50/kw4x_resnet50",
        "mobilenetv2_100/kw4x_mobilenetv2_100",
    )
    layer_batches: tuple[int, ...] = (128, 1)
    networks: tuple[str, ...] = (
        "resnet18/kw4x_resnet18",
        "resnet50/kw4x_resnet50",
        "mobilenetv2_100/kw4x_mobilenetv2_100",
        "resnet18/kw1x_resnet18",
        "resnet50/kw1x_resnet50",
        "mobilenetv2_100/kw1x_mobilenetv2_100",
    )
    siblings: bool = True
    batches: tuple[int, ...] = (128, 1)
    precision: str = "bf16"
    side: int | None = None
    seeds: int = 3
    epochs: int | None = None
    runs: int = 4
    steps_network: str = "resnet18/kw4x_resnet18"
    steps: int = 200
    steps_epochs: int = 5
    steps_batch: int = 64
    steps_side: int = 224

    @property
    def compilation(self) -> "Scope":
        """What compiles the same kernels as the layers' rows: fewer samples, whose number kernels do not hold."""
        return replace(self, layer_batches=(32,))

    @classmethod
    def of(cls, device: torch.device, size: str) -> "Scope":
        """The scope of a size: full, quick or tiny."""
        if size == "tiny":
            return _tiny(device)
        if device.type == "cpu":
            return _cpu(device, size)
        limits = {"machine": 30, "correctness": 100, "compilation": 45, "layers": 90, "networks": 80, "training": 75}
        full = cls(device, limits, limit=400)
        if size == "full":
            return full
        quick = {"machine": 25, "correctness": 60, "networks": 35}
        return replace(full, limits=quick, limit=112, networks=full.networks[:1])


def _cpu(device: torch.device, size: str) -> Scope:
    """Whatever a CPU can: the same code with fewer and smaller images."""
    factor = 1 if size == "quick" else 4
    limits = {"machine": 30, "correctness": 90, "layers": 40, "networks": 50, "training": 80}
    return Scope(
        device,
        {name: factor * seconds for name, seconds in limits.items()},
        limit=factor * 285,
        precisions=("fp64", "fp32", "fp16" if INTERPRETED else "bf16"),
        shares=torch.get_num_threads(),
        layers=("resnet18/kw4x_resnet18",),
        layer_batches=(4, 1),
        networks=("resnet18/kw4x_resnet18",),
        batches=(4, 1),
        precision="fp32",
        side=128,
        seeds=1,
        epochs=2 if size == "quick" else None,
        runs=1,
        steps_network="quickstart/kw1x_resnet18",
        steps=6,
        steps_epochs=3,
        steps_batch=4,
        steps_side=64,
    )


def _tiny(device: torch.device) -> Scope:
    limits = dict.fromkeys(("machine", "correctness", "layers", "networks", "training"), 150)  # on a busy machine too
    return Scope(
        device,
        limits,
        limit=450,
        precisions=("fp64", "fp32"),
        odd=("layer",),
        shares=1,
        layers=("quickstart/kw1x_resnet18",),
        layer_batches=(2,),
        networks=("quickstart/kw1x_resnet18",),
        siblings=False,
        batches=(2,),
        precision="fp32",
        seeds=0,
        runs=1,
        steps_network="quickstart/kw1x_resnet18",
        steps=2,
        steps_epochs=2,
        steps_batch=4,
        steps_side=32,
    )
