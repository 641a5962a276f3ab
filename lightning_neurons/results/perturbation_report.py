"""Result of a perturbation study: the loss with shifted weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_neurons.results.plain import plain
from lightning_neurons.results.whole_file import write_whole


class Perturbed(NamedTuple):
    """The loss with one parameter, or one neuron's part of it, shifted.

    Attributes:
        name: The parameter; of one neuron, with its index, such as ``"conv1.weight[3]"``.
        loss: Mean loss while its weights were shifted.
        delta_loss: The same minus the mean loss of the unchanged model.
        neuron: The neuron's index, or None for the whole parameter.
    """

    name: str
    loss: float
    delta_loss: float
    neuron: int | None = None


@dataclass(frozen=True)
class PerturbationReport:
    """The loss under each perturbation, in the order of the model.

    Attributes:
        loss: Mean loss of the unchanged model.
        samples: Number of samples it was measured on.
        rows: One for each perturbation.
        settings: The settings of the study.
        notes: Notes on the data and the limits of the numbers.

    Example:
        >>> rows = (Perturbed("a.weight", 1.5, 0.5), Perturbed("b.weight", math.nan, math.nan))
        >>> [row.name for row in PerturbationReport(1.0, 8, rows[::-1], {}, ()).ranking()]
        ['a.weight', 'b.weight']
    """

    loss: float
    samples: int
    rows: tuple[Perturbed, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def ranking(self) -> list[Perturbed]:
        """Rank rows from the highest to the lowest loss; ties keep the model's order, NaN and infinity come last."""
        return sorted(self.rows, key=lambda row: -row.loss if math.isfinite(row.loss) else math.inf)

    def save(self, path: str | Path) -> None:
        """Write the ranking as JSON, whole or not at all; NaN becomes null, infinity a word."""
        document = {
            "format": "lightning_neurons perturbation",
            "version": 1,
            "loss": self.loss,
            "samples": self.samples,
            "settings": self.settings,
            "notes": list(self.notes),
            "ranking": [row._asdict() for row in self.ranking()],
        }
        write_whole(path, json.dumps(plain(document), allow_nan=False, indent=1))
