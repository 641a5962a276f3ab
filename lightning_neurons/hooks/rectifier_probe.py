"""Test of whether an activation function that is written out gives zero or positive values only, as ReLU does.

Its steps run again on a range of values, for every neuron.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.hooks.chain_functions import ELEMENTWISE, GET, SET, STEPS, Step
from lightning_neurons.isolation.tensors import map_tensors_in
from lightning_neurons.layers.registry import LINKS

_RANGE = torch.linspace(-8, 8, 161)
_LEAST_ZEROS = 3  # a square is zero at zero alone


def rectifies(steps: Mapping[int, Step], start: int, first: Tensor, axis: int, last: Tensor) -> bool:
    """Return whether steps make every value zero or positive, and exactly zero over some range, for each neuron.

    Args:
        steps: The steps, by the number of the value that each makes.
        start: The number of the value that they begin with.
        first: That value.
        axis: Axis of its neurons.
        last: The value that they end with.
    """
    axis %= first.ndim
    is_known = len(steps) == 1 and all(step.function in LINKS for step in steps.values())
    if is_known or axis == 0 or not _can_run_all(steps.values()) or not bool((last >= 0).all()):
        return False
    shape = [1] * first.ndim
    shape[axis] = first.shape[axis]
    probe = _RANGE.to(first).view(-1, *[1] * (first.ndim - 1)).expand(-1, *shape[1:])
    try:
        with torch.no_grad():
            found = _run(steps, start, first, probe, axis)
    except (RuntimeError, TypeError, ValueError, IndexError):  # constants that do not fit one position
        return False
    if found.shape != probe.shape or not bool((found >= 0).all()):
        return False
    return bool(((found == 0).sum(0) >= _LEAST_ZEROS).all()) and bool((found > 0).any())


def _can_run_all(steps: Iterable[Step]) -> bool:
    parts = [step for step in steps if not _is_passed_over(step)]
    if len(parts) < len(list(steps)):  # then constants would have to be laid out anew as well
        read = [(tensor, number) for s in parts for tensor, number in zip(s.operands(), s.reads, strict=True)]
        if any(number is None and tensor.ndim for tensor, number in read):
            return False
    return all(map(_can_run, parts))


def _is_passed_over(step: Step) -> bool:
    """Return whether a step only changes the layout, which does nothing to a value that is tested alone."""
    return step.is_move and step.function is not GET


def _can_run(step: Step) -> bool:
    drawn = LINKS.get(step.function) == "dropout" or STEPS[step.function] == "rrelu"
    return (step.function in ELEMENTWISE or step.function in (GET, SET)) and not drawn and "out" not in step.kwargs


def _run(steps: Mapping[int, Step], start: int, first: Tensor, probe: Tensor, axis: int) -> Tensor:
    values = {start: probe.clone()}
    for number, step in steps.items():
        if _is_passed_over(step):
            values[number] = values[step.values[0]].clone()
            continue
        reads = iter(step.reads)

        def given(tensor: Tensor) -> Tensor:
            source = next(reads)  # noqa: B023 (called at once)
            return _in_one_place(tensor, first, probe, axis) if source is None else values[source]

        args, kwargs = map_tensors_in((tuple(step.args), dict(step.kwargs)), given)
        made: Any = step.function(*args, **kwargs)
        values[number] = args[0] if made is None else made
    return values[max(steps)]


def _in_one_place(constant: Tensor, first: Tensor, probe: Tensor, axis: int) -> Tensor:
    """Return a constant for one position of each neuron; the other positions must have the same.

    Raises:
        ValueError: If they do not.
    """
    kept = constant
    for d in range(constant.ndim):
        if d + first.ndim - constant.ndim != axis:
            kept = kept.narrow(d, 0, min(1, kept.shape[d]))
    if not torch.equal(kept.expand_as(constant), constant):
        raise ValueError("depends on the position")
    return (kept.expand_as(probe) if constant.shape == first.shape else kept).clone()
