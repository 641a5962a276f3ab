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
from jaxtyping import Float
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

AT_ONCE = 64
"""Inputs that go before the matrices of all inputs are brought up to date."""


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


class _Blocks:
    """The entries of a reading's two matrices that the errors of units of one width depend on.

    Attributes:
        units: ``(unit,)``, those that have not gone.
        rows: ``(unit, place)``, where their inputs stand in the matrices.
        inverse: ``(unit, place, place)``.
        products: ``(unit, place, place)``.
    """

    def __init__(self, places: Mapping[int, tuple[int, ...]], inverse: Tensor, products: Tensor) -> None:
        self.units, self.rows = torch.tensor(list(places)), torch.tensor(list(places.values()))
        pairs = self.rows[:, :, None], self.rows[:, None, :]
        self.inverse, self.products = inverse[pairs], products[pairs]

    def errors(self) -> Float[Tensor, " unit"]:
        """Return the error of removing each of the units alone."""
        if self.rows.shape[1] == 1:
            return (self.products / self.inverse)[:, 0, 0]
        solved: Tensor = torch.linalg.solve(self.inverse, self.products)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def update(self, across: Tensor, rows: Tensor, mixed: Tensor) -> None:
        """Follow a change of the matrices; each factor is ``(input, place that goes)``."""
        across, rows, mixed = across[self.rows], rows[self.rows], mixed[self.rows]
        change = across @ mixed.mT
        self.products.add_(change).add_(change.mT)
        self.inverse.sub_(across @ rows.mT)

    def forget(self, unit: int) -> None:
        """Let a unit that has gone cost nothing, until it is left out."""
        gone = self.units == unit
        self.inverse[gone] = torch.eye(self.rows.shape[1], dtype=self.inverse.dtype)
        self.products[gone] = 0

    def keep(self, gone: Tensor, row_of: Tensor) -> None:
        """Leave out units that have gone, when the rows of the others have moved."""
        stays = ~gone[self.units]
        self.units, self.rows = self.units[stays], row_of[self.rows[stays]]
        self.inverse, self.products = self.inverse[stays], self.products[stays]


class _State:
    """The state of one layer that reads a group: inverse covariance of the inputs left, products of their weights.

    Errors depend on the weights by ``W W'`` alone, so it does not matter how many outputs there are, and on the blocks
    of single units. Only these follow each removal; the whole matrices follow many at a time, by one product of
    matrices instead of many passes over them, and without the inputs that have gone.
    """

    def __init__(self, reading: Reading) -> None:
        self.places, self.scale = reading.places, reading.scale
        self.products = reading.weight @ reading.weight.T
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(reading.covariance))
        by_width: dict[int, dict[int, tuple[int, ...]]] = {}
        for unit, places in enumerate(self.places):
            by_width.setdefault(len(places), {})[unit] = places
        self.blocks = [_Blocks(of, self.inverse, self.products) for width, of in by_width.items() if width]
        self.row_of = torch.arange(len(self.inverse))
        self.gone = torch.zeros(len(self.places), dtype=torch.bool)
        self.stays = torch.ones(len(self.inverse), dtype=torch.bool)
        # What the matrices have not followed yet: inverse - across rows', products + across mixed' + mixed across'.
        room = max(AT_ONCE, *by_width, 0)
        self.pending = 0
        self.across, self.rows, self.mixed = (self.inverse.new_empty(len(self.inverse), room) for _ in range(3))

    def add_errors(self, cost: Float[Tensor, " unit"]) -> None:
        """Add the error of removing each unit alone; nothing for those that it does not read or that have gone."""
        for blocks in self.blocks:
            cost.index_add_(0, blocks.units, blocks.errors(), alpha=1 / self.scale)

    def remove(self, unit: int) -> None:
        """Remove a unit: the others take over what they can."""
        self.gone[unit] = True
        width = len(self.places[unit])
        if not width:
            return
        if self.pending + width > self.across.shape[1]:
            self._catch_up()
        places = self.row_of[list(self.places[unit])]
        across, rows, mixed = (all_of[:, : self.pending] for all_of in (self.across, self.rows, self.mixed))
        row = self.inverse[places] - across[places] @ rows.T  # (place, input)
        product = self.products[places] + across[places] @ mixed.T + mixed[places] @ across.T
        step = slice(self.pending, self.pending + width)
        factor = torch.linalg.solve(row[:, places], row) if width > 1 else row / row[:, places]
        self.across[:, step], self.rows[:, step] = factor.T, row.T  # W becomes W - across W_P
        self.mixed[:, step] = (0.5 * product[:, places] @ factor - product).T
        self.pending += width
        self.stays[places] = False
        for blocks in self.blocks:
            blocks.update(self.across[:, step], self.rows[:, step], self.mixed[:, step])
            blocks.forget(unit)

    def _catch_up(self) -> None:
        """Bring the matrices up to date, and leave out what has gone."""
        across, rows, mixed = (m[self.stays, : self.pending] for m in (self.across, self.rows, self.mixed))
        self.inverse = self.inverse[self.stays][:, self.stays].addmm_(across, rows.T, alpha=-1)
        self.products = self.products[self.stays][:, self.stays].addmm_(across, mixed.T).addmm_(mixed, across.T)
        moved = self.stays.cumsum(0) - 1
        self.row_of = moved[self.row_of]
        for blocks in self.blocks:
            blocks.keep(self.gone, moved)
        size = len(self.inverse)
        self.across, self.rows, self.mixed = self.across[:size], self.rows[:size], self.mixed[:size]
        self.stays, self.pending = self.stays[self.stays], 0


def eliminate(readings: Sequence[Reading], units: int) -> tuple[list[int], list[float]]:
    """Return the order in which units go, and the error of each when those before it have gone.

    Args:
        readings: All layers that read the units.
        units: Number of units.

    Returns:
        All units, the first to go first, and for each the error that it adds, relative and summed over the layers.
    """
    states = [_State(reading) for reading in readings]
    gone = torch.zeros(units, dtype=torch.bool)
    order: list[int] = []
    errors: list[float] = []
    while len(order) < units:
        cost = torch.zeros(units, dtype=torch.float64)
        for state in states:
            state.add_errors(cost)
        cost[gone] = torch.inf
        best = int(cost.argmin())
        order.append(best)
        errors.append(float(cost[best]))
        gone[best] = True
        for state in states:
            state.remove(best)
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
