"""Functions whose fast forms autograd cannot see into: every kind of derivative of theirs is right or refused."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .context import exporting


class Function(ABC):
    """A function of tensors that exists in differentiable operators, and perhaps in faster ones.

    A gradient is computed by `gradients`. Where a graph of the gradient is wanted (create_graph=True, torch.func), it
    is that of `compute`, done again in backward. Nothing but the arguments is kept for backward.

    Attributes:
        name: Of the implementation, for what cannot be differentiated as it was asked.
        fast: Whether `forward` and `gradients` are other operators than those of `compute`.
    """

    name: ClassVar[str]
    fast: ClassVar[bool] = False

    @abstractmethod
    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """The result for the arguments and the tensors, in differentiable operators."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same, where no gradient is recorded."""
        return self.compute(*args, **kwargs)

    def gradients(self, *args: Any, **kwargs: Any) -> Sequence[Tensor | None]:
        """The gradients of those tensors that need one, None for the others.

        It is given the arguments, the gradient of the result, whether each tensor needs one, and the tensors.
        """
        arguments, grad, needs, *tensors = args
        return gradients_by_autograd(lambda *inputs: self.compute(arguments, *inputs), tensors, needs, grad, **kwargs)

    def apply(self, arguments: Any, *tensors: Tensor | None) -> Tensor:
        """The result, with its gradient recorded where one is wanted."""
        if exporting() or torch.compiler.is_compiling():
            return _Compiled.apply(self, arguments, *tensors) if self.fast else self.compute(arguments, *tensors)
        if torch.is_inference_mode_enabled():  # in which torch itself keeps no derivative of any kind
            return self.forward(arguments, *tensors)
        try:
            return _Eager.apply(self, arguments, *tensors)
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
        return _Transformed.apply(self, arguments, *tensors)  # by torch.func, which takes no other form


def gradients_by_autograd(
    compute: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor | Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of a function, by computing it again; with a graph of them if gradients are being recorded.

    Args:
        compute: The function.
        tensors: Its arguments.
        needs: For which of them a gradient is wanted; None is returned for the others.
        grad: The gradient of its result, or what gives that from the result.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one of the tensors may have been made of another. What needs a gradient and records none is of a
        # transform of torch.func that was left, as the function that torch.func.vjp returns leaves it.
        inputs: list[Any] = [
            t if t is None or not need else _input(t, create_graph) for t, need in zip(tensors, needs, strict=True)
        ]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        result = compute(*inputs)
    given = grad if isinstance(grad, Tensor) else grad(result.detach())
    found = iter(torch.autograd.grad(result, wanted, given, create_graph=create_graph) if wanted else ())
    return tuple(next(found) if need else None for need in needs)


def _input(tensor: Tensor, create_graph: bool) -> Tensor:
    view = tensor.view_as(tensor) if create_graph else tensor.detach()
    return view if view.requires_grad else view.detach().requires_grad_()


class _Compiled(torch.autograd.Function):
    """As torch.compile takes it, which has no second derivatives."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        function, arguments, *tensors = args
        ctx.function, ctx.arguments = function, arguments
        ctx.save_for_backward(*tensors)
        return function.forward(arguments, *tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        needs = ctx.needs_input_grad[2:]
        return None, None, *ctx.function.gradients(ctx.arguments, *grads, needs, *ctx.saved_tensors)


class _Eager(_Compiled):
    """The same, with second derivatives."""

    @staticmethod
    def backward(ctx, *grads: Tensor):
        if not torch.is_grad_enabled():
            return _Compiled.backward(ctx, *grads)
        function, arguments = ctx.function, ctx.arguments
        found = gradients_by_autograd(
            lambda *tensors: function.compute(arguments, *tensors), ctx.saved_tensors, ctx.needs_input_grad[2:], *grads
        )
        return None, None, *found

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_refusal("forward-mode differentiation (jvp)", ctx.function))


class _Transformed(_Eager):
    """The same in the form of torch.func, which costs many times as much to call."""

    @staticmethod
    def forward(*args: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] (torch's other form)
        function, *rest = args
        return function.forward(*rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004 (torch's signature)
        ctx.function, ctx.arguments, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def vmap(info, in_dims, *args):  # noqa: ARG004
        raise RuntimeError(_refusal("torch.vmap", args[0]))


def _refusal(what: str, function: Function) -> str:
    return f"{what} is not there for {function.name!r}; set_implementation(net, 'reference') computes it"
