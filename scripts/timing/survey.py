"""Every operator on one backbone: which networks that is, and how long and how much memory they take."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernelwarehouse.models import get_operator, operator_names, read_config

from .memory import working_bytes
from .networks import Pair
from .parity import check_parity
from .rounds import time_case
from .shipped import Cost, folders, shipped

STATIC, OURS = "static", "ours"
_SMALLEST = 64  # side of images below which BatchNorm would see one or two values per channel when results are compared


@dataclass(frozen=True)
class Case:
    """What is timed: inference ("infer") or training ("train") with a batch of that size."""

    mode: str
    batch: int

    @classmethod
    def read(cls, text: str) -> "Case":
        """Of a text such as "infer:8".

        Raises:
            ValueError: Another text.
        """
        mode, _, batch = text.partition(":")
        if mode not in ("infer", "train") or not batch.isdecimal() or int(batch) < 1:
            raise ValueError(text)
        return cls(mode, int(batch))

    def __str__(self) -> str:
        return f"{'inference' if self.mode == 'infer' else 'training'}, {self.batch}"


@dataclass(frozen=True)
class Ratio:
    """Times over those of the static network in the same rounds.

    Attributes:
        median: Of the times, over the median of the static network's.
        spread: Half the range of the rounds' ratios.
        seconds: Of each round.
    """

    median: float
    spread: float
    seconds: list[float]

    @classmethod
    def of(cls, seconds: Sequence[float], static: Sequence[float]) -> "Ratio":
        """Of the times of the same rounds."""
        rounds = [a / b for a, b in zip(seconds, static, strict=True)]
        median = statistics.median(seconds) / statistics.median(static)
        return cls(median, (max(rounds) - min(rounds)) / 2, list(seconds))

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {self.spread:.2f}"


@dataclass
class Row:
    """A converted network and its static twin.

    Attributes:
        name: The configuration's, or the operator's where its defaults are taken.
        operator: The operator's name.
        pair: The networks; None where the operator cannot convert the backbone.
        cost: What the converted network costs.
        remarks: Why something is missing.
        parity: The largest relative difference between the two in outputs and gradients, in float64.
        static_seconds: By case, of each round of the static network in its faster layout.
        ratios: By case, of ours and of the authors' formulation ("upstream").
        memory: What a training step holds besides parameters and gradients, in bytes, with that of "static".
    """

    name: str
    operator: str
    pair: Pair | None = None
    cost: Cost | None = None
    remarks: list[str] = field(default_factory=list)
    parity: float | None = None
    static_seconds: dict[Case, list[float]] = field(default_factory=dict)
    ratios: dict[Case, dict[str, Ratio]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(cls, name: str, operator: str, fields: Any, side: int | None) -> "Row":
        """Read and convert, without weights; what fails is a remark."""
        row = cls(name, operator)
        try:
            pair = Pair.read(fields, side=side)
            row.cost = Cost.of(pair.converted)
            missing = pair.no_authors
        except ValueError as e:
            row.remarks.append(f"not converted: {' '.join(str(e).split())}")
            return row
        row.pair = pair
        if missing is not None:
            row.remarks.append(f"not compared: {missing}")
        return row

    def compared(self) -> str:
        """In words, what came of the comparison with the authors' formulation."""
        return "; ".join(self.remarks) if self.parity is None else f"parity {self.parity:.0e}"

    def memory_ratio(self, network: str) -> float | None:
        """Memory over the static network's; None where it was not measured."""
        return self.memory[network] / self.memory[STATIC] if network in self.memory else None


def find_rows(backbone: str, side: int | None, operators: Sequence[str] = ()) -> tuple[Cost, list[Row]]:
    """What the static network costs, and for every operator its shipped configurations or, without any, its defaults.

    Args:
        backbone: A folder of shipped configurations, or a name of timm's.
        side: Of the images, in place of the configurations'.
        operators: The operators; none for all that are known.

    Raises:
        ConfigError: No such network or operator, or one that takes no such images.
    """
    files = list(shipped([backbone] if backbone in folders() else []))
    base = next((one.config.to_fields() for one in files if not one.config.model.operator), {"model": backbone})
    size = {} if side is None else {"input_size": side}
    cost, rows = Cost.of(read_config(base, size).model), []
    for operator in operators:
        get_operator(operator)
    for operator in operators or operator_names():
        own = [one.file for one in files if one.config.model.operator == operator]
        rows += [Row.make(file.stem, operator, file, side) for file in own]
        if not own:
            rows.append(Row.make(operator, operator, {**base, "operator": operator}, side))
    return cost, rows


def check(row: Row, device: torch.device) -> None:
    """Compare outputs and gradients with the authors' formulation.

    Raises:
        SystemExit: As `check_parity`.
    """
    if row.pair is not None and row.pair.no_authors is None:
        contender = next(c for c in row.pair.contenders() if c.name == OURS)
        config = dataclasses.replace(contender.config, input_size=max(contender.config.input_size, _SMALLEST))
        contender = dataclasses.replace(contender, config=config)
        row.parity = check_parity(contender.build(device), contender.images(2, device))


def measure(
    row: Row, cases: Sequence[Case], rounds: int, precision: str, with_memory: bool, device: torch.device
) -> None:
    """Time the networks of a row in turn, and measure the memory of the last training case.

    Raises:
        SystemExit: As `time_case` and `working_bytes`.
    """
    if row.pair is None:
        return
    built = {contender: contender.build(device) for contender in row.pair.contenders()}
    for case in cases:
        networks = {contender: (net, contender.images(case.batch, device)) for contender, net in built.items()}
        timed = time_case(networks, case.mode, precision, rounds)
        seconds = {contender.name: values for contender, values in timed.items()}
        row.static_seconds[case] = seconds[STATIC]
        row.ratios[case] = {
            name: Ratio.of(values, seconds[STATIC]) for name, values in seconds.items() if name != STATIC
        }
        if case.mode == "train" and with_memory:
            row.memory = {c.name: working_bytes(c, precision, case.batch, device) for c in timed}
        for net in built.values():
            net.zero_grad()
