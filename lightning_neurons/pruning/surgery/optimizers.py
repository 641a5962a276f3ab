"""Which optimizers can go on after a cut, and what of their state follows a parameter's shape."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.errors import ArgumentError


def checked_optimizers(given: Any, model: nn.Module | None = None) -> list[torch.optim.Optimizer]:
    """The optimizers, unwrapped.

    Args:
        given: None, one optimizer, or several.
        model: If given, each of them must hold one of its parameters.

    Raises:
        ArgumentError: If one is no optimizer, keeps its state in a form that cannot be cut, or is another model's.
    """
    several: Sequence[Any] = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    found = []
    for one in several:
        optimizer = getattr(one, "optimizer", one)  # Lightning's wrapper
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError.of("optimizer", type(one).__name__, "a torch.optim.Optimizer, or a list of them")
        why = why_not(optimizer)
        if why is not None:
            raise ArgumentError.of("optimizer", type(optimizer).__name__, why)
        if model is not None:
            own = {id(p) for p in model.parameters()}
            if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                raise ArgumentError.of("optimizer", type(optimizer).__name__, "one that holds parameters of this model")
        found.append(optimizer)
    return found


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """What to use instead of an optimizer that cannot go on after a cut, or None if it can."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return "an optimizer with a state for each parameter (AdamW, SGD, ...); LBFGS keeps one flat history of all"
    if hasattr(optimizer, "consolidate_state_dict"):
        return "an optimizer that is whole in each process; this one spreads its state over processes"
    return None


def is_large(value: Any) -> bool:
    """Whether an entry of an optimizer's state has a shape that may follow the parameter's."""
    return isinstance(value, Tensor) and value.numel() > 1


def fits(value: Any, like: Tensor) -> bool:
    """A number; or element by element; or summed over some axes, as in Adafactor."""
    if not isinstance(value, Tensor):
        return not isinstance(value, list | tuple | dict)
    same = value.ndim == like.ndim and all(a in (1, b) for a, b in zip(value.shape, like.shape, strict=True))
    return value.numel() == 1 or same


def refill(state: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Give a dict other content; whoever holds it sees it."""
    state.clear()
    state.update(content)
