"""Values computed from a layer's output in one call: which depend on it alone, and where its branches reunite.

The output is value 0. Each step makes another value, of earlier ones of the same graph and of constants. A value to
which everything before it leads, and nothing else, is where the chain may end: the last such one is the activation
point. Between two of them lies a link: one function, or several where an activation function is written out.

Whether a written-out activation function gives zero or positive values only, as ReLU does, is tried on a
range of values.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.hooks.chain_functions import ARITHMETIC, DETACHES, ELEMENTWISE, GET, SET, STEPS, Step
from lightning_neurons.hooks.neuron_positions import Place
from lightning_neurons.hooks.unseen_code import DATA, HIDDEN, PYTHON, SCRIPT, TRANSFORM
from lightning_neurons.isolation.tensors import map_tensors_in
from lightning_neurons.isolation.writes import share_memory
from lightning_neurons.layers.layer import Link
from lightning_neurons.layers.registry import LINKS, RECTIFIERS

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
            values = _run(steps, start, first, probe, axis)
    except (RuntimeError, TypeError, ValueError, IndexError):  # constants that do not fit one position
        return False
    if values.shape != probe.shape or not bool((values >= 0).all()):
        return False
    return bool(((values == 0).sum(0) >= _LEAST_ZEROS).all()) and bool((values > 0).any())


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

        def substitute(tensor: Tensor) -> Tensor:
            source = next(reads)  # noqa: B023 (called at once)
            return _in_one_place(tensor, first, probe, axis) if source is None else values[source]

        args, kwargs = map_tensors_in((tuple(step.args), dict(step.kwargs)), substitute)
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


@dataclass(eq=False)
class Value:
    """An output of a layer, or the result of a step after it.

    Attributes:
        tensor: The tensor.
        place: Where its neurons lie, and the stage of the chain.
        step: The call that made it; None for the layer's output.
        uses: The numbers of the values that are computed from it.
        outside: Names of functions that read it and are no steps.
        readers: The layers that read it, each with the number of its inputs that belong to one neuron.
        foreign: Whether a call reads it that is neither a layer nor leads to one.
        pooled: Names of activation functions that read it after a pooling function.
        torn: The functions, in words, that work on parts of it, or on it joined to others, and could not be followed.
        is_aside: Whether it is computed from detached values alone: ignored, unless the model goes on with it.
        is_entered: Whether a layer reads it.
        is_taken_out: Whether its numbers have been handed to code outside of torch.
    """

    tensor: Tensor
    place: Place
    step: Step | None = None
    uses: list[int] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    readers: dict[str, int] = field(default_factory=dict)
    foreign: bool = False
    pooled: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    is_aside: bool = False
    is_entered: bool = False
    is_taken_out: bool = False


class ValueGraph:
    """The values that are computed from one call of a layer.

    Args:
        output: The layer's output.
        axis: Axis of its neurons.
        depth: Number of autograd functions that were running.
        in_model: Whether a module around the layer was running.
    """

    def __init__(self, output: Tensor, axis: int, depth: int = 0, *, in_model: bool = True) -> None:
        self.depth, self.in_model = depth, in_model
        self.values = [Value(output, Place(axis))]

    def add(self, tensor: Tensor, place: Place, step: Step) -> Value:
        """Add the value that a step makes.

        Returns:
            The value, which the values that the step reads now have among their uses.
        """
        is_aside = step.function in DETACHES or all(self.values[number].is_aside for number in step.values)
        made = Value(tensor, place, step, is_aside=is_aside)
        for number in set(step.values):
            self.values[number].uses.append(len(self.values))
        self.values.append(made)
        return made

    def take_out(self, number: int) -> None:
        """Record that the numbers of a value, detached or not, have left torch."""
        value = self.values[number]
        value.is_taken_out = True
        for read in value.step.values if value.step is not None and value.is_aside else ():
            self.take_out(read)

    def keep_before_write(self, target: Tensor, *, is_aside: bool) -> None:
        """Copy the values that a call is about to overwrite, perhaps through a detached one."""
        for value in self.values:
            if share_memory(value.tensor, target):
                value.tensor = value.tensor.clone()
                if is_aside and not value.is_aside:
                    value.outside.append(DATA)

    def points(self) -> Iterator[int]:
        """Yield the values where the chain may end, from the layer's output on."""
        reach, counts = 0, self._of_account()
        for number, value in enumerate(self.values):
            if not counts[number]:
                continue
            if reach <= number and self._may_end(number):
                yield number
            uses = [use for use in value.uses if counts[use]]
            if not uses or (value.outside and not value.is_aside):
                return
            reach = max(reach, *uses)

    def uses(self, number: int) -> list[int]:
        """Return the values that are computed from a value, and that the model goes on with."""
        counts = self._of_account()
        return [use for use in self.values[number].uses if counts[use]]

    def _of_account(self) -> list[bool]:
        """Return for each value whether the model goes on with it, and not only logging, which reads detached ones."""
        counts = [not value.is_aside or value.is_entered for value in self.values]
        for number in reversed(range(len(counts))):
            step = self.values[number].step
            for read in step.values if step is not None and counts[number] else ():
                counts[read] = True
        return counts

    def _may_end(self, number: int) -> bool:
        """Return whether samples and neurons lie in their places; a mere change of layout after that does not count."""
        value = self.values[number]
        if value.place.axis is None or not value.tensor.is_floating_point():
            return False
        if _lies_first(value) and not _lies_first(self.values[0]):
            return False  # that is where samples lie
        return not (value.step is not None and value.step.is_move and self._may_end(self._before_moves(number)))

    def _before_moves(self, number: int) -> int:
        """Return the value before all changes of layout that end in this one."""
        step = self.values[number].step
        return self._before_moves(step.values[0]) if step is not None and step.is_move else number

    def goes_on_alone(self, number: int) -> bool:
        """Return whether nothing has read a value yet, and all values before lead to it."""
        value = self.values[number]
        return not value.uses and not value.outside and number in self.points()

    def end(self, axis: int | None = None) -> Value:
        """Return the value at the activation point; with ``axis``, the last that has its neurons on that axis."""
        return self.values[self._ends(axis)[-1]]

    def _ends(self, axis: int | None) -> list[int]:
        points = [0, *(p for p in self.points() if p)]
        while axis is not None and self.values[points[-1]].place.axis != axis:
            points.pop()
        return points

    def chain(self, axis: int | None = None) -> tuple[Link, ...]:
        """Return the links up to the activation point; see ``end``."""
        points = self._ends(axis)
        return tuple(self._link(first, last) for first, last in pairwise(points))

    def _link(self, first: int, last: int) -> Link:
        by_number = self._steps(first, last)
        steps, number_of = list(by_number.values()), {number: i for i, number in enumerate((first, *by_number))}
        parts = [step for step in steps if not step.is_move]
        kinds = {step.kind for step in parts}
        modules = {step.module for step in parts}
        return Link(
            kind=kinds.pop() if len(kinds) == 1 else "activation",
            function=_name(parts),
            module=modules.pop() if len(modules) == 1 else None,
            rectified=self._rectified(last),
            steps=tuple((s.name, tuple(number_of[number] for number in s.values)) for s in steps),
        )

    def _steps(self, first: int, last: int) -> dict[int, Step]:
        """Return the steps between two values, by the number of the value that each makes."""
        counts = self._of_account()
        numbered = [(number, self.values[number].step) for number in range(first + 1, last + 1) if counts[number]]
        return {number: step for number, step in numbered if step is not None}

    def _rectified(self, last: int) -> bool:
        """Return whether a value is known to be zero or positive, and exactly zero where the neuron is silent."""
        end, made = self.values[last], self.values[self._before_moves(last)]
        if made.step is not None and made.step.title in RECTIFIERS:
            return True
        start = max((p for p in self.points() if p <= last and self.values[p].place.stage < 2), default=0)
        steps = self._steps(start, last)
        first, axis = self.values[start].tensor, self.values[start].place.axis
        return end.place.stage == 2 and axis is not None and rectifies(steps, start, first, axis, end.tensor)

    def note(self, axis: int | None = None) -> str:
        """Return a warning if values are changed after the activation point in ways that were not followed; else ""."""
        end = self._ends(axis)[-1]
        value = self.values[end]
        following = self._functions_behind(end)
        for name in (HIDDEN, SCRIPT, TRANSFORM, DATA):
            if name in value.outside:
                return f"its values go on to {name}, which cannot be looked into"
        if value.is_taken_out and not value.is_entered:
            return f"its values go on to {PYTHON}, which cannot be looked into"
        if following and (value.outside or len(self.uses(end)) > 1):
            return f"its values go to {_listed([*following, *value.outside])}, which do not reunite"
        if following:
            lost = [name for later in self.values[end + 1 :] for name in later.outside]
            rest = f", and then to {_listed(lost)}" if lost else ""
            return f"its values go on to {_listed(following)}{rest}, behind which they could not be followed"
        torn = [words for later in self.values[end:] for words in later.torn]
        if torn:
            return f"its values go on to {torn[0]}, where they could not be followed"
        if value.pooled:
            return f"its values are pooled before they go to {_listed(value.pooled)}"
        return ""

    def _functions_behind(self, end: int) -> list[str]:
        """Return the first functions that compute on a value, after any change of layout."""
        names = []
        for number in self.uses(end):
            step = self.values[number].step
            assert step is not None, "only the output has none"
            names += self._functions_behind(number) if step.is_move else [step.title]
        return names


def common_axis(calls: Sequence[ValueGraph]) -> int | None:
    """Return None if the neurons lie on one axis at the ends of all calls; else the axis of the layer's output."""
    axes = {graph.end().place.axis for graph in calls}
    return calls[0].values[0].place.axis if len(axes) > 1 else None


def _lies_first(value: Value) -> bool:
    return value.place.axis is not None and value.place.axis % max(1, value.tensor.ndim) == 0


def _name(parts: Sequence[Step]) -> str:
    """Return a short name: ``"mul(sigmoid)"`` for ``x * sigmoid(1.702 * x)``."""
    last, inner = parts[-1].title, list(dict.fromkeys(step.title for step in parts[:-1]))
    telling = [name for name in inner if name not in ARITHMETIC] or inner
    return f"{last}({', '.join(telling)})" if telling else last


def _listed(names: Sequence[str]) -> str:
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} and {last}" if others else last
