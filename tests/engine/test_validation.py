"""A state is checked whole before anything is used: whatever is wrong in it is one error that names it."""

import copy
import math
import random
import warnings

import pytest
import torch
from faults import ENTRIES, KEYS, VALUES

from kernelwarehouse.engine.state import Training
from kernelwarehouse.engine.validation import SCHEMA, check_state
from kernelwarehouse.models import CheckpointError, build_model

NAN, INF = math.nan, math.inf
MOMENT = ("optimizer", "state", 0, "exp_avg")
SQUARE = ("optimizer", "state", 0, "exp_avg_sq")
GROUP = ("optimizer", "param_groups", 0)
GENERATORS = ("processes", 0, "generators")
ABSENT = object()


def take_a_step(training):
    training.begin_epoch()
    for parameter in training.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e-3)
    training.scaler.scale(torch.zeros(()))  # which prepares it
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.iteration += 1
    training.losses += 1


@pytest.fixture(scope="module")
def begin(tiny_config):
    """A function that begins a training without its data, of epochs of four steps."""
    from kernelwarehouse.engine import World

    def build(**fields):
        config = tiny_config(model_ema=True, **fields)
        return Training.build(build_model(config.model), config, World(torch.device("cpu")), 4)

    return build


@pytest.fixture(scope="module")
def training(begin):
    """A training after three steps."""
    training = begin()
    for _ in range(3):
        take_a_step(training)
    return training


@pytest.fixture(scope="module")
def good(training):
    return training.state_dict()


def changed(state, path, value):
    """A copy of a state with another value somewhere, computed from what is there where it is a function."""
    if not path:
        return value(state) if callable(value) else value
    key, *rest = path
    if isinstance(state, dict):
        rest_of_it = {k: v for k, v in state.items() if k != key}
        if value is ABSENT and not rest:
            return rest_of_it
        return {k: changed(v, rest, value) if k == key else v for k, v in state.items()} | (
            {key: value} if key not in state else {}
        )
    return [changed(v, rest, value) if i == key else v for i, v in enumerate(state)]


def fill(value):
    return lambda tensor: torch.full_like(tensor, value)


CASES = [
    *[((name,), ABSENT, name) for name, (required, _) in SCHEMA.items() if required],
    *[((name,), value, f"'{name}[.\\[']") for name in SCHEMA for value in ("x" * 1000, [5], b"x", {5: 5}, NAN)],
    *[(("model", "bn1.bias"), entry, text) for entry, text in ENTRIES.values()],
    *[(("model_ema", key), torch.zeros(1), "not a name|keys of type str") for key in KEYS],
    *[(MOMENT, entry, "optimizer.state.0.exp_avg|'exp_avg' of|its state") for entry, _ in ENTRIES.values()],
    *[(("model", f"bn1.{leaf}"), make, text) for leaf, make, text in VALUES.values()],
    *[(("model_ema", f"bn1.{leaf}"), make, text) for leaf, make, text in VALUES.values()],
    (("epoch",), 0, "'step' of its state is 3; epoch 0, iteration 3 of the next would be 7"),
    (("epoch",), -2, "'epoch'"),
    (("epoch",), 7, "'step' of its state is 3; epoch 7"),
    (("epoch",), True, "'epoch'"),
    (("iteration",), 0, "nothing was done|'step'"),
    (("iteration",), 5, "'iteration' of its state is 5, in an epoch of 4"),
    (("iteration",), -1, "'iteration'"),
    (("iterations_per_epoch",), 0, "'iterations_per_epoch'"),
    (("step",), 10**6, "'step'"),
    (("skipped",), 4, "'skipped' of its state is 4, after 3 steps"),
    (("bad_steps",), 4, "'bad_steps' of its state is 4"),
    (("best",), {"model": NAN}, "best.model"),
    (("best",), {"model": 101.0}, "best.model"),
    (("best",), {"model": "good"}, "best.model"),
    (("config", "update_freq"), 0, "config.update_freq"),
    (("config", "batch_size"), ABSENT, "'config' of its state has no 'batch_size'"),
    (("kept_for",), "model_max", "'kept_for' names weights that are not there"),
    (("tuned",), {"a case": 3}, "tuned.a case"),
    (("temperature",), NAN, "'temperature'"),
    (("scaler",), {"scale": NAN}, "'scaler' of its state has no"),
    (("processes",), [], "'processes'"),
    (("processes", 0), {}, "has no 'generators'"),
    (("processes", 0, "losses"), [1.0], "losses"),
    (("processes", 0, "losses"), [1.0, 2.0, 3.0], "losses"),
    (("processes", 0, "losses"), [NAN, 2.0], "losses"),
    (("processes", 0, "losses"), [1.0, -2], "losses"),
    (("processes", 0, "losses"), torch.zeros(2), "losses"),
    *[((*GENERATORS, name), value, f"generators.{name}|'{name}'")
      for name in ("python", "numpy", "torch") for value in (ABSENT, None, [], [3, [1], None], torch.zeros(3), "x")],
    ((*GENERATORS, "python", 1), lambda v: v[:-1], "generators.python"),
    ((*GENERATORS, "python", 2), "x", "generators.python"),
    ((*GENERATORS, "torch"), lambda v: v[:-1], "generators.torch"),
    ((*GENERATORS, "torch"), lambda v: v.float(), "generators.torch"),
    ((*GENERATORS, "cuda"), torch.zeros(16), "generators.cuda"),
    (("optimizer", "state"), {}, "is empty, and the optimizer has taken steps"),
    (("optimizer", "state"), [], "optimizer.state"),
    (("optimizer", "state", 99), {"step": 1}, "parameters that no group has"),
    (("optimizer", "state", "0"), {"step": 1}, "keys of type int"),
    (("optimizer", "param_groups"), [], "param_groups"),
    (("optimizer", "param_groups"), lambda groups: groups[:1], "param_groups|number the parameters|no group has"),
    (("optimizer", "param_groups"), lambda groups: groups[::-1], "another optimizer|decays"),
    (MOMENT, ABSENT, "no 'exp_avg' of parameter 0|no step can be taken"),
    (MOMENT, fill(NAN), "exp_avg' of its state has NaN"),
    (MOMENT, fill(INF), "exp_avg' of its state has NaN or inf"),
    (MOMENT, lambda t: torch.full_like(t, 1e300, dtype=torch.float64), "beyond the range of float32"),
    (MOMENT, lambda t: t.to(torch.complex64), "is complex|no step can be taken"),
    (MOMENT, lambda t: t.flatten()[:-1], "exp_avg.*shape|no step can be taken"),
    (MOMENT, torch.zeros(()), "exp_avg|no step can be taken"),
    (MOMENT, torch.zeros(1).expand(10**9), "a value for each of its elements"),
    (SQUARE, fill(NAN), "exp_avg_sq' of its state has NaN"),
    (SQUARE, fill(-1.0), "negative values"),
    (("optimizer", "state", 3, "exp_avg_sq"), ABSENT, "'exp_avg_sq'"),
    (("optimizer", "state", 3, "step"), ABSENT, "'step'"),
    *[(("optimizer", "state", 0, "step"), value, "step|was updated") for value in
      (-1.0, NAN, INF, 1e30, 0.5, "x", None, torch.tensor(-1.0), torch.tensor(0.0), torch.zeros(2), [1])],
    *[((*GROUP, name), ABSENT, name) for name in ("params", "decays", "lr_scale", "lr", "weight_decay")],
    *[((*GROUP, name), value, name) for name in ("lr_scale", "lr", "weight_decay") for value in (NAN, "x", None, -1.0)],
    ((*GROUP, "lr_scale"), 0.5, "'lr_scale' of group 0 is 0.5, here 1"),
    ((*GROUP, "decays"), lambda decays: not decays, "'decays' of group 0|decays"),
    ((*GROUP, "decays"), 1, "decays"),
    ((*GROUP, "params"), [0, 0], "number the parameters"),
    ((*GROUP, "params"), ["conv1.weight"], "params"),
    ((*GROUP, "betas"), (NAN, 0.9), "betas"),
    ((*GROUP, "betas"), None, "no step can be taken"),
    ((*GROUP, "betas"), ABSENT, "no step can be taken"),
    ((*GROUP, "amsgrad"), True, "no step can be taken"),
]  # fmt: skip


def place(value):
    return ".".join(map(str, value)) if isinstance(value, tuple) else ""


def go_on(training, state):
    check_state(state)
    training.load_state_dict(state)


@pytest.mark.parametrize(("path", "value", "text"), CASES, ids=place)
def test_what_is_wrong_is_named_and_changes_nothing(training, good, path, value, text):
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    moments = {p: v["exp_avg"].clone() for p, v in training.optimizer.state.items()}
    state = changed(good, path, value)
    with pytest.raises(CheckpointError, match=f"(?s){text}") as error:
        go_on(training, state)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in training.model.state_dict().items())
    assert all(torch.equal(v["exp_avg"], moments[p]) for p, v in training.optimizer.state.items())
    assert (training.epoch, training.iteration) == (0, 3)


def places(state, path=()):
    """Where a state has values, at any depth."""
    if path:
        yield path
    entries = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


WRONG = [ABSENT, None, "x", -1, NAN, 10**30, True, [], {}, b"x", torch.zeros(2), torch.full((3,), NAN), 1e300, 2j]


@pytest.mark.parametrize("fields", [{}, {"opt": "lookahead_momentum", "use_amp": True}], ids=["adamw", "momentum"])
def test_no_value_anywhere_ends_in_another_error(begin, fields):
    """Drawn at random; a state that is accepted lets the training take a step."""
    training = begin(**fields)
    take_a_step(training)
    good, draw = training.state_dict(), random.Random(0)
    groups: dict[str, list] = {}
    for path in places(good):
        groups.setdefault(str(path[:1]), []).append(path)
    refused = 0
    for _ in range(80):
        path = draw.choice(groups[draw.choice(sorted(groups))])
        state = changed(good, path, draw.choice(WRONG))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                go_on(training, state)
            except CheckpointError:
                refused += 1
            else:
                take_a_step(training)
                training.load_state_dict(copy.deepcopy(good))
    assert refused > 40


def test_a_good_state_is_good_at_every_moment(begin):
    """Also where no step changed anything: all losses were infinite, or all scaled gradients."""
    training = begin(use_amp=True)
    training.scaler.scale(torch.zeros(()))
    for bad in (1, 2):
        training.iteration = training.skipped = training.bad_steps = bad
        training.scaler.update(training.scaler.get_scale() * 0.5)
        state = training.state_dict()
        check_state(state)
        begin(use_amp=True).load_state_dict(state)
    training.optimizer.zero_grad()
    training.scaler.update(2.0**17)
    with pytest.raises(CheckpointError, match="is empty"):
        begin(use_amp=True).load_state_dict(training.state_dict())


def test_moments_that_some_parameters_lack_are_warned_of(begin, good):
    state = changed(good, ("optimizer", "state", 0), ABSENT)
    check_state(state)
    with pytest.warns(UserWarning, match="1 of 41 parameters have no moments in the checkpoint"):
        begin().load_state_dict(state)


def test_an_infinite_square_is_kept(begin, good):
    state = changed(good, SQUARE, fill(INF))
    check_state(state)
    training = begin()
    training.load_state_dict(state)
    assert training.optimizer.state_dict()["state"][0]["exp_avg_sq"].isinf().all()


def test_a_state_of_more_data_is_refused(begin, good):
    from kernelwarehouse.engine import World

    training = begin()
    shorter = Training.build(training.model, training.config, World(torch.device("cpu")), 2)
    with pytest.raises(CheckpointError, match="belongs to other data: 3 iterations are done in an epoch of 2"):
        shorter.load_state_dict(good)
