"""What no state dict may hold, and which values no network can: tables for tests of everything that reads a file."""

import torch


def _nested():
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def _quantized():
    return torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)


# Name → an entry in place of a tensor, and what the refusal says of it.
ENTRIES = {
    "none": (None, "None, not a tensor"),
    "number": (3, "a int, not a tensor"),
    "fraction": (0.5, "a float, not a tensor"),
    "flag": (True, "a bool, not a tensor"),
    "text": ("weights", "a str, not a tensor"),
    "bytes": (bytearray(b"weights"), "a bytearray, not a tensor"),
    "list": ([1.0, 2.0], "a list, not a tensor"),
    "tuple": ((torch.zeros(1),), "a tuple, not a tensor"),
    "dictionary": ({"weight": torch.zeros(1)}, "a dict, not a tensor"),
    "type": (torch.float32, "a dtype, not a tensor"),
    "sparse": (torch.eye(2).to_sparse(), "sparse"),
    "sparse_rows": (torch.eye(2).to_sparse_csr(), "sparse"),
    "nested": (_nested(), "nested"),
    "quantized": (_quantized(), "quantized"),
    "meta": (torch.zeros(2, device="meta"), "on meta"),
}
KEYS = [5, None, 1.5, True, ("a", "b"), torch.float32]

# Name → a tensor of the same shape that a network cannot hold, made of a good one, and what the refusal says of it.
VALUES = {
    "complex": ("weight", lambda t: t.to(torch.complex64), "is complex"),
    "beyond": ("weight", lambda t: torch.full_like(t, 1e39, dtype=torch.float64), "beyond the range of float32"),
    "one_beyond": ("weight", lambda t: _with(t.double(), -1e300), "beyond the range of float32"),
    "fraction": ("num_batches_tracked", lambda t: torch.tensor(1.9), "are no int64"),
    "nan_count": ("num_batches_tracked", lambda t: torch.tensor(float("nan")), "are no int64"),
    "large_count": ("num_batches_tracked", lambda t: torch.tensor(1e30), "are no int64"),
    "complex_count": ("num_batches_tracked", lambda t: torch.tensor(1j), "is complex"),
    "variance": ("running_var", lambda t: _with(t, -1.0), "negative variances"),
}
# Name → values with which a network is loaded, with a warning.
WARNED = {
    "nan": lambda t: _with(t, float("nan")),
    "inf": lambda t: _with(t, float("inf")),
    "minus_inf_in_double": lambda t: _with(t.double(), -float("inf")),
    "nan_in_half": lambda t: _with(t.half(), float("nan")),
    "nan_in_bfloat16": lambda t: _with(t.bfloat16(), float("nan")),
    "nan_in_float8": lambda t: _with(t, float("nan")).to(torch.float8_e4m3fn),
}


def _with(tensor, value):
    """A copy whose last element is another."""
    copy = tensor.clone()
    copy.view(-1)[-1] = value
    return copy
