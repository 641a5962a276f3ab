"""Result of a class study: the neurons that serve each class."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_neurons.criteria.selectivity import reuse, shared_by
from lightning_neurons.errors import ArgumentError
from lightning_neurons.results.typed import plain
from lightning_neurons.results.whole_file import write_whole


class ClassAccuracy(NamedTuple):
    """The accuracy of one model, with respect to one class.

    Attributes:
        model: ``"whole"``; ``"subnetwork"``: only the class's neurons; ``"ablation"``: all but those;
            ``"random subnetwork"`` and ``"random ablation"``: the same with as many neurons drawn at random (means over
            draws); ``"other subnetworks"``: those of the other classes (means).
        klass: The class.
        on_all: Accuracy on all samples.
        on_class: On the samples of the class.
        on_others: On all other samples.
        balanced: Mean of the last two.
        deviation: Standard deviation of ``on_class`` over what the figures are means of; NaN for a single network.
    """

    model: str
    klass: int
    on_all: float
    on_class: float
    on_others: float
    balanced: float
    deviation: float = math.nan


@dataclass(frozen=True)
class ClassReport:
    """Neurons by class, and the accuracy of their sub-networks.

    Attributes:
        classes: The classes that were studied.
        class_counts: Number of samples of each of them.
        importance: By layer, ``(class, neuron)``: mean activation, another score, or the measured change of the class's
            loss without the neuron.
        members: By layer, ``(class, neuron)``: whether the neuron belongs to the class's sub-network.
        selectivity: By layer, ``(neuron,)``: the class selectivity index of mean magnitudes of activations. It
            describes; it is not importance. Over all classes that have samples.
        accuracies: Each model, with respect to each class.
        settings: The settings of the study.
        notes: Notes on the data and the limits of the numbers.
        entropy: By layer, ``(neuron,)``: the entropy of its importance over all those classes, in [0, 1]; 0 serves one.
    """

    classes: tuple[int, ...]
    class_counts: tuple[int, ...]
    importance: Mapping[str, Float[Tensor, "klass neuron"]]
    members: Mapping[str, Bool[Tensor, "klass neuron"]]
    selectivity: Mapping[str, Float[Tensor, " neuron"]]
    accuracies: tuple[ClassAccuracy, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    entropy: Mapping[str, Float[Tensor, " neuron"]] = field(default_factory=dict)

    @property
    def jaccard(self) -> Float[Tensor, "klass klass"]:
        """Overlap of the classes' neurons: size of the intersection over that of the union."""
        return reuse(self.members)[0]

    @property
    def jaccard_chance(self) -> Float[Tensor, "klass klass"]:
        """The overlap of random sets of the same sizes; ``jaccard`` minus this is 0 where classes share by chance."""
        return reuse(self.members)[1]

    @property
    def shared_by(self) -> Int[Tensor, " count"]:
        """The number of neurons that belong to 0, 1, 2, ... classes."""
        return shared_by(self.members)

    def subnetwork(self, classes: int | Sequence[int]) -> dict[str, list[int]]:
        """Return the neurons of a class, or of any of several, by layer.

        Raises:
            ArgumentError: If a class was not studied.
        """
        numbers = classes.tolist() if hasattr(classes, "tolist") else classes
        rows = [self.row(k) for k in (numbers if isinstance(numbers, Sequence) else [numbers])]
        if not rows:
            raise ArgumentError.of("classes", classes, "at least one class")
        return {name: m[rows].any(0).nonzero().flatten().tolist() for name, m in self.members.items()}

    def outside(self, classes: int | Sequence[int]) -> dict[str, list[int]]:
        """Return the neurons of the studied layers that belong to none of the classes, by layer."""
        inside = self.subnetwork(classes)
        return {name: sorted({*range(m.shape[1])} - {*inside[name]}) for name, m in self.members.items()}

    def row(self, klass: int) -> int:
        """Return the row of a class in ``importance`` and ``members``.

        Raises:
            ArgumentError: If it was not studied.
        """
        if isinstance(klass, bool) or klass not in self.classes:
            raise ArgumentError.of("classes", klass, f"classes that were studied: {', '.join(map(str, self.classes))}")
        return self.classes.index(klass)

    def accuracy(self, model: str, klass: int) -> ClassAccuracy:
        """Return one row of ``accuracies``.

        Raises:
            ArgumentError: If there is none.
        """
        rows = [row for row in self.accuracies if row.model == model and row.klass == klass]
        if not rows:
            models = ", ".join(repr(name) for name in dict.fromkeys(row.model for row in self.accuracies))
            raise ArgumentError.of("model, klass", (model, klass), f"one of {models} and a class that was studied")
        return rows[0]

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all; NaN becomes null."""
        document = {
            "format": "lightning_neurons classes",
            "version": 1,
            "classes": self.classes,
            "class_counts": self.class_counts,
            "accuracies": [row._asdict() for row in self.accuracies],
            "jaccard": self.jaccard,
            "jaccard_chance": self.jaccard_chance,
            "shared_by": self.shared_by,
            "subnetworks": {str(k): self.subnetwork(k) for k in self.classes},
            "importance": self.importance,
            "selectivity": self.selectivity,
            "entropy": self.entropy,
            "settings": self.settings,
            "notes": self.notes,
        }
        write_whole(path, json.dumps(plain(document), allow_nan=False))
