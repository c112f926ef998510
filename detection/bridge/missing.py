"""What happens on a call of an operator that only compiled mmcv has."""

from collections.abc import Callable
from typing import Any, NoReturn


class MissingOperatorError(NotImplementedError):
    """An operator of mmcv that only its compiled form has."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is not among the operators of mmcv that run on torchvision; install compiled mmcv instead of "
            "mmcv-lite, as mmcv documents it: pip uninstall mmcv-lite; pip install openmim; mim install mmcv==2.1.0"
        )


def missing_operator(name: str) -> Callable[..., NoReturn]:
    """An operator that can be imported and raises `MissingOperatorError` when called.

    Raises:
        AttributeError: `name` begins with an underscore, as no operator's does.
    """
    if name.startswith("_"):
        raise AttributeError(name)

    def operator(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise MissingOperatorError(repr(name))

    operator.__name__ = operator.__qualname__ = name
    return operator
