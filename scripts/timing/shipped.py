"""The shipped configurations: which there are, what their networks cost, and what their authors published."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kernelwarehouse import ConfigError, ModelConfig, plans
from kernelwarehouse.configs.schema import Config, find_config
from kernelwarehouse.models import read_config

from .networks import meta_network, static_twin

ROOT = find_config("resnet18/resnet18").parent.parent
# By a file's name, of those for ImageNet's classes: parameters in millions that the authors print or their code builds,
# and top-1 in percent.
PUBLISHED: dict[str, dict[str, str]] = json.loads(
    Path(__file__).parent.with_name("published.json").read_text(encoding="utf-8")
)
_CLASSES = 1000
COLUMNS = {
    "name": "configuration", "operator": "operator", "parameters": "params (M)",
    "published_parameters": "authors' (M)", "macs": "conv MACs (G)", "mixing_macs": "mixing MACs (G)",
    "published_top1": "top-1 published (%)",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Their number.
        macs: Multiply-accumulates for one image, of what the static network computes too.
        mixing_macs: Those beyond, by the plans; None of a static network.
    """

    parameters: int
    macs: int
    mixing_macs: int | None

    @property
    def macs_in_all(self) -> int:
        """All multiply-accumulates for one image."""
        return self.macs + (self.mixing_macs or 0)

    @classmethod
    def of(cls, config: ModelConfig) -> "Cost":
        """Count, without any weights.

        Raises:
            ValueError: A network that cannot be built or converted, or that takes no such images.
        """
        net = meta_network(config)
        mixing = sum(plan.mixing_macs for plan in plans(net)) if config.operator else None
        macs = _static_macs(json.dumps(dataclasses.asdict(static_twin(config)), sort_keys=True))
        return cls(sum(p.numel() for p in net.parameters()), macs, mixing)


@dataclass(frozen=True)
class Shipped:
    """A shipped configuration.

    Attributes:
        file: Its file, in the folder of its backbone.
        config: What it says.
        cost: What its network costs.
    """

    file: Path
    config: Config
    cost: Cost

    @property
    def published(self) -> dict[str, str]:
        """What the authors published of it, "parameters" and "top1"; empty where they did not."""
        return PUBLISHED.get(self.file.stem, {}) if self.config.model.nb_classes == _CLASSES else {}


def folders() -> list[str]:
    """The folders of configurations, one for each backbone."""
    return sorted({file.parent.name for file in ROOT.glob("*/*.json")})


def shipped(names: Sequence[str]) -> Iterator[Shipped]:
    """The configurations of folders: in each the static network first, then by operator and parameters."""
    for directory in (ROOT / name for name in names):
        configs = {file: read_config(file) for file in directory.glob("*.json")}
        found = [Shipped(file, config, Cost.of(config.model)) for file, config in configs.items()]
        yield from sorted(found, key=lambda one: (one.config.model.operator or "", one.cost.parameters, one.file.name))


def record(one: Shipped) -> dict[str, Any]:
    """The values of `COLUMNS`, None where there is none."""
    name, published = one.file.relative_to(ROOT).with_suffix("").as_posix(), one.published
    values = [name, one.config.model.operator, one.cost.parameters, published.get("parameters")]
    values += [one.cost.macs, one.cost.mixing_macs, published.get("top1")]
    return dict(zip(COLUMNS, values, strict=True))


def cells(record: dict[str, Any]) -> list[str]:
    """A record as the table shows it."""
    shown = {name: "–" if value is None else str(value) for name, value in record.items()}
    for name, form in {"parameters": ".2f", "macs": ".3f", "mixing_macs": ".3f"}.items():
        if record[name] is not None:
            shown[name] = format(record[name] / (1e6 if name == "parameters" else 1e9), form)
    return list(shown.values())


@cache
def _static_macs(fields: str) -> int:
    config = ModelConfig(**json.loads(fields))
    net, side = meta_network(config).eval(), config.input_size
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, config.in_chans, side, side, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as e:
        raise ConfigError(f"{config.model} cannot take images of {side}×{side}: {e}") from e
    return counter.get_total_flops() // 2
