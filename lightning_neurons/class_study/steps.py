"""The steps of a class study: importance by class, the choice of neurons, accuracies of what they make."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_neurons.ablation.ablate import measure_batches
from lightning_neurons.ablation.engine import AblationEngine, activation_means
from lightning_neurons.ablation.sums import AblationSums
from lightning_neurons.class_study.accuracy import (
    ClassAccuracies,
    accuracy_rows,
    checked_logits,
    require_finite,
    variants_of,
)
from lightning_neurons.class_study.choice import ClassRule, random_members
from lightning_neurons.criteria import CRITERIA
from lightning_neurons.criteria.activity import MAGNITUDE
from lightning_neurons.criteria.contract import Criterion, mean_over_values
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.selectivity import class_entropy, class_selectivity
from lightning_neurons.data.batches import targets_in
from lightning_neurons.errors import ArgumentError, MeasurementError
from lightning_neurons.hooks.output_layers import Origins
from lightning_neurons.layers.layer import Layer, candidates, widths_of
from lightning_neurons.measurement.losses import normal_tensors
from lightning_neurons.measurement.measure import collect
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.results.class_report import ClassAccuracy, ClassReport

_MAGNITUDE = Criterion("magnitude", (MAGNITUDE,), lambda summary: mean_over_values(summary, MAGNITUDE))

SumProcesses = Callable[[Tensor], Tensor]


class ClassStudy:
    """A class study; the model is isolated and in evaluation mode around ``run``.

    Args:
        model: The model.
        forward: Returns the logits of the model on a batch.
        settings: The checked settings.
        rule: The rule for the neurons that belong to a class.
        processes: Number of processes, each with its own batches.
        add_up: Sums a tensor over processes.
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
        self._engine = AblationEngine(model, self._losses, loss_reduction="none", replacement=settings["replacement"])

    def _losses(self, model: Any, batch: Any) -> Tensor:
        targets = targets_in(batch, True)
        return nn.functional.cross_entropy(
            checked_logits(self.forward(model, batch), targets), targets, reduction="none"
        )

    def run(self, batches: Sequence[Any], *, progress: bool = False) -> ClassReport:
        """Find the neurons of all classes that have samples, and run the sub-networks of those asked for.

        Returns:
            Importance, members and selectivity of neurons by layer and class, and the accuracy of each variant of the
            model.
        """
        counts = self._counts(batches)
        there = counts.nonzero().flatten().tolist()
        chosen = self._chosen(there)
        layers = self._studied(batches[0])
        for batch in batches:
            for part in self._engine.parts(batch):
                require_finite(self._logits(part))
        importance, magnitude = self._importance(batches, there, list(layers), progress)
        rows = [there.index(klass) for klass in chosen]
        members = self.rule.members(importance, there, rows)
        accuracies = self._accuracies(batches, members, there, chosen, counts, progress)
        return ClassReport(
            classes=tuple(chosen),
            class_counts=tuple(int(counts[k]) for k in chosen),
            importance={name: scores[rows] for name, scores in importance.items()},
            members={name: m[rows] for name, m in members.items()},
            selectivity={name: class_selectivity(values) for name, values in magnitude.items()},
            entropy={name: class_entropy(scores) for name, scores in importance.items()},
            accuracies=tuple(accuracies),
            settings={**self.settings, "layers": list(layers), "classes": chosen, **self.rule.plain()},
            notes=self._notes({name: m[rows] for name, m in members.items()}, chosen),
        )

    def check(self, batch: Any) -> None:
        """Check that the model returns logits for a batch, and that the batch shows its targets.

        Raises:
            MeasurementError: If it does not.
            ArgumentError: If a class that is asked for is none of the model's outputs.
        """
        outputs = self._logits(batch).shape[1]
        if wrong := [klass for klass in self.settings["classes"] or () if klass >= outputs]:
            raise ArgumentError.of("classes", wrong[0], f"classes of the model's {outputs} outputs")
        self._studied(batch)

    def _counts(self, batches: Sequence[Any]) -> Tensor:
        """Count the samples of each class, in all processes.

        Returns:
            Counts ``(class,)``, int64, one for each output of the model.
        """
        targets = torch.cat([targets_in(batch, True).cpu() for batch in batches])
        outputs = self._logits(batches[0]).shape[1]
        if len(targets) and int(targets.max()) >= outputs:
            raise MeasurementError(f"a target is {int(targets.max())}, and the model has {outputs} outputs")
        return self._add_up(torch.bincount(targets, minlength=outputs))

    def _logits(self, batch: Any) -> Tensor:
        batch = normal_tensors(batch)
        return checked_logits(self.forward(self.model, batch), targets_in(batch, True))

    def _chosen(self, there: list[int]) -> list[int]:
        chosen = self.settings["classes"]
        for klass in chosen or ():
            if klass not in there:
                allowed = f"classes that have samples: {', '.join(map(str, there))}"
                raise ArgumentError.of("classes", klass, allowed)
        if len(there) < 2:
            raise ArgumentError.of("batches", f"samples of class {there} alone", "samples of two classes or more")
        return list(there if chosen is None else chosen)

    def _studied(self, batch: Any) -> dict[str, Layer]:
        """Return the layers that take part: those that lead to the logits and do not make them."""
        engine = self._engine
        engine.look(batch)
        with Origins(engine.modules) as origins:
            logits = self._logits(batch)
            nearest, every = origins.of(logits)
        chosen = candidates(self.model, self.settings["layers"])
        studied = {name: layer for name, layer in engine.layers.items() if name in chosen and name in every - nearest}
        if not studied:
            inner = ", ".join(name for name in engine.layers if name in every - nearest) or "there are none"
            if self.settings["layers"] is None:
                raise MeasurementError(
                    "no layer leads to those of the logits, so no neuron can be told to serve a class"
                )
            raise ArgumentError.of(
                "layers", self.settings["layers"], f"layers that lead to those of the logits: {inner}"
            )
        return studied

    def _importance(
        self, batches: Sequence[Any], classes: Sequence[int], layers: Sequence[str], progress: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Measure how much each neuron matters to each class, and how strongly it is active.

        Returns:
            By layer, ``(class, neuron)``: importance, and the mean magnitude of activations.
        """
        name = self.settings["importance"]
        masking = self.settings["method"] == "masking"
        criteria = [_MAGNITUDE] if masking else [CRITERIA[name], _MAGNITUDE]
        settings = MeasurementSettings.checked(
            criteria=criteria, layers=list(layers), per_class=True, threshold=SILENT, relative_threshold=True,
            normalize="none", inputs="clean", eps=0.0, loss_reduction="none",
        )  # fmt: skip
        device = next((p.device for p in self.model.parameters()), None)
        measurement = Measurement(self.model, settings.criteria, layers=settings.layers, per_class=True, device=device)
        collect(measurement, batches, settings, self._losses, self.forward)
        measurement.merge_processes(self._processes)
        by_criterion = measurement.report(settings={}).per_class
        magnitude = {n: by_criterion[_MAGNITUDE.name][n][list(classes)] for n in layers}
        if not masking:
            return {n: by_criterion[name][n][list(classes)] for n in layers}, magnitude
        if self.settings["replacement"] == "mean":
            self._engine.measure_means(batches)
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
        there: Sequence[int],
        chosen: Sequence[int],
        counts: Tensor,
        progress: bool,
    ) -> list[ClassAccuracy]:
        """Run every variant of the model on every batch.

        Returns:
            One row for each class asked for and kind of model: accuracies, from 0 to 1, on the class and on the
            others.
        """
        generator = torch.Generator().manual_seed(self.settings["seed"])
        draws = [random_members(members, generator) for _ in range(self.settings["controls"])]
        variants, places = variants_of(members, draws, [there.index(klass) for klass in chosen])
        engine, means = self._engine, None
        if self.settings["replacement"] == "mean":
            means = activation_means(self.model, engine.layers, engine.modules, batches, self.forward, self._add_up)
        accuracies = ClassAccuracies(
            self.model, self.forward, engine.layers, engine.modules, variants, len(counts),
            self.settings["replacement"], means,
        )  # fmt: skip
        for batch in tqdm(batches, desc="accuracies", disable=not progress):
            for part in engine.parts(normal_tensors(batch)):
                accuracies.add(part, targets_in(part, True))
        return accuracy_rows(self._add_up(accuracies.right), counts, chosen, places)

    def _notes(self, members: Mapping[str, Tensor], classes: Sequence[int]) -> tuple[str, ...]:
        empty = [
            f"class {klass} keeps no neuron of {name}"
            for name, m in members.items()
            for klass, kept in zip(classes, m.sum(1).tolist(), strict=True)
            if not kept
        ]
        return (*empty, "selectivity describes which classes excite a neuron; it is not importance")
