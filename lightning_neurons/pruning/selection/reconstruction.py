"""The criterion ``"reconstruction"``: the error that downstream layers cannot make up for without a unit.

Units of a group are eliminated one after the other (``elimination.py``), so a score holds for the case that all with
lower scores have gone as well, which is how units are removed.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_neurons.dependency.groups import Coupling, Group
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import axes, keeps_statistics
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.moments import Moments
from lightning_neurons.pruning.compensation.ridge import FEW, RIDGE, varies
from lightning_neurons.pruning.selection.elimination import Reading, eliminate
from lightning_neurons.pruning.selection.group_scores import GroupScores
from lightning_neurons.pruning.structure.structure import Structure


def reconstruction_scores(
    structure: Structure, model: nn.Module, moments: Mapping[str, Moments], budget: PruningBudget
) -> tuple[dict[str, GroupScores], tuple[str, ...]]:
    """Return the error that remains in downstream layers without each unit, relative to variances; and notes.

    Errors count behind the norm layer that follows a downstream layer: what that makes small matters little.

    For a target of MACs or parameters it is divided by the share of them that goes with the unit; for a threshold it is
    the sum over all that have gone before. Scores never fall along the order of elimination.

    Args:
        structure: The model's groups.
        model: The model.
        moments: By downstream layer, of its inputs.
        budget: Says by what to divide. Groups that are read by a layer without moments have no scores.

    Returns:
        Scores by root, the lowest of which go first; and notes on groups without scores.
    """
    modules = modules_by_name(model)
    found, notes = {}, []
    for root, group in structure.offered.items():
        readings = _readings(group, modules, moments, structure.coupling)
        if readings is None:
            unknown = [part.path for part in group.parts if part.role == "reads" and part.path not in moments]
            notes.append(f"{root} is not cut: it is not known what {', '.join(unknown) or 'its readers'} read")
            continue
        order, errors = eliminate(readings, group.size) if readings else (list(range(group.size)), [0.0] * group.size)
        value = torch.empty(group.size, dtype=torch.float64)
        price = _price(structure, root, budget)
        highest = total = 0.0
        for unit, error in zip(order, errors, strict=True):
            total += max(error, 0.0)
            highest = max(highest, error / price)
            value[unit] = total if budget.rule[0] == "threshold" else highest
        found[root] = GroupScores(_strictly(value, order), value[None])
    return found, tuple(notes)


def _strictly(value: Tensor, order: list[int]) -> Tensor:
    """Return scores that rise along the order of elimination: equal ones would go in the order of the model."""
    value = value.clone()
    for before, unit in pairwise(order):
        if value[unit] <= value[before]:
            value[unit] = torch.nextafter(value[before], value.new_full((), torch.inf))
    return value


def _price(structure: Structure, root: str, budget: PruningBudget) -> float:
    name = budget.rule[0]
    if name not in ("target_macs", "target_params"):
        return 1.0
    parameters, macs = structure.costs_without({root: [0]})
    if name == "target_macs":
        return max(1 - macs / max(structure.costs.macs(), 1), 1e-12)
    return max(1 - parameters / max(structure.costs.parameters(), 1), 1e-12)


def _readings(
    group: Group, modules: Mapping[str, nn.Module], moments: Mapping[str, Moments], coupling: Coupling
) -> list[Reading] | None:
    """Return weights and inputs of the layers that read a group; None if that is not known."""
    found, parts = [], [part for part in group.parts if part.role == "reads"]
    for part in parts:
        seen = moments.get(part.path)
        if seen is None or not float(seen.count):
            return None
        covariance = seen.covariance_xx.cpu()
        scale = float(covariance.diagonal().mean())
        if not varies(seen, scale):  # it reads nothing that ever changes
            continue
        few = float(seen.count) < len(covariance)
        covariance = covariance + (FEW if few else RIDGE) * scale * torch.eye(len(covariance), dtype=covariance.dtype)
        module = modules[part.path]
        weight = module.get_parameter("weight").detach().cpu().to(covariance.dtype)
        weight = weight * _gain(part.path, modules, coupling, weight)
        matrix = weight.movedim(axes(module, "reads")["weight"], 0).flatten(1)
        power = _variance_behind(part.path, moments, coupling) or float((matrix * (covariance @ matrix)).sum())
        if power > 0:
            found.append(Reading(matrix, covariance, part.indices, power))
    return found if parts else None


def _gain(path: str, modules: Mapping[str, nn.Module], coupling: Coupling, weight: Tensor) -> Tensor:
    """Return the factor of the norm layer behind a layer, in a shape that fits its weight."""
    norm = modules.get(coupling.norm_behind.get(path, ""))
    if not keeps_statistics(norm) or norm.running_var is None:
        return weight.new_ones(())
    gain = (norm.running_var.detach().cpu().to(weight.dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().cpu().to(weight.dtype)
    axis = axes(modules[path], "makes")["weight"]
    return gain.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])


def _variance_behind(path: str, moments: Mapping[str, Moments], coupling: Coupling) -> float | None:
    """Return the mean variance of the inputs of the layers that read a layer, directly or through a sum."""
    behind = [moments[layer] for layer, sources in coupling.reads.items() if path in sources and layer in moments]
    known = [float(seen.covariance_xx.trace()) for seen in behind if float(seen.count)]
    return sum(known) / len(known) if known and sum(known) > 0 else None
