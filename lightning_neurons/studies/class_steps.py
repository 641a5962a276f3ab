"""The steps of a class study: importance by class, the choice of neurons, accuracies of what they make."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_neurons.criteria import CRITERIA
from lightning_neurons.criteria.activity import MAGNITUDE
from lightning_neurons.criteria.contract import Criterion, mean_over_values
from lightning_neurons.criteria.selectivity import class_selectivity
from lightning_neurons.errors import ArgumentError, MeasurementError
from lightning_neurons.network.layer import Layer, candidates, widths_of
from lightning_neurons.network.watch import WatchActivations
from lightning_neurons.results.class_report import ClassAccuracy, ClassReport
from lightning_neurons.studies.ablation import measure_batches
from lightning_neurons.studies.ablation_sums import AblationSums
from lightning_neurons.studies.activation_means import activation_means
from lightning_neurons.studies.class_accuracy import (
    ClassAccuracies,
    Forward,
    accuracy_rows,
    checked_logits,
    variants_of,
)
from lightning_neurons.studies.class_choice import ClassRule, random_members
from lightning_neurons.studies.losses import normal_tensors
from lightning_neurons.studies.measure import collect
from lightning_neurons.studies.measurement import Measurement
from lightning_neurons.studies.settings import MeasurementSettings
from lightning_neurons.studies.targets import targets_in
from lightning_neurons.studies.whatif import WhatIf

_MAGNITUDE = Criterion("magnitude", (MAGNITUDE,), lambda summary: mean_over_values(summary, MAGNITUDE))

SumProcesses = Callable[[Tensor], Tensor]


class ClassStudy:
    """One study; the model is isolated and in evaluation mode around ``run``.

    Args:
        model: The model.
        forward: From the model and a batch to logits.
        settings: What was asked for, checked.
        rule: Which neurons are a class's own.
        processes: How many processes take part, each with its own batches.
        add_up: Adds a tensor up over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        settings: Mapping[str, Any],
        rule: ClassRule,
        *,
        processes: int = 1,
        add_up: SumProcesses = lambda tensor: tensor,
    ) -> None:
        self.model, self.forward, self.settings, self.rule = model, forward, settings, rule
        self._processes, self._add_up = processes, add_up
        self._engine = WhatIf(model, self._losses)

    def _losses(self, model: Any, batch: Any) -> Tensor:
        targets = targets_in(batch, True)
        return nn.functional.cross_entropy(
            checked_logits(self.forward(model, batch), targets), targets, reduction="none"
        )

    def run(self, batches: Sequence[Any], *, progress: bool = False) -> ClassReport:
        """Find neurons and measure what they make."""
        counts = self._counts(batches)
        classes = self._classes(counts)
        layers = self._studied(batches[0])
        importance, magnitude = self._importance(batches, classes, list(layers), progress)
        members = self.rule.members(importance, classes)
        accuracies = self._accuracies(batches, members, classes, counts, progress)
        selectivity = {name: class_selectivity(values) for name, values in magnitude.items()}
        return ClassReport(
            classes=tuple(classes),
            class_counts=tuple(int(counts[k]) for k in classes),
            importance=importance,
            members=members,
            selectivity=selectivity,
            accuracies=tuple(accuracies),
            settings={**self.settings, "layers": list(layers), "classes": list(classes), **self.rule.plain()},
            notes=self._notes(members, classes),
        )

    def check(self, batch: Any) -> None:
        """Make sure that the model makes logits of a batch, and that the batch shows its targets.

        Raises:
            MeasurementError: Otherwise.
        """
        self._logits(batch)

    def _counts(self, batches: Sequence[Any]) -> Tensor:
        """How many samples each class has, in all processes."""
        targets = torch.cat([targets_in(batch, True).cpu() for batch in batches])
        outputs = self._logits(batches[0]).shape[1]
        if len(targets) and int(targets.max()) >= outputs:
            raise MeasurementError(f"a target is {int(targets.max())}, and the model has {outputs} outputs")
        return self._add_up(torch.bincount(targets, minlength=outputs))

    def _logits(self, batch: Any) -> Tensor:
        batch = normal_tensors(batch)
        return checked_logits(self.forward(self.model, batch), targets_in(batch, True))

    def _classes(self, counts: Tensor) -> list[int]:
        there = counts.nonzero().flatten().tolist()
        chosen = self.settings["classes"]
        for klass in chosen or ():
            if klass not in there:
                known = f"classes that have samples: {', '.join(map(str, there))}"
                raise ArgumentError.of("classes", klass, known)
        found = list(there if chosen is None else chosen)
        if len(there) < 2:
            raise ArgumentError.of("batches", f"samples of class {there} alone", "samples of two classes or more")
        return found

    def _studied(self, batch: Any) -> dict[str, Layer]:
        """The layers that take part: those that run, without the one that makes the logits."""
        engine = self._engine
        engine.look(batch)
        arrivals: list[str] = []
        modules = {name: engine.modules[name] for name in engine.layers}
        with WatchActivations(engine.layers, modules, lambda name, value: arrivals.append(name)):
            logits = self._logits(batch)
        if not arrivals:
            got = type(self.model).__name__
            raise ArgumentError.of("model", got, "a model with convolutional or linear layers, or see register_layer")
        last = arrivals[-1]
        is_output = engine.layers[last].neurons == logits.shape[1]
        from_patterns = candidates(self.model, self.settings["layers"])
        present = {name: layer for name, layer in engine.layers.items() if name in from_patterns}
        found = {name: layer for name, layer in present.items() if not (is_output and name == last)}
        if not found:
            allowed = (
                f"patterns of layers that run before the logits: {', '.join(n for n in engine.layers if n != last)}"
            )
            raise ArgumentError.of("layers", self.settings["layers"], allowed)
        return found

    def _importance(
        self, batches: Sequence[Any], classes: Sequence[int], layers: Sequence[str], progress: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By layer, ``(class, neuron)``: importance, and mean magnitude of activations."""
        name = self.settings["importance"]
        masking = self.settings["method"] == "masking"
        criteria = [_MAGNITUDE] if masking else [CRITERIA[name], _MAGNITUDE]
        settings = MeasurementSettings.checked(
            criteria=criteria, layers=list(layers), per_class=True, threshold=0.01, relative_threshold=True,
            normalize="none", inputs="clean", eps=0.0, loss_reduction="none",
        )  # fmt: skip
        device = next((p.device for p in self.model.parameters()), None)
        measurement = Measurement(self.model, settings.criteria, layers=settings.layers, per_class=True, device=device)
        collect(measurement, batches, settings, self._losses, self.forward)
        measurement.merge_processes(self._processes)
        found = measurement.report(settings={}).per_class
        magnitude = {n: found[_MAGNITUDE.name][n][list(classes)] for n in layers}
        if not masking:
            return {n: found[name][n][list(classes)] for n in layers}, magnitude
        sums = AblationSums({n: range(self._engine.layers[n].neurons) for n in layers}, widths_of(self.model), {})
        with self._engine.open():
            measure_batches(self._engine, batches, sums, targets=partial(targets_in, per_class=True), progress=progress)
        sums.merge_processes(self._processes)
        changes = sums.report(settings={}).per_class
        return {n: changes[n][list(classes)] for n in layers}, magnitude

    def _accuracies(
        self,
        batches: Sequence[Any],
        members: Mapping[str, Tensor],
        classes: Sequence[int],
        counts: Tensor,
        progress: bool,
    ) -> list[ClassAccuracy]:
        """Run every variant of the model on every batch."""
        generator = torch.Generator().manual_seed(self.settings["seed"])
        draws = [random_members(members, generator) for _ in range(self.settings["controls"])]
        variants, places = variants_of(members, draws, len(classes))
        engine, means = self._engine, None
        if self.settings["replacement"] == "mean":
            means = activation_means(self.model, engine.layers, engine.modules, batches, self.forward, self._add_up)
        found = ClassAccuracies(
            self.model, self.forward, engine.layers, engine.modules, variants, len(counts),
            self.settings["replacement"], means,
        )  # fmt: skip
        for batch in tqdm(batches, desc="accuracies", disable=not progress):
            for part in engine.parts(normal_tensors(batch)):
                found.add(part, targets_in(part, True))
        return accuracy_rows(self._add_up(found.right), counts, classes, places)

    def _notes(self, members: Mapping[str, Tensor], classes: Sequence[int]) -> tuple[str, ...]:
        empty = [
            f"class {klass} keeps no neuron of {name}"
            for name, m in members.items()
            for klass, kept in zip(classes, m.sum(1).tolist(), strict=True)
            if not kept
        ]
        return (*empty, "selectivity describes which classes excite a neuron; it is not importance")
