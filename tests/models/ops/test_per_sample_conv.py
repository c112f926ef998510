import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity

from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.per_sample_conv import IMPLEMENTATIONS, no_depthwise, per_sample_conv

# name: (batch, in channels, out channels, input size, kernel size, other arguments)
CASES = {
    "1d": (3, 4, 6, (11,), (3,), {"stride": 2, "padding": 1}),
    "1d-same-even-kernel": (2, 3, 5, (9,), (4,), {"padding": "same", "dilation": 2}),
    "2d": (3, 4, 6, (7, 5), (3, 3), {"padding": 1}),
    "2d-pointwise-stride": (5, 4, 3, (7, 9), (1, 1), {"stride": (2, 3)}),
    "2d-pointwise-padded": (2, 4, 3, (5, 4), (1, 1), {"padding": (2, 1)}),
    "2d-stride-dilation-groups": (2, 6, 4, (13, 9), (3, 2), {"stride": (2, 1), "dilation": (2, 3), "groups": 2}),
    "2d-depthwise": (3, 5, 5, (8, 7), (5, 3), {"padding": (2, 1), "groups": 5}),
    "2d-depthwise-multiplier": (2, 3, 6, (6, 6), (3, 3), {"groups": 3, "padding": "valid"}),
    "2d-reflect": (2, 3, 4, (6, 5), (3, 3), {"padding": 2, "padding_mode": "reflect"}),
    "2d-same-circular": (2, 3, 4, (6, 5), (4, 3), {"padding": "same", "padding_mode": "circular"}),
    "2d-batch-of-one": (1, 3, 4, (6, 5), (3, 3), {"padding": 1}),
    "2d-single-pixel": (3, 4, 2, (1, 1), (3, 3), {"padding": 1}),
    "3d": (2, 2, 4, (5, 4, 6), (3, 2, 1), {"stride": (1, 2, 1), "padding": (1, 0, 2), "groups": 2}),
    "3d-replicate": (2, 2, 3, (4, 4, 3), (3, 3, 3), {"padding": 1, "padding_mode": "replicate"}),
}


def operands(case):
    batch, cin, cout, size, kernel, arguments = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(batch, cin, *size, dtype=torch.float64, requires_grad=True)
    groups = arguments.get("groups", 1)
    weight = torch.randn(batch, cout, cin // groups, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(cout, dtype=torch.float64, requires_grad=True)
    return x, weight, bias, arguments


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"] + ["auto"])
@pytest.mark.parametrize("case", CASES)
def test_parity_with_reference(case, implementation):
    x, weight, bias, arguments = operands(case)
    reason = no_depthwise(x, weight, Geometry.of(weight.shape[3:], **arguments))
    if implementation == "depthwise" and reason:
        with pytest.raises(ValueError, match=r"'depthwise' cannot compute this: .*; 'auto' takes another"):
            per_sample_conv(x, weight, bias, **arguments, implementation=implementation)
        return
    assert_parity(
        lambda: per_sample_conv(x, weight, bias, **arguments, implementation=implementation),
        lambda: per_sample_conv(x, weight, bias, **arguments, implementation="reference"),
        {"x": x, "weight": weight, "bias": bias},
    )


@pytest.mark.parametrize("case", CASES)
def test_reference_is_torch_convolution_of_each_sample(case):
    x, weight, bias, arguments = operands(case)
    y = per_sample_conv(x, weight, bias, **arguments, implementation="reference")
    module = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}[x.ndim]
    for b in range(len(x)):
        conv = module(x.shape[1], weight.shape[1], weight.shape[3:], **arguments, dtype=torch.float64)
        conv.weight.data, conv.bias.data = weight[b].data, bias.data
        torch.testing.assert_close(y[b], conv(x[b : b + 1])[0])


def test_equal_kernels_are_an_ordinary_convolution_and_bias_may_differ_by_sample():
    x = torch.randn(4, 3, 8, 8)
    kernel, bias = torch.randn(5, 3, 3, 3), torch.randn(4, 5)
    y = per_sample_conv(x, kernel.expand(4, -1, -1, -1, -1), bias, padding=1)
    torch.testing.assert_close(y, F.conv2d(x, kernel, padding=1) + bias[:, :, None, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 4, 5, 5), "weight": torch.zeros(0, 2, 4, 3, 3)}, "batch is empty"),
        ({"weight": torch.zeros(3, 2, 4, 3, 3)}, "2 samples, 3 kernels"),
        ({"x": torch.zeros(2, 5, 5, 5)}, "do not fit 5 input channels"),
        ({"x": torch.zeros(2, 4, 5)}, "2-D per-sample convolution"),
        ({"stride": 0}, "stride"),
        ({"stride": 2, "padding": "same"}, "stride 1"),
        ({"padding": "full"}, "'same' or 'valid'"),
        ({"padding": -1}, "padding"),
        ({"padding_mode": "wrap"}, "padding_mode"),
        ({"dilation": (1, 1, 1)}, "dilation"),
        ({"groups": 0}, "groups"),
        ({"implementation": "magic"}, "implementation"),
    ],
)
def test_nonsense_is_refused(change, message):
    arguments = {"x": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(2, 2, 4, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        per_sample_conv(**arguments)
