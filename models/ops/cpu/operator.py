"""Functions as operators of torch: a graph, a trace or a profile shows each as one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def operator(
    name: str, fake: Callable, cuda: Callable | None = None, macs: Callable[..., int] | None = None
) -> Callable[[Callable], torch._ops.OpOverload]:
    """Make a function the operator `kernelwarehouse::name` for a CPU.

    A call costs half of one by `torch.library.custom_op`, since autograd does not look at it: it belongs into the
    forward or backward of an autograd Function.

    Args:
        name: Of the operator.
        fake: Makes an uninitialised result, of the right shape and layout, from the same arguments.
        cuda: What computes it on a GPU, if anything does.
        macs: Its multiply-adds, given its arguments with the shapes of tensors in place of tensors, so that torch's
            FlopCounterMode counts them; None where it has no products.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        qualified = f"kernelwarehouse::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "cpu", function)
        if cuda:
            torch.library.impl(qualified, "cuda", cuda)
        torch.library.register_fake(qualified, fake)
        packet = getattr(torch.ops.kernelwarehouse, name)
        if macs is not None:
            register_flop_formula(packet)(partial(_flops, macs))
        return packet.default

    return register


def _flops(macs: Callable[..., int], *shapes: Any, **_: Any) -> int:
    return 2 * macs(*shapes)
