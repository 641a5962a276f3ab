"""Pruning without a Trainer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import inputs_of, map_tensors, results_of, targets_of
from lightning_neurons.errors import ArgumentError, PruningError, check_flag
from lightning_neurons.hooks.find_neurons import call, find_neurons
from lightning_neurons.hooks.output_layers import logits_in
from lightning_neurons.isolation.copying import hooked_parameters
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.attention import separated_heads
from lightning_neurons.measurement.measure import measure
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.compensate import Compensation, CompensationName
from lightning_neurons.pruning.cut import Cut, PruningReport
from lightning_neurons.pruning.decision import candidates_of, gather, lossless_candidates, score
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.planning import allocations, complete
from lightning_neurons.pruning.preparation import prepare
from lightning_neurons.pruning.request import (
    check_inputs,
    check_model,
    checked_norm_streams,
    chosen_compensation,
    kept_batches,
    wanted,
)
from lightning_neurons.pruning.selection.lossless import without_loss
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.norm_streams import NormStreams
from lightning_neurons.pruning.structure.structure import Structure, discover
from lightning_neurons.pruning.surgery.optimizers import checked_optimizers
from lightning_neurons.pruning.surgery.surgery import cut
from lightning_neurons.results.neuron_report import NeuronReport

_NEEDS_LOSS = {"gradient", "sampled_gradient"}


def prune(
    model: nn.Module,
    example_inputs: Any,
    plan_or_budget: PruningPlan | PruningBudget | Mapping[str, Any] | float | None = None,
    batches: Iterable[Any] | None = None,
    optimizer: Any = None,
    compensation: CompensationName | None = None,
    *,
    lossless: bool = False,
    reestimate_norms: bool = False,
    loss_fn: LossFunction | None = None,
    norm_streams: NormStreams = "refuse",
) -> PruningReport:
    """Make a model smaller, in place, and with it the state of its optimizer.

    Every cut is tried on a copy first; what cannot be cut is left alone or refused, and after an error everything is as
    it was.

    Args:
        model: Any module.
        example_inputs: One small batch: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        plan_or_budget: A plan; or a mapping of layers to neurons; or a ``PruningBudget``, or a mapping of its arguments
            such as ``{"criterion": "reconstruction", "target_macs": 0.5}``; or a number, the share of neurons to remove
            by the L2 norm of their weights.
        batches: Model inputs or ``(inputs, target)`` pairs: what criteria and compensations are measured on. They are
            kept in memory; a few hundred samples do.
        optimizer: All optimizers that hold the model's parameters, one or a list: what is not passed would go on
            with state of the old shapes.
        compensation: ``"least_squares"`` solves the layers that read removed neurons again, over channels;
            ``"patch_least_squares"`` over whole receptive patches, which is better and slower; ``"mean"`` folds the
            mean of removed neurons into biases and norm statistics; ``"none"``. None takes the first where there are
            ``batches``.
        lossless: Remove the neurons that are dead or constant on ``batches``, and nothing else; outputs that would
            change by more than 1e-5 of the largest are an error.
        reestimate_norms: Estimate running statistics of norm layers anew, where that lowers the loss on ``batches``.
        loss_fn: Returns the loss of the model on a batch, for criteria that need gradients and to compare by; by
            default the cross entropy of ``(inputs, class number)`` pairs, else the distance from the outputs before
            the cut.
        norm_streams: ``"renormalize"`` removes neurons that norm layers take their statistics over as well, as those of
            a residual stream with LayerNorm: the norms then run over fewer, which is another function, so the report
            says by how much the output changes. ``"refuse"`` leaves them alone.

    Returns:
        The neurons that have been removed, and the layers that were left alone.

    Raises:
        ArgumentError: If an argument is out of range, contradicts another, or a plan is for another model.
        PruningError: If the model cannot be traced, a plan cannot be carried out, or a target cannot be met.
        MeasurementError: If ``batches`` cannot be measured.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = prune(net, torch.zeros(1, 4), {"0": [1, 6]})
        >>> net[0].out_features, net[2].in_features, report.cost.parameters_after
        (6, 6, 44)
    """
    check_model(model)
    asked = wanted(plan_or_budget, lossless)
    given = kept_batches(batches)
    how = chosen_compensation(compensation, given, lossless)
    if check_flag("reestimate_norms", reestimate_norms) and lossless:
        raise ArgumentError.of("reestimate_norms", True, "False with lossless=True, which changes nothing else")
    if reestimate_norms and not given:
        raise ArgumentError.of("batches", given, "some batches, with reestimate_norms=True")
    _refuse_unmeasurable(asked, given)
    checked_norm_streams(norm_streams, lossless)
    kept = given or []
    optimizers = checked_optimizers(optimizer, model)
    check_inputs(example_inputs, kept)
    if loss_fn is not None and not callable(loss_fn):
        raise ArgumentError.of("loss_fn", loss_fn, "a function (model, batch) -> loss")
    example = Example(example_inputs)
    with isolated(model):  # copies may share with it what their code reaches on other ways
        structure = discover(model, example, norm_streams)
        calibration = Calibration(kept, _run, _loss(model, kept, loss_fn))
        report = None
        if isinstance(asked, PruningBudget):
            report = _measured(model, example_inputs, asked, kept, loss_fn)
        prepared = _prepared(structure, model, asked, calibration, report, how, lossless, reestimate_norms)
    operation = cut(model, prepared.tensor_cuts, optimizers=optimizers, shifts=prepared.shifts)
    try:
        example.check(model)
    except BaseException:
        operation.roll_back()
        raise
    if structure.coupling.idle and prepared.plan:
        names = ", ".join(structure.coupling.idle)
        prepared = prepared.noted([f"did not run, so not cut with what they may read in training: {names}"])
    if prepared.plan and (hooked := hooked_parameters(model)):
        names = ", ".join(hooked)
        prepared = prepared.noted([
            f"hooks on gradients may count on the number of neurons, and are left as they are: {names}"
        ])
    if prepared.plan.norm_streams != "refuse" and prepared.shifts:
        change, _ = structure.changes(prepared.units, prepared.shifts)
        prepared = prepared.noted([f"with compensation, outputs on the example change by {change:.2g} of their size"])
    widths = {layer: len(prepared.plan.remaining(layer)) for layer in structure.widths}
    return PruningReport(prepared.plan, widths, prepared.plan.notes)


def _prepared(
    structure: Structure,
    model: nn.Module,
    asked: PruningPlan | PruningBudget,
    calibration: Calibration,
    report: NeuronReport | None,
    how: Compensation,
    lossless: bool,
    reestimate_norms: bool,
) -> Cut:
    """Return the cut that is asked for, tried on copies and compensated."""
    notes: tuple[str, ...] = ()
    if isinstance(asked, PruningPlan):
        candidates = [complete(structure, asked)]
    else:
        evidence = gather(model, asked, calibration, structure.wiring, lossless=lossless)
        if lossless:
            candidates, notes = lossless_candidates(structure, model, asked, evidence, report)
            found = without_loss(model, candidates, evidence.constants, calibration, structure.wiring)
            return found.noted(notes)
        scores, notes = score(structure, model, asked, report=report, evidence=evidence)
        candidates = candidates_of(structure, asked, allocations(structure, asked, scores))
        _refuse_unmet(asked, candidates)
    options: dict[str, Any] = {"how": how, "reestimate_norms": reestimate_norms}
    return prepare(model, candidates, calibration, structure.wiring, **options).noted(notes)


def _run(model: nn.Module, batch: Any) -> Any:
    """Return the output for a copy of the inputs: what a forward changes in place must not be seen by the next."""
    return call(model, map_tensors(inputs_of(batch), Tensor.clone))


def _refuse_unmet(budget: PruningBudget, candidates: Sequence[Cut]) -> None:
    """Refuse a target that is not reached even without all neurons that may be removed, or as none passed its trial."""
    notes, (name, value) = candidates[0].plan.notes, budget.rule
    unmet = [note for note in notes if "not reached" in note and budget.amount is None]
    is_whole = not any(candidates[0].plan.neurons.values()) and not any("met already" in note for note in notes)
    if not unmet and is_whole and name in ("target_macs", "target_params"):
        unmet = [f"{name}={value:g} is not reached: nothing can be removed"]
    if unmet:
        raise PruningError("; ".join([*unmet, *(note for note in notes if note not in unmet)]))


def _refuse_unmeasurable(asked: PruningPlan | PruningBudget, batches: Sequence[Any] | None) -> None:
    """Refuse a criterion that has to be measured, without batches to measure it on."""
    if isinstance(asked, PruningPlan) or batches:
        return
    criterion = asked.measured
    if asked.by_reconstruction or (criterion is not None and criterion.statistics):
        raise ArgumentError.of("batches", batches, f"some batches, which the criterion {asked.label!r} is measured on")


def _measured(
    model: nn.Module, example: Any, budget: PruningBudget, batches: list[Any], loss_fn: LossFunction | None
) -> NeuronReport | None:
    criterion = budget.measured
    if criterion is None:
        return None
    if not criterion.statistics:  # weights alone
        measurement = Measurement(model, [criterion])
        with separated_heads(model):
            measurement.learn({layer.name: layer for layer in find_neurons(model, example)})
        return measurement.report(settings={})
    if criterion.needs & _NEEDS_LOSS and loss_fn is None:
        loss_fn = _cross_entropy
    with separated_heads(model):  # else nothing is known of the neurons of their output projections
        return measure(model, batches, loss_fn=loss_fn, criteria=[criterion])


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    targets = targets_of(batch)
    if targets is None:
        raise ArgumentError.of(
            "loss_fn", None, "a function (model, batch) -> loss, as the batches show no class numbers"
        )
    output = _run(model, batch)
    logits = logits_in(output)
    if logits is None:
        raise ArgumentError.of(
            "loss_fn", None, f"a function (model, batch) -> loss, as {type(output).__name__} shows no logits"
        )
    return nn.functional.cross_entropy(logits, targets)


def _loss(model: nn.Module, batches: Sequence[Any], loss_fn: LossFunction | None) -> LossFunction:
    """Return the loss that candidates are compared by."""
    if loss_fn is not None:
        return loss_fn

    def distance(other: nn.Module, batch: Any) -> Tensor:
        pairs = zip(*(results_of(_run(m, batch)) for m in (model, other)), strict=True)
        return torch.stack([(a - b).square().mean() for a, b in pairs if a.is_floating_point()]).sum()

    try:
        with isolated(model), torch.no_grad():
            model.eval()
            _cross_entropy(model, batches[0])
    except Exception:  # noqa: BLE001 (no batches, no targets, or no class numbers: whatever it is, it is no such loss)
        return distance
    return _cross_entropy
