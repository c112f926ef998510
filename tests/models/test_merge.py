import copy

import pytest
import torch
from layers import LAYERS, make
from torch import nn

from kernelwarehouse import build_model, merge_, set_temperature
from kernelwarehouse.models import sharing
from kernelwarehouse.models.ops.kernel_warehouse import KWLayer


def randomise(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (2 / max(p[0].numel(), 1)) ** 0.5 if p.ndim > 1 else torch.rand_like(p))
    return net.eval()


@pytest.mark.parametrize("way", ["with a gradient", "materialize", "auto"])
@pytest.mark.parametrize("case", LAYERS)
def test_parity(case, way):
    layer, x = make(case)
    layer.eval()
    expected, kernels = layer(x), None if case.startswith("linear") else layer.kernels(x)
    layer.merge()
    layer.implementation = "materialize" if way == "materialize" else "auto"
    with torch.set_grad_enabled(way == "with a gradient"):
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    if kernels is not None:
        torch.testing.assert_close(layer.kernels(x), kernels, rtol=1e-10, atol=1e-10)


def test_a_watched_attention_cannot_be_merged():
    layer, _ = make("conv2d")
    layer.attention.fc2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.eval().merge()


class TestNetwork:
    def network(self):
        return randomise(build_model("configs/resnet18/kw4x_resnet18.json", nb_classes=10)).double()

    def test_same_results_and_no_warehouse_left_in_use(self):
        net, x = self.network(), torch.randn(3, 3, 64, 64).double()
        expected = net(x).detach()
        users = sharing(net)
        assert merge_(net, x) is net
        folded = [name for name, m in net.named_modules() if isinstance(m, KWLayer) and m.products is not None]
        assert 0 < len(folded) < 19
        torch.testing.assert_close(net(x).detach(), expected, rtol=1e-9, atol=1e-9)
        assert {n for names in sharing(net).values() for n in names} == (
            {n for names in users.values() for n in names} - set(folded)
        )
        assert net(torch.randn(1, 3, 50, 70).double()).isfinite().all()  # any other input

    def test_nothing_can_go_stale(self):
        """A folded layer owns its numbers: what happens to the warehouse afterwards does not reach it."""
        net, x = self.network(), torch.randn(2, 3, 64, 64).double()
        twin = copy.deepcopy(net)
        for module in twin.modules():
            if isinstance(module, KWLayer):
                module.merge()
        before = twin(x)
        with torch.no_grad():
            for name in sharing(net):
                net.get_parameter(name).zero_()
        assert not sharing(twin)
        torch.testing.assert_close(twin(x), before)
        assert not torch.allclose(net(x), before)

    def test_budget_of_memory(self):
        net, x = self.network(), torch.randn(8, 3, 64, 64).double()
        merge_(net, x, max_bytes=10 << 20, dtype=torch.float32)
        held = [m.products for m in net.modules() if isinstance(m, KWLayer) and m.products is not None]
        assert held
        assert sum(p.numel() * p.element_size() for p in held) <= 10 << 20

    @pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
    def test_half_precision_products(self, dtype, error):
        net, x = self.network().float(), torch.randn(2, 3, 64, 64)
        expected = net(x)
        merge_(net, x, dtype=dtype)
        assert {m.products.dtype for m in net.modules() if getattr(m, "products", None) is not None} == {dtype}
        assert 0 < (net(x) - expected).norm() / expected.norm() < error

    def test_export_with_any_batch_size(self):
        net, x = self.network().float(), torch.randn(2, 3, 64, 64)
        merge_(net, x)
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},))
        x = torch.randn(5, 3, 64, 64)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-3, atol=1e-3)

    def test_errors(self):
        x = torch.randn(2, 3, 64, 64).double()
        with pytest.raises(ValueError, match="no converted layer to merge"):
            merge_(nn.Conv2d(3, 3, 1).eval(), x)
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            merge_(self.network().train(), x)
        net = self.network()
        set_temperature(net, 0.5)
        with pytest.raises(ValueError, match=r"at temperature 0\.5, a trained one at 0"):
            merge_(net, x)
        with pytest.raises(ValueError, match=r"at temperature 0\.5, a trained one at 0"):
            merge_(net, x, max_bytes=0)  # though no layer would be folded
        set_temperature(net, 0.0)
        merge_(net, x)
        with pytest.raises(RuntimeError, match="cannot be trained"):
            net.train()(x)
