"""What no network can hold is refused in one line, by whatever name it comes; a refused load changes nothing."""

import pytest
import torch
from faults import ENTRIES, KEYS, VALUES, WARNED
from torch import nn

from kernelwarehouse import CheckpointError, build_model, load_checkpoint
from kernelwarehouse.models import load_content, load_weights, set_temperature, temperatures

NARROW = {"model": "kw_resnet18", "model_kwargs": {"channels": [8, 8, 16, 16]}, "nb_classes": 5}


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def weights():
    """Other weights than those of `small`."""
    return {k: v + 1 for k, v in small().state_dict().items()}


@pytest.fixture
def unchanged():
    """A network; it has to be the same at the end of the test."""
    net = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    yield net
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def refusal(net, content, path):
    """The one line by which a file with that content is refused."""
    torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(net, path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("form", ["ours", "bare", "timm", "ddp"])
def test_entries_that_are_no_weights(unchanged, tmp_path, name, form):
    entry, text = ENTRIES[name]
    state = weights() | {"1.bias": entry}
    if form == "ddp":
        state = {f"module.{k}": v for k, v in state.items()}
    content = {"ours": {"model": state, "epoch": 1}, "timm": {"state_dict": state}, "ddp": {"model": state}}
    message = refusal(unchanged, content.get(form, state), tmp_path / "c.pth")
    assert text in message
    assert "1.bias" in message or name == "nested"  # which torch does not unpickle
    with pytest.raises(CheckpointError, match=r"'1\.bias' is "):
        load_weights(unchanged, weights() | {"1.bias": entry})


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_keys_that_are_no_names(unchanged, tmp_path, key):
    assert "not a name" in refusal(unchanged, {"model": weights() | {key: torch.zeros(1)}}, tmp_path / "c.pth")
    assert "not a name" in refusal(unchanged, weights() | {key: torch.zeros(1)}, tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"model": {"model": weights()}}, "'model': not a dictionary of weights: 'model' is a dict"),
        ({"model": {"state_dict": weights(), "epoch": 3}}, "'state_dict' is a dict"),
        ({}, "no weights under"),
        ({"model": None}, "no weights under"),
        ({"model": [torch.zeros(1)]}, "no weights under"),
        ({"model": 3, "epoch": 3}, "the entries are model, epoch"),
        ({5: 6}, "the entries are 5"),
        ({"model": weights(), "kept_for": "model_ema"}, "no weights under 'model_ema'"),
        ({"model": weights(), "kept_for": 3}, "'kept_for' is a int"),
    ],
    ids=str,
)
def test_contents_without_weights(unchanged, tmp_path, content, text):
    assert text in refusal(unchanged, content, tmp_path / "c.pth")


@pytest.mark.parametrize("name", VALUES)
def test_values_that_the_network_cannot_hold(unchanged, tmp_path, name):
    leaf, make, text = VALUES[name]
    state = weights()
    key = f"1.{leaf}"
    message = refusal(unchanged, {"model": state | {key: make(state[key])}}, tmp_path / "c.pth")
    assert f"{key} " in message
    assert text in message


def test_values_beyond_a_smaller_type():
    net, state = small().half(), weights()
    with pytest.raises(CheckpointError, match=r"0\.weight has values beyond the range of float16"):
        load_weights(net, state | {"0.weight": torch.full_like(state["0.weight"], 1e5)})
    with pytest.raises(CheckpointError, match=r"0\.weight has values beyond the range of float16"):
        load_weights(net, state | {"0.weight": torch.full_like(state["0.weight"], 10**6, dtype=torch.int64)})


@pytest.mark.parametrize("name", WARNED)
def test_nan_and_infinity_are_loaded_with_a_warning_that_names_them(tmp_path, name):
    net, state = small(), weights()
    state["3.weight"] = WARNED[name](state["3.weight"])
    torch.save({"model": state}, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match=r"c\.pth: has NaN or infinite values.*: 3\.weight$"):
        load_checkpoint(net, tmp_path / "c.pth")
    assert not net[3].weight.isfinite().all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_other_types_are_rounded_and_whole_numbers_may_be_fractions_of_one(dtype):
    net, state = small(), weights()
    state = {k: v.to(dtype) for k, v in state.items()}
    load_weights(net, state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


class Stubborn(nn.Linear):
    """Refuses its weights when others have been loaded already."""

    def _load_from_state_dict(self, *_args, **_kwargs):
        raise RuntimeError("not today")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_refusal_in_the_middle_of_loading_changes_nothing(monkeypatch, error):
    net = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    if error is KeyboardInterrupt:
        monkeypatch.setattr(Stubborn, "_load_from_state_dict", lambda *_a, **_k: (_ for _ in ()).throw(error))
    with pytest.raises(CheckpointError if error is RuntimeError else error):
        load_weights(net, {k: v + 1 for k, v in before.items()})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Scaled(nn.Linear):
    """Saves a number beside its tensors."""

    def get_extra_state(self):
        return {"scale": 1.0}

    def set_extra_state(self, state):
        """Nothing to do."""


def test_a_network_on_meta_or_with_more_than_tensors_is_refused():
    with pytest.raises(CheckpointError, match=r"0\.weight of the network is on meta; call its to_empty"):
        load_weights(small().to("meta"), weights())
    net = nn.Sequential(Scaled(2, 2))
    with pytest.raises(CheckpointError, match=r"more than tensors \(0\._extra_state\)"):
        load_weights(net, {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)})


@pytest.fixture(scope="module")
def converted():
    return build_model(NARROW)


@pytest.mark.parametrize("value", [float("nan"), -0.5, 1.5, float("inf")])
def test_a_temperature_that_the_operator_cannot_have(converted, value):
    state = {k: v.clone() for k, v in converted.state_dict().items()}
    (name,) = [k for k in state if k.endswith("temperature.value")]
    set_temperature(converted, 0.25)
    older = {k: v for k, v in state.items() if k != name}
    for content in ({"model": state | {name: torch.tensor(value)}}, {"model": older, "temperature": value}):
        with pytest.raises(CheckpointError, match="temperature must be between 0 and 1"):
            load_content(converted, content, source="c.pth")
        assert temperatures(converted) == {"kernel_warehouse": 0.25}
    with pytest.raises(CheckpointError, match="'temperature' is a str, not a number"):
        load_content(converted, {"model": older, "temperature": "hot"}, source="c.pth")
    load_content(converted, {"model": older, "temperature": 0.75}, source="c.pth")
    assert temperatures(converted) == {"kernel_warehouse": 0.75}


def test_a_file_says_which_weights_it_was_kept_for(tmp_path):
    raw, averaged = weights(), {k: v + 1 for k, v in weights().items()}
    content = {"model": raw, "model_ema": averaged}
    for kept_for, key, expected in [
        (None, None, raw),
        ("model", None, raw),
        ("model_ema", None, averaged),
        ("model_ema", "model", raw),
        ("model", "model_ema", averaged),
    ]:
        torch.save(content | ({"kept_for": kept_for} if kept_for else {}), tmp_path / "c.pth")
        net = small()
        load_checkpoint(net, tmp_path / "c.pth", key)
        assert torch.equal(net[0].weight, expected["0.weight"])
