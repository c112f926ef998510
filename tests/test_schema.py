"""A configuration that says something else than its writer meant is refused, by file and field."""

import dataclasses
import inspect
import json

import pytest

from kernelwarehouse import KWConfig
from kernelwarehouse.configs.schema import (
    ConfigError,
    ModelConfig,
    RunConfig,
    field_help,
    find_config,
    known_fields,
)
from kernelwarehouse.models import read_config


def write(folder, text, name="config.json"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("epoch", "epochs"), ("cell_number_ratio", "cell_num_ratio"), ("Model", "model"), ("mix_up", "mixup")],
)
def test_an_unknown_field_names_the_file_and_the_nearest_field(tmp_path, typo, meant):
    path = write(tmp_path, json.dumps({"model": "kw_resnet18", typo: 1}))
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(error.value) == f"{path}: unknown field '{typo}'; did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epochs", "ten", "a whole number"),
        ("epochs", 1.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("lr", "fast", "a number"),
        ("use_amp", "perhaps", "true or false"),
        ("use_amp", 2, "true or false"),
        ("data_set", "MNIST", "one of 'DIGITS'"),
        ("model_kwargs", 3, "a mapping"),
        ("model", 18, "text"),
        ("clip_grad", "hard", "a number or null"),
        ("cell_num_ratio", ["a"], r"a number or a list \(of a number\)"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(tmp_path, field, value, expected):
    path = write(tmp_path, json.dumps({"model": "kw_resnet18", field: value}))
    with pytest.raises(ConfigError, match=rf"config\.json: field '{field}': expected {expected}"):
        read_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("update_freq", 0),
        ("epochs", -1),
        ("lr", 0),
        ("smoothing", 1.5),
        ("layer_decay", 0),
        ("clip_grad", 0),
        ("drop_path", 1),
        ("in_chans", 0),
        ("temp_epoch", -1),
        ("cell_num_ratio", 0),
        ("cell_num_ratio", [1, -1]),
        ("reduction", float("nan")),
    ],
)
def test_a_value_out_of_range_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"field '{field}'"):
        read_config({"model": "kw_resnet18", field: value})


def test_numbers_and_booleans_may_be_text():
    config = read_config({"model": "resnet18", "lr": "4e-3", "epochs": "5", "use_amp": "yes", "clip_grad": "null"})
    assert (config.run.lr, config.run.epochs, config.run.use_amp, config.run.clip_grad) == (4e-3, 5, True, None)


def test_overrides_win():
    assert read_config({"model": "resnet18", "epochs": 1}, {"epochs": 2}).run.epochs == 2


def test_a_model_is_needed():
    with pytest.raises(ConfigError, match="field 'model' is missing"):
        read_config({"epochs": 1})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"model": "resnet18",}', "line 1, column"),
        ("a.json", '{"model": "resnet18", "lr": 1, "lr": 2}', "'lr' is given twice"),
        ("a.json", "[1]", "expected a mapping"),
        ("a.yaml", "model: [", "a.yaml"),
        ("a.yaml", "model: resnet18\nlr: 1\nlr: 2\n", "'lr' is given twice"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_config(write(tmp_path, text, name))
    assert str(error.value).startswith(str(tmp_path / name))


def test_yaml_says_the_same_as_json(tmp_path):
    yaml = write(tmp_path, "model: kw_resnet18\nlr: 4e-3\nsharing_range: layer_conv\nmodel_kwargs: {a: 1}\n", "a.yml")
    fields = {"model": "kw_resnet18", "lr": 4e-3, "sharing_range": ["layer", "conv"], "model_kwargs": {"a": 1}}
    assert read_config(yaml) == read_config(fields)


@pytest.mark.parametrize(
    "name", ["quickstart/resnet18", "quickstart/resnet18.json", "configs/quickstart/resnet18.json"]
)
def test_shipped_files_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config(name).model.model == "resnet18"


def test_a_file_that_is_absent_names_similar_ones():
    with pytest.raises(ConfigError, match=r"did you mean .*kw1x_resnet18\.json"):
        find_config("resnet18/kw1_resnet18.json")


def test_all_fields_can_be_written_and_read_back():
    config = read_config("quickstart/kw1x_resnet18")
    assert read_config(json.loads(json.dumps(config.to_fields()))) == config


@pytest.mark.parametrize("cls", [KWConfig, ModelConfig, RunConfig])
def test_every_field_is_described_once(cls):
    assert list(field_help(cls)) == [f.name for f in dataclasses.fields(cls)]
    assert all(field_help(cls).values())


def test_descriptions_do_not_depend_on_how_python_indents_docstrings():
    """From Python 3.13 on the compiler takes the indentation away."""
    dedented = type("Dedented", (), {"__doc__": inspect.cleandoc(RunConfig.__doc__)})
    assert field_help(dedented) == field_help(RunConfig)


def test_no_field_has_two_owners():
    names = [
        f.name
        for cls in (KWConfig, ModelConfig, RunConfig)
        for f in dataclasses.fields(cls)
        if f.name != "operator_fields"
    ]
    assert len(names) == len(set(names)) == len(known_fields(KWConfig))


def test_shipped_files_leave_the_length_of_annealing_to_the_operator_unless_their_paper_differs():
    root = find_config("resnet18/resnet18").parent.parent
    lengths = {p.parent.name: read_config(p).run.temp_epoch for p in root.glob("*/*.json") if p.stem.startswith("kw")}
    assert {family: length for family, length in lengths.items() if length is not None} == {
        "mobilenetv2_050": 15,
        "mobilenetv2_100": 15,
    }
    assert read_config("quickstart/kw1x_resnet18", {"epochs": 5}).run.epochs == 5
