"""Functions as operators of torch, for a CPU: a graph, a trace or a profile shows each as one."""

from collections.abc import Callable

import torch


def operator(name: str, fake: Callable) -> Callable[[Callable], torch._ops.OpOverload]:
    """Make a function the operator `kernelwarehouse::name`, which changes none of its arguments.

    A call costs half of one by `torch.library.custom_op`, since autograd does not look at it: it belongs into the
    forward or backward of an autograd Function, or where nothing is recorded.

    Args:
        name: Of the operator.
        fake: Makes an uninitialised result, of the right shape and layout, from the same arguments.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        qualified = f"kernelwarehouse::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "cpu", function)
        torch.library.register_fake(qualified, fake)
        return getattr(torch.ops.kernelwarehouse, name).default

    return register
