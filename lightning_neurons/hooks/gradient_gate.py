"""An identity in autograd's graph that reports the gradient which passes through it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

Passed = Callable[[Tensor], Tensor | None]


def gated(value: Tensor, root: Tensor, passed: Passed) -> Tensor:
    """Put a gate behind a tensor, in place: all who use the tensor from now on go through the gate.

    Args:
        value: The tensor; it need not require a gradient.
        root: A leaf that requires a gradient; a backward that asks for its gradient reaches all its gates.
        passed: Called with the gradient in every backward that comes through; may return a factor for it.

    Returns:
        The same tensor; a copy where autograd refuses to go on with the same one.

    Example:
        >>> value, root, found = torch.ones(2), torch.zeros((), requires_grad=True), []
        >>> value = gated(value, root, found.append)
        >>> _ = torch.autograd.grad((3 * value).sum(), [root], allow_unused=True)
        >>> found
        [tensor([3., 3.])]
    """
    if value.requires_grad and value.is_leaf:
        value = value.clone()  # nothing may be done to a leaf in place
    try:
        return _passed_through(value, root, passed)
    except RuntimeError:  # nor to one of several views made at once, nor to a view made in no_grad
        return _passed_through(value.clone(), root, passed)


def _passed_through(value: Tensor, root: Tensor, passed: Passed) -> Tensor:
    with _unsafe_preserve_version_counter(value):  # no number changes
        _Gate.apply(value, root, passed)  # type: ignore[no-untyped-call]
    return value


class _Gate(torch.autograd.Function):
    """The identity, in place.

    A function of its own behind the activation function: what that saved of its result, to be differentiated a second
    time, is no use of the activation.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, root: Tensor, passed: Passed) -> Tensor:
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0]
        factor = None if gradient is None else ctx.passed(gradient)
        return gradient if factor is None else gradient * factor, None, None
