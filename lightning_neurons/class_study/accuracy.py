"""The accuracy of a model, class by class, with some of its neurons switched off."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lightning_neurons.errors import MeasurementError
from lightning_neurons.hooks.intervention import Edit, Replacement, Silence, edit_of
from lightning_neurons.hooks.output_layers import logits_in
from lightning_neurons.isolation.isolation import eager
from lightning_neurons.layers.layer import Layer
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.results.class_report import ClassAccuracy

Masks = Mapping[str, Bool[Tensor, " neuron"]]
"""By layer, True for the neurons that are on."""


class ClassAccuracies:
    """Counts of correct predictions; those of several processes add up.

    Args:
        model: The model, in evaluation mode.
        forward: Runs it on a batch.
        layers: The layers with their activation points.
        modules: Their modules.
        variants: Masks of the neurons that are on, for each variant of the model; an empty mapping is the whole model.
        classes: Number of classes.
        replacement: The activation of a neuron that is off: ``"zero"`` or ``"mean"``.
        means: Mean activations by layer, for ``"mean"``.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        layers: Mapping[str, Layer],
        modules: Mapping[str, nn.Module],
        variants: Sequence[Masks],
        classes: int,
        replacement: Replacement = "zero",
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._forward, self._layers, self._modules = model, forward, layers, modules
        self.right = torch.zeros(len(variants), classes, dtype=torch.int64)
        self._edits = [self._off(masks, replacement, means or {}) for masks in variants]

    def _off(self, masks: Masks, replacement: Replacement, means: Mapping[str, Tensor]) -> dict[str, Edit]:
        edits = {}
        for name, on in masks.items():
            off = (~on).nonzero().flatten()
            if len(off):
                device = next((p.device for p in self._modules[name].parameters()), torch.device("cpu"))
                edits[name] = edit_of(self._layers[name], off, replacement, device=device, means=means.get(name))
        return edits

    def add(self, batch: Any, targets: Int[Tensor, " batch"]) -> None:
        """Run a batch through every variant."""
        for row, edits in enumerate(self._edits):
            silence = Silence(self._layers, self._modules, edits)
            with torch.inference_mode(False), torch.no_grad(), eager(), silence:
                logits = checked_logits(self._forward(self._model, batch), targets)
            hits = targets[logits.argmax(1) == targets].cpu()
            self.right[row] += torch.bincount(hits, minlength=self.right.shape[1])


def checked_logits(output: Any, targets: Tensor) -> Tensor:
    """Return the logits in the output of a model, after a check of their shape.

    Raises:
        MeasurementError: If there are none of shape ``(batch, class)``, or a target is no class of them.
    """
    logits = logits_in(output)
    if logits is None or logits.ndim != 2 or len(logits) != len(targets):
        got = type(output).__name__ if logits is None else tuple(logits.shape)
        raise MeasurementError(f"the model returned {got}: a class study needs logits of shape (batch, class)")
    if len(targets) and int(targets.max()) >= logits.shape[1]:
        raise MeasurementError(f"a target is {int(targets.max())}, and the model has {logits.shape[1]} outputs")
    return logits


def require_finite(logits: Tensor) -> None:
    """Refuse logits of which some are NaN or infinite: the predicted class would not be defined.

    Raises:
        MeasurementError: If there are any.
    """
    bad = int((~logits.isfinite().all(1)).sum())
    if bad:
        raise MeasurementError(f"the model's outputs are not finite for {bad} of {len(logits)} samples of a batch")


def variants_of(
    members: Mapping[str, Tensor], draws: Sequence[Mapping[str, Tensor]], rows: Sequence[int]
) -> tuple[list[Masks], dict[str, list[list[int]]]]:
    """Return every different variant of the model once, and for each kind and class, the indices of its variants."""
    variants: list[Masks] = [{}]
    indices: dict[bytes, int] = {}

    def place(of: Mapping[str, Tensor], row: int, inside: bool) -> int:
        masks = {name: m[row] if inside else ~m[row] for name, m in of.items()}
        key = torch.cat(list(masks.values())).numpy().tobytes()
        if key not in indices:
            indices[key] = len(variants)
            variants.append(masks)
        return indices[key]

    places = {
        "whole": [[0] for _ in rows],
        "subnetwork": [[place(members, row, True)] for row in rows],
        "ablation": [[place(members, row, False)] for row in rows],
        "random subnetwork": [[place(draw, row, True) for draw in draws] for row in rows],
        "random ablation": [[place(draw, row, False) for draw in draws] for row in rows],
    }
    every = range(len(next(iter(members.values()))))
    own = {row: place(members, row, True) for row in every if any(m[row].any() for m in members.values())}
    places["other subnetworks"] = [[own[other] for other in own if other != row] for row in rows]
    return variants, places


def accuracy_rows(
    right: Tensor, counts: Tensor, classes: Sequence[int], places: Mapping[str, Sequence[Sequence[int]]]
) -> list[ClassAccuracy]:
    """Return the accuracies that follow from counts of correct predictions.

    Args:
        right: ``(variant, class)``: correct predictions by variant of the model and true class.
        counts: ``(class,)``: samples of each class.
        classes: The classes that are looked at.
        places: For each kind of model and class, the variants whose mean is taken; kinds without any are left out.

    Returns:
        One row for each class and kind of model; accuracies are shares of samples, from 0 to 1.
    """
    rows = []
    for row, klass in enumerate(classes):
        for kind, by_class in places.items():
            if by_class[row]:
                mine = right[list(by_class[row])].double().mean(0)
                own, others = mine[klass] / counts[klass], (mine.sum() - mine[klass]) / (counts.sum() - counts[klass])
                on_all = mine.sum() / counts.sum()
                each = right[list(by_class[row]), klass].double() / counts[klass]
                deviation = float(each.std()) if len(each) > 1 else math.nan
                mean = float(own + others) / 2
                rows.append(ClassAccuracy(kind, klass, float(on_all), float(own), float(others), mean, deviation))
    return rows
