"""Batches without images and images without a batch, as torch's layers take them."""

import copy

import pytest
import torch
from layers import LAYERS, make
from torch import nn

from kernelwarehouse import KWConfig, convert_, merge_


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_no_images_give_no_results_and_gradients_of_zeros(case, training):
    layer, x = make(case)
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    nothing = x[:0].requires_grad_()
    y = layer(nothing)
    assert y.shape == (0, *layer(x).shape[1:])
    layer.load_state_dict(before)
    y = layer(nothing)
    y.sum().backward()
    assert nothing.grad.shape == nothing.shape
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    for key, value in layer.state_dict().items():
        if "num_batches" not in key:  # which torch counts for empty ones too
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    with torch.no_grad():
        assert layer(nothing).shape == y.shape


@pytest.mark.parametrize("case", [case for case in LAYERS if case not in ("linear-tokens", "linear-map")])
def test_an_image_alone_is_a_batch_of_one(case):
    layer, x = make(case)
    layer.eval()
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="found"):
        layer(x[0, 0])


@pytest.mark.parametrize("training", [True, False])
def test_networks(training):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    static, net = network().train(training), convert_(network(), KWConfig()).train(training)
    for x in (torch.randn(0, 3, 9, 9), torch.randn(0, 3, 9, 9).to(memory_format=torch.channels_last)):
        assert net(x).shape == static(x).shape
    if not training:
        merged = merge_(net, torch.randn(2, 3, 9, 9))
        assert merged(torch.randn(0, 3, 9, 9)).shape == (0, 5)
