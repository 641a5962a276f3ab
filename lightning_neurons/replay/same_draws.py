"""Random numbers that are the same in two runs of a model whose layers differ in width."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

_DROPOUTS = {
    f"{name}{end}"
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
    for end in ("", "_")
} | {"feature_alpha_dropout", "feature_alpha_dropout_"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_DRAWS = {
    "rand", "randn", "rand_like", "randn_like", "normal", "normal_", "uniform_", "bernoulli", "bernoulli_",
    "exponential_", "log_normal_", "cauchy_", "geometric_", "randint", "randint_like", "randperm", "multinomial",
}  # fmt: skip

_DROPOUT_OF_ATTENTION = 4  # place of ``dropout_p``, behind queries, keys, values and a mask


class SameDraws(TorchFunctionMode):
    """A mode that gives runs of different widths the same draws: dropout is off, and every draw has its own seed.

    Args:
        alike: Draws, by their number in the run, whose shape depends on the widths: one number is drawn for all
            places, or for all of an entry of the first axis where that is True.

    Attributes:
        shapes: The shapes of all draws of the run.
        calls: The names of all functions that were called, with the indices that were read.
    """

    def __init__(self, alike: Mapping[int, bool]) -> None:
        super().__init__()
        self.alike, self.shapes, self.calls = alike, list[torch.Size](), list[tuple[str, ...]]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        self.calls.append((name, *_place(name, args)))
        if func is Tensor.backward:  # a checkpoint runs a part of the forward again
            with self:
                return _backward(*args, **kwargs)
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name not in _DRAWS:
            return func(*_without_dropout(name, args), **_without_dropout_named(name, kwargs))
        number = len(self.shapes)
        _seed(number)
        drawn: Tensor = func(*args, **kwargs)
        self.shapes.append(drawn.shape)
        if number in self.alike and drawn.numel():
            _seed(number)
            with torch.no_grad():
                drawn.copy_(_narrow(func, args, kwargs, drawn, by_entry=self.alike[number]))
        return drawn


def _without_dropout(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a function that drops out values inside, where it is told to drop none."""
    if name == "scaled_dot_product_attention" and len(args) > _DROPOUT_OF_ATTENTION:
        return (*args[:_DROPOUT_OF_ATTENTION], 0.0, *args[_DROPOUT_OF_ATTENTION + 1 :])
    return tuple(0.0 if isinstance(arg, float) else arg for arg in args) if name in _RECURRENT else args


def _without_dropout_named(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    if name == "scaled_dot_product_attention" and "dropout_p" in kwargs:
        return kwargs | {"dropout_p": 0.0}
    return kwargs | {"training": False} if name == "multi_head_attention_forward" else kwargs


def _place(name: str, args: tuple[Any, ...]) -> list[str]:
    place = args[1] if name == "__getitem__" and len(args) > 1 else ()
    return [str(index) for index in (place if isinstance(place, tuple) else (place,)) if not isinstance(index, Tensor)]


def _backward(
    tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = ()
) -> None:
    """Run ``Tensor.backward`` under another name: by its own, a mode would be called again and again."""
    first = torch.ones_like(tensor) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    _engine_run_backward((tensor,), (first,), keep, create_graph, inputs, allow_unreachable=True, accumulate_grad=True)


def _seed(number: int) -> None:
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def _narrow(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], drawn: Tensor, *, by_entry: bool
) -> Tensor:
    """Draw random numbers for one place alone, or for one place of each entry of the first axis.

    Returns:
        A tensor with the axes of ``drawn``, of length 1 (but for the first, with ``by_entry``) where the function
        allows it; else ``(1,)``.
    """
    places = tuple(slice(None) if axis == 0 and by_entry else slice(0, 1) for axis in range(drawn.ndim))
    if args and isinstance(args[0], Tensor) and args[0].shape == drawn.shape:
        return func(args[0][places].clone(), *args[1:], **kwargs)  # type: ignore[no-any-return]
    if func in (torch.rand, torch.randn):
        options = {name: value for name, value in kwargs.items() if name not in ("size", "out")}
        return func(drawn[places].shape, **options)
    return drawn.flatten()[:1].clone()


def alike_of(shapes: list[torch.Size], others: list[torch.Size]) -> dict[int, bool] | None:
    """Find the draws of two runs that differ in shape, and whether their first axis is the same.

    Returns:
        By number of each draw whose shapes differ, whether the first of several axes is the same; None if the runs have
        other numbers of draws or of axes.

    Example:
        >>> alike_of([torch.Size([4, 8]), torch.Size([4])], [torch.Size([4, 6]), torch.Size([4])])
        {0: True}
    """
    if [len(shape) for shape in shapes] != [len(shape) for shape in others]:
        return None
    pairs = enumerate(zip(shapes, others, strict=True))
    return {number: a[:1] == b[:1] and len(a) > 1 for number, (a, b) in pairs if a != b}
