"""A cut: all that is decided about it, from the choice of units to the tensors that become smaller, and its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_neurons.pruning.plan import PlanCost, PruningPlan
from lightning_neurons.pruning.structure.structure import Structure
from lightning_neurons.pruning.surgery.surgery import TensorCut, cuts_of


@dataclass(frozen=True, eq=False)
class Cut:
    """Neurons that are removed together: one value from the decision on them to the optimizer.

    ``decide`` makes one of a selection and ``complete`` one of a plan; ``prepare`` adds the shifts that compensate, and
    a callback the round that it belongs to.

    Attributes:
        plan: The neurons to remove by layer, with reasons, costs and notes; of a callback, in the indices of the
            original model.
        tensor_cuts: The same for every tensor, in the indices of the model as it is.
        units: By root, the units of a group to remove, in the indices of the model as it is; empty in one that was read
            from a checkpoint.
        shifts: By parameter or buffer, what is added to it before the cut.
        scope: The scope that it was chosen in.
        number: The round's number in the schedule; 0 without a schedule.
        decided: The epoch in which it was decided; -1 without a Trainer.
    """

    plan: PruningPlan
    tensor_cuts: tuple[TensorCut, ...] = ()
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    scope: str = ""
    number: int = 0
    decided: int = -1

    @classmethod
    def of(cls, structure: Structure, plan: PruningPlan, units: Mapping[str, Sequence[int]], scope: str = "") -> "Cut":
        """Return the cut of a plan, without shifts.

        Args:
            structure: The model.
            plan: The neurons.
            units: By root, the units with just these neurons.
            scope: The scope that they were chosen in.
        """
        ordered = {root: units[root] for root in structure.groups if units.get(root)}
        return cls(plan, tuple(cuts_of(structure.groups.values(), ordered)), ordered, scope=scope)

    def noted(self, notes: Sequence[str]) -> "Cut":
        """Return the same cut with further notes in its plan."""
        return replace(self, plan=replace(self.plan, notes=(*self.plan.notes, *notes)))


@dataclass(frozen=True)
class PruningReport:
    """The report of a cut.

    Attributes:
        plan: The neurons that have been removed, with those coupled with them.
        widths: Neurons by layer, as they are now.
        notes: Layers that were left alone, with the reasons, and layers that could not be compensated.
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
        lines += [f"{name}: {before} -> {after}" for name, (before, after) in self.plan.attributes.items()]
        return "\n".join([*lines, *self.notes])
