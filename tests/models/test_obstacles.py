"""What a conversion would lose or break is refused by name, and what can be kept is kept."""

import copy

import pytest
import torch
from networks import narrow_resnet
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from kernelwarehouse import KWConfig, convert_, merge_, plan_conversion, set_implementation, set_temperature
from kernelwarehouse.models import CheckpointError, dynamic_layers, load_weights
from kernelwarehouse.models.ops.kernel_warehouse import KWConv2d


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "state-dict hook": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "load-state-dict hook": lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
    "hook on the weight": lambda m: m.weight.register_hook(lambda g: g),
    "hook after accumulation": lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None),
    "forward of the instance": lambda m: setattr(m, "forward", m.forward),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Double()),
    "new weight norm": lambda m: parametrizations.weight_norm(m),
    "new spectral norm": lambda m: parametrizations.spectral_norm(m),
    "old weight norm": lambda m: weight_norm(m),
    "old spectral norm": lambda m: spectral_norm(m),
    "pruning": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_layer_that_somebody_changed_is_refused_by_name(change):
    net, plan = narrow_resnet(), plan_conversion(narrow_resnet(), KWConfig())
    CHANGES[change](net.layer2[0].conv2)
    before = copy.copy(list(net.named_modules()))
    with pytest.raises(ValueError, match=r"layer2\.0\.conv2"):
        plan_conversion(net, KWConfig())
    with pytest.raises(ValueError, match=r"layer2\.0\.conv2"):
        convert_(net, plan)  # though the plan was made before
    assert [name for name, _ in net.named_modules()] == [name for name, _ in before]
    convert_(net, KWConfig(exclude=(r"layer2\.0\.conv2",)))
    assert not isinstance(net.layer2[0].conv2, KWConv2d)


def test_a_layer_of_another_class_stays_and_is_listed_or_is_refused_where_it_is_named():
    class Special(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Special(8, 8, 3), nn.Conv2d(8, 8, 3))
    plan = plan_conversion(net, KWConfig(), example_input=torch.randn(2, 3, 16, 16))
    assert [layer.name for layer in plan.layers] == ["2"]
    assert "1 stays static: it is a Special, whose arithmetic may be its own" in str(plan)
    with pytest.raises(ValueError, match="1 cannot be converted: it is a Special"):
        plan_conversion(net, KWConfig(warehouses={"[12]": "all"}))


def with_weight(m, weight):
    m.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())


class Marked(nn.Parameter):
    """A parameter of another class."""


# By what somebody did to one of two equal layers: what the refusal says. Both are given.
UNUSUAL = {
    "complex": (lambda m, other: m.to(torch.complex64), "has a weight of complex64; operators know float16, bfloat16"),
    "integers": (lambda m, other: with_weight(m, m.weight.to(torch.int8)), "has a weight of int8"),
    "eight bits": (lambda m, other: with_weight(m, m.weight.to(torch.float8_e4m3fn)), "has a weight of float8_e4m3fn"),
    "no elements": (lambda m, other: m.__init__(0, 8, 3), "has a kernel without elements"),
    "sparse": (lambda m, other: with_weight(m, m.weight.detach().to_sparse()), "weight that is no plain parameter"),
    "another class": (lambda m, other: setattr(m, "weight", Marked(m.weight)), "no plain parameter, but a Marked"),
    "no parameter": (lambda m, other: m.register_parameter("weight", None), "no plain parameter, but a NoneType"),
    "channels cut": (
        lambda m, other: with_weight(m, m.weight[:4]),
        r"weight of \(4, 8, 3, 3\) where its",
    ),
    "bias cut": (lambda m, other: setattr(m, "bias", nn.Parameter(m.bias[:4])), r"has a bias of \(4,\) where"),
    "mask": (lambda m, other: m.register_buffer("mask", torch.ones(1)), "has mask beside its weight and bias"),
    "adapter": (lambda m, other: m.add_module("lora", nn.Linear(1, 1)), "has lora beside its weight and bias"),
    "one bias": (lambda m, other: setattr(m, "bias", other.bias), r"bias and body\.1\.bias share one bias"),
    "memory": (lambda m, other: with_weight(m, other.weight.data), "share one weight"),
    "overlap": (
        lambda m, other: setattr(m, "bias", nn.Parameter(other.bias.data.view(2, 4).flatten())),
        "share one bias",
    ),
}


@pytest.mark.parametrize("change", UNUSUAL)
def test_a_layer_that_is_not_as_its_class_makes_it_is_refused_by_name(change):
    function, reason = UNUSUAL[change]
    net = nn.Sequential()
    net.stem, net.body = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    config = KWConfig(warehouses={r"body\..": "all"})
    plan = plan_conversion(net, config)
    function(net.body[1], net.body[0])
    state = {name: id(p) for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=rf"body\..*{reason}"):
        plan_conversion(net, config)
    with pytest.raises(ValueError, match=r"body|does not run"):
        plan_conversion(net, KWConfig())
    with pytest.raises(ValueError, match=r"body\.1"):
        convert_(net, plan)  # though the plan was made before
    assert {name: id(p) for name, p in net.named_parameters()} == state


def test_parameters_side_by_side_in_memory_are_no_obstacle():
    net = narrow_resnet()
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(flat, net.parameters())
    assert convert_(net, KWConfig()) is net


def test_a_block_under_two_names_is_converted_once():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))).eval()
    net.append(net[1])
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = net(x)
        convert_(net, KWConfig(), example_input=x)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    assert net[1][0] is net[2][0]
    again = copy.deepcopy(net)
    for p in again.parameters():
        nn.init.zeros_(p)
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x), net(x))


class Tokens(nn.Module):
    """Linear layers over (T, B, C), (B, T, C) or windows (B · windows, T, C)."""

    def __init__(self, layout):
        super().__init__()
        self.stem, self.body, self.layout = nn.Linear(6, 8), nn.Linear(8, 8), layout

    def forward(self, x):
        x = self.stem(x)
        if self.layout == "sequence first":
            return self.body(x.transpose(0, 1)).transpose(0, 1)
        if self.layout == "windows":
            return self.body(x.reshape(-1, 3, 8)).reshape(x.shape)
        return self.body(x)


class Masked(nn.Module):
    """An encoder that may be told to leave the last token out."""

    def __init__(self, stem, encoder, mask):
        super().__init__()
        self.stem, self.encoder, self.mask = stem, encoder, mask

    def forward(self, x):
        mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        mask[:, -1] = self.mask
        return self.encoder(self.stem(x), src_key_padding_mask=mask if self.mask else None)[:, :-1]


class TestFirstDimension:
    def test_the_batch_converts_and_samples_do_not_mix(self):
        net = convert_(Tokens("batch first"), KWConfig(), example_input=torch.randn(4, 12, 6)).double()
        x = torch.randn(3, 12, 6, dtype=torch.float64)
        torch.testing.assert_close(net(x)[:1], net(x[:1]))

    @pytest.mark.parametrize("batch", [4, 12])  # 12 is the number of tokens as well
    def test_another_dimension_is_refused(self, batch):
        with pytest.raises(ValueError, match="body reads an input whose first dimension is not the batch"):
            plan_conversion(Tokens("sequence first"), KWConfig(), example_input=torch.randn(batch, 12, 6))

    def test_torchs_transformer_is_refused_in_its_default_layout(self):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
        with pytest.raises(ValueError, match=r"linear1 reads an input whose first dimension is not the batch"):
            plan_conversion(encoder, KWConfig(warehouses={r".*linear[12]": "mlp"}), example_input=torch.randn(7, 5, 8))

    @pytest.mark.parametrize("mask", [False, True])
    def test_torchs_transformer_converts_where_the_batch_is_first(self, mask):
        """In evaluation torch would read the weights of its linear layers instead of calling them."""
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        net = Masked(nn.Linear(8, 8), encoder, mask).eval()
        x = torch.randn(3, 7, 8)
        with torch.no_grad():
            expected = net(x)
            convert_(net, KWConfig(), example_input=x)
            assert len(dynamic_layers(net)) == 4
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)

    def test_windows_have_kernels_of_their_own_which_are_counted(self):
        plan = plan_conversion(Tokens("windows"), KWConfig(), example_input=torch.randn(4, 12, 6))
        same = plan_conversion(Tokens("batch first"), KWConfig(), example_input=torch.randn(4, 12, 6))
        assert [layer.repeats for layer in plan.layers] == [4]
        assert plan.mixing_macs == 4 * same.mixing_macs
        assert "body: 4 windows an image, a kernel each" in str(plan)

    def test_a_linear_layer_that_was_never_seen_is_not_taken_on_trust(self):
        with pytest.raises(ValueError, match=r"body is a linear layer.*pass example_input"):
            plan_conversion(Tokens("batch first"), KWConfig(warehouses={"body": "body"}))


class TestTrainability:
    def test_a_frozen_bias_and_a_frozen_weight_stay_as_they_are(self):
        net = narrow_resnet()
        for name, with_bias in (("conv1", False), ("conv2", True)):
            old = getattr(net.layer1[1], name)
            new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
            new.weight.requires_grad_(not with_bias)
            new.bias.requires_grad_(with_bias)
            setattr(net.layer1[1], name, new)
        convert_(net, KWConfig())
        frozen_bias, frozen_weight = net.layer1[1].conv1, net.layer1[1].conv2
        assert not frozen_bias.bias.requires_grad
        assert all(p.requires_grad for p in frozen_bias.attention.parameters())
        assert frozen_weight.bias.requires_grad
        assert not any(p.requires_grad for p in frozen_weight.attention.parameters())
        assert frozen_bias.warehouse.weight.requires_grad  # others still learn


def wrapped():
    """A network inside a module, as a trainer holds it."""
    holder = nn.Module()
    holder.net = convert_(narrow_resnet(), KWConfig(cell_num_ratio=4)).eval()
    holder.forward = lambda x: holder.net(x)
    return holder


def test_functions_take_a_network_inside_a_module():
    holder, x = wrapped(), torch.randn(2, 3, 32, 32)
    expected = holder(x)
    set_implementation(holder, "reference")
    torch.testing.assert_close(holder(x), expected, rtol=1e-4, atol=1e-4)
    set_implementation(holder, "auto")
    set_temperature(holder, 0.5)
    with pytest.raises(ValueError, match="trained"):
        merge_(holder, x)
    assert all(layer.warehouse is not None for layer in dynamic_layers(holder).values())  # nothing is half done
    set_temperature(holder, 0.0)
    assert merge_(holder, x) is holder
    torch.testing.assert_close(holder(x), expected, rtol=1e-4, atol=1e-4)


def test_an_option_of_merging_that_means_nothing_changes_nothing():
    holder, x = wrapped(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="no option 'dtyp'"):
        merge_(holder, x, dtyp=torch.float16)
    assert all(layer.warehouse is not None for layer in dynamic_layers(holder).values())


def test_a_kernel_of_other_axes_is_not_reshaped_into_place():
    net = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(CheckpointError, match=r"0\.weight is \(1, 4, 3, 3\) in the file, \(4, 1, 3, 3\)"):
        load_weights(net, {"0.weight": torch.zeros(1, 4, 3, 3), "0.bias": torch.zeros(4)})
    linear = nn.Sequential(nn.Linear(4, 2))
    load_weights(linear, {"0.weight": torch.ones(2, 4, 1, 1), "0.bias": torch.zeros(2)})
    assert linear[0].weight.sum() == 8
