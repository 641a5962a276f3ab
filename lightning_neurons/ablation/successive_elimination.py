"""Find the least important neurons without measuring every neuron on every sample.

All neurons run on the same samples, part by part. One that is surely among the bottom, or surely not, by its confidence
interval, drops out; the budget goes to those that are hard to place. (Maron and Moore 1994, "Hoeffding races", with
intervals of Student's distribution.)

What makes the intervals narrow is one backward, which gives the gate gradients ``u`` of all neurons and samples. On a
trained network most samples hardly change whatever is switched off: samples are drawn in proportion to the size of
their gate gradients (of their loss, where that cannot be differentiated). And first and second order, ``-u`` and
``u^2``, predict the changes of samples that have not been run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_neurons.ablation.engine import AblationEngine
from lightning_neurons.ablation.estimates import Estimates, GateGradients, decided
from lightning_neurons.data.batches import batch_size_of, is_divisible, rows_of
from lightning_neurons.data.joining import form_of, join
from lightning_neurons.errors import ArgumentError, MeasurementError, check_share, is_number
from lightning_neurons.results.ablation_report import AblationReport

_LEAST = 32
"""Samples to a part."""
_PARTS = 4
"""Parts before the first decision: fewer say little about a spread."""
_FLOOR = 0.05
"""Least size of a sample, as a share of the mean size: no sample is left out for sure."""
_INTERRUPTED = "interrupted"
_BACKWARD = 3
"""Forwards that a forward and the backward to the activations are counted as."""


@dataclass(frozen=True)
class EliminationRules:
    """The rules of successive elimination.

    Attributes:
        budget: The largest share of the work of the exact study.
        bottom: The share of neurons that is looked for.
        confidence: Of each decision.
        seed: Of the order of the samples.

    Raises:
        ArgumentError: If one is out of range.
    """

    budget: float
    bottom: float
    confidence: float
    seed: int

    def __post_init__(self) -> None:
        check_share("budget", self.budget, zero=False)
        if not is_number(self.bottom) or not 0 < self.bottom < 1:
            raise ArgumentError.of("bottom", self.bottom, "a share between 0 and 1, such as 0.25")
        if not is_number(self.confidence) or not 0.5 <= self.confidence < 1:
            raise ArgumentError.of("confidence", self.confidence, "a probability in [0.5, 1), such as 0.95")


def race(
    study: AblationEngine,
    batches: Sequence[Any],
    neurons: Mapping[str, Sequence[int]],
    rules: EliminationRules,
    settings: Mapping[str, Any],
    *,
    progress: bool = False,
) -> AblationReport:
    """Find the least important neurons by a race, in which neurons drop out as soon as they are decided.

    Args:
        study: The engine, open.
        batches: The data.
        neurons: The neurons that take part, by layer.
        rules: The rules.
        settings: Settings that the report names.
        progress: Whether to show a bar.

    Returns:
        Estimated changes of the loss with standard errors; ``undecided`` names the neurons that could not be placed.

    Raises:
        MeasurementError: If losses cannot be told apart by sample.
    """
    whole, population = _joined(batches)
    some = [rows_of(whole, rows, population) for rows in torch.arange(population).split(_LEAST)]
    as_they_came = len(batches) == 1 or study.has_parts(whole, batches)
    if not as_they_came or (len(some) > 1 and not study.may_divide(whole, some)):
        raise MeasurementError(
            "budget: a race runs samples in any company, and here the loss of one depends on the others in its batch"
        )
    pairs = [(layer, i) for layer, indices in neurons.items() for i in indices]
    budget = rules.budget * len(pairs) * population
    losses = _losses(study, whole)
    controls, notes = _controls(study, neurons, whole, population, is_worth=2 * _BACKWARD * population <= budget)
    sizes = losses.abs() if notes else controls[..., 0].double().square().mean(1).sqrt()
    sizes = torch.where(sizes.isfinite(), sizes, 0)
    estimates = Estimates(controls, (sizes + _FLOOR * sizes.mean()).clamp_min(1e-30), rules.seed)
    spent = float(population) * (1 if notes else 1 + _BACKWARD)
    active = torch.ones(len(pairs), dtype=torch.bool)
    with tqdm(total=1.0, desc="race", disable=not progress) as bar:
        for number, rows in enumerate(estimates.order.split(_LEAST)):
            cost = len(rows) * int(active.sum())
            if not active.any() or spent + cost > budget or _INTERRUPTED in notes:
                break
            try:
                _one_part(study, rows_of(whole, rows, population), pairs, active, estimates)
            except KeyboardInterrupt:
                notes.append(_INTERRUPTED)
                break
            spent += cost
            bar.update(len(rows) / population)
            if number + 1 < _PARTS and population > _PARTS * _LEAST:
                continue
            middle, half = estimates.interval(rules.confidence)
            inside, outside = decided(middle - half, middle + half, _count(rules, pairs))
            active &= ~(inside | outside)
    return _report(estimates, pairs, study, active, rules, losses, spent / population, settings, notes)


def _count(rules: EliminationRules, pairs: Sequence[Any]) -> int:
    return min(max(round(rules.bottom * len(pairs)), 1), len(pairs))


def _one_part(
    study: AblationEngine,
    part: Any,
    pairs: Sequence[tuple[str, int]],
    active: Tensor,
    estimates: Estimates,
) -> None:
    here = study.on(part)
    rows = {pair: row for row, pair in enumerate(pairs) if active[row]}
    for layer in here.order(list(dict.fromkeys(layer for layer, _ in rows))):
        mine = {neuron: row for (name, neuron), row in rows.items() if name == layer}
        changes = here.without([{layer: [neuron]} for neuron in mine]).losses - here.outcome.losses
        for row, values in zip(mine.values(), changes, strict=True):
            estimates.add(row, values)


def _losses(study: AblationEngine, whole: Any) -> Tensor:
    """Return the losses of all samples."""
    outcomes = [study.on(part).outcome for part in study.parts(whole)]
    if any((outcome.weights != 1).any() for outcome in outcomes):
        raise MeasurementError(
            "budget: a race needs the loss of every sample, and that of loss_fn could not be taken apart; return "
            "one loss per sample from it, or leave budget out"
        )
    return torch.cat([outcome.losses[0] for outcome in outcomes]).double().cpu()


def _controls(
    study: AblationEngine, neurons: Mapping[str, Sequence[int]], whole: Any, population: int, *, is_worth: bool
) -> tuple[Tensor, list[str]]:
    """Return the control variates of each sample, and notes on why there are none (then they are zeros)."""
    gates, width = GateGradients(study, neurons), sum(map(len, neurons.values()))
    why = "the loss cannot be differentiated" if is_worth else "they would take more than half of the budget"
    try:
        gradients = [gates.of(part).float() for part in study.parts(whole)] if is_worth else []
        if is_worth and gates.works:
            return torch.cat(gradients), []
    except KeyboardInterrupt:
        return torch.zeros(population, width, 2), [_INTERRUPTED]
    return torch.zeros(population, width, 2), [f"no control variates: {why}"]


def _joined(batches: Sequence[Any]) -> tuple[Any, int]:
    """Return all samples as one batch, and how many there are.

    Raises:
        MeasurementError: If they cannot be joined.
    """
    if not all(is_divisible(b) and form_of(b) == form_of(batches[0]) for b in batches):
        raise MeasurementError(
            "budget: a race needs samples in random order, and batches of one form to draw them from"
        )
    sizes = [batch_size_of(batch) for batch in batches]
    return join(batches, sizes), sum(sizes)


def _report(
    estimates: Estimates,
    pairs: Sequence[tuple[str, int]],
    study: AblationEngine,
    active: Tensor,
    rules: EliminationRules,
    losses: Tensor,
    runs: float,
    settings: Mapping[str, Any],
    notes: Sequence[str],
) -> AblationReport:
    middle, _ = estimates.interval(rules.confidence)
    _, one_sigma = estimates.interval(0.6827)
    deltas = {
        name: torch.full((study.layers[name].neurons,), torch.nan, dtype=torch.float64)
        for name in dict.fromkeys(layer for layer, _ in pairs)
    }
    errors = {name: values.clone() for name, values in deltas.items()}
    undecided: dict[str, list[int]] = {}
    for row, (layer, neuron) in enumerate(pairs):
        if estimates.seen[row]:
            deltas[layer][neuron], errors[layer][neuron] = middle[row], one_sigma[row]
        if active[row]:
            undecided.setdefault(layer, []).append(neuron)
    paid = [] if estimates.seen.any() else [f"the budget does not pay for {_LEAST} samples; raise it"]
    said = f"{int(active.sum())} of {len(pairs)} neurons undecided for the bottom {rules.bottom:.0%}"
    return AblationReport(
        loss=float(losses.mean()),
        samples=len(losses),
        delta_loss=deltas,
        standard_error=errors,
        undecided={layer: tuple(indices) for layer, indices in undecided.items()},
        runs=runs,
        settings=dict(settings),
        notes=(*notes, *paid, said, *study.remarks()),
    )
