"""What CUDA graphs ask of a network: a step that never waits for the host and sends it nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernelwarehouse import build_model, set_implementation


class Transfers(TorchDispatchMode):
    """Notes every operator that reads from one device and writes to another."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("implementation", ["auto", "grouped", "materialize", "mix_inputs", "reassociated"])
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_a_step_never_waits_for_the_host(implementation, train):
    """On the meta device, that has no numbers: reading one, as by item(), is an error there."""
    with torch.device("meta"):
        net = build_model({"model": "kw_resnet18", "nb_classes": 10, "cell_num_ratio": 1}).train(train)
        images = torch.empty(4, 3, 64, 64)
    set_implementation(net, implementation)
    with Transfers() as transfers, torch.set_grad_enabled(train):
        y = net(images)
        if train:
            y.sum().backward()
    assert y.device.type == "meta"
    assert not transfers.seen
