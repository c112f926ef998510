"""Every reader notices damage, follows what a file was kept for, and passes over what cannot be used."""

import copy
import json
import shutil

import pytest
import torch

from kernelwarehouse.engine import evaluate_run, train_run
from kernelwarehouse.engine.checkpoint import read_state, save_checkpoint
from kernelwarehouse.models import CheckpointError, build_model, load_checkpoint

FIELDS = {"model_ema": True, "model_ema_decay": 0.5, "model_ema_eval": True, "epochs": 2, "batch_size": 256}


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """A whole run."""
    from kernelwarehouse.engine import World

    folder = tmp_path_factory.mktemp("run")
    train_run(tiny_config(**FIELDS, output_dir=str(folder)), World(torch.device("cpu")))
    return folder


@pytest.fixture
def use(tiny_config, cpu):
    """A function that uses a file as `main.py` would with one of its options."""

    def use(option, path, **fields):
        fields = FIELDS | fields | {"resume" if option == "eval" else option: str(path)}
        if option == "eval":
            return evaluate_run(tiny_config(**fields, eval=True), cpu)
        return train_run(tiny_config(**fields), cpu)

    return use


def flip_a_bit(path, state):
    """In the middle of the weights, where torch sees nothing."""
    content = bytearray(path.read_bytes())
    at = content.find(state["model"]["layer1.0.conv1.weight"].numpy().tobytes())
    assert at > 0
    content[at + 403] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("option", ["eval", "finetune", "resume"])
def test_a_flipped_bit_is_noticed_by_every_option(folder, use, tmp_path, option, sealed):
    path, state = tmp_path / "c.pth", read_state(folder / "checkpoint-0.pth")
    (save_checkpoint if sealed else lambda p, s: torch.save(s, p))(path, state)
    flip_a_bit(path, state)
    with pytest.raises(CheckpointError, match=r"c\.pth: damaged: .*" + ("has changed" if sealed else "Bad CRC-32")):
        use(option, path)


@pytest.mark.parametrize("option", ["eval", "finetune"])
def test_values_follow_one_rule(folder, use, tmp_path, option):
    path, state = tmp_path / "c.pth", read_state(folder / "checkpoint-0.pth")
    weights = state["model"]["fc.weight"]
    for bad, message in ((weights * 1j, "is complex"), (weights.double() * 1e300, "beyond the range")):
        torch.save({"model": state["model"] | {"fc.weight": bad}}, path)
        with pytest.raises(CheckpointError, match=rf"c\.pth: .*cannot hold: fc\.weight .*{message}"):
            use(option, path)
    state["model"]["bn1.running_mean"][0] = torch.inf
    torch.save({"model": state["model"]}, path)
    with pytest.warns(UserWarning, match=r"c\.pth: has NaN or infinite values.*bn1\.running_mean"):
        use(option, path, epochs=1, disable_eval=True)


def test_the_best_average_is_evaluated_as_the_average(folder, use):
    best = read_state(folder / "checkpoint-best-ema.pth")
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()][best["epoch"]]
    for name, fields, key in (
        ("checkpoint-best-ema.pth", {}, "test_loss_ema"),
        ("checkpoint-best-ema.pth", {"model_key": "model"}, "test_loss"),
    ):
        assert use("eval", folder / name, **fields).loss == log[key]
    last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    assert use("eval", folder / "checkpoint-1.pth").loss == last["test_loss"]
    assert last["test_loss"] != last["test_loss_ema"]


def test_the_best_average_starts_a_training_and_continues_one(folder, use, tiny_config):
    path = folder / "checkpoint-best-ema.pth"
    state = read_state(path)
    net = build_model(tiny_config().model)
    load_checkpoint(net, path)
    assert torch.equal(net.fc.weight, state["model_ema"]["fc.weight"])
    tuned = use("finetune", path, epochs=1, lr=1e-12, min_lr=0, weight_decay=0).model
    torch.testing.assert_close(tuned.fc.weight.detach(), state["model_ema"]["fc.weight"])
    continued = use("resume", path, epochs=state["epoch"] + 1)
    assert torch.equal(continued.model.fc.weight, state["model"]["fc.weight"])
    assert torch.equal(continued.ema.module.fc.weight, state["model_ema"]["fc.weight"])


def without_moments(state):
    state["optimizer"]["state"] = {}


def without_a_weight(state):
    del state["model"]["fc.bias"]


def with_a_moment_of_another_shape(state):
    state["optimizer"]["state"][2]["exp_avg"] = torch.zeros(7)


def with_a_complex_weight(state):
    state["model_ema"]["fc.bias"] = state["model_ema"]["fc.bias"] * 1j


BAD = [without_moments, without_a_weight, with_a_moment_of_another_shape, with_a_complex_weight]


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_state_is_passed_over(folder, tiny_config, cpu, tmp_path, spoil):
    """The training then ends as the one that knew no bad state."""
    shutil.copy(folder / "checkpoint-0.pth", tmp_path)
    state = read_state(folder / "checkpoint-1.pth")
    bad = copy.deepcopy(state)
    spoil(bad)
    save_checkpoint(tmp_path / "checkpoint-1.pth", bad)
    config = tiny_config(**FIELDS, output_dir=str(tmp_path), disable_eval=True)
    with pytest.warns(UserWarning, match=r"passing over a checkpoint: .*checkpoint-1\.pth: "):
        training = train_run(config, cpu)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.filterwarnings("ignore:passing over")
def test_nothing_but_bad_states_is_an_error(folder, tiny_config, cpu, tmp_path):
    state = read_state(folder / "checkpoint-1.pth")
    without_moments(state)
    save_checkpoint(tmp_path / "checkpoint-1.pth", state)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        train_run(tiny_config(**FIELDS, output_dir=str(tmp_path)), cpu)
    with pytest.raises(CheckpointError, match=r"checkpoint-1\.pth: 'optimizer\.state' of its state is empty"):
        train_run(tiny_config(**FIELDS, resume=str(tmp_path / "checkpoint-1.pth")), cpu)
