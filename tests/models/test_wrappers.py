"""Wrappers and trainers of others, in which the converted network does what the static one does."""

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from networks import narrow_resnet
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from kernelwarehouse import KWConfig, convert_, set_temperature, sharing_groups
from kernelwarehouse.models import dynamic_layers, sharing

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
STAGES = {f"layer{i}": str(i) for i in range(1, 5)}


def network():
    net = convert_(narrow_resnet(), KWConfig(), keep_weights=False)
    set_temperature(net, 0.0)
    return net


def shapes(y):
    if isinstance(y, torch.Tensor):
        return y.shape
    return [(name, shapes(part)) for name, part in y.items()] if hasattr(y, "items") else [shapes(p) for p in y]


WRAPPERS = {
    "IntermediateLayerGetter": lambda net: IntermediateLayerGetter(net, STAGES),
    "BackboneWithFPN": lambda net: BackboneWithFPN(net, STAGES, [8, 8, 16, 16], 8),
    "DeepLab": lambda net: DeepLabV3(IntermediateLayerGetter(net, {"layer4": "out"}), DeepLabHead(16, 3)),
    "Sequential": lambda net: nn.Sequential(*list(net.children())[:-2]),
    "slice": lambda net: nn.Sequential(*net.children())[3:6],
    "FeatureListNet": lambda net: timm.models.FeatureListNet(net, out_indices=(1, 2, 3)),
    "AveragedModel": lambda net: torch.optim.swa_utils.AveragedModel(net),
    "DataParallel": nn.DataParallel,
}


class TestWrappers:
    @pytest.mark.parametrize("name", WRAPPERS)
    def test_outputs_and_gradients(self, name):
        x = torch.randn(2, 64, 8, 8) if name == "slice" else X
        static, net = (WRAPPERS[name](net).train() for net in (narrow_resnet(), network()))
        y = net(x)
        assert shapes(y) == shapes(static(x))
        outputs = [y] if isinstance(y, torch.Tensor) else list(y.values() if hasattr(y, "values") else y)
        sum(part.square().mean() for part in outputs).backward()
        assert dynamic_layers(net)
        layers = {name: layer for name, layer in dynamic_layers(net).items() if layer.bias is None}
        assert all(layer.warehouse.weight.grad is not None for layer in layers.values())
        assert not [key for key, p in net.named_parameters() if p.grad is None]

    def test_optimizer_groups_by_what_is_shared(self):
        net = network()
        groups = [[p for m in group for p in dict.fromkeys(m.parameters())] for group in sharing_groups(net)]
        seen = {p for group in groups for p in group}
        others = [p for p in net.parameters() if p not in seen]
        optimizer = torch.optim.SGD([{"params": list(dict.fromkeys(g))} for g in (*groups, others)], lr=0.1)
        before = {k: v.clone() for k, v in net.named_parameters()}
        net.train()(X).square().mean().backward()
        optimizer.step()
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)
        moved = [k for k, v in net.named_parameters() if not torch.equal(v, before[k])]
        assert "layer1.0.conv2.warehouse.weight" in moved

    def test_models_are_saved_as_transformers_trainer_does(self, tmp_path):
        net, other = network().eval(), network().eval()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        safetensors.torch.save_file(net.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)
        safetensors.torch.save_model(net, str(tmp_path / "b.safetensors"))
        other = network().eval()
        safetensors.torch.load_model(other, str(tmp_path / "b.safetensors"))
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_the_first_fsdp_has_cells_under_each_name(alone, use_orig_params):
    net, other = network().eval(), network().eval()
    expected, names = net(X), set(net.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    sharded = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    torch.testing.assert_close(sharded(X), expected)
    state = sharded.state_dict()
    users = {f"{user}.warehouse.weight" for users in sharing(other).values() for user in users}
    assert set(state) >= names | users
    wrapped = FullyShardedDataParallel(other, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    wrapped.load_state_dict({name: state[name] for name in names})  # the first names alone
    torch.testing.assert_close(wrapped(X), expected)
    plain = network().eval()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(X), expected)
    wrapped.train()(X).square().mean().backward()
