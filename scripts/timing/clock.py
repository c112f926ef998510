"""What is timed, and how: steps of inference or training in one precision, in rounds that take turns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelwarehouse.models import set_temperature, temperatures

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "tf32", *HALF)


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """On a GPU, compute products of fp32 values in full, or rounded to TF32, and let cuDNN look for its best way."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision == "tf32"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to a half precision, or none for fp32 and tf32."""
    return torch.autocast(device.type, HALF.get(precision, torch.bfloat16), enabled=precision in HALF)


def step(net: nn.Module, x: Tensor, train: bool, precision: str = "fp32") -> Callable[[], None]:
    """Return a function that runs `net` on x once: inference, or forward and backward without the optimizer."""

    def infer() -> None:
        with torch.inference_mode(), autocast(precision, x.device):
            net(x)

    def forward_backward() -> None:
        net.zero_grad()
        with autocast(precision, x.device):
            y = net(x)
            loss = F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long, device=y.device))
        loss.backward()

    for operator, value in temperatures(net).items():
        set_temperature(net, value, operator)  # it is meant to stay there
    net.train(train)
    return forward_backward if train else infer
