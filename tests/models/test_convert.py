import copy
import math

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import narrow_resnet
from torch import nn

from kernelwarehouse import KWConfig, build_model, convert_, plan_conversion, set_temperature
from kernelwarehouse.models import plans, sharing
from kernelwarehouse.models.families import find_family
from kernelwarehouse.models.ops.kernel_warehouse import KWConv1d, KWConv3d, KWLayer, KWLinear
from kernelwarehouse.models.ops.kernel_warehouse.layers import KWConvNd


class Net1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 5, padding="same")
        self.body = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 16, 3))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean(-1))


class Net3d(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv3d(2, 4, 3, padding=1),
            nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv3d(4, 8, (1, 3, 3), stride=2, groups=2),
        )


NETWORKS = {
    "timm.resnet18": 19,
    "timm.resnet34": 35,
    "timm.resnet50": 50,
    "timm.resnet101": 101,
    "timm.resnext50_32x4d": 50,
    "timm.mobilenetv2_050": 52,
    "timm.mobilenetv2_110d": 67,
    "timm.convnext_atto": 40,
    "timm.deit_tiny_patch16_224": 48,
    "timm.deit_tiny_distilled_patch16_224": 48,
    "timm.vit_tiny_patch16_224": 48,
    "timm.efficientnet_b0": 48,
    "torchvision.resnet18": 19,
    "torchvision.resnet50": 50,
    "torchvision.mobilenet_v2": 51,
    "torchvision.mobilenet_v3_small": 33,
    "torchvision.efficientnet_b0": 48,
    "torchvision.regnet_x_400mf": 70,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_convert_and_compute_what_they_did(name):
    library, architecture = name.split(".")
    torch.manual_seed(0)
    create = getattr(torchvision.models, architecture) if library == "torchvision" else timm.create_model
    net = (create(num_classes=7) if library == "torchvision" else create(architecture, num_classes=7)).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = net(x)
        plan = plan_conversion(net, KWConfig())
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)
        convert_(net, plan)
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert len(plan.layers) == NETWORKS[name]
    assert sum(isinstance(m, KWLayer) for m in net.modules()) == len(plan.layers)
    assert sum(p.numel() for p in net.parameters()) == plan.parameters_after
    if find_family(net) is None:
        assert plan.parameters_after < 1.6 * plan.parameters_before


@pytest.mark.parametrize(
    ("net", "x", "kinds"),
    [(Net1d, (3, 2, 20), {KWConv1d}), (Net3d, (2, 2, 5, 8, 7), {KWConv3d})],
    ids=["1d", "3d"],
)
def test_networks_of_a_users_own(net, x, kinds):
    torch.manual_seed(0)
    net, x = net().eval(), torch.randn(x)
    before = net(x)
    convert_(net, plan_conversion(net, KWConfig(), example_input=x))
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert {type(m) for m in net.modules() if isinstance(m, KWLayer)} == kinds
    net.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


class TestProperties:
    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=4),
        st.lists(st.sampled_from([1, 3]), min_size=4, max_size=4),
        st.sampled_from([1, 1.3, 1.5, 2, 2.75, 4]),
        st.sampled_from([1, 0.5, 0.25]),
        st.booleans(),
        st.integers(0, 99),
    )
    def test_at_temperature_one_it_is_the_static_network_of_its_assigned_cells(
        self, widths, kernels, ratio, part, spatial, seed
    ):
        torch.manual_seed(seed)
        sizes = kernels if spatial else kernels[:1] * 4
        channels = [3, *widths]
        layers = [
            nn.Conv2d(channels[i], channels[i + 1], sizes[i], padding=sizes[i] // 2, stride=1 + i % 2)
            for i in range(len(widths))
        ]
        net = nn.Sequential(*layers).double()
        static = copy.deepcopy(net)
        config = KWConfig(
            cell_num_ratio=ratio,
            cell_inplane_ratio=part,
            cell_outplane_ratio=part,
            spatial_partition=spatial,
            warehouses={"0": "stem", r"[1-9]": "body"},
        )
        convert_(net, plan_conversion(net, config), keep_weights=False)
        for before, after in zip(static, net, strict=False):
            before.weight.data = after.static_kernel().detach()
            before.bias.data.zero_()
        x = torch.randn(2, 3, 7, 9).double()
        set_temperature(net, 1.0)
        torch.testing.assert_close(net(x), static(x))
        set_temperature(net, 0.5)
        assert not torch.allclose(net(x), static(x))

    @settings(max_examples=12, deadline=None)
    @given(st.floats(0.02, 6.0))
    def test_every_ratio_builds_or_says_which_work(self, ratio):
        net = narrow_resnet()
        try:
            plan = plan_conversion(net, KWConfig(cell_num_ratio=ratio))
        except ValueError as e:
            least = float(str(e).split("Ratios from ")[1].split(" ")[0])
            assert least > ratio
            return
        convert_(net, plan, keep_weights=False)
        owned = {w.name: [] for w in plan.warehouses}
        for layer in plan.layers:
            owned[layer.warehouse] += range(layer.start, layer.start + layer.own_cells)
        for w in plan.warehouses:
            assert sorted(owned[w.name]) == list(range(w.cells))
        net.train()(torch.randn(2, 3, 32, 32)).sum().backward()

    @pytest.mark.parametrize("ratio", [0.75, 1.5, 1 / 3, 0.5])
    def test_ratios_that_upstream_crashed_on(self, ratio):
        net = narrow_resnet()
        plan = plan_conversion(net, KWConfig(cell_num_ratio=ratio))
        convert_(net, plan, keep_weights=False)
        y = net.train()(torch.randn(2, 3, 32, 32))
        assert y.isfinite().all()

    def test_the_least_ratio_named_in_the_error_works(self):
        net = narrow_resnet()
        with pytest.raises(ValueError, match=r"warehouse stage\d_layer_conv: cell_num_ratio 0.01 of \d+ mixtures") as e:
            plan_conversion(net, KWConfig(cell_num_ratio=0.01))
        warehouses = len(plan_conversion(net, KWConfig()).warehouses)
        least = float(str(e.value).split("Ratios from ")[1].split(" ")[0])
        plan_conversion(net, KWConfig(cell_num_ratio=(least, *(1.0,) * (warehouses - 1))))


class TestErrors:
    def refused(self, net, config=None, match=""):
        names = [name for name, _ in net.named_modules()]
        with pytest.raises(ValueError, match=match):
            plan_conversion(net, config or KWConfig())
        assert [name for name, _ in net.named_modules()] == names

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (KWConfig(include=("layer1",)), r"include: 'layer1' matches no layer.*such as those of conv1"),
            (KWConfig(exclude=(r"layer9\..*",)), "exclude: .* matches no layer"),
            (KWConfig(include=("layer[",)), "not a regular expression"),
            (KWConfig(exclude=(".*",)), "nothing to convert"),
            (
                KWConfig(cell_inplane_ratio=0.4),
                "0.4 of 8 channels makes cells of 3, which do not divide them; 0.25 or 0.5 would",
            ),
            (KWConfig(cell_outplane_ratio=0.7), r"cells of 5, which do not divide them; 0.5 or 1 would"),
            (KWConfig(cell_num_ratio=(1, 2)), r"cell_num_ratio holds 2 ratios, one for each of \d: stage"),
            (KWConfig(spatial_partition=False), "one kernel size"),
            (KWConfig(warehouses={".*": "all"}), "dimensions cannot share"),
            (KWConfig(warehouses={".*conv2": "layer 2"}), "'layer 2': a name may hold letters"),
        ],
    )
    def test_configuration(self, config, message):
        self.refused(narrow_resnet(), config, message)

    def test_wrapped_networks(self):
        self.refused(nn.DataParallel(narrow_resnet()), match="wrapped in DataParallel: convert the network inside")
        self.refused(torch.compile(narrow_resnet()), match="wrapped in OptimizedModule")

    def test_distributed_data_parallel(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(narrow_resnet())
            self.refused(wrapped, match="wrapped in DistributedDataParallel: convert the network inside")
            inside = convert_(narrow_resnet(), plan_conversion(narrow_resnet(), KWConfig())).train()
            converted = nn.parallel.DistributedDataParallel(inside)
            names = [name for name, _ in converted.named_parameters()]
            assert len(names) == len(set(names))
            converted(torch.randn(2, 3, 32, 32)).square().mean().backward()
            assert all(p.grad is not None for p in converted.parameters())
        finally:
            torch.distributed.destroy_process_group()

    def test_already_converted(self):
        net = convert_(narrow_resnet(), plan_conversion(narrow_resnet(), KWConfig()))
        self.refused(net, match="already converted")
        with pytest.raises(ValueError, match="already converted"):
            convert_(net, plan_conversion(narrow_resnet(), KWConfig()))

    def test_single_layer_and_nothing(self):
        self.refused(nn.Conv2d(4, 4, 3), match="single Conv2d")
        self.refused(nn.ReLU(), match="no convolution")

    def test_tied_modules_and_weights(self):
        net = narrow_resnet()
        net.layer1[0].conv2 = net.layer1[1].conv2
        self.refused(net, match=r"layer1\.0\.conv2 and layer1\.1\.conv2 are one module")
        net = narrow_resnet()
        net.layer1[0].conv2.weight = net.layer1[1].conv2.weight
        self.refused(net, match="share one weight")

    def test_hooks(self):
        net = narrow_resnet()
        net.layer2[0].conv1.register_forward_hook(lambda *_: None)
        self.refused(net, match=r"layer2\.0\.conv1 has forward hooks")

    def test_networks_that_cannot_be_run(self):
        class Picky(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

            def forward(self, x, mask):
                return self.b(self.a(x)) * mask

        self.refused(Picky(), match="pass example_input, or name the warehouses yourself")
        plan = plan_conversion(Picky(), KWConfig(warehouses={"b": "b"}))
        assert [layer.name for layer in plan.layers] == ["b"]
        self.refused(Picky(), KWConfig(sharing_range="layer_conv"), match="sharing_range needs a table")

    def test_a_plan_for_another_network(self):
        net = narrow_resnet()
        state = copy.deepcopy(net.state_dict())
        for other in ("resnet18", "resnet34", "mobilenetv2_050"):
            with pytest.raises(ValueError, match="the plan expects"):
                convert_(net, plan_conversion(timm.create_model(other), KWConfig()))
        assert list(net.state_dict()) == list(state)

    def test_ratios_out_of_range(self):
        for value in (0, -1, math.nan, math.inf, (1, 0), ()):
            with pytest.raises(ValueError, match=r"cell_num_ratio.*(positive|at least one value)"):
                KWConfig(cell_num_ratio=value)


class TestConverted:
    def test_inherits_type_mode_and_frozenness(self):
        net = narrow_resnet().to(torch.bfloat16).train()
        net.layer4.eval()
        for p in net.layer1.parameters():
            p.requires_grad_(False)
        convert_(net, plan_conversion(net, KWConfig(sharing_range=("conv",))))
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        assert not net.layer4[0].conv1.training
        assert net.layer3[0].conv1.attention.training
        for name, users in sharing(net).items():
            frozen = all(user.startswith("layer1.") for user in users)
            assert net.get_parameter(name).requires_grad is not frozen
        own = [p for name, p in net.layer1.named_parameters() if "warehouse" not in name]
        assert not any(p.requires_grad for p in own)

    def test_sharing(self):
        users = sharing(build_model("configs/resnet18/kw1x_resnet18.json"))
        assert users["layer4.0.conv2.warehouse.weight"] == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
        wrapped = nn.Sequential(narrow_resnet())
        convert_(wrapped[0], plan_conversion(wrapped[0], KWConfig()))
        assert all(k.startswith("0.") and v[0].startswith("0.") for k, v in sharing(wrapped).items())
        assert len(plans(wrapped)) == 1

    def test_cells_go_with_the_last_layer_that_uses_them(self):
        net = narrow_resnet()
        convert_(net, plan_conversion(net, KWConfig(include=("layer.*", "fc"))))
        assert isinstance(net.fc, KWLinear)
        net.fc = nn.Linear(16, 2)
        assert not any(name.startswith("fc.warehouse") for name in net.state_dict())
        net.train()(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())

    def test_convolutions_keep_torchs_attributes(self):
        static, net = narrow_resnet(), narrow_resnet()
        convert_(net, plan_conversion(net, KWConfig()))
        for name, module in net.named_modules():
            if isinstance(module, KWConvNd):
                old = static.get_submodule(name)
                for attribute in (
                    "in_channels",
                    "out_channels",
                    "kernel_size",
                    "stride",
                    "padding",
                    "dilation",
                    "groups",
                ):
                    assert getattr(module, attribute) == getattr(old, attribute)
