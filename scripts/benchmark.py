"""Time a converted network beside its static twin, as upstream computes it and as we do, interleaved in one process.

    python scripts/benchmark.py --model configs/resnet18/kw1x_resnet18.json --batch 1 8 --mode infer train

"upstream" mixes all kernels from cells that lie one after the other, puts them in order, and runs one grouped
convolution. The static network and ours are taken in the faster of their two memory layouts. Inference is the forward
pass, training forward and backward. Outputs and gradients are compared first, in float64; nothing is printed if they
differ. "floor" is the least time that the multiply-adds and the bytes of the parameters take on this machine
(`timing/floor.py` has the formula), and "floor to static" what the ratio would be if both networks ran at theirs.

    python scripts/benchmark.py --model FILE --compile                           every network by torch.compile
    python scripts/benchmark.py --model FILE --sweep budget --plot budget.png    how cost grows
    python scripts/benchmark.py --model FILE --layers                            what each layer costs, and takes
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import chart, layers
from timing.clock import PRECISIONS, arithmetic, autocast
from timing.floor import Floor, Machine
from timing.memory import check_measurable, peak_bytes
from timing.networks import MERGED, Contender, Pair, compiled
from timing.parity import check_outputs, check_parity
from timing.results import MEMORY_WIDTHS, WIDTHS, Result, compare, table_head, table_row
from timing.rounds import time_case
from torch import nn

from kernelwarehouse import ConfigError, ModelConfig, build_model, merge_
from kernelwarehouse.engine import check_picture, keep_freed_memory
from kernelwarehouse.engine.outputs import check_file
from kernelwarehouse.models import dynamic_layers, get_operator, plans
from kernelwarehouse.models.tuning import distinct_layers, tune

SWEEPS = {
    "budget": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "batch": (1, 2, 4, 8, 16, 32, 64, 128),
    "resolution": (32, 64, 128, 224, 320, 448),
}


@dataclass(frozen=True)
class Case:
    """A pair of networks, and the floors of both."""

    pair: Pair
    floor: Floor
    static_floor: Floor


def read_cases(arguments: argparse.Namespace) -> list[Case]:
    """Read what is compared: one pair of networks, or one for each point of a sweep.

    A budget with fewer cells than layers is said and left out of a sweep.

    Raises:
        ValueError: A configuration that cannot be built, or that takes no such images.
    """
    points = [{"side": arguments.size}]
    if arguments.sweep == "budget":
        points = [{"side": arguments.size, "budget": budget} for budget in arguments.values]
    elif arguments.sweep == "resolution":
        points = [{"side": int(side)} for side in arguments.values]
    cases = []
    for point in points:
        pair = Pair.read(arguments.model, arguments.static, **point)
        try:
            cases.append(Case(pair, Floor(pair.converted, pair.static), Floor(pair.static, pair.static)))
        except ValueError as e:
            if arguments.sweep != "budget" or isinstance(e, ConfigError):
                raise
            print(f"budget {point['budget']:g}× is left out: {e}", file=sys.stderr)
    if not cases:
        raise ConfigError("--sweep budget: none of the budgets can be built")
    known = [*implementation_names(cases[0].pair.converted), *MERGED]
    for name in arguments.implementation:
        if name not in known:
            raise ConfigError(f"--implementation: there is no {name!r}; there are {', '.join(known)}")
    return cases


def implementation_names(config: ModelConfig) -> list[str]:
    """The names of all implementations that layers of a converted network have."""
    with torch.device("meta"):
        layers = dynamic_layers(build_model(config)).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.candidates()))


def check_case(
    case: Case, side: int, implementations: Sequence[str], device: torch.device, mode: str | None = None
) -> float | None:
    """`check_parity` of the converted network with images of that side; of a folded or compiled one, of its outputs.

    None for a network that there is nothing to compare with.

    Raises:
        SystemExit: As `check_parity`.
    """
    contender = Contender("ours", dataclasses.replace(case.pair.converted, input_size=side), implementation="auto")
    net, x = contender.build(device), contender.images(8, device)  # BatchNorm over fewer makes much of rounding errors
    forced = (name for name in implementations if name not in MERGED)
    found = [check_parity(net, x, ("auto", *forced))] if case.pair.no_authors is None else []
    net, x = net.double().eval(), x.double()
    others = [compiled] if mode else []
    others += [lambda net, _: merge_(net, x)] if MERGED.keys() & set(implementations) else []  # in place, so the last
    if others:
        found.append(check_outputs(net, x, (other(net, mode) for other in others)))
    return max(found, default=None)


def time_networks(
    cases: Sequence[Case], arguments: argparse.Namespace, machine: Machine, device: torch.device
) -> Iterator[list[Result]]:
    """Time everything that was asked for; the networks of one mode, precision and batch come together."""
    for case in cases:
        contenders = case.pair.contenders(arguments.implementation)
        built = {contender: contender.build(device) for contender in contenders if contender.name not in MERGED}
        config = case.pair.converted
        defaults = get_operator(config.operator).Config()
        budget = config.operator_fields.get("cell_num_ratio", getattr(defaults, "cell_num_ratio", None))
        for mode, precision, batch in itertools.product(arguments.mode, arguments.precision, arguments.batch):
            train, networks, results = mode == "train", {}, []
            for contender in contenders:
                images = contender.images(batch, device)
                if contender in built:
                    networks[contender] = built[contender], images
                elif not train:  # a folded network is made for a batch, and cannot be trained
                    networks[contender] = contender.build_for(images, precision), images
            warm_up = 1
            if arguments.compile:
                torch.compiler.reset()
                networks = {who: (compiled(net, arguments.compile), x) for who, (net, x) in networks.items()}
                warm_up = 3  # which is when a graph of kernels is captured
            if arguments.tune:
                for contender, network in networks.items():
                    if contender.name == "ours":
                        with arithmetic(precision), autocast(precision, device):
                            tune(*network, training=train)
            for contender, seconds in time_case(networks, mode, precision, arguments.rounds, warm_up).items():
                floor = case.static_floor if contender.implementation is None else case.floor
                least = floor.seconds(batch, train, precision, machine)
                peak = peak_bytes(contender, train, precision, batch, device) if arguments.memory else None
                labels = (mode, precision, batch, config.input_size, budget, contender.name, contender.layout)
                results.append(Result(*labels, seconds, least, peak))
            compare(results)
            yield results


def run_networks(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Print the table of whole networks, draw it if asked to, and return what JSON keeps."""
    cases = read_cases(arguments)
    # Below 64×64 BatchNorm would see one or two values per channel, and gradients rounding errors only.
    sides = [max(case.pair.converted.input_size, 64) for case in cases]
    found = [
        check_case(case, side, arguments.implementation, device, arguments.compile)
        for case, side in zip(cases, sides, strict=True)
    ]
    parity = max((value for value in found if value is not None), default=None)
    machine = Machine.measure(device, arguments.precision)
    print(f"{_heading(arguments, device)}; {_parity(parity)}\n{machine}\n")
    columns = {**WIDTHS, **(MEMORY_WIDTHS if arguments.memory else {})}
    print(table_head(columns))
    kept = []
    for results in time_networks(cases, arguments, machine, device):
        kept += results
        for result in results:
            print(table_row(result.cells(), list(columns.values())), flush=True)
    if arguments.plot:
        figure = chart.draw(kept, arguments.varies, _heading(arguments, device))
        figure.savefig(arguments.plot, dpi=120)
    return {"parity": parity, "machine": dataclasses.asdict(machine), "results": [dataclasses.asdict(r) for r in kept]}


def run_layers(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Print a table of layers for each mode, precision and batch, and return what JSON keeps."""
    (case,) = read_cases(arguments)
    contender = Contender("ours", case.pair.converted, "NHWC", "auto")
    net, kept = contender.build(device), []
    static = Contender("static", case.pair.static, "NHWC").build(device)
    names = implementation_names(case.pair.converted)
    compared = [
        *(name for name in names if name not in ("reference", "triton")),
        *(["merged"] if _can_merge(net) else []),
    ]
    parity = check_case(case, 64, compared, device)
    print(f"{_heading(arguments, device)}; {_parity(parity)}")
    for mode, precision, batch in itertools.product(arguments.mode, arguments.precision, arguments.batch):
        with autocast(precision, device):
            found = distinct_layers(net, contender.images(batch, device), mode == "train")
        for layer in found:
            layers.time_layer(layer, static.get_submodule(layer.name), precision, arguments.rounds)
        print(f"\n{mode}, {precision}, batches of {batch}: milliseconds\n\n{layers.table(found)}", flush=True)
        rows = [layers.record(layer) for layer in found]
        kept.append({"mode": mode, "precision": precision, "batch": batch, "layers": rows})
    return {"parity": parity, "layers": kept}


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: Options that exclude each other, or a file that cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="CONFIG", help="configuration of a converted network")
    add("--static", metavar="CONFIG", help="of its static twin; default: the same backbone unconverted")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--batch", type=_positive(int), nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    add("--mode", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    add("--precision", nargs="+", default=["fp32"], choices=PRECISIONS, help="bf16 and fp16 by autocast")
    text = f"time these too, each in all layers that can: implementations of the operator, {', '.join(MERGED)}"
    add("--implementation", nargs="+", default=[], metavar="NAME", help=text)
    modes = ("default", "reduce-overhead", "max-autotune")
    text = "compile every network by torch.compile; a GPU captures graphs of its kernels with reduce-overhead"
    add("--compile", nargs="?", const=modes[0], choices=modes, help=text)
    add("--tune", action="store_true", help="let ours take in each layer what is measured to be fastest first")
    add("--size", type=_positive(int), metavar="N", help="side of the images; default: the configuration's")
    add("--rounds", type=_positive(int), default=7, metavar="N", help="default: %(default)s")
    add("--memory", action="store_true", help="measure the peak of memory too, each in a process of its own")
    add("--sweep", choices=SWEEPS, help="show how cost grows with one of these")
    add("--values", type=_positive(float), nargs="+", metavar="V", help="what --sweep goes through")
    add("--layers", action="store_true", help="time each implementation in each distinct layer (NHWC) instead")
    add("--plot", type=Path, metavar="FILE", help="draw the ratios to the static network")
    add("--json", type=Path, metavar="FILE", help="write all figures there, with the seconds of every round")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: torch finds no GPU here; take cpu")
    if arguments.device == "cpu" and "tf32" in arguments.precision:
        raise ConfigError("--precision: tf32 is of GPUs; on a CPU take fp32, bf16 or fp16")
    if arguments.device == "cpu" and "triton" in arguments.implementation:
        raise ConfigError("--implementation: triton runs on a GPU only; on a CPU take cpp")
    others = arguments.sweep, arguments.plot, arguments.memory, arguments.implementation, arguments.compile
    if arguments.layers and any(others):
        raise ConfigError("--layers goes with none of --sweep, --plot, --memory, --implementation and --compile")
    if arguments.compile and arguments.memory:
        raise ConfigError("--memory is measured of networks that are not compiled; leave out --compile")
    if arguments.tune and (arguments.layers or arguments.memory or arguments.compile):
        raise ConfigError("--tune goes with none of --layers, --memory and --compile")
    if arguments.values and not arguments.sweep:
        raise ConfigError("--values means nothing without --sweep")
    arguments.varies = {"resolution": "side", None: "batch"}.get(arguments.sweep, arguments.sweep)
    if arguments.sweep:
        arguments.values = arguments.values or SWEEPS[arguments.sweep]
        if arguments.sweep != "budget" and any(value != int(value) for value in arguments.values):
            raise ConfigError(f"--values: a {arguments.sweep} is a whole number")
        if arguments.sweep == "batch":
            arguments.batch = [int(value) for value in arguments.values]
    if arguments.plot:
        check_picture("--plot", arguments.plot)
    if arguments.json:
        check_file("--json", arguments.json)
    if arguments.memory:
        check_measurable(torch.device(arguments.device))
    return arguments


def main() -> int:
    """Run the command line; return 0, or 2 for a configuration or an option that cannot be used."""
    try:
        arguments = parse_arguments()
        device = torch.device(arguments.device)
        if device.type == "cpu":
            keep_freed_memory()  # for all networks alike, as main.py does
        kept = (run_layers if arguments.layers else run_networks)(arguments, device)
        if arguments.json:
            about = {"model": arguments.model, "device": _where(device), "torch": torch.__version__}
            arguments.json.write_text(json.dumps({**about, **kept}, indent=2) + "\n", encoding="utf-8")
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _positive(kind: type) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    read.__name__ = f"positive {kind.__name__}"  # which argparse puts into its message
    return read


def _can_merge(net: nn.Module) -> bool:
    layers = dynamic_layers(net)
    try:
        for operator in {plan.operator for plan in plans(net)}:
            get_operator(operator).check_merge(layers)
    except ValueError:
        return False
    return True


def _parity(worst: float | None) -> str:
    return "no formulation of its authors to compare with" if worst is None else f"parity {worst:.0e}"


def _heading(arguments: argparse.Namespace, device: torch.device) -> str:
    way = f", torch.compile ({arguments.compile})" if arguments.compile else ", tuned" if arguments.tune else ""
    return f"{Path(arguments.model).stem}, {_where(device)}, torch {torch.__version__}{way}"


def _where(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
