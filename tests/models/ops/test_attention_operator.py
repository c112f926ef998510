"""The attention in C++ beside the module in torch."""

import pytest
import torch
from layers import make
from processor import needs_compiler
from torch import nn

from kernelwarehouse.models.ops.kernel_warehouse import Attention, assign, attention_operator, set_implementation
from kernelwarehouse.models.ops.kernel_warehouse import layer as layers
from kernelwarehouse.models.ops.kernel_warehouse.attention import pool
from kernelwarehouse.models.ops.native import mean

SIZES = {"plane": (7, 5), "pixel": (1, 1), "line": (11,), "volume": (3, 2, 5), "large": (40, 31)}


def attention_of(channels=6, cells=37, mixtures=5, norm="batch", dtype=torch.float64, reduction=3.0):
    torch.manual_seed(0)
    own = range(3, cells - 2)
    attention = Attention(
        channels, cells, own, assign(mixtures, len(own), 3), norm=norm, dtype=dtype, reduction=reduction
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.5)
        if norm == "batch":
            attention.norm.running_mean.normal_()
            attention.norm.running_var.uniform_(0.5, 2)
    return attention


def images_of(attention, size, last, batch=3):
    x = torch.randn(batch, attention.fc1.in_features, *size, dtype=attention.fc1.weight.dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def truth(attention, x, temperature):
    return attention(x.flatten(2).mean(2), temperature)


@needs_compiler
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_it_is_the_module(size, last, norm, train):
    attention = attention_of(norm=norm).train(train)
    x, temperature = images_of(attention, SIZES[size], last), torch.tensor(0.3).double()
    with torch.set_grad_enabled(train):
        assert attention_operator.attends_at_once(attention, x)
        alpha, used = attention_operator.attend_at_once(attention, x, temperature)
        torch.testing.assert_close(alpha, truth(attention, x, temperature))
    torch.testing.assert_close(used, x)


@needs_compiler
@pytest.mark.parametrize(("channels", "cells", "mixtures", "batch"), [(3, 1, 2, 1), (24, 15, 1, 35), (130, 65, 3, 17)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_counts(channels, cells, mixtures, batch, dtype):
    own = range(cells)
    attention = Attention(channels, cells, own, assign(mixtures, cells, 0), dtype=dtype).eval()
    x = images_of(attention, (8, 6), True, batch)
    with torch.no_grad():
        alpha, _ = attention_operator.attend_at_once(attention, x, torch.zeros((), dtype=dtype))
        torch.testing.assert_close(alpha, truth(attention, x, torch.zeros((), dtype=dtype)))


@needs_compiler
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradients(temperature, norm):
    attention = attention_of(norm=norm)
    x = images_of(attention, (7, 5), True, batch=19).requires_grad_()
    tau = torch.tensor(temperature).double()
    leaves = [x, *attention.parameters()]

    def gradients(alpha, received):
        return torch.autograd.grad(alpha, leaves, received, allow_unused=True, materialize_grads=True)

    alpha, _ = attention_operator.attend_at_once(attention, x, tau)
    received = torch.randn_like(alpha)
    torch.testing.assert_close(gradients(alpha, received), gradients(truth(attention, x, tau), received))


@needs_compiler
def test_at_temperature_one_coefficients_are_the_assignment_to_the_last_digit():
    """A cell that no mixture holds gets no gradient then, not even of rounding errors, which Adam would magnify."""
    attention = attention_of(dtype=torch.float32)
    x, tau = images_of(attention, (7, 5), True), torch.tensor(1.0)
    for train in (True, False):
        with torch.set_grad_enabled(train):
            alpha, _ = attention_operator.attend_at_once(attention.train(train), x, tau)
        assert torch.equal(alpha, attention.assignment.expand_as(alpha))


@needs_compiler
def test_gradients_are_those_at_the_temperature_of_the_forward_pass():
    attention = attention_of()
    x, tau = images_of(attention, (7, 5), True).requires_grad_(), torch.tensor(0.25).double()
    (expected,) = torch.autograd.grad(truth(attention, x, tau).square().sum(), x)
    alpha, _ = attention_operator.attend_at_once(attention, x, tau)
    tau.fill_(1.0)
    torch.testing.assert_close(torch.autograd.grad(alpha.square().sum(), x)[0], expected)


@needs_compiler
def test_logits_of_zero_have_the_gradient_that_torch_gives_them():
    attention = attention_of()
    attention.hold_assignment()
    x, tau = images_of(attention, (7, 5), True), torch.tensor(0.0).double()
    weights = [attention.fc2.weight, attention.fc2.bias]
    torch.manual_seed(1)
    received = torch.randn(3, 5, 37).double()
    alpha, _ = attention_operator.attend_at_once(attention, x, tau)
    expected = torch.autograd.grad(truth(attention, x, tau), weights, received)
    torch.testing.assert_close(torch.autograd.grad(alpha, weights, received), expected)


@needs_compiler
def test_training_moves_the_running_statistics_and_evaluation_does_not():
    attention = attention_of()
    x, tau = images_of(attention, (7, 5), True), torch.tensor(0.0).double()
    before = attention.norm.running_mean.clone()
    attention_operator.attend_at_once(attention.eval(), x, tau)
    torch.testing.assert_close(attention.norm.running_mean, before)
    attention_operator.attend_at_once(attention.train(), x, tau)
    assert not torch.equal(attention.norm.running_mean, before)


@needs_compiler
def test_bfloat16_images_lose_nothing_but_their_own_digits():
    attention = attention_of(channels=24, dtype=torch.float32).eval()
    x, tau = images_of(attention, (9, 9), True).bfloat16(), torch.tensor(0.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alpha, _ = attention_operator.attend_at_once(attention, x, tau)
    with torch.no_grad():
        torch.testing.assert_close(alpha, truth(attention, x.float(), tau))


@needs_compiler
def test_the_number_of_threads_does_not_change_a_digit():
    attention = attention_of(dtype=torch.float32).eval()
    x, found, threads = images_of(attention, (150, 90), True), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append(attention_operator.attend_at_once(attention, x, torch.tensor(0.0))[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@pytest.mark.parametrize("channels", [1, 3, 24, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_means(channels, dtype):
    for size in SIZES.values():
        for batch in (1, 4):
            x = 1 + torch.randn(batch, channels, *size, dtype=dtype)
            for images in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.transpose(0, 1)):
                torch.testing.assert_close(mean(images), images.flatten(2).mean(2))


@pytest.mark.parametrize("case", ["conv2d", "conv2d-layer-norm", "depthwise"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["any-size", "one-size"])
def test_compiled_in_one_graph(case, train, dynamic):
    layer, _, x = make(case)
    layer.train(train)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    parameters = list(layer.parameters())
    with torch.set_grad_enabled(train):
        y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    if train:
        found, truth = (torch.autograd.grad(z.square().sum(), parameters) for z in (y, expected))
        torch.testing.assert_close(found, truth)


class TestWhereItIsTaken:
    def taken(self, monkeypatch, layer, x, implementation="auto"):
        seen = []
        run = attention_operator._attention
        monkeypatch.setattr(attention_operator, "_attention", lambda *a: seen.append(1) or run(*a))
        monkeypatch.setattr(layers, "infers_at_once", lambda *_: False)
        set_implementation(layer, implementation)
        with torch.no_grad():
            layer(x)
        return bool(seen)

    @needs_compiler
    @pytest.mark.parametrize("case", ["conv2d", "conv2d-layer-norm", "depthwise", "conv1d-circular", "linear-tokens"])
    def test_by_every_layer(self, monkeypatch, case):
        layer, _, x = make(case)
        assert self.taken(monkeypatch, layer.eval(), x)

    @pytest.mark.parametrize("implementation", ["naive", "grouped", "streamed"])
    def test_not_by_what_it_is_compared_with(self, monkeypatch, implementation):
        layer, _, x = make("conv2d")
        assert not self.taken(monkeypatch, layer.eval(), x, implementation)

    @pytest.mark.parametrize("part", ["", "fc1", "norm", "fc2"])
    def test_not_where_somebody_looks_at_a_part(self, monkeypatch, part):
        layer, _, x = make("conv2d")
        seen = []
        layer.attention.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        assert not self.taken(monkeypatch, layer.eval(), x)
        assert seen == [1]

    def test_not_where_a_hook_looks_at_all_modules(self, monkeypatch):
        layer, _, x = make("conv2d")
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            assert not self.taken(monkeypatch, layer.eval(), x)
        finally:
            handle.remove()
        assert nn.Linear in seen

    def test_a_replaced_part_is_asked(self, monkeypatch):
        class Twice(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        for name in ("fc1", "fc2"):
            layer, _, x = make("conv2d")
            with torch.no_grad():
                expected = layer.eval()(x)
            getattr(layer.attention, name).__class__ = Twice
            assert not self.taken(monkeypatch, layer, x)
            with torch.no_grad():
                assert not torch.allclose(layer(x), expected)

    def test_not_for_a_type_that_it_does_not_compute(self):
        attention = attention_of()
        assert not attention_operator.attends_at_once(attention, torch.randn(2, 6, 3, 3).half())
        assert not attention_operator.attends_at_once(attention, torch.randn(2, 6, 3, 3))  # of double parameters

    @needs_compiler
    @pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.LayerNorm(16, bias=False), nn.LayerNorm(16, 1e-5, False)])
    def test_another_norm_is_asked(self, norm):
        attention = attention_of(reduction=1.0).eval()
        attention.norm = norm.double().eval()
        x, tau = images_of(attention, (7, 5), True), torch.tensor(0.3).double()
        assert not attention_operator.folds_at_once(attention, x)
        with torch.no_grad():
            alpha, _ = attention_operator.attend_at_once(attention, x, tau)
            torch.testing.assert_close(alpha, truth(attention, x, tau))

    def test_a_norm_without_statistics_is_asked(self):
        attention = attention_of().eval()
        attention.norm.running_mean = attention.norm.running_var = None
        assert not attention_operator.folds_at_once(attention, images_of(attention, (7, 5), True))

    def test_not_for_weights_that_are_more_than_tensors(self):
        class Quantised(nn.Parameter):
            pass

        attention = attention_of().eval()
        attention.fc2.weight = Quantised(attention.fc2.weight.data)
        assert not attention_operator.attends_at_once(attention, images_of(attention, (7, 5), True))

    def test_not_for_a_basis(self, monkeypatch):
        layer, _, x = make("conv2d-nonlocal")
        assert not self.taken(monkeypatch, layer.eval(), x)


@pytest.mark.parametrize(("part", "message"), [("fc1", "for 7 channels got 6"), ("fc2", "5 mixtures logits for 37")])
def test_weights_that_do_not_fit_are_refused(part, message):
    attention = attention_of().eval()
    x, old = images_of(attention, (7, 5), True), getattr(attention, part)
    setattr(attention, part, nn.Linear(old.in_features + 1, old.out_features).double())
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        attention_operator.attend_at_once(attention, x, torch.tensor(0.0).double())


@needs_compiler
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_buffers_of_another_type_are_converted(train):
    attention = attention_of().train(train)
    x, tau = images_of(attention, (7, 5), True), torch.tensor(0.25)  # of a warehouse in single precision
    expected = truth(attention, x, tau)
    attention.assignment = attention.assignment.float()
    with torch.set_grad_enabled(train):
        alpha, _ = attention_operator.attend_at_once(attention, x, tau)
    torch.testing.assert_close(alpha, expected)


def test_parameters_that_are_changed_in_place_are_seen():
    layer, warehouses, x = make("conv2d")
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        layer.attention.fc2.bias.add_(1)
        warehouses.temperature.fill_(0.5)
        after = layer(x)
        set_implementation(layer, "grouped")
        torch.testing.assert_close(after, layer(x))
    assert not torch.allclose(before, after)


@needs_compiler
def test_it_keeps_less_for_the_backward_pass_than_torch_does():
    attention = attention_of()
    x, tau = images_of(attention, (7, 5), True).requires_grad_(), torch.tensor(0.0).double()

    def kept(run):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            run()
        return sum(sizes)

    pooled, _ = pool(x)
    alpha = attention(pooled, tau).numel()
    ours = kept(lambda: attention_operator.attend_at_once(attention, x, tau))
    assert ours <= kept(lambda: attention(pool(x)[0], tau)) - alpha


@needs_compiler
def test_operators_are_well_formed():
    attention = attention_of().eval()
    x, tau = images_of(attention, (7, 5), True), torch.tensor(0.3).double()
    for temperature in (tau, None):
        parameters = attention_operator.parameters_of(attention, temperature)
        parameters = [value if value is None else value.detach() for value in parameters]
        operands = x, parameters, attention.norm.eps, attention.mixtures
        torch.library.opcheck(attention_operator._attention, operands)
    last = attention.fc2.weight.detach(), attention.fc2.bias.detach(), attention.assignment, tau
    hidden = torch.randn(3, attention.fc1.out_features).double()
    torch.library.opcheck(attention_operator.coefficients, (hidden, *last))
    grad = torch.randn(3, *attention.assignment.shape).double()
    torch.library.opcheck(attention_operator.coefficients_gradients, (grad, hidden, *last[:2], tau))
    torch.library.opcheck(mean, (x,))


@needs_compiler
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("size", SIZES)
def test_of_a_folded_layer(norm, size):
    attention = attention_of(norm=norm).eval()
    x = images_of(attention, SIZES[size], True)
    with torch.no_grad():
        assert attention_operator.folds_at_once(attention, x)
        alpha = attention_operator.folded_at_once(attention, x)
        hidden = attention.hidden(x.flatten(2).mean(2))
        scale = 1 / (attention.logits(hidden).abs().sum(2) + 1e-3)
    torch.testing.assert_close(alpha[..., :-1], scale[..., None] * hidden[:, None])
    torch.testing.assert_close(alpha[..., -1], scale)
    assert not attention_operator.folds_at_once(attention.train(), x)
