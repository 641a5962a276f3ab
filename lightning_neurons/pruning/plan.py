"""A plan of the neurons to remove, and why: a plain value that can be looked at, saved, changed and applied."""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from lightning_neurons.errors import ArgumentError, UnknownNameError, check_choice, is_number
from lightning_neurons.pruning.structure.norm_streams import NormStreams
from lightning_neurons.results.whole_file import read_text, write_whole

_AS_SAVED = "a plan as PruningPlan.save wrote it"
FORMAT, VERSION = "lightning_neurons pruning plan", 1
_DIGITS = 19  # of the largest whole number that a tensor can hold


@dataclass(frozen=True)
class PlanCost:
    """Parameters and MACs per sample, before a cut and after it."""

    parameters: int
    macs: int
    parameters_after: int
    macs_after: int


@dataclass(frozen=True)
class PruningPlan:
    """A plan of the neurons to remove. Indices are those of the original model, also after several rounds.

    Attributes:
        neurons: By layer, the neurons to remove, sorted.
        widths: By layer, the number of neurons of the original model; empty if the plan was written by hand.
        reasons: By layer and neuron, the reason in words.
        cost: Costs before and after the cut, or None if it was written by hand.
        notes: Reasons why nothing, or less than asked, is removed.
        norm_streams: ``"renormalize"`` if norm layers take their statistics over fewer neurons without these, so that
            the cut is not exact.
        attributes: Whole numbers in modules' own attributes that follow, such as ``"attention.num_heads"``, each before
            and after the cut.

    Example:
        >>> plan = PruningPlan.from_indices({"net.conv1": [3, 0]})
        >>> plan.neurons, len(plan)
        ({'net.conv1': (0, 3)}, 2)
    """

    neurons: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    cost: PlanCost | None = None
    notes: tuple[str, ...] = ()
    norm_streams: NormStreams = "refuse"
    attributes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def from_indices(cls, neurons: Mapping[str, Iterable[int]]) -> "PruningPlan":
        """Make a plan by hand: by layer, the neurons to remove.

        Returns:
            A plan without scores or reasons; what is coupled with its neurons is removed too when it is applied.

        Raises:
            ArgumentError: If it is not a mapping of layers to whole numbers, or a number is negative or comes twice.
        """
        if not isinstance(neurons, Mapping):
            raise ArgumentError.of("neurons", neurons, 'a mapping of layers to neurons, such as {"net.conv1": [0, 3]}')
        return cls({str(layer): indices for layer, indices in neurons.items()})  # type: ignore[misc]

    def __post_init__(self) -> None:
        checked = {layer: _checked(layer, indices) for layer, indices in self.neurons.items()}
        object.__setattr__(self, "neurons", checked)

    def __len__(self) -> int:
        return sum(map(len, self.neurons.values()))

    def __bool__(self) -> bool:
        return len(self) > 0

    def remaining(self, layer: str) -> list[int]:
        """Return the original indices of the neurons of a layer that stay.

        Raises:
            UnknownNameError: If the plan does not know the layer's width.
        """
        if layer not in self.widths:
            raise UnknownNameError.among("layer", layer, self.widths)
        gone = set(self.neurons.get(layer, ()))
        return [i for i in range(self.widths[layer]) if i not in gone]

    def then(self, later: "PruningPlan") -> "PruningPlan":
        """Join this plan and another one that was made for the model that this one leaves.

        Args:
            later: Its indices are those of the model after this plan.

        Returns:
            A plan in the indices of the model that this plan is for.

        Example:
            >>> first = PruningPlan({"fc": (0,)}, widths={"fc": 4})
            >>> first.then(PruningPlan({"fc": (0, 2)}, widths={"fc": 3})).neurons
            {'fc': (0, 1, 3)}
        """
        lifted = later.lifted(self)
        layers = [*self.neurons, *(layer for layer in lifted.neurons if layer not in self.neurons)]
        both = {n: tuple(sorted({*self.neurons.get(n, ()), *lifted.neurons.get(n, ())})) for n in layers}
        reasons = {n: {**self.reasons.get(n, {}), **lifted.reasons.get(n, {})} for n in layers}
        cost = None if self else later.cost
        if self.cost is not None and later.cost is not None:
            cost = replace(later.cost, parameters=self.cost.parameters, macs=self.cost.macs)
        norms = self.norm_streams if later.norm_streams == "refuse" else later.norm_streams
        attributes = {**self.attributes, **lifted.attributes}
        notes = (*self.notes, *later.notes)
        return PruningPlan(both, self.widths or later.widths, reasons, cost, notes, norms, attributes)

    def lifted(self, before: "PruningPlan") -> "PruningPlan":
        """Translate this plan for the model that ``before`` leaves to the indices that ``before`` has.

        Returns:
            A plan of the same neurons for the model as it was before ``before`` was applied.

        Raises:
            ArgumentError: If the plan does not fit the model that ``before`` leaves.
        """
        moved = _moved(self, before, _lift)
        for layer, neurons in moved.neurons.items():
            width = before.widths.get(layer)
            if width is not None and neurons and neurons[-1] >= width:
                left = width - len(before.neurons.get(layer, ()))
                raise ArgumentError.of("plan", {layer: self.neurons[layer][-1]}, f"neurons of the {left} in {layer!r}")
        first = {name: pair[0] for name, pair in before.attributes.items()}
        attributes = {name: (first.get(name, was), now) for name, (was, now) in self.attributes.items()}
        return replace(moved, widths=before.widths or self.widths, attributes=attributes)

    def lowered(self, before: "PruningPlan") -> "PruningPlan":
        """Translate this plan to the model that ``before`` leaves.

        Returns:
            A plan of the same neurons in the indices of that model, without those that ``before`` has removed.
        """
        widths = before.widths or self.widths
        left = {n: width - len(before.neurons.get(n, ())) for n, width in widths.items()}
        last = {name: pair[1] for name, pair in before.attributes.items()}
        attributes = {name: (last.get(name, was), now) for name, (was, now) in self.attributes.items()}
        return replace(_moved(self, before, _lower), widths=left, attributes=attributes)

    def check(self, widths: Mapping[str, int]) -> None:
        """Check that the plan is one for a model.

        Args:
            widths: Neurons by layer of the model.

        Raises:
            ArgumentError: Naming the layer, what is wrong, and what the model has.
        """
        for layer, neurons in self.neurons.items():
            if layer not in widths:
                raise UnknownNameError.among("plan", layer, widths)
            planned = self.widths.get(layer, widths[layer])
            if planned != widths[layer]:
                raise ArgumentError(
                    f"plan: it was made for {planned} neurons in {layer!r}, and the model has {widths[layer]}. Was "
                    "it made for another model, or applied already?"
                )
            if neurons and neurons[-1] >= widths[layer]:
                allowed = f"neurons of 0 to {widths[layer] - 1} in {layer!r}"
                raise ArgumentError.of("plan", {layer: neurons[-1]}, allowed)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON and for checkpoints."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "neurons": {layer: list(neurons) for layer, neurons in self.neurons.items()},
            "widths": dict(self.widths),
            "reasons": {layer: {str(i): why for i, why in by.items()} for layer, by in self.reasons.items()},
            "cost": None if self.cost is None else dict(vars(self.cost)),
            "notes": list(self.notes),
            "norm_streams": self.norm_streams,
            "attributes": {name: list(pair) for name, pair in self.attributes.items()},
        }

    @classmethod
    def from_dict(cls, document: Any) -> "PruningPlan":
        """Make a plan of what ``to_dict`` returned.

        Returns:
            A plan equal to the one that was converted.

        Raises:
            ArgumentError: If it is no such thing, of a newer version, or contradicts itself.
        """
        return cls(**_fields(document))

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read what ``save`` wrote.

        Returns:
            A plan equal to the one that was saved.

        Raises:
            ArgumentError: If the file is no plan, of a newer version, or contradicts itself.
        """
        try:
            document = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ArgumentError.of("path", str(path), "a JSON file that PruningPlan.save wrote, whole") from error
        try:
            return cls.from_dict(document)
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from error


def _moved(plan: PruningPlan, before: PruningPlan, move: Callable[[int, Sequence[int]], int | None]) -> PruningPlan:
    """Translate a plan to other indices.

    Returns:
        A plan in the new indices, with its reasons; neurons without a new index are left out.
    """

    def of(layer: str, neurons: Iterable[int]) -> dict[int, int]:
        gone = before.neurons.get(layer, ())
        return {i: there for i in neurons if (there := move(i, gone)) is not None}

    return replace(
        plan,
        neurons={layer: tuple(of(layer, neurons).values()) for layer, neurons in plan.neurons.items()},
        reasons={n: {there: by[i] for i, there in of(n, by).items()} for n, by in plan.reasons.items()},
    )


def _lift(neuron: int, gone: Sequence[int]) -> int:
    """Return the index that a neuron had before others were removed; ``gone`` is sorted."""
    for earlier in gone:
        neuron += earlier <= neuron
    return neuron


def _lower(neuron: int, gone: Sequence[int]) -> int | None:
    """Return the index that a neuron has when others are removed, or None if it is removed itself."""
    return None if neuron in gone else neuron - bisect_left(gone, neuron)


def _checked(layer: str, indices: Any) -> tuple[int, ...]:
    allowed = "a list of whole numbers of at least 0, each of them once"
    indices = indices.tolist() if hasattr(indices, "tolist") else indices  # tensors and arrays
    if isinstance(indices, str | Mapping) or not isinstance(indices, Iterable):
        raise ArgumentError.of(f"neurons[{layer!r}]", indices, allowed)
    found = list(indices)
    wrong = [i for i in found if not is_number(i) or not hasattr(i, "__index__") or i < 0]
    wrong = wrong or [i for i, count in Counter(found).items() if count > 1]
    if wrong:
        raise ArgumentError.of(f"neurons[{layer!r}]", wrong[0], allowed)
    return tuple(sorted(map(int, found)))


def _fields(document: Any) -> dict[str, Any]:
    """Return the fields of a plan in a document.

    Args:
        document: The value of ``to_dict``, or a document written by hand.

    Returns:
        The arguments of ``PruningPlan``.

    Raises:
        ArgumentError: If the document is no plan, of a newer version, or contradicts itself.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT or not _is_map(document.get("neurons")):
        got = document if not isinstance(document, dict) else document.get("format")
        raise ArgumentError.of("plan", got, f"a document with format {FORMAT!r} and neurons by layer")
    if not is_number(document.get("version")) or not 1 <= document["version"] <= VERSION:
        raise ArgumentError.of("plan", f"version {document.get('version')!r}", f"version 1 to {VERSION}")
    neurons = {layer: _checked(layer, indices) for layer, indices in document["neurons"].items()}
    widths, reasons, cost = document.get("widths") or {}, document.get("reasons") or {}, document.get("cost")
    if not _is_map(widths) or not all(is_number(w) and isinstance(w, int) and w > 0 for w in widths.values()):
        raise ArgumentError.of("plan", widths, "widths that are positive whole numbers by layer")
    for layer, indices in neurons.items():
        if layer in widths and indices and indices[-1] >= widths[layer]:
            raise ArgumentError.of(
                "plan", {layer: indices[-1]}, f"neurons below the width {widths[layer]} in {layer!r}"
            )
    _check_reasons(reasons, neurons)
    if not (cost is None or (_is_map(cost) and all(is_number(n) and isinstance(n, int) for n in cost.values()))):
        raise ArgumentError.of("plan", cost, f"a cost of whole numbers, in {_AS_SAVED}")
    attributes = document.get("attributes") or {}
    if not _is_map(attributes) or not all(_is_pair(pair) for pair in attributes.values()):
        allowed = f"attributes with two whole numbers each, before and after the cut, in {_AS_SAVED}"
        raise ArgumentError.of("plan", attributes, allowed)
    if not isinstance(document.get("notes", []), list):
        raise ArgumentError.of("plan", document["notes"], f"a list of notes, in {_AS_SAVED}")
    try:
        return {
            "neurons": neurons,
            "widths": widths,
            "reasons": {layer: {int(i): str(why) for i, why in by.items()} for layer, by in reasons.items()},
            "cost": None if cost is None else PlanCost(**cost),
            "notes": tuple(map(str, document.get("notes", []))),
            "norm_streams": check_choice("norm_streams", document.get("norm_streams", "refuse"), get_args(NormStreams)),
            "attributes": {name: (pair[0], pair[1]) for name, pair in attributes.items()},
        }
    except TypeError as error:
        raise ArgumentError.of("plan", str(error), _AS_SAVED) from error


def _check_reasons(reasons: Any, neurons: Mapping[str, tuple[int, ...]]) -> None:
    by_layer: dict[str, Any] = reasons if _is_map(reasons) else {"": None}
    for layer, by in by_layer.items():
        if not _is_map(by) or not all(i.isdecimal() and len(i) < _DIGITS for i in by):
            raise ArgumentError.of("plan", reasons, f"reasons by layer and neuron, in {_AS_SAVED}")
        strange = [i for i in by if int(i) not in neurons.get(layer, ())]
        if strange:
            raise ArgumentError.of("plan", {layer: strange[0]}, "reasons for neurons that it removes")


def _is_pair(value: Any) -> bool:
    fits = isinstance(value, list | tuple) and len(value) == 2
    return fits and all(is_number(n) and isinstance(n, int) and n > 0 for n in value)


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
