"""Rankings of neurons over several layers: neurons that are one entry, and neurons that are left out.

Channel ``i`` of every layer that writes into a residual stream can only be removed together, so those *twins* are one
entry, with the mean of their scores, as pruning scores them. Layers that make the model's output are left out.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_neurons.criteria.ranking import order
from lightning_neurons.layers.layer import Layer


class _Place(NamedTuple):
    layer: str
    neuron: int
    score: float


class RankedNeuron(_Place):
    """One place in a ranking: ``layer, neuron, score = place``.

    Attributes:
        layer: The layer's path; of twins, that of the first in the order of the model.
        neuron: Its index there, and in each of the ``twins``.
        score: By the criterion of the ranking; of twins, the mean.
        twins: The other layers of a residual stream whose neuron of the same index is part of this entry.
    """

    twins: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of the entry."""
        return (self.layer, *self.twins)

    @property
    def where(self) -> str:
        """The layers, as a text."""
        others = (f"{len(self.twins)} more",) if len(self.twins) > 2 else self.twins
        return " + ".join((self.layer, *others))


Entries = Mapping[tuple[str, ...], Float[Tensor, " neuron"]]
"""Scores by the layers that are one entry, neuron by neuron."""


def each_alone(scores: Mapping[str, Tensor]) -> Entries:
    """Return every layer as an entry of its own."""
    return {(name,): values for name, values in scores.items()}


def merged(scores: Mapping[str, Tensor], layers: Iterable[Layer], *, include_outputs: bool) -> Entries:
    """Return the entries of all layers together: twins as one, and no outputs unless there is nothing else.

    Args:
        scores: By layer.
        layers: The layers, with their twins and whether they make the output.
        include_outputs: Whether the layers that make the model's output are candidates.

    Returns:
        By group of layers, the scores ``(neuron,)``, of twins their mean.
    """
    by_name = {layer.name: layer for layer in layers}
    groups: dict[tuple[str, ...], Tensor] = {}
    for name, values in scores.items():
        twins = by_name[name].twins if name in by_name else ()
        stream = {name, *(other for other in twins if other in scores and scores[other].shape == values.shape)}
        group = tuple(other for other in scores if other in stream)
        groups.setdefault(group, torch.stack([scores[other] for other in group]).nanmean(0))
    outputs = {name for name, layer in by_name.items() if layer.output}
    candidates = {group: values for group, values in groups.items() if not outputs & {*group}}
    return groups if include_outputs or not candidates else candidates


def dead_in(entries: Entries, deadness: Mapping[str, Tensor]) -> Bool[Tensor, " neuron"]:
    """Return a mask of the neurons that never fire in any of their layers, over all entries one after the other."""
    parts = [torch.zeros(0, dtype=torch.bool)]
    for group, values in entries.items():
        silent = [deadness[name] == 1 for name in group if name in deadness]
        parts.append(torch.stack(silent).all(0) if silent else torch.zeros(len(values), dtype=torch.bool))
    return torch.cat(parts)


def best_first(scores: Float[Tensor, " neuron"], dead: Bool[Tensor, " neuron"]) -> Int[Tensor, " neuron"]:
    """Return indices from the most to the least important; of equal scores, those that fire first; NaN last.

    Example:
        >>> best_first(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([True, False, False])).tolist()
        [2, 1, 0]
    """
    alive_first = torch.sort(dead.int(), stable=True).indices
    return alive_first[order(scores[alive_first])]


def ranked(entries: Entries, deadness: Mapping[str, Tensor]) -> list[RankedNeuron]:
    """Return the neurons of all entries, from the most to the least important."""
    owners = [(group, i) for group, values in entries.items() for i in range(len(values))]
    scores = torch.cat([torch.zeros(0), *entries.values()])
    rows = []
    for place in best_first(scores, dead_in(entries, deadness)).tolist():
        group, neuron = owners[place]
        rows.append(RankedNeuron(group[0], neuron, float(scores[place])))
        rows[-1].twins = group[1:]
    return rows


def chosen(entries: Entries, mask: Bool[Tensor, " neuron"]) -> dict[str, list[int]]:
    """Look up the neurons that a mask over all entries, one after the other, selects.

    Returns:
        Sorted indices by layer; layers of one entry have the same ones.
    """
    parts = mask.split([len(values) for values in entries.values()])
    neurons = zip(entries, (part.nonzero().flatten().tolist() for part in parts), strict=True)
    return {name: list(indices) for group, indices in neurons for name in group}
