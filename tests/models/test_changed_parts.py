"""What others do to the parts of a converted network is respected by every way to compute it."""

import pytest
import torch
from networks import narrow_resnet
from timm.layers import convert_splitbn_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kernelwarehouse import KWConfig, convert_, set_implementation
from kernelwarehouse.engine.state import synchronise_norms

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2 + 0.1


def network():
    net = convert_(narrow_resnet(), KWConfig(cell_num_ratio=2), keep_weights=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def double_forward(module):
    """As accelerate's and peft's hooks do."""
    before = module.forward
    module.forward = lambda *args, **kwargs: 2 * before(*args, **kwargs) + 1


CHANGES = {
    "patched fc1": lambda a: double_forward(a.fc1),
    "patched norm": lambda a: double_forward(a.norm),
    "patched fc2": lambda a: double_forward(a.fc2),
    "patched attention": lambda a: double_forward(a),
    "hook of fc1": lambda a: a.fc1.register_forward_hook(lambda _m, _args, y: 2 * y + 1),
    "hook of the attention": lambda a: a.register_forward_hook(lambda _m, _args, y: 2 * y + 1),
    "parametrized fc1": lambda a: parametrize.register_parametrization(a.fc1, "weight", Half()),
    "parametrized fc2": lambda a: parametrize.register_parametrization(a.fc2, "weight", Half()),
    "weight norm": lambda a: parametrizations.weight_norm(a.fc2).parametrizations.weight.original0.data.mul_(2),
    "pruned fc2": lambda a: prune.l1_unstructured(a.fc2, "weight", amount=0.9),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_of_an_attention_is_never_passed_over(change, gradients):
    layer = network().layer2[1].conv1.double()
    x = torch.randn(4, 8, 7, 5, dtype=torch.float64)
    unchanged = layer(x).detach()
    CHANGES[change](layer.attention)
    with torch.set_grad_enabled(gradients):
        found = layer(x).detach()
    set_implementation(layer, "reference")
    expected = layer(x).detach()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected - unchanged).abs().max() > 1e-4 * unchanged.abs().max()


def test_norms_split_by_timm():
    net = convert_splitbn_model(network(), num_splits=2).train()
    net(X).square().mean().backward()
    norm = net.layer2[1].conv1.attention.norm
    assert type(norm).__name__ == "SplitBatchNorm2d"
    assert norm.weight.grad.abs().sum() > 0
    torch.testing.assert_close(net.eval()(X).shape, (4, 5))


def test_synchronised_norms_of_attentions_train_on_a_batch_of_one():
    """As ours do: by the running statistics, which stay. Torch's synchronised norm itself asks for a GPU."""
    net = synchronise_norms(network(), torch.device("cuda"))
    layer = net.layer2[1].conv1.train()
    assert isinstance(layer.attention.norm, nn.SyncBatchNorm)
    before = layer.attention.norm.running_mean.clone()
    x = torch.randn(1, 8, 8, 8)
    y = layer(x)
    assert torch.equal(layer.attention.norm.running_mean, before)
    torch.testing.assert_close(y, layer.eval()(x), rtol=1e-4, atol=1e-5)
