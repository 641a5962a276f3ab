"""Pruning without a Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_neurons.errors import ArgumentError, PruningError, UnknownNameError, check_choice, is_number
from lightning_neurons.network.batches import inputs_of, targets_of, tensors_of
from lightning_neurons.network.isolate import eager, isolated
from lightning_neurons.network.neurons import call, find_neurons
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation import Compensation, InputMeans, Repair, fold_means, readers_of
from lightning_neurons.pruning.example import Example
from lightning_neurons.pruning.optimizers import checked_optimizers
from lightning_neurons.pruning.plan import PlanCost, PruningPlan
from lightning_neurons.pruning.planning import choose, complete, decide, units_of
from lightning_neurons.pruning.structure import Structure, discover
from lightning_neurons.pruning.surgery import Cut, cut, cuts_of
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.studies.measure import LossFunction, measure
from lightning_neurons.studies.measurement import Measurement

_NEEDS_LOSS = {"gradient", "sampled_gradient"}


@dataclass(frozen=True)
class PruningReport:
    """What a cut has done.

    Attributes:
        plan: What has been removed, with what was coupled.
        widths: Neurons by layer, as they are now.
        notes: What was left alone and why, and what could not be compensated.
    """

    plan: PruningPlan
    widths: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def cost(self) -> PlanCost:
        """Parameters and MACs, before and after."""
        assert self.plan.cost is not None, "a completed plan has a cost"
        return self.plan.cost

    def __str__(self) -> str:
        c = self.cost
        lines = [
            f"{len(self.plan)} neurons removed",
            f"parameters {c.parameters:,} -> {c.parameters_after:,} ({c.parameters_after / max(c.parameters, 1):.1%})",
            f"MACs {c.macs:,} -> {c.macs_after:,} ({c.macs_after / max(c.macs, 1):.1%})",
        ]
        lines += [f"{n}: {self.plan.widths[n]} -> {w}" for n, w in self.widths.items() if w != self.plan.widths[n]]
        return "\n".join([*lines, *self.notes])


def prune(
    model: nn.Module,
    example_inputs: Any,
    plan_or_budget: PruningPlan | PruningBudget | Mapping[str, Any] | float,
    batches: Iterable[Any] | None = None,
    optimizer: Any = None,
    compensation: Compensation = "none",
    *,
    loss_fn: LossFunction | None = None,
) -> PruningReport:
    """Make a model smaller, in place, and with it the state of its optimizer.

    Every cut is tried on a copy first; what cannot be cut is left alone or refused, and after an error everything is as
    it was.

    Args:
        model: Any module.
        example_inputs: One small batch: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        plan_or_budget: A plan; or a mapping of layers to neurons; or a ``PruningBudget``, or a mapping of its arguments
            such as ``{"criterion": "fisher", "target_macs": 0.5}``; or a number, the share of neurons to remove by the
            L2 norm of their weights.
        batches: Model inputs or ``(inputs, target)`` pairs: what criteria and compensations are measured on. Needed by
            criteria that look at more than weights, and by ``compensation="mean"``.
        optimizer: All optimizers that hold the model's parameters, one or a list: what is not passed would go on
            with state of the old shapes.
        compensation: ``"mean"`` folds the mean of what goes into biases and norm statistics.
        loss_fn: From the model and a batch to a loss, for criteria that need gradients; by default the cross entropy of
            ``(inputs, class number)`` pairs.

    Returns:
        What has been removed and what was left alone.

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
    if not isinstance(model, nn.Module):
        raise ArgumentError.of("model", type(model).__name__, "a torch.nn.Module (an instance, not its class)")
    check_choice("compensation", compensation, get_args(Compensation))
    wanted = _wanted(plan_or_budget)
    optimizers = checked_optimizers(optimizer, model)
    if batches is not None and (isinstance(batches, Tensor | Dataset) or not isinstance(batches, Iterable)):
        raise ArgumentError.of("batches", type(batches).__name__, "an iterable of batches: a DataLoader, or [batch]")
    kept = None if batches is None else list(batches)
    _check_inputs(example_inputs, kept or [])
    if compensation == "mean" and not kept:
        raise ArgumentError.of("batches", batches, 'some batches to average over, with compensation="mean"')
    structure = discover(model, Example(example_inputs))
    if isinstance(wanted, PruningPlan):
        plan = complete(structure, wanted)
    else:
        report = _measured(model, example_inputs, wanted, kept, loss_fn)
        plan = decide(structure, wanted, choose(structure, wanted, report))
        unmet = [note for note in plan.notes if "not reached" in note and wanted.amount is None]
        if unmet:  # to cut down to the bone would help nobody
            raise PruningError("; ".join([*unmet, *(note for note in plan.notes if note not in unmet)]))
    cuts = cuts_of(structure.groups.values(), units_of(structure, plan))
    repair = _repair(model, structure, cuts, kept or []) if compensation == "mean" else Repair()
    cut(model, cuts, optimizers=optimizers, shifts=repair.shifts)
    widths = {layer: len(plan.remaining(layer)) for layer in structure.widths}
    return PruningReport(plan, widths, (*plan.notes, *repair.notes))


def _check_inputs(example: Any, batches: Sequence[Any]) -> None:
    if not tensors_of(example) or any(t.ndim and not len(t) for t in tensors_of(example)):
        got = type(example).__name__ if not tensors_of(example) else [tuple(t.shape) for t in tensors_of(example)]
        allowed = "a batch of at least one sample: a tensor, a tuple of arguments or a dict of keyword arguments"
        raise ArgumentError.of("example_inputs", got, allowed)
    several = isinstance(example, Mapping) or (isinstance(example, list | tuple) and len(example) > 1)
    strange = [type(batch).__name__ for batch in batches if several and not isinstance(batch, Mapping)]
    if strange:
        allowed = 'dicts of keyword arguments, with targets under "label", as the model takes several inputs'
        raise ArgumentError.of("batches", strange[0], allowed)


def _wanted(given: Any) -> PruningPlan | PruningBudget:
    if isinstance(given, PruningPlan | PruningBudget):
        return given
    if is_number(given):
        if given == 1:  # a slip that would leave one neuron in each layer
            raise ArgumentError.of("plan_or_budget", given, "a share of neurons below 1, such as 0.3")
        return PruningBudget("weight_l2", amount=given)
    if isinstance(given, Mapping):
        names = [field.name for field in fields(PruningBudget)]
        if not any(name in names for name in given):
            return PruningPlan.from_indices(given)
        unknown = [name for name in given if name not in names]
        if unknown:
            raise UnknownNameError.among("plan_or_budget", str(unknown[0]), names)
        return PruningBudget(**given)
    allowed = "a PruningPlan, a PruningBudget, a mapping of layers to neurons, or a share of neurons"
    raise ArgumentError.of("plan_or_budget", given, allowed)


def _measured(
    model: nn.Module, example: Any, budget: PruningBudget, batches: list[Any] | None, loss_fn: LossFunction | None
) -> NeuronReport | None:
    criterion = budget.measured
    if criterion is None:
        return None
    if not criterion.statistics:  # weights alone
        measurement = Measurement(model, [criterion])
        measurement.learn({layer.name: layer for layer in find_neurons(model, example)})
        return measurement.report(settings={})
    if not batches:
        raise ArgumentError.of(
            "batches", batches, f"some batches, which the criterion {criterion.name!r} is measured on"
        )
    if criterion.needs & _NEEDS_LOSS and loss_fn is None:
        loss_fn = _cross_entropy
    return measure(model, batches, loss_fn=loss_fn, criteria=[criterion])


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    targets = targets_of(batch)
    if targets is None:
        raise ArgumentError.of(
            "loss_fn", None, "a function (model, batch) -> loss, as the batches show no class numbers"
        )
    return nn.functional.cross_entropy(call(model, inputs_of(batch)), targets)


def _repair(model: nn.Module, structure: Structure, cuts: list[Cut], batches: list[Any]) -> Repair:
    found = InputMeans(model, readers_of(cuts))
    with isolated(model), eager():
        model.eval()
        for batch in batches:
            found.observe(_running(model, batch))
    return fold_means(model, cuts, found.means(), structure.coupling.norm_behind)


def _running(model: nn.Module, batch: Any) -> Callable[[], Any]:
    return lambda: call(model, inputs_of(batch))
