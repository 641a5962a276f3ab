"""The criterion ``"reconstruction"``: the error that downstream layers cannot make up for without a unit.

Units of a group are eliminated one after the other, so a score holds for the case that all with
lower scores have gone as well, which is how units are removed.

With the covariance ``S`` of what a consumer reads and its weights ``W``, ``(input, output)``, both for the inputs that
are left, the error that remains when the inputs ``P`` go and the others are solved again is
``tr(W_P' [S^-1]_PP^-1 W_P)`` (Hassibi and Stork 1993, on blocks). Removing them updates both in closed form, so nothing
is inverted twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_neurons.dependency.groups import Coupling, Group
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.recognition import centres
from lightning_neurons.layers.width_handlers import axes
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.moments import Moments
from lightning_neurons.pruning.compensation.ridge import FEW, RIDGE, varies
from lightning_neurons.pruning.selection.group_scores import GroupScores
from lightning_neurons.pruning.structure.structure import Structure


@dataclass(frozen=True, eq=False)
class Reading:
    """The weights and inputs of one layer that reads a group.

    Attributes:
        weight: ``(input, output)``, all taps of an output as outputs of their own.
        covariance: ``(input, input)`` of everything that it reads, positive definite.
        places: By unit, its inputs.
        scale: Variance of its output, by which errors are divided.
    """

    weight: Float[Tensor, "input output"]
    covariance: Float[Tensor, "input input"]
    places: tuple[tuple[int, ...], ...]
    scale: float


class _State:
    """The state of one layer that reads a group: inverse covariance of the inputs left, products of their weights.

    Errors depend on the weights by ``W W'`` alone, so it does not matter how many outputs there are.
    """

    def __init__(self, reading: Reading) -> None:
        self.places, self.scale = reading.places, reading.scale
        self.products = reading.weight @ reading.weight.T
        self.inverse = torch.linalg.inv(reading.covariance)
        widths = {len(places) for places in self.places}
        self.index = torch.tensor(self.places) if len(widths) == 1 else None

    def errors(self, units: Sequence[int]) -> Tensor:
        """Return the error of removing each of some units alone."""
        if self.index is None:
            return torch.stack([self._errors(torch.tensor([self.places[unit]]).long())[0] for unit in units])
        return self._errors(self.index[list(units)])

    def remove(self, unit: int) -> None:
        """Remove a unit: the others take over what they can."""
        gone = list(self.places[unit])
        if len(gone) == 1:
            self._remove_one(gone[0])
        elif gone:
            rows, products = self.inverse[gone], self.products[gone]
            across = torch.linalg.solve(rows[:, gone], rows).T  # (input, place); W becomes W - across W_P
            mixed = across @ (0.5 * products[:, gone]) @ across.T - across @ products
            self.products.add_(mixed).add_(mixed.T)
            self.inverse.addmm_(across, rows, alpha=-1)
        for matrix in (self.products, self.inverse):
            matrix[gone] = 0
            matrix[:, gone] = 0
        self.inverse[gone, gone] = 1

    def _remove_one(self, place: int) -> None:
        """Remove a single input, in place: most units have one, and there may be thousands."""
        row, products = self.inverse[place].clone(), self.products[place].clone()
        across = row / row[place]
        mixed = 0.5 * products[place] * across - products
        self.products.addr_(across, mixed).addr_(mixed, across)
        self.inverse.addr_(across, row, alpha=-1)

    def _errors(self, index: Int[Tensor, "unit place"]) -> Float[Tensor, " unit"]:
        if not index.shape[1]:
            return self.products.new_zeros(len(index))
        if index.shape[1] == 1:
            found: Tensor = (self.products[index, index] / self.inverse[index, index])[:, 0]
        else:
            pairs = index[:, :, None], index[:, None, :]
            solved = torch.linalg.solve(self.inverse[pairs], self.products[pairs])
            found = solved.diagonal(dim1=1, dim2=2).sum(1)
        return found / self.scale


def eliminate(readings: Sequence[Reading], units: int) -> tuple[list[int], list[float]]:
    """Return the order in which units go, and the error of each when those before it have gone.

    Args:
        readings: All layers that read the units.
        units: Number of units.

    Returns:
        All units, the first to go first, and for each the error that it adds, relative and summed over the layers.
    """
    states = [_State(reading) for reading in readings]
    left, order, errors = list(range(units)), [], []
    while left:
        cost = torch.stack([state.errors(left) for state in states]).sum(0)
        best = int(cost.argmin())
        order.append(left.pop(best))
        errors.append(float(cost[best]))
        for state in states:
            state.remove(order[-1])
    return order, errors


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
            notes.append(f"{root} is not cut: it is not known what {', '.join(unknown) or 'its consumers'} read")
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
    norm: Any = modules.get(coupling.norm_behind.get(path, ""))
    if not centres(norm) or getattr(norm, "running_var", None) is None:
        return weight.new_ones(())
    gain: Tensor = (norm.running_var.detach().cpu().to(weight.dtype) + getattr(norm, "eps", 0.0)).rsqrt()
    if getattr(norm, "weight", None) is not None:
        gain = gain * norm.weight.detach().cpu().to(weight.dtype)
    axis = axes(modules[path], "makes")["weight"]
    return gain.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])


def _variance_behind(path: str, moments: Mapping[str, Moments], coupling: Coupling) -> float | None:
    """Return the mean variance of the inputs of the layers that read a layer, directly or through a sum."""
    behind = [moments[layer] for layer, sources in coupling.reads.items() if path in sources and layer in moments]
    known = [float(seen.covariance_xx.trace()) for seen in behind if float(seen.count)]
    return sum(known) / len(known) if known and sum(known) > 0 else None
