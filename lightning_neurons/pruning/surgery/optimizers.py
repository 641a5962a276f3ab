"""Optimizers after a cut: those that can go on, and the part of their state that follows a parameter's shape."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.errors import ArgumentError, PruningError


def checked_optimizers(given: Any, model: nn.Module | None = None) -> list[torch.optim.Optimizer]:
    """Return the optimizers, unwrapped and checked.

    Args:
        given: None, one optimizer, or several.
        model: If given, each of them must hold one of its parameters.

    Returns:
        Each once, with those that they hold themselves.

    Raises:
        ArgumentError: If one is no optimizer, keeps its state in a form that cannot be cut, or is another model's.
    """
    several: Sequence[Any] = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    found = []
    for one in several:
        optimizer = getattr(one, "optimizer", one)  # Lightning's wrapper
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError.of("optimizer", type(one).__name__, "a torch.optim.Optimizer, or a list of them")
        for each in with_held([optimizer]):
            why = why_not(each)
            if why is not None:
                raise ArgumentError.of("optimizer", type(each).__name__, why)
        if model is not None:
            own = {id(p) for p in model.parameters()}
            if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                raise ArgumentError.of("optimizer", type(optimizer).__name__, "one that holds parameters of this model")
        found.append(optimizer)
    return with_held(found)


def with_held(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Return optimizers and those that they hold themselves, as SAM and Lookahead do, each once.

    Example:
        >>> import torch
        >>> outer, inner = (torch.optim.SGD([torch.zeros(2)], lr=0.1) for _ in range(2))
        >>> outer.base_optimizer = inner
        >>> with_held([outer]) == [outer, inner]
        True
    """
    found: list[torch.optim.Optimizer] = []
    todo = list(optimizers)
    while todo:
        one = todo.pop(0)
        if not any(one is other for other in found):
            found.append(one)
            todo += [held for held in _inside(vars(one)) if isinstance(held, torch.optim.Optimizer)]
    return found


def _inside(value: Any) -> Iterator[Any]:
    """Yield what lists, tuples and dicts hold."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _inside(one)
    else:
        yield value


def refuse_outside_state(optimizers: Sequence[torch.optim.Optimizer], cut: Iterable[Tensor]) -> None:
    """Refuse tensors that may belong to a parameter and that an optimizer keeps elsewhere than in its state.

    Args:
        optimizers: With those that they hold.
        cut: The parameters that are going to be cut, as they are.

    Raises:
        PruningError: Naming the optimizer and the attribute.
    """
    shapes = {one.shape for one in cut if one.numel() > 1}
    known = {id(one) for optimizer in optimizers for one in _inside([optimizer.state, optimizer.param_groups])}
    for optimizer in optimizers:
        for name, value in vars(optimizer).items():
            tensors = [one for one in _inside(value) if isinstance(one, Tensor) and id(one) not in known]
            if any(one.shape in shapes for one in tensors):
                raise PruningError(
                    f"{type(optimizer).__name__} keeps tensors in {name!r} that have the shape of a parameter, and "
                    "they would not become smaller with it: keep them in its state, one entry for each parameter"
                )


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """Return what to use instead of an optimizer that cannot go on after a cut, or None if it can."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return "an optimizer with a state for each parameter (AdamW, SGD, ...); LBFGS keeps one flat history of all"
    if hasattr(optimizer, "consolidate_state_dict"):
        return "an optimizer that is whole in each process; this one spreads its state over processes"
    return None


def is_large(value: Any) -> bool:
    """Return whether an entry of an optimizer's state has a shape that may follow the parameter's."""
    return isinstance(value, Tensor) and value.numel() > 1


def fits(value: Any, like: Tensor) -> bool:
    """Return whether a value is a number, has the parameter's shape, or is summed over axes, as in Adafactor."""
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, Number | str)
    same = value.ndim == like.ndim and all(a in (1, b) for a, b in zip(value.shape, like.shape, strict=True))
    return value.numel() == 1 or same


def foreign_entries(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """Return the names of entries that do not follow the shape of some parameter, as a matrix for each axis.

    With a square parameter, such a matrix has its shape by chance.
    """
    pairs = ((p, entry) for p, state in optimizer.state.items() if isinstance(p, Tensor) for entry in state.items())
    return frozenset(name for p, (name, value) in pairs if not fits(value, p))


def refill(state: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Replace the content of a dict in place."""
    state.clear()
    state.update(content)
