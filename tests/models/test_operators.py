"""Operators: how one is brought in and found, and that everything serves an operator of others as it does our own."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import timm
import torch
import toy_operator
from networks import narrow_resnet
from torch import nn
from toy_operator import Mixture, Toy, ToyConfig, ToyLayer

import kernelwarehouse
from kernelwarehouse import (
    ConfigError,
    ConversionPlan,
    KWConfig,
    build_model,
    convert_,
    load_checkpoint,
    merge_,
    plan_conversion,
    plans,
)
from kernelwarehouse.configs.schema import RunConfig
from kernelwarehouse.engine import parse_arguments
from kernelwarehouse.engine.schedule import Schedule
from kernelwarehouse.models import (
    anneals,
    dynamic_layers,
    find_preset,
    get_operator,
    operator_names,
    operators,
    read_config,
    register,
    set_implementation,
    set_temperature,
    sharing,
    sharing_groups,
    temperatures,
)

EARLY, LATE = r"layer[12].*", r"layer[34].*"


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    return narrow_resnet()


@pytest.fixture
def registry(monkeypatch):
    """What a test brings in is gone after it."""
    monkeypatch.setattr(operators, "_registered", dict(operators._registered))
    monkeypatch.setattr(operators, "_plugins", dict)
    return monkeypatch


class TestConversion:
    @pytest.mark.parametrize("by", ["config", "plan", "plan from JSON"])
    def test_it_computes_what_the_static_network_did(self, net, by):
        before, config = net(images()), ToyConfig(hidden_gates=3)
        plan = plan_conversion(net, config)
        if by == "plan from JSON":
            plan = ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
        assert convert_(net, config if by == "config" else plan) is net
        torch.testing.assert_close(net(images()), before)
        assert plans(net) == [plan]
        assert sum(p.numel() for p in net.parameters()) == plan.parameters_after > plan.parameters_before
        names = [f"{stage}.{rest}" for stage in ("layer1", "layer4") for rest in ("0.conv1", "0.conv2", "1.conv2")]
        assert set(names) < set(dynamic_layers(net)) == {layer.name for layer in plan.layers}

    def test_the_plan_is_a_table(self, net):
        text = str(plan_conversion(net, ToyConfig()))
        assert "layer3.0.downsample.0  Conv2d  16×8×1×1   mixture" in text
        assert "toy: parameters 36,981 → 38,409; mixing 0.0 M MACs an image" in text

    def test_a_plan_of_an_unknown_operator_is_one_line(self, net):
        data = plan_conversion(net, ToyConfig()).to_dict() | {"operator": "toi"}
        with pytest.raises(ConfigError, match=r"^operator 'toi' is not known; did you mean 'toy'\?.*--import MODULE"):
            ConversionPlan.from_dict(data)

    def test_what_its_layers_share_is_one_module(self, net):
        convert_(net, ToyConfig())
        layers = dynamic_layers(net)
        (mixture,) = {layer.mixture for layer in layers.values()}
        assert isinstance(mixture, Mixture)
        assert mixture.label == "mixture"
        assert sharing(net) == {"layer1.0.conv1.mixture.weight": list(layers)}
        assert plans(net)[0].sharing() == {"mixture": list(layers)}
        assert sharing_groups(net) == [list(layers.values())]
        assert sharing_groups(net, [net.conv1, net.layer1, net.fc, net.layer3]) == [
            [net.conv1],
            [net.layer1, net.layer3],
            [net.fc],
        ]
        saved = [name for name in net.state_dict() if "mixture" in name]
        assert saved == ["layer1.0.conv1.mixture.weight"]
        assert len([name for name in net.state_dict() if "temperature" in name]) == 1

    def test_its_state_is_loaded_with_the_temperature(self, net):
        convert_(net, ToyConfig())
        set_temperature(net, 3.0)
        with torch.no_grad():
            dynamic_layers(net)["layer1.0.conv1"].mixture.weight.fill_(0.5)
        again = convert_(narrow_resnet(), ToyConfig())
        again.load_state_dict(net.state_dict())
        assert temperatures(again) == {"toy": 3.0}
        torch.testing.assert_close(again(images()), net(images()))
        old = {name: value for name, value in net.state_dict().items() if "temperature" not in name}
        again.load_state_dict(old)
        assert temperatures(again) == {"toy": 1.0}

    def test_every_parameter_learns(self, net):
        convert_(net, ToyConfig(), keep_weights=False).train()(images()).square().mean().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
        assert all(p.grad.abs().sum() > 0 for name, p in net.named_parameters() if "mixture" in name)

    def test_a_temperature_beyond_its_limits_is_refused(self, net):
        convert_(net, ToyConfig())
        with pytest.raises(ValueError, match=r"between 0\.5 and 8, found 0\.0"):
            set_temperature(net, 0.0)
        assert temperatures(net) == {"toy": 1.0}

    def test_implementations(self, net):
        convert_(net, ToyConfig())
        with pytest.raises(ValueError, match=r"layer1\.0\.conv1: .*'reference'"):
            set_implementation(net, "reference")
        set_implementation(net, "auto")

    def test_it_says_that_it_has_nothing_to_merge(self, net):
        convert_(net, ToyConfig())
        before = net(images())
        with pytest.raises(ValueError, match=r"^toy has nothing that could be merged"):
            merge_(net, images())
        assert torch.equal(net(images()), before)

    def test_it_is_converted_once(self, net):
        convert_(net, ToyConfig(include=(EARLY,)))
        with pytest.raises(ValueError, match="already converted by toy"):
            convert_(net, ToyConfig(include=(LATE,)))


class TestTwoOperators:
    """On disjoint layers of one network, one after the other."""

    @pytest.mark.parametrize("first", ["toy", "kernel_warehouse"])
    def test_each_has_its_layers_and_its_temperature(self, net, first):
        before = net(images())
        toy, ours = ToyConfig(include=(EARLY,)), KWConfig(include=(LATE,))
        for config in (toy, ours) if first == "toy" else (ours, toy):
            convert_(net, config)
        assert [plan.operator for plan in plans(net)] == ["toy", "kernel_warehouse"]
        assert {name[:6] for name, m in dynamic_layers(net).items() if isinstance(m, ToyLayer)} == {"layer1", "layer2"}
        assert {name[:6] for name, m in dynamic_layers(net).items() if not isinstance(m, ToyLayer)} == {
            "layer3",
            "layer4",
        }
        assert len(dynamic_layers(net)) == 20
        torch.testing.assert_close(net(images()), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
        assert temperatures(net) == {"toy": 1.0, "kernel_warehouse": 0.0}
        set_temperature(net, 0.75, "kernel_warehouse")
        set_temperature(net, 2.0, "toy")
        assert temperatures(net) == {"toy": 2.0, "kernel_warehouse": 0.75}
        with pytest.raises(ValueError, match=r"between 0 and 1, found 2"):
            set_temperature(net, 2.0)
        assert temperatures(net) == {"toy": 2.0, "kernel_warehouse": 0.75}
        assert anneals(net).keys() == {"toy", "kernel_warehouse"}
        twin = convert_(convert_(narrow_resnet(), toy), ours)
        twin.load_state_dict(net.state_dict())
        assert temperatures(twin) == temperatures(net)
        torch.testing.assert_close(twin(images()), net(images()))

    def test_the_second_takes_all_that_is_left(self, net):
        alone = {layer.name for layer in plan_conversion(net, KWConfig()).layers}
        convert_(net, ToyConfig(include=(EARLY,)))
        left = {layer.name for layer in plan_conversion(net, KWConfig()).layers}
        assert left == {name for name in alone if name.startswith(("layer3", "layer4"))}

    @pytest.mark.parametrize("first", ["toy", "kernel_warehouse"])
    def test_what_is_inside_a_converted_layer_belongs_to_its_operator(self, first):
        """Here the layers are found by structure: attentions are linear layers, and the toy keeps convolutions."""
        net, x = timm.create_model("regnetx_002", num_classes=3).eval(), torch.ones(2, 3, 64, 64)
        early, late = r"s[12]\..*", r"s[34]\..*"
        configs = ToyConfig(include=(early,)), KWConfig(include=(late,))
        alone = [{layer.name for layer in plan_conversion(net, config).layers} for config in configs]
        before = net(x)
        for config in configs if first == "toy" else configs[::-1]:
            convert_(net, config)
        assert [{layer.name for layer in plan.layers} for plan in plans(net)] == alone
        torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-4)

    def test_a_pattern_does_not_reach_into_a_converted_layer(self, net):
        convert_(net, ToyConfig(include=(EARLY,)))
        with pytest.raises(ValueError, match="matches no layer"):
            plan_conversion(net, KWConfig(include=(r".*\.conv1\.conv",)))

    def test_the_first_layer_stays_the_stem_when_it_is_taken(self):
        """A network of a user's own, in which the first layer that the second operator sees is not the first."""
        net = nn.Sequential(*(nn.Conv2d(8 if i else 3, 8, 3) for i in range(4)))
        alone = {layer.name for layer in plan_conversion(net, KWConfig()).layers}
        convert_(net, KWConfig(warehouses={"0": "stem"}))
        toy = plan_conversion(net, ToyConfig(), example_input=torch.empty(2, 3, 16, 16))
        assert {layer.name for layer in toy.layers} == alone == {"1", "2", "3"}

    def test_a_schedule_moves_each_temperature(self, net):
        convert_(convert_(net, ToyConfig(include=(EARLY,))), KWConfig(include=(LATE,)))
        schedule = Schedule.build(RunConfig(epochs=30, warmup_epochs=0), 10, anneals(net))
        assert schedule.temperatures(0) == {"toy": 4.0, "kernel_warehouse": 1.0}
        assert schedule.temperatures(10) == {"toy": 1.0, "kernel_warehouse": 0.9}
        assert schedule.temperatures(100) == {"toy": 1.0, "kernel_warehouse": 0.0}


class TestByName:
    def test_by_prefix_and_by_field(self):
        by_prefix = kernelwarehouse.create_model("toy_resnet18", num_classes=5, hidden_gates=2, channels=(8, 8, 16, 16))
        by_field = build_model(
            {
                "model": "resnet18",
                "operator": "toy",
                "nb_classes": 5,
                "hidden_gates": 2,
                "model_kwargs": {"channels": [8, 8, 16, 16]},
            }
        )
        assert by_prefix.default_cfg["architecture"] == "toy_resnet18"
        assert plans(by_prefix) == plans(by_field)
        assert plans(by_prefix)[0].config == ToyConfig(hidden_gates=2)
        shapes = [{name: v.shape for name, v in net.state_dict().items()} for net in (by_prefix, by_field)]
        assert shapes[0] == shapes[1]

    def test_a_configuration_says_all_of_it(self):
        config = read_config({"model": "toy_resnet18", "hidden_gates": "2"})
        assert config.model.operator == "toy"
        assert config.model.operator_fields == {"hidden_gates": 2}
        assert read_config(config.to_fields()) == config

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model": "resnet18", "operator": "toi"}, "operator 'toi' is not known; did you mean 'toy'.*--import"),
            (
                {"model": "resnet18", "operator": "zzz"},
                "'zzz' is not known; there are .*kernel_warehouse, .*toy.*--import",
            ),
            ({"model": "toy_resnet18", "operator": "kernel_warehouse"}, "is converted by 'toy', found 'kernel_wareh"),
            ({"model": "toy_resnet18", "hiden_gates": 3}, "unknown field 'hiden_gates'; did you mean 'hidden_gates'"),
            ({"model": "toy_resnet18", "hidden_gates": 0}, "field 'hidden_gates': must be at least 1, found 0"),
            ({"model": "toy_resnet18", "cell_num_ratio": 2}, "unknown field 'cell_num_ratio'"),
            (
                {"model": "resnet18", "hidden_gates": 2},
                "static network, for which 'hidden_gates' means nothing.*of toy",
            ),
        ],
    )
    def test_errors_are_one_line(self, fields, message):
        with pytest.raises(ConfigError, match=message) as error:
            build_model(fields)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["zz_resnet18", "zz1x_resnet18"])
    def test_a_prefix_without_an_operator_is_one_line(self, name):
        message = f"model '{name}': no operator has the prefix of 'zz.*--import MODULE"
        for make in (kernelwarehouse.create_model, find_preset, lambda name: build_model({"model": name})):
            with pytest.raises(ConfigError, match=message):
                make(name)
        with pytest.raises(ConfigError, match=f"command line: {message}"):
            parse_arguments(["--model", name, "--kernel_num", "4"])

    def test_help_shows_its_fields_and_a_static_networks_does_not(self, capsys):
        texts = {}
        for words in ("--operator toy --help", "--model toy_resnet18 --help", "--model resnet18 --help"):
            with pytest.raises(SystemExit):
                parse_arguments(["--import", "toy_operator", *words.split()])
            texts[words] = capsys.readouterr().out
        by_name, by_model, static = texts.values()
        assert by_name == by_model
        assert "--hidden_gates" in by_name
        assert "Values that the attention of each layer makes" in " ".join(by_name.split())
        assert "--cell_num_ratio" not in by_name
        assert "--hidden_gates" not in static

    def test_an_import_that_is_not_there_is_named(self):
        with pytest.raises(ConfigError, match="--import absent_operator: No module named 'absent_operator'"):
            parse_arguments(["--import", "absent_operator", "--model", "resnet18"])

    def test_a_name_is_looked_up_and_never_imported(self, net, tmp_path, monkeypatch):
        """A module that is there for the taking, and would leave a trace."""
        (tmp_path / "tempting.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
        monkeypatch.syspath_prepend(tmp_path)
        plan = plan_conversion(net, ToyConfig()).to_dict()
        for name in ("tempting", "tempting:Toy", ".tempting", f"{tmp_path}/tempting.py"):
            named = plan | {"operator": name}
            with pytest.raises(ConfigError, match="is not known"):
                ConversionPlan.from_dict(named)
            for fields in ({"model": "resnet18", "operator": name}, {"model": f"{name}_resnet18"}):
                with pytest.raises(ConfigError):
                    build_model(fields)
            with pytest.raises(ConfigError):
                parse_arguments(["--model", "resnet18", "--operator", name])
            torch.save(
                {"model": net.state_dict(), "config": {"operator": name}, "plans": [named]}, tmp_path / "net.pth"
            )
            load_checkpoint(net, tmp_path / "net.pth")
        assert not (tmp_path / "trace").exists()
        parse_arguments(["--import", "tempting", "--model", "resnet18"])
        assert (tmp_path / "trace").exists()


class OtherConfig(ToyConfig):
    operator = "other"


class Other(Toy):
    name, prefix, Config = "other", "ot", OtherConfig


class TestRegistry:
    def test_an_operator_is_registered_by_one_line_and_again_by_the_same_class(self, registry):
        assert register(Other) is Other
        assert "other" in operator_names()
        assert isinstance(get_operator("other"), Other)
        register(Other)
        assert find_preset("ot_resnet34").backbone == "resnet34"

    @pytest.mark.parametrize(
        ("name", "prefix", "message"),
        [
            ("toy", "ot", "operator 'toy' with prefix 'ot': taken by 'toy'"),
            ("other", "toy", "operator 'other' with prefix 'toy': taken by 'toy'"),
            ("kernel_warehouse", "ot", "taken by 'kernel_warehouse'"),
            ("other", "kw", "taken by 'kernel_warehouse'"),
            ("third", "th", "operator 'third': OtherConfig is of 'other'"),
            ("an-other", "ot", "names are identifiers"),
            ("other", "ot_", "prefixes letters"),
        ],
    )
    def test_names_and_prefixes_are_taken_once(self, registry, name, prefix, message):
        before = operator_names()
        config = type("OtherConfig", (ToyConfig,), {"operator": "other" if name == "third" else name})
        another = type("Another", (Toy,), {"name": name, "prefix": prefix, "Config": config})
        with pytest.raises(ValueError, match=message):
            register(another)
        assert operator_names() == before

    def test_an_entry_point_is_imported_when_it_is_asked_for(self, registry):
        point = EntryPoint("other", f"{__name__}:Other", operators.GROUP)
        loaded = []
        registry.setattr(EntryPoint, "load", lambda self: loaded.append(self.name) or Other)
        registry.setattr(operators, "_plugins", lambda: {"other": point})
        assert "other" in operator_names()
        assert loaded == []
        assert isinstance(get_operator("other"), Other)
        assert isinstance(get_operator("other"), Other)
        assert loaded == ["other"]

    def test_an_entry_point_of_another_name_is_refused(self, registry):
        registry.setattr(EntryPoint, "load", lambda self: Other)
        registry.setattr(operators, "_plugins", lambda: {"mine": EntryPoint("mine", "x:Other", operators.GROUP)})
        with pytest.raises(ConfigError, match="operator 'mine': the entry point gives an operator called 'other'"):
            get_operator("mine")


PLUGIN = """
from kernelwarehouse.models import register
from toy_operator import Toy, ToyConfig

class InstalledConfig(ToyConfig):
    operator = "{name}"

{decorator}
class Installed(Toy):
    name, prefix, Config = "{name}", "{prefix}", InstalledConfig
"""
USE = """
import sys
sys.path[:0] = sys.argv[1:]
import kernelwarehouse as k
from kernelwarehouse.models import operators

print(operators.operator_names())
k.build_model("resnet18/kw1x_resnet18")
k.create_model("resnet18")
print(*(f"{name}_plugin" in sys.modules for name in ("first", "second")))
net = k.create_model("snd_resnet18", channels=(8, 8, 8, 8))
print(k.plans(net)[0].operator, type(operators.get_operator("first")).__name__)
try:
    k.build_model({"model": "resnet18", "operator": "broken"})
except k.ConfigError as e:
    print(e)
"""


def test_installed_packages_bring_operators(tmp_path):
    """Three of them, in a process of its own, by nothing but their metadata.

    One registers its operator itself as well, one does not, and one cannot be imported, which stops nobody else. No
    model with a name of timm's or ours asks for any of them.
    """
    info = tmp_path / "plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    points = ["first = first_plugin:Installed", "second = second_plugin:Installed", "broken = broken_plugin:Absent"]
    (info / "entry_points.txt").write_text("\n".join([f"[{operators.GROUP}]", *points]))
    for name, prefix, decorator in (("first", "fst", "@register"), ("second", "snd", "")):
        source = PLUGIN.format(decorator=decorator, name=name, prefix=prefix)
        (tmp_path / f"{name}_plugin.py").write_text(source)
    helpers = Path(toy_operator.__file__).parent
    command = [sys.executable, "-c", USE, str(tmp_path), str(helpers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    missing = "operator 'broken': its plugin broken_plugin:Absent cannot be imported: No module named 'broken_plugin'"
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(sorted([*operators.built_in_operators(), "broken", "first", "second"])),
        "False False",
        "second Installed",
        f"configuration: {missing}",
    ]
    assert f"UserWarning: {missing}" in done.stderr
