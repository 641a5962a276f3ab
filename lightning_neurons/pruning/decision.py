"""Candidates for a cut, from measurements; the same with and without a Trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.attention import separated_heads
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.moments import Moments
from lightning_neurons.pruning.compensation.weight_shifts import Wiring
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.planning import allocations, decide
from lightning_neurons.pruning.selection.budget_fill import Dense
from lightning_neurons.pruning.selection.evidence import Constant, constants, first_read, second_moments
from lightning_neurons.pruning.selection.group_scores import GroupScores, group_scores, neuron_scores, random_scores
from lightning_neurons.pruning.selection.head_scores import head_scores
from lightning_neurons.pruning.selection.lossless import lossless_scores, still_layers
from lightning_neurons.pruning.selection.reconstruction import reconstruction_scores
from lightning_neurons.pruning.selection.select import Selection
from lightning_neurons.pruning.structure.structure import Structure
from lightning_neurons.results.neuron_report import NeuronReport


@dataclass(frozen=True, eq=False)
class Evidence:
    """Statistics of the inputs of downstream layers.

    Attributes:
        moments: By downstream layer; for the criterion ``"reconstruction"``.
        constants: By downstream layer; for a lossless cut.
        still: Downstream layers whose output is the same whatever they read.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    still: frozenset[str] = frozenset()


def gather(
    model: nn.Module, budget: PruningBudget, calibration: Calibration, wiring: Wiring, *, lossless: bool
) -> Evidence:
    """Measure the inputs of downstream layers, as far as needed. Every process has to take part.

    Args:
        model: The model; it is left as it was.
        budget: The budget.
        calibration: The data.
        wiring: The order of the model's layers.
        lossless: Whether only constant neurons may go.

    Returns:
        Constants for a lossless cut, moments for the criterion ``"reconstruction"``, else nothing.
    """
    with separated_heads(model):
        return _gathered(model, budget, calibration, wiring, lossless=lossless)


def _gathered(
    model: nn.Module, budget: PruningBudget, calibration: Calibration, wiring: Wiring, *, lossless: bool
) -> Evidence:
    readers = list(wiring.calls)
    if lossless:
        first: dict[str, Tensor] = {}
        for batch in calibration.batches[:1]:
            with isolated(model):
                model.eval()
                first = first_read(model, readers, lambda module: calibration.run(module, batch))  # noqa: B023
        return Evidence(constants=constants(model, readers, calibration.agree(first), calibration))
    if budget.by_reconstruction:
        return Evidence(moments=second_moments(model, [*readers, *wiring.behind], calibration))
    return Evidence()


def score(
    structure: Structure,
    model: nn.Module,
    budget: PruningBudget,
    *,
    report: NeuronReport | None = None,
    evidence: Evidence | None = None,
    seed: int = 0,
) -> tuple[dict[str, GroupScores], tuple[str, ...]]:
    """Return the scores of all units, by the budget's criterion, and notes.

    Args:
        structure: The model's groups.
        model: The model.
        budget: The budget.
        report: A measurement of the budget's criterion.
        evidence: Statistics of the inputs of downstream layers.
        seed: Of random scores.

    Returns:
        By root, the scores of a group's units, the lowest of which go first; and notes.
    """
    evidence = evidence or Evidence()
    if evidence.constants:
        return lossless_scores(structure, model, evidence.constants, evidence.still)
    if budget.by_reconstruction:
        return reconstruction_scores(structure, model, evidence.moments, budget)
    if report is None or budget.measured is None:
        return random_scores(structure.offered, seed), ()
    measured = neuron_scores(report, budget)
    of_heads, notes = head_scores(structure.offered, model, budget, measured)
    return group_scores(structure.offered, measured, budget) | of_heads, notes


def lossless_candidates(
    structure: Structure,
    model: nn.Module,
    budget: PruningBudget,
    evidence: Evidence,
    report: NeuronReport | None,
    *,
    dense: Dense | None = None,
    earlier: Sequence[Mapping[str, Sequence[int]]] = (),
) -> tuple[list[Cut], tuple[str, ...]]:
    """Return candidates for a cut without loss: first with inputs of saturated layers, then without; and notes.

    Args:
        structure: The model's groups.
        model: The model.
        budget: Limits that it gives are kept.
        evidence: The inputs of downstream layers that never change.
        report: A measurement of the layers that never change.
        dense: The model before earlier cuts.
        earlier: As in ``decide``.

    Returns:
        Candidates, the first to be tried first; and notes on constant neurons that have to stay.
    """
    still = frozenset() if report is None else still_layers(report)
    found: list[Cut] = []
    notes: tuple[str, ...] = ()
    for one in dict.fromkeys((still, frozenset[str]())):
        scores, notes = score(structure, model, budget, evidence=replace(evidence, still=one))
        found += candidates_of(structure, budget, allocations(structure, budget, scores, dense=dense), earlier)
    return found, notes


def candidates_of(
    structure: Structure,
    budget: PruningBudget,
    selections: Sequence[Selection],
    earlier: Sequence[Mapping[str, Sequence[int]]] = (),
) -> list[Cut]:
    """Return each selection as a cut that has been tried on a copy.

    Args:
        structure: The model's groups.
        budget: The budget.
        selections: One for each scope of the budget.
        earlier: As in ``decide``.

    Returns:
        One candidate for each selection, with its scope.
    """
    pairs = zip(budget.scopes, selections, strict=True)
    return [decide(structure, budget, selection, earlier, scope=scope) for scope, selection in pairs]
