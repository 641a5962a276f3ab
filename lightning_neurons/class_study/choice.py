"""The neurons that are important for a class, and sets of other neurons to compare them with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_neurons.criteria.ranking import select
from lightning_neurons.errors import ArgumentError, check_share, is_number


@dataclass(frozen=True)
class ClassRule:
    """A rule for the neurons of a layer that belong to a class; without any, the more important half does.

    Attributes:
        share: The most important share of each layer.
        threshold: Those whose importance is at least this.
        cumulative: The fewest that hold this share of the layer's importance for the class.

    Raises:
        ArgumentError: If more than one is given, or it is out of range.
    """

    share: float | None = None
    threshold: float | None = None
    cumulative: float | None = None

    def __post_init__(self) -> None:
        rules = {name: value for name, value in vars(self).items() if value is not None}
        if len(rules) > 1:
            raise ArgumentError.of("share, threshold, cumulative", rules, "at most one of them")
        for name in ("share", "cumulative"):
            if (value := getattr(self, name)) is not None and not 0 < check_share(name, value) < 1:
                raise ArgumentError.of(name, value, "a share between 0 and 1: all neurons are the whole network")
        if self.threshold is not None and (not is_number(self.threshold) or self.threshold != self.threshold):
            raise ArgumentError.of("threshold", self.threshold, "a number")

    def plain(self) -> dict[str, float]:
        """Return the rule as its name and value."""
        return {name: value for name, value in vars(self).items() if value is not None} or {"share": 0.5}

    def members(
        self, importance: Mapping[str, Float[Tensor, "klass neuron"]], classes: Sequence[int], asked: Sequence[int]
    ) -> dict[str, Bool[Tensor, "klass neuron"]]:
        """Return the neurons that belong to each class.

        Args:
            importance: By layer, that of each neuron for each class.
            classes: The classes of its rows, for messages.
            asked: The rows that have to have some neurons, and not all; others may be left without any.

        Returns:
            By layer, True where a neuron belongs to the class of the row.

        Raises:
            ArgumentError: If one of those would keep nothing or everything.
        """
        rule = self.plain()
        if "cumulative" in rule:  # what helps a class when it goes is not part of it
            importance = {name: scores.clamp_min(0) for name, scores in importance.items()}
        members = {
            name: torch.stack([select(row, **rule) for row in scores])  # type: ignore[arg-type]
            for name, scores in importance.items()
        }
        kept = torch.stack([m.sum(1) for m in members.values()]).sum(0)
        total = sum(m.shape[1] for m in members.values())
        for row, klass in enumerate(classes):
            if kept[row] in (0, total) and row in asked:
                scores = torch.cat([values[row] for values in importance.values()])
                low, high = float(scores.min()), float(scores.max())
                what = "nothing" if kept[row] == 0 else "everything"
                name, value = next(iter(rule.items()))
                allowed = f"one that keeps some of the neurons of class {klass}, whose importance is {low:.3g} to "
                raise ArgumentError.of(name, value, f"{allowed}{high:.3g}; this keeps {what}")
        return members


def random_members(
    members: Mapping[str, Bool[Tensor, "klass neuron"]], generator: torch.Generator
) -> dict[str, Bool[Tensor, "klass neuron"]]:
    """Draw as many neurons of each layer for each class at random.

    Returns:
        Masks of the same shapes; classes with the same number of neurons in every layer get the same ones.
    """
    drawn: dict[tuple[int, ...], dict[str, Tensor]] = {}
    sizes = torch.stack([m.sum(1) for m in members.values()], 1)
    rows = []
    for counts in (tuple(row) for row in sizes.tolist()):
        if counts not in drawn:
            drawn[counts] = {
                name: torch.zeros(m.shape[1], dtype=torch.bool).index_fill_(
                    0, torch.randperm(m.shape[1], generator=generator)[:count], True
                )
                for (name, m), count in zip(members.items(), counts, strict=True)
            }
        rows.append(drawn[counts])
    return {name: torch.stack([row[name] for row in rows]) for name in members}
