"""Backwards inside a forward that is itself differentiated afterwards.

A validation step may take gradients of its own (an attack, a penalty, forces), a network may carry backward hooks (a
monitor of gradients), and parts of it may be checkpointed. The backward of the loss must find the whole graph, and no
hook of the user's may hear of it.

For that, a gate, an identity in autograd's graph, reports the gradient that passes through it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode

from lightning_neurons.isolation.tensors import tensors_in

Hook = Callable[..., Any]

BACKWARDS = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})
"""The functions by which a mode sees a backward."""


_REQUIRES = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]


def needs_parameters(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of one of ``BACKWARDS`` gives something else while all parameters are frozen."""
    inputs = args[1] if func is torch.autograd.grad else kwargs.get("inputs")
    tensors = [*tensors_in(inputs)]
    return not tensors or not all(t.requires_grad for t in (*tensors, *tensors_in(args[0])))


def retaining(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call one of ``BACKWARDS`` and keep the graph, so that it can be differentiated again.

    Returns:
        What the function returns: gradients, or None.
    """
    return func(*args, **{**kwargs, "retain_graph": True})


class RetainedGraphs(TorchFunctionMode):
    """A mode in which no backward frees its graph, which another one may share.

    A tensor that is made to require a gradient keeps its ``.grad``, although it may be no leaf here.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in BACKWARDS:
            return retaining(func, args, kwargs or {})
        if func in _REQUIRES and args[0].requires_grad and not args[0].is_leaf:
            args[0].retain_grad()  # whatever was asked for: a tensor that is no leaf cannot change
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def backward_hooks(choose: Callable[[list[Hook]], list[Hook]] = lambda hooks: []) -> Iterator[None]:
    """Replace the backward hooks of modules that are called meanwhile; by default there are none.

    This holds for global hooks and for those that are registered meanwhile as well.
    """
    hooks_of: Any = nn.Module._get_backward_hooks
    pre_hooks_of: Any = nn.Module._get_backward_pre_hooks

    def chosen(module: nn.Module) -> tuple[list[Hook], list[Hook]]:
        full, others = hooks_of(module)
        return choose(full), choose(others)

    def chosen_pre(module: nn.Module) -> list[Hook]:
        return choose(pre_hooks_of(module))

    with _replaced(nn.Module, _get_backward_hooks=chosen, _get_backward_pre_hooks=chosen_pre):
        yield


def unhooked(tensor: Any) -> Any:
    """Return the tensor that the backward hook of a module has wrapped into another one, or the tensor itself."""
    if not isinstance(tensor, Tensor):
        return tensor
    with torch._C.DisableTorchFunction():  # to ask is no call of the model's
        made_by, base = tensor.grad_fn, tensor._base
        is_wrapped = made_by is not None and made_by.name() == "BackwardHookFunctionBackward"
        return base if is_wrapped and base is not None and base.shape == tensor.shape else tensor


def functions_running() -> int:
    """Return the number of custom autograd functions that are running; calls inside of one cannot be followed."""
    # What starts them is a function of Python in some versions of torch only; their forward is one in all.
    functions = (inspect.unwrap(kind.forward) for kind in _subclasses(torch.autograd.Function))
    forwards = {getattr(function, "__code__", None) for function in functions}
    frame, count = inspect.currentframe(), 0
    while frame is not None:
        count += frame.f_code in forwards
        frame = frame.f_back
    return count


def _subclasses(kind: Any) -> Iterator[Any]:
    for subclass in type.__subclasses__(kind):
        yield subclass
        yield from _subclasses(subclass)


@contextmanager
def direct_checkpoints() -> Iterator[None]:
    """Run checkpointed functions once and directly: a second run of theirs could not be followed."""

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    with _replaced(
        torch.utils.checkpoint, CheckpointFunction=_Direct, _checkpoint_without_reentrant_generator=generator
    ):
        yield


class _Direct:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def kept_gradients(model: nn.Module) -> Iterator[None]:
    """Set the gradients of all parameters to None, and put them back afterwards."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def shared_graph(model: nn.Module) -> Iterator[None]:
    """Keep all that a model computes meanwhile differentiable, whatever it differentiates itself.

    No backward hook fires, no graph is freed, no gradient of a parameter changes, and nothing is checkpointed.
    """
    with ExitStack() as stack:
        for context in (kept_gradients(model), backward_hooks(), direct_checkpoints(), RetainedGraphs()):
            stack.enter_context(context)
        yield


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of a class or module of torch for a while."""
    kept = {name: vars(owner)[name] for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


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
