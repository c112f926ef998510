"""The attention as few operators: equal to its parts, and only where nobody looks at them or has changed them."""

import pytest
import torch
from layers import make
from processor import needs_compiler
from torch import nn

from kernelwarehouse.models.ops.kernel_warehouse import Attention, assign
from kernelwarehouse.models.ops.kernel_warehouse import coefficients as operators
from kernelwarehouse.models.ops.means import mean, mean_operator

SIZES = {"2d": (7, 5), "line": (9,), "volume": (3, 4, 2), "pixel": (1, 1), "large": (40, 33)}


def attention_of(norm="batch", cells=37, mixtures=5, channels=6, dtype=torch.float64):
    torch.manual_seed(0)
    attention = Attention(channels, cells, range(cells), assign(mixtures, cells, 0), norm=norm, dtype=dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.5)
        if norm == "batch":
            attention.norm.running_mean.normal_()
            attention.norm.running_var.uniform_(0.5, 2)
    return attention


def images_of(attention, size, last=True, batch=3):
    x = torch.randn(batch, attention.fc1.in_features, *size, dtype=attention.fc1.weight.dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


@pytest.fixture
def taken(monkeypatch):
    """Names of the operators that were called."""
    seen = []
    for function in (operators.ATTENTION, operators.COEFFICIENTS):
        kind = type(function).__name__

        def run(*args, _forward=function.forward, _name=kind):
            seen.append(_name)
            return _forward(*args)

        monkeypatch.setattr(function, "forward", run, raising=False)
    return seen


@needs_compiler
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_it_is_the_parts(size, last, norm, train, taken):
    attention = attention_of(norm=norm).train(train)
    x, temperature = images_of(attention, SIZES[size], last), torch.tensor(0.3).double()
    with torch.set_grad_enabled(train):
        found = attention(x, temperature)
        torch.testing.assert_close(found, attention(x, temperature, "torch"))
    assert taken == ["_Coefficients" if train else "_Attention"]


@needs_compiler
@pytest.mark.parametrize(("channels", "cells", "mixtures", "batch"), [(3, 1, 2, 1), (24, 15, 1, 35), (130, 65, 3, 17)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_counts(channels, cells, mixtures, batch, dtype):
    attention = attention_of(cells=cells, mixtures=mixtures, channels=channels, dtype=dtype).eval()
    x, tau = images_of(attention, (8, 6), batch=batch), torch.zeros((), dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, tau), attention(x, tau, "torch"))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradients(temperature, norm):
    attention = attention_of(norm=norm)
    x, tau = images_of(attention, (7, 5), batch=19).requires_grad_(), torch.tensor(temperature).double()
    leaves, received = [x, *attention.parameters()], torch.randn(19, 5, 37).double()

    def gradients(alpha):
        return torch.autograd.grad(alpha, leaves, received, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(attention(x, tau)), gradients(attention(x, tau, "torch")))


def test_at_temperature_one_coefficients_are_the_assignment_to_the_last_digit():
    """A cell that no mixture holds gets no gradient then, not even of rounding errors, which Adam would magnify."""
    attention = attention_of(dtype=torch.float32)
    x, tau = images_of(attention, (7, 5)), torch.tensor(1.0)
    for train in (True, False):
        with torch.set_grad_enabled(train):
            alpha = attention.train(train)(x, tau)
        assert torch.equal(alpha, attention.assignment.expand_as(alpha))


def test_logits_of_zero_have_the_gradient_that_torch_gives_them():
    attention = attention_of()
    attention.hold_assignment()
    x, tau = images_of(attention, (7, 5)), torch.tensor(0.0).double()
    weights, received = [attention.fc2.weight, attention.fc2.bias], torch.randn(3, 5, 37).double()
    expected = torch.autograd.grad(attention(x, tau, "torch"), weights, received)
    torch.testing.assert_close(torch.autograd.grad(attention(x, tau), weights, received), expected)


def test_training_moves_the_running_statistics_and_evaluation_does_not():
    attention = attention_of()
    x, tau = images_of(attention, (7, 5)), torch.tensor(0.0).double()
    before = attention.norm.running_mean.clone()
    attention.eval()(x, tau)
    torch.testing.assert_close(attention.norm.running_mean, before)
    attention.train()(x, tau)
    assert not torch.equal(attention.norm.running_mean, before)


@needs_compiler
def test_the_number_of_threads_does_not_change_a_digit():
    attention = attention_of(dtype=torch.float32).eval()
    x, found, threads = images_of(attention, (150, 90)), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append(attention(x, torch.tensor(0.0)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("channels", [1, 3, 24, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means(channels, dtype):
    for size in SIZES.values():
        for batch in (1, 4):
            x = 1 + torch.randn(batch, channels, *size).to(dtype)
            for images in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.transpose(0, 1)):
                torch.testing.assert_close(mean(images), images.flatten(2).mean(2))


class TestWhereItIsTaken:
    @pytest.mark.parametrize("implementation", ["reference", "grouped"])
    def test_not_by_what_it_is_compared_with(self, taken, implementation):
        layer, x = make("conv2d")
        layer.implementation = implementation
        layer(x)
        with torch.no_grad():
            layer.eval()(x)
        assert not taken

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("part", ["", "fc1", "norm", "fc2"])
    def test_a_hook_sees_every_call(self, part, grad):
        layer, x = make("conv2d")
        seen = []
        handle = layer.attention.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        with torch.set_grad_enabled(grad):
            layer.eval()(x)
            assert seen == [1]
            handle.remove()
            layer(x)
        assert seen == [1]

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("part", ["fc1", "norm", "fc2"])
    def test_a_patched_forward_of_a_part_is_called(self, part, grad):
        """As accelerate's and peft's hooks do it."""
        layer, x = make("conv2d")
        module = layer.eval().attention.get_submodule(part)
        forward, seen = module.forward, []
        module.forward = lambda *args: seen.append(1) or forward(*args)
        with torch.set_grad_enabled(grad):
            layer(x)
        assert seen == [1]

    @pytest.mark.parametrize("part", ["fc1", "fc2"])
    def test_a_replaced_part_is_asked(self, part):
        class Twice(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        layer, x = make("conv2d")
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = layer.eval()(x).detach()
                kind = type(getattr(layer.attention, part))
                getattr(layer.attention, part).__class__ = Twice
                assert not torch.allclose(layer(x), expected)
                getattr(layer.attention, part).__class__ = kind

    @pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.LayerNorm(16, bias=False), nn.LayerNorm(16, 1e-5, False)])
    def test_another_norm_is_asked(self, norm, taken):
        attention = attention_of().eval()
        attention.norm = norm.double().eval()
        x, tau = images_of(attention, (7, 5)), torch.tensor(0.3).double()
        with torch.no_grad():
            torch.testing.assert_close(attention(x, tau), attention(x, tau, "torch"))
        assert "_Attention" not in taken

    def test_a_norm_without_statistics_is_asked(self, taken):
        attention = attention_of().eval()
        attention.norm.running_mean = attention.norm.running_var = None
        with torch.no_grad():
            attention(images_of(attention, (7, 5)), torch.tensor(0.3).double())
        assert "_Attention" not in taken

    def test_not_for_weights_that_are_more_than_tensors(self, taken):
        class Quantised(nn.Parameter):
            pass

        attention = attention_of().eval()
        attention.fc2.weight = Quantised(attention.fc2.weight.data)
        attention(images_of(attention, (7, 5)), torch.tensor(0.3).double())
        assert not taken

    def test_not_for_a_basis(self, taken):
        layer, x = make("conv2d-nonlocal")
        with torch.no_grad():
            layer.eval()(x)
        assert not taken


@needs_compiler
@pytest.mark.parametrize(("part", "message"), [("fc1", "for 7 channels got 6"), ("fc2", "5 mixtures logits for 37")])
def test_weights_that_do_not_fit_are_refused(part, message):
    attention = attention_of().eval()
    x, old = images_of(attention, (7, 5)), getattr(attention, part)
    setattr(attention, part, type(old)(old.in_features + 1, old.out_features).double())
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        attention(x, torch.tensor(0.0).double())


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_buffers_of_another_type_are_converted(train):
    attention = attention_of().train(train)
    x, tau = images_of(attention, (7, 5)), torch.tensor(0.25)
    expected = attention(x, tau, "torch")
    attention.assignment = attention.assignment.float()
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(attention(x, tau), expected)


def test_parameters_that_are_changed_in_place_are_seen():
    layer, x = make("conv2d")
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        layer.attention.fc2.bias.add_(1)
        layer.temperature.fill(0.5)
        after = layer(x)
        layer.implementation = "grouped"
        torch.testing.assert_close(after, layer(x))
    assert not torch.allclose(before, after)


@needs_compiler
def test_operators_are_well_formed():
    attention = attention_of().eval()
    x, tau = images_of(attention, (7, 5)), torch.tensor(0.3).double()
    parameters = [*(t if t is None else t.detach() for t in attention._fixed(x)), attention.assignment, tau]
    torch.library.opcheck(operators.attention_operator, (x, parameters, attention.norm.eps))
    last = attention.fc2.weight.detach(), attention.fc2.bias.detach(), attention.assignment, tau
    hidden = torch.randn(3, attention.fc1.out_features).double()
    torch.library.opcheck(operators.coefficients_operator, (hidden, *last))
    grad = torch.randn(3, *attention.assignment.shape).double()
    torch.library.opcheck(operators.coefficients_gradients, (grad, hidden, *last[:2], tau))
    torch.library.opcheck(mean_operator, (x,))
