"""Single-unit ablation: the loss with every neuron switched off, one at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm

from lightning_neurons.ablation.engine import AblationEngine, given_study, require_present
from lightning_neurons.ablation.neuron_choice import NeuronChoice, chosen_neurons
from lightning_neurons.ablation.successive_elimination import EliminationRules, race
from lightning_neurons.ablation.sums import AblationSums
from lightning_neurons.data.batches import PerClass, targets_in
from lightning_neurons.errors import ArgumentError
from lightning_neurons.hooks.intervention import Replacement
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.measurement.arguments import given_batches
from lightning_neurons.measurement.losses import LossReduction
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.results.ablation_report import AblationReport

TOGETHER = 32
"""Neurons whose losses are split into samples, and summed, together."""


def ablate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    neurons: NeuronChoice = "all",
    replacement: Replacement = "zero",
    loss_reduction: LossReduction = "mean",
    metrics: Mapping[str, Metric] | None = None,
    per_class: PerClass = False,
    budget: float | None = None,
    bottom: float = 0.25,
    confidence: float = 0.95,
    exact: bool = True,
    memory_limit: int = 2**30,
    progress: bool = False,
    seed: int = 0,
) -> AblationReport:
    """Measure the loss without each neuron, in evaluation mode, leaving no trace in the model.

    The single-unit ablation of Morcos et al. 2018 (arXiv:1803.06959); its absolute value is the oracle of Molchanov et
    al. 2017. Every batch is run once and recorded; for a neuron, only what comes behind it is computed again, and the
    losses are bit for bit those of whole forwards. Where that does not hold (control flow that depends on data, state
    that changes), whole forwards are run. Large batches run in parts, unless samples depend on one another. Interrupted
    from the keyboard, it returns what has been measured.

    Args:
        model: Any module. Batches must lie on its device.
        batches: An iterable of batches of any form; kept in memory.
        loss_fn: Called with the model and a batch; returns a scalar, or one loss per sample. A scalar that depends on
            the model's output is taken apart into samples; where that fails, errors are those over batches.
        neurons: ``"all"``, patterns of layers, a list of ``(layer, neuron)``, or a mapping of layers to neurons.
        replacement: The new activation of a neuron: ``"zero"``, its ``"mean"`` over all samples, or, with
            ``"resample"``, its values on another sample that runs with it.
        loss_reduction: Reduction of a scalar of ``loss_fn`` over samples: ``"mean"`` or ``"sum"``; ``"none"`` where it
            returns one loss per sample, which is recognised in any case.
        metrics: torchmetrics by name, called with the model's output and the targets of the batch.
        per_class: Keep classes apart: True finds the targets in the batch, a function gives them.
        budget: Race: spend at most this share of the exact study, and only as much on each neuron as is needed to tell
            whether it is among the least important ``bottom``. What could not be told is in ``undecided``.
        bottom: The share of least important neurons that a race looks for.
        confidence: Of each decision in a race.
        exact: False lets the first layers that read a neuron compute only the difference that it makes, and on a GPU
            several neurons share one batch: faster, and equal to whole forwards up to rounding, not bit for bit.
        memory_limit: Bytes that may be kept of a batch's activations; less takes more forwards.
        progress: Show a progress bar.
        seed: Of the order of a race and of ``"resample"``.

    Returns:
        The changes of loss and metrics.

    Raises:
        ArgumentError: If an argument is out of range, or a neuron is unknown.
        MeasurementError: If there is no batch, the loss is not one, or a layer that was named did not run.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> report = ablate(net, data, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
        >>> report.delta_loss["0"].shape, len(report.ranking())
        (torch.Size([3]), 5)
    """
    options = {"replacement": replacement, "loss_reduction": loss_reduction, "exact": exact}
    study = given_study(model, loss_fn, **options, memory_limit=memory_limit, progress=progress, seed=seed)
    chosen, named = chosen_neurons(model, neurons), not (isinstance(neurons, str) and neurons == "all")
    checked = EliminationRules(1.0 if budget is None else budget, bottom, confidence, seed)
    rules = None if budget is None else checked
    _check_metrics(metrics, per_class, rules)
    data = given_batches(batches)
    with isolated(model), torch.no_grad(), study.open():
        model.eval()
        study.look(data[0])
        present = {name: indices for name, indices in chosen.items() if name in study.layers}
        missing = [name for name in chosen if name not in present]
        if named or not present:
            require_present(study, chosen)
        if replacement == "mean":
            study.measure_means(data)
        if rules is not None:
            return race(study, data, present, rules, _settings(locals()), progress=progress)
        sums = AblationSums(present, {name: study.layers[name].neurons for name in present}, metrics or {})
        notes = [] if not missing else [f"did not run as modules and were not measured: {', '.join(missing)}"]
        targets = None if per_class is False else partial(targets_in, per_class=per_class)
        measure_batches(study, data, sums, targets=targets, progress=progress, notes=notes)
        return sums.report(settings=_settings(locals()), notes=[*notes, *study.remarks()])


def measure_batches(
    study: AblationEngine,
    batches: Sequence[Any],
    sums: AblationSums,
    *,
    targets: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
    notes: list[str] | None = None,
) -> None:
    """Measure every chosen neuron on every batch.

    Args:
        study: The engine, open.
        batches: The data.
        sums: The sums that the losses are added to.
        targets: Returns the class of each sample of a batch, to keep classes apart; None does not.
        progress: Whether to show a bar.
        notes: A list to which a note on an interruption is added; None raises it.
    """
    parts = [part for batch in batches for part in study.parts(batch)]
    total = len(parts) * sum(map(len, sums.neurons.values()))
    with tqdm(total=total, desc="ablation", unit="neuron", disable=not progress) as bar:
        try:
            for part in parts:
                here = study.on(part)
                classes = None if targets is None else targets(part)
                sums.start(here.outcome, part, classes)
                for layer in here.order(list(sums.neurons)):
                    mine = sums.neurons[layer]
                    for few in (mine[i : i + TOGETHER] for i in range(0, len(mine), TOGETHER)):
                        sums.add(layer, few, here.without([{layer: [neuron]} for neuron in few]))
                        bar.update(len(few))
        except KeyboardInterrupt:
            if notes is None:
                raise
            notes.append("interrupted: neurons were measured on different numbers of samples")


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = ("replacement", "loss_reduction", "exact", "budget", "bottom", "confidence", "seed")
    return {
        name: arguments[name]
        for name in names
        if arguments["budget"] is not None or name not in ("bottom", "confidence")
    }


def _check_metrics(metrics: Any, per_class: Any, rules: Any) -> None:
    if metrics is not None:
        wrong = not isinstance(metrics, Mapping) or [m for m in metrics.values() if not isinstance(m, Metric)]
        if wrong:
            raise ArgumentError.of("metrics", metrics, 'torchmetrics by name, such as {"accuracy": Accuracy(...)}')
    if not isinstance(per_class, bool) and not callable(per_class):
        raise ArgumentError.of("per_class", per_class, "True, False, or a function from a batch to classes")
    if rules is not None and (metrics or per_class is not False):
        raise ArgumentError.of(
            "budget", rules.budget, "None with metrics= or per_class=: a race looks at the loss alone"
        )
