"""Which values a tensor has, and whether a type can hold them; each tensor is read once and not copied if it can be."""

import torch
from torch import Tensor

_ORDERED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_finite(value: Tensor) -> bool:
    """Whether a dense tensor has neither NaN nor infinite values."""
    if value.numel() == 0 or not (value.is_floating_point() or value.is_complex()):
        return True
    if value.is_complex():
        return bool(torch.view_as_real(value.resolve_conj()).isfinite().all())
    least, greatest = _as_ordered(value).aminmax()  # NaN where there is one
    return bool(least.isfinite() & greatest.isfinite())


def cannot_hold(value: Tensor, dtype: torch.dtype) -> str | None:
    """Why a type cannot hold the values of a dense tensor, None where it can; rounding a fraction is no reason.

    NaN and infinity are held by every type of fractions.
    """
    if value.dtype == dtype or value.numel() == 0:
        return None
    if value.is_complex() and not dtype.is_complex:
        return "is complex"
    try:
        held = value.to(dtype)
        if not (dtype.is_floating_point or dtype.is_complex):
            exact = bool((held.to(value.dtype) == value).all())
            return None if exact else f"has values that are no {_name(dtype)}"
        return None if _overflows_nowhere(value, held) else f"has values beyond the range of {_name(dtype)}"
    except RuntimeError:  # torch has no conversion between some types
        return f"is of type {_name(value.dtype)}, which cannot be made {_name(dtype)}"


def has_negative(value: Tensor) -> bool:
    """Whether a dense tensor of real numbers has one below 0."""
    ordered = _as_ordered(value) if value.is_floating_point() else value
    return bool((ordered < 0).any())


def _overflows_nowhere(value: Tensor, held: Tensor) -> bool:
    if is_finite(held):
        return True
    before = _as_ordered(value).isfinite() if value.is_floating_point() else value.isfinite()
    after = _as_ordered(held).isfinite() if held.is_floating_point() else held.isfinite()
    return bool((before == after).all())


def _as_ordered(value: Tensor) -> Tensor:
    """The same values in a type that torch compares; those of one byte and less are not."""
    return value if value.dtype in _ORDERED else value.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
