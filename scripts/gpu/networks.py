"""Stage 4: whole networks, static, as upstream formulates them, and ours, estimated and tuned: time and memory.

On a GPU none is there beside another. Inference of single images is timed a second time
as a CUDA graph. The peak of memory is that of the allocator above what was held before the network was built, and is
measured in the process that measures time: another for each figure, as in `timing.memory`, would take ten seconds.
"""

import copy
import functools
import gc
import itertools
import warnings
from collections.abc import Iterator

import torch
from timing.clock import arithmetic, autocast, step
from timing.networks import UPSTREAM, Contender, Pair
from torch import nn

from kernelwarehouse.models import operator_names, tune
from kernelwarehouse.models.operators import prefix_of

from .cases import Case
from .journal import Record
from .scope import Scope
from .stopwatch import captured, median_seconds

STAGE = "networks"
TUNED = "ours, tuned"
_LAYOUTS = {"static": "NHWC", UPSTREAM: "NCHW", "ours": "NHWC"}  # upstream's code knows no other
_SIBLING = "resnet18"


def cases(scope: Scope) -> Iterator[Case]:
    """For each network: static, ours and upstream's in each mode and batch; then ours tuned, which takes long."""
    for config, pair in pairs(scope):
        contenders = {c.name: c for c in pair.contenders() if c.layout == _LAYOUTS[c.name]}
        for names in (("static", "ours", UPSTREAM), (TUNED,)):
            for batch, train, name in itertools.product(scope.batches, (False, True), names):
                label = f"{config} {'train' if train else 'infer'} {batch} {name}"
                contender = contenders[name.partition(",")[0]]
                yield Case(label, functools.partial(_time, contender, config, name, train, batch, scope))


def pairs(scope: Scope) -> Iterator[tuple[str, Pair]]:
    """The networks of the scope, then the same backbone by each operator that none of them is of."""
    seen: set[str | None] = set()
    for config in scope.networks:
        pair = Pair.read(config, side=scope.side)
        seen.add(pair.converted.operator)
        yield config, pair
    for operator in operator_names() if scope.siblings else ():
        if operator not in seen:
            name = f"{prefix_of(operator)}_{_SIBLING}"
            yield name, Pair.read({"model": name}, side=scope.side)


@functools.cache
def _built(contender: Contender) -> nn.Module:
    """A network on the CPU, whose statistics take a second to find."""
    return contender.build(torch.device("cpu"))


def _time(contender: Contender, config: str, name: str, train: bool, batch: int, scope: Scope) -> Record:
    about = {"network": config, "contender": name, "mode": "train" if train else "infer", "batch": batch}
    about |= {"precision": scope.precision, "side": contender.config.input_size, "layout": contender.layout}
    try:
        with arithmetic(scope.precision if scope.precision == "fp32" else "tf32"):
            return {**about, **_figures(contender, name == TUNED, train, batch, scope)}
    finally:
        gc.collect()
        if scope.device.type == "cuda":
            torch.cuda.empty_cache()


def _figures(contender: Contender, tuned: bool, train: bool, batch: int, scope: Scope) -> Record:
    device, found = scope.device, {}
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    net, x = copy.deepcopy(_built(contender)).to(device), contender.images(batch, device)
    if tuned:
        with autocast(scope.precision, device), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layers = tune(net, x, training=train, rounds=3)
        found["taken"] = {layer.name: layer.taken for layer in layers}
        found["left_out"] = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    run = step(net, x, train, scope.precision)
    run()
    found["seconds"] = median_seconds({"step": run}, device)["step"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        if batch == 1 and not train:
            found["graph_seconds"] = median_seconds({"graph": captured(run)}, device)["graph"]
    return found
