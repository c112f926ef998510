"""What layers share stays shared and whole, whatever torch and its ecosystem do to a network."""

import copy
import io

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from networks import narrow_resnet
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from kernelwarehouse import KWConfig, convert_, load_checkpoint, plans, set_temperature, sharing_groups
from kernelwarehouse.models import load_weights, set_implementation, sharing, temperatures

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def network(seed=0):
    net = convert_(narrow_resnet(), KWConfig(cell_num_ratio=2), keep_weights=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def cells(net):
    return {name: net.get_parameter(name) for name in sharing(net)}


def users_agree(net):
    """Whether all layers of each warehouse still have one and the same parameter."""
    return all(
        len({id(net.get_submodule(user).warehouse.weight) for user in users}) == 1 for users in sharing(net).values()
    )


def written(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.getvalue()


class TestStateDict:
    def test_each_cell_is_written_once_and_two_files_are_equal(self):
        net = network()
        names = [name for name in net.state_dict() if "warehouse" in name]
        assert names == list(sharing(net))
        assert names[0] == "layer1.0.conv2.warehouse.weight"
        assert len(net.state_dict(destination={})) == len(net.state_dict())
        assert written(net) == written(net)

    def test_every_shared_tensor_is_contiguous(self):
        net = network()
        assert all(value.is_contiguous() for value in net.state_dict().values())
        net.to(memory_format=torch.channels_last)
        assert all(value.is_contiguous() for value in cells(net).values())

    def test_a_dict_without_cells_is_refused_also_after_a_good_load(self):
        net, other = network(), network(1)
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)
        without = {name: value for name, value in net.state_dict().items() if "warehouse" not in name}
        missing = other.load_state_dict(without, strict=False).missing_keys
        assert missing == list(sharing(net))  # each is missing once
        with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.0\.conv2\.warehouse\.weight"):
            other.load_state_dict(without)

    def test_cells_are_accepted_under_the_name_of_any_layer_that_uses_them(self):
        net, other = network(), network(1)
        late = {}
        for name, value in net.state_dict().items():
            users = sharing(net).get(name)
            late[f"{users[-1]}.warehouse.weight" if users else name] = value
        assert list(late) != list(net.state_dict())
        other.load_state_dict(late)
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)

    def test_two_names_with_equal_values_load_and_with_different_ones_are_both_named(self):
        net, other = network(), network(1)
        name, users = next(iter(sharing(net).items()))
        second = f"{users[1]}.warehouse.weight"
        state = net.state_dict()
        other.load_state_dict({**state, second: state[name].clone()})
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)
        for load in (other.load_state_dict, lambda s: load_weights(other, s)):
            with pytest.raises((RuntimeError, ValueError), match=rf"{name} and {second}.*different values"):
                load({**state, second: state[name] + 1})

    def test_a_network_of_one_flat_storage(self):
        """Parameters that share memory are still each their own."""
        net, other = network(), network(1)
        flat = nn.utils.parameters_to_vector(net.parameters())
        nn.utils.vector_to_parameters(flat, other.parameters())
        assert list(other.state_dict()) == list(net.state_dict())
        other.load_state_dict({**net.state_dict(), **other.state_dict()})
        buffers = {k: v for k, v in net.state_dict().items() if k not in dict(net.named_parameters())}
        other.load_state_dict(buffers, strict=False)
        torch.testing.assert_close(other(X), net(X))

    def test_safetensors(self, tmp_path):
        net, other = network(), network(1)
        safetensors.torch.save_file(net.state_dict(), tmp_path / "net.safetensors")
        load_checkpoint(other, tmp_path / "net.safetensors")
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)
        safetensors.torch.save_model(net, str(tmp_path / "model.safetensors"))
        again = network(2)
        assert safetensors.torch.load_model(again, str(tmp_path / "model.safetensors")) == (set(), [])
        torch.testing.assert_close(again(X), net(X), rtol=0, atol=0)


class TestParts:
    def test_a_truncated_network_keeps_its_cells_and_gives_them_back(self):
        net = network()
        body = nn.Sequential(*list(net.children())[:-2])
        torch.testing.assert_close(body(X), net.forward_features(X), rtol=0, atol=0)
        other = network(1)
        twin = nn.Sequential(*list(other.children())[:-2])
        twin.load_state_dict(body.state_dict())
        torch.testing.assert_close(other.forward_features(X), net.forward_features(X), rtol=0, atol=0)

    def test_a_stage_alone_and_back(self):
        net, other = network(), network(1)
        stage = copy.deepcopy(net.layer2)
        assert any("warehouse" in name for name in stage.state_dict())
        x = torch.randn(2, 8, 8, 8)
        torch.testing.assert_close(stage(x), net.layer2(x), rtol=0, atol=0)
        other.layer2.load_state_dict(stage.state_dict())
        torch.testing.assert_close(other.layer2(x), net.layer2(x), rtol=0, atol=0)

    def test_feature_extraction_keeps_every_parameter_that_it_needs(self):
        net = network()
        expected = net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(X))))))
        getter = IntermediateLayerGetter(net, {"layer2": "two"})
        torch.testing.assert_close(getter(X)["two"], expected, rtol=0, atol=0)
        extractor = create_feature_extractor(
            net, ["layer2"], tracer_kwargs={"leaf_modules": [type(net.layer1[0].conv2)]}
        )
        torch.testing.assert_close(extractor.eval()(X)["layer2"], expected, rtol=0, atol=0)
        for part in (getter, extractor):
            kept = {id(p) for p in part.parameters()}
            needed = [
                *net.conv1.parameters(),
                *net.bn1.parameters(),
                *net.layer1.parameters(),
                *net.layer2.parameters(),
            ]
            assert {id(p) for p in needed} <= kept

    def test_the_features_of_vgg(self):
        torch.manual_seed(0)
        net = convert_(torchvision.models.vgg11(num_classes=3), KWConfig()).eval()
        features = net.features
        assert users_agree(features)
        assert sum(p.numel() for p in features.parameters()) > 9e6
        x = torch.randn(1, 3, 64, 64)
        twin = copy.deepcopy(features)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        twin.load_state_dict(features.state_dict())
        torch.testing.assert_close(twin(x), features(x), rtol=0, atol=0)

    def test_data_parallel_is_the_network_on_a_cpu(self):
        net = network()
        torch.testing.assert_close(nn.DataParallel(net)(X), net(X), rtol=0, atol=0)
        assert len(list(nn.DataParallel(net).parameters())) == len(list(net.parameters()))


class TestCopies:
    @pytest.mark.parametrize(
        "change", [copy.deepcopy, lambda n: copy.deepcopy(n).half(), lambda n: copy.deepcopy(n).double()]
    )
    def test_copies_and_types_keep_the_sharing(self, change):
        net = network()
        twin = change(net)
        assert users_agree(twin)
        assert list(twin.state_dict()) == list(net.state_dict())
        assert len(plans(twin)) == 1
        with torch.no_grad():
            next(iter(cells(twin).values())).zero_()
        assert all(value.abs().sum() > 0 for value in cells(net).values())

    def test_meta_and_assign(self):
        """Nothing is computed from memory that nobody filled: neither cells nor what a constructor computes."""
        net = network()
        set_temperature(net, 0.5)
        empty = copy.deepcopy(net).to("meta")
        assert list(empty.state_dict()) == list(net.state_dict())
        empty.load_state_dict(net.state_dict(), assign=True)
        assert users_agree(empty)
        torch.testing.assert_close(empty(X), net(X), rtol=0, atol=0)

    def test_meta_and_to_empty(self):
        net = network()
        set_temperature(net, 0.5)
        empty = copy.deepcopy(net).to("meta").to_empty(device="cpu")
        for tensor in (*empty.parameters(), *(b for b in empty.buffers() if b.is_floating_point() and b.ndim < 2)):
            tensor.data.fill_(float("nan"))
        empty.load_state_dict(net.state_dict())
        assert users_agree(empty)
        torch.testing.assert_close(empty(X), net(X), rtol=0, atol=0)

    def test_converting_a_network_on_meta(self):
        with torch.device("meta"):
            static = timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=5)
            net = convert_(static, KWConfig(cell_num_ratio=2), keep_weights=False)
        assert {p.device.type for p in net.parameters()} == {"meta"}
        filled = network()
        net.load_state_dict(filled.state_dict(), assign=True)
        torch.testing.assert_close(net.eval()(X), filled(X), rtol=0, atol=0)

    def test_averages(self):
        net = network()
        set_temperature(net, 0.5)
        average = AveragedModel(net)
        assert users_agree(average.module)
        average.update_parameters(net)
        torch.testing.assert_close(average(X), net(X))
        assert temperatures(average) == temperatures(net)


class TestOptimizers:
    def test_lbfgs_and_flat_vectors_see_each_parameter_once(self):
        net = network().double()
        x = X.double()
        vector = nn.utils.parameters_to_vector(net.parameters())
        assert vector.numel() == plans(net)[0].parameters_after
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

        def closure():
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        before = closure().item()
        optimizer.step(closure)
        assert closure().item() < before

    def test_groups_by_child_that_share_are_torchs_error(self):
        net = network()
        groups = [{"params": net.layer1.parameters()}, {"params": net.layer2.parameters()}]
        with pytest.raises(ValueError, match="more than one parameter group"):
            torch.optim.SGD(groups, lr=0.1)
        groups = [{"params": list(dict.fromkeys(p for m in g for p in m.parameters()))} for g in sharing_groups(net)]
        assert len(groups) == len(plans(net)[0].warehouses)
        torch.optim.SGD(groups, lr=0.1)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def train_step(net):
    set_implementation(net, "auto")
    net.train()(X).square().mean().backward()
    return net


class TestDistributed:
    def test_distributed_data_parallel(self, alone):
        parallel = nn.parallel.DistributedDataParallel(network())
        train_step(parallel)
        assert all(p.grad is not None for p in parallel.parameters())
        assert list(parallel.module.state_dict()) == list(network().state_dict())

    def test_fsdp2_around_the_whole(self, alone):
        net = fully_shard(network(), mesh=alone)
        train_step(net)
        assert users_agree(net)
        assert all(p.grad is not None for p in net.parameters())
        assert list(net.state_dict()) == list(network().state_dict())

    def test_fsdp2_in_groups_of_layers_that_share(self, alone):
        net = network()
        groups = sharing_groups(net)
        assert {len(group) for group in groups} != {1}
        for group in groups:
            fully_shard(group, mesh=alone)
        train_step(fully_shard(net, mesh=alone))
        assert users_agree(net)
        assert all(p.grad is not None for p in net.parameters())

    def test_fsdp2_stage_by_stage_is_torchs_error(self, alone):
        net = network()
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        assert sharing_groups(net, stages) == [stages]  # the next stage borrows what the last one has

        def one_by_one():
            for stage in stages:
                fully_shard(stage, mesh=alone)
            train_step(fully_shard(net, mesh=alone))

        with pytest.raises((ValueError, RuntimeError, AssertionError, TypeError)):
            one_by_one()

    def test_distributed_checkpoints(self, alone, tmp_path):
        net, other = fully_shard(network(), mesh=alone), fully_shard(network(1), mesh=alone)
        state = {"model": get_model_state_dict(net)}
        dcp.save(state, checkpoint_id=tmp_path / "dcp")
        read = {"model": get_model_state_dict(other)}
        dcp.load(read, checkpoint_id=tmp_path / "dcp")
        set_model_state_dict(other, read["model"])
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)
