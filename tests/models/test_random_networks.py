"""Networks drawn at random: what is planned runs and computes what it did, and planning leaves everything as it was."""

import itertools
import random

import pytest
import torch
from odd_modules import description
from torch import nn

from kernelwarehouse import KWConfig, convert_, plan_conversion

CONVOLUTIONS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
KINDS = ("plain", "residual", "gate", "reads", "tokens", "shared", "in training", "recurrent", "attention")


class Block(nn.Module):
    """(B, Cin, *spatial) → (B, Cout, *spatial), with layers over positions, tokens or pooled features."""

    def __init__(self, draw, dimensions, cin, cout):
        super().__init__()
        convolution, norm = CONVOLUTIONS[dimensions]
        size, self.kind, self.seen = draw.choice((1, 3, 5)), draw.choice(KINDS), []
        groups = draw.choice([g for g in (1, 2, cin) if cin % g == 0 and cout % g == 0])
        mode = draw.choice(("zeros", "circular"))
        arguments = {"padding": size // 2, "groups": groups, "bias": draw.random() < 0.5, "padding_mode": mode}
        self.conv = convolution(cin, cout, size, **arguments)
        self.norm = norm(cout) if draw.random() < 0.7 else nn.Identity()
        self.point, self.linear = convolution(cout, cout, 1), nn.Linear(cout, cout)
        self.rnn = nn.LSTM(cout, cout, batch_first=True) if self.kind == "recurrent" else None
        self.attention = nn.MultiheadAttention(cout, 2, batch_first=True) if self.kind == "attention" else None

    def forward(self, x):
        y = self.norm(self.conv(x))
        self.seen.append(y.shape)
        if self.kind == "residual" and y.shape == x.shape:
            y = y + x
        elif self.kind == "gate":
            y = y * self.point(y.flatten(2).mean(2)[(...,) + (None,) * (y.ndim - 2)]).sigmoid()
        elif self.kind == "reads":
            y = self.point(y) * self.point.weight.mean()
        elif self.kind in ("tokens", "shared") or (self.kind == "in training" and self.training):
            y = self.linear(y.movedim(1, -1)).movedim(-1, 1)
            y = self.linear(y.movedim(1, -1)).movedim(-1, 1) if self.kind == "shared" else y
        elif self.rnn is not None or self.attention is not None:
            tokens = y.flatten(2).transpose(1, 2)
            tokens = self.rnn(tokens)[0] if self.rnn is not None else self.attention(tokens, tokens, tokens)[0]
            y = tokens.transpose(1, 2).reshape(y.shape)
        return y.relu()


class Network(nn.Module):
    """Blocks, one of them at times twice, and a head."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        dimensions = draw.choice((1, 2, 2, 3))
        channels = [draw.choice((1, 3, 4)), *(draw.choice((4, 6, 8, 12)) for _ in range(draw.randint(2, 4)))]
        pairs = itertools.pairwise(channels)
        self.blocks = nn.ModuleList(Block(draw, dimensions, cin, cout) for cin, cout in pairs)
        if draw.random() < 0.3:
            self.blocks.append(Block(draw, dimensions, channels[-1], channels[-1]))
            self.blocks.append(self.blocks[-1])
        self.head = nn.Linear(channels[-1], 3)
        self.shape = (channels[0], *[draw.choice((5, 6, 8))] * dimensions)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(2).mean(2))


@pytest.mark.parametrize("seed", range(16))
def test_a_network_drawn_at_random(seed):
    net = Network(seed).train(seed % 2 == 0)
    x = torch.randn(2, *net.shape)
    before = description(net)
    plan = plan_conversion(net, KWConfig(), example_input=x)
    assert description(net) == before
    read = {f"blocks.{i}.point" for i, block in enumerate(net.blocks) if block.kind == "reads"}
    assert {name for name, _ in plan.left} <= read
    assert not {layer.name for layer in plan.layers} & read
    with torch.no_grad():
        expected = net.eval()(x)
        convert_(net, plan)
        torch.testing.assert_close(net(x), expected, rtol=2e-3, atol=2e-4)
    net.train()(x).sum().backward()
