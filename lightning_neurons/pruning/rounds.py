"""The state of a pruning callback: the model before any cut, the rounds so far, and the one that is decided."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from lightning_neurons.pruning.cut import Cut, PruningReport
from lightning_neurons.pruning.plan import PlanCost, PruningPlan
from lightning_neurons.pruning.selection.budget_fill import Dense
from lightning_neurons.pruning.surgery.surgery import TensorCut
from lightning_neurons.results.typed import typed


@dataclass(frozen=True)
class PruningRound:
    """One cut that has been made.

    Attributes:
        number: The round's number in the schedule.
        epoch: The epoch at whose beginning it was made.
        step: Optimizer steps before it.
        plan: The neurons that were removed, in the indices of the original model.
        latency_before: Seconds of a forward on the example before the cut, in evaluation mode, or None.
        latency: The same after it.
        before: The monitored metric at the validation before the cut, or None.
        cut: The metric right after the cut, on the kept validation samples, or None.
        after: The metric at the first validation after the cut, or None.
    """

    number: int
    epoch: int
    step: int
    plan: PruningPlan
    latency_before: float | None = None
    latency: float | None = None
    before: float | None = None
    cut: float | None = None
    after: float | None = None

    @property
    def summary(self) -> str:
        """The round in one line."""
        cost = self.plan.cost
        if cost is None or not self.plan:
            return f"round {self.number}: nothing removed"
        return (
            f"round {self.number}: {len(self.plan)} neurons removed; parameters {cost.parameters:,} -> "
            f"{cost.parameters_after:,}, MACs {cost.macs:,} -> {cost.macs_after:,}"
        )


@dataclass
class Rounds:
    """The state of a pruning callback; goes into checkpoints as plain values and tensors.

    Attributes:
        dense: The model before any cut; None before it has been looked at.
        done: The rounds so far.
        pending: The round that is decided and not yet made.
        votes: By layer, in original indices, the neurons that each of the latest measurements would have removed.
        undone: Rounds that were taken back.
        earlier: Number of rounds that were made by another schedule.
    """

    dense: Dense | None = None
    done: list[PruningRound] = field(default_factory=list)
    pending: Cut | None = None
    votes: list[dict[str, list[int]]] = field(default_factory=list)
    undone: list[PruningRound] = field(default_factory=list)
    earlier: int = 0

    @property
    def number(self) -> int:
        """The last round of the schedule that has been made; 0 before the first."""
        return self.done[-1].number if len(self.done) > self.earlier else 0

    @property
    def plan(self) -> PruningPlan:
        """Everything that has been removed so far, in the indices of the original model."""
        total = PruningPlan({}, {} if self.dense is None else dict(self.dense.widths))
        for one in self.done:
            plan = one.plan
            layers = dict.fromkeys([*total.neurons, *plan.neurons])
            total = replace(
                total,
                neurons={n: tuple(sorted({*total.neurons.get(n, ()), *plan.neurons.get(n, ())})) for n in layers},
                reasons={n: {**total.reasons.get(n, {}), **plan.reasons.get(n, {})} for n in layers},
                cost=plan.cost,
                notes=tuple(dict.fromkeys((*total.notes, *plan.notes))),
                attributes={**total.attributes, **plan.attributes},
                norm_streams=total.norm_streams if plan.norm_streams == "refuse" else plan.norm_streams,
            )
        if total.cost is not None and self.dense is not None:
            cost = replace(total.cost, parameters=self.dense.parameters, macs=self.dense.macs)
            total = replace(total, cost=cost)
        return total

    def report(self) -> PruningReport | None:
        """Return all cuts so far as one; None before the model has been looked at."""
        plan, dense = self.plan, self.dense
        if dense is None:
            return None
        nothing = PlanCost(dense.parameters, dense.macs, dense.parameters, dense.macs)
        return PruningReport(replace(plan, cost=plan.cost or nothing), self.widths(), plan.notes)

    def become(self, other: "Rounds") -> None:
        """Take over the state of other rounds."""
        vars(self).update(vars(other))

    def finish(self, made: PruningRound) -> None:
        """Record that the pending round has been made."""
        self.done, self.pending = [*self.done, made], None

    def take_back(self, kept: int) -> None:
        """Take back all rounds but the first ``kept``, and what is decided."""
        undone, self.done = self.done[kept:], self.done[:kept]
        self.undone, self.pending, self.votes = [*self.undone, *undone], None, []
        self.earlier = min(self.earlier, kept)

    def note_recovery(self, value: float) -> bool:
        """Store the metric after the last round.

        Returns:
            Whether that was missing.
        """
        if not self.done or self.done[-1].after is not None:
            return False
        self.done[-1] = replace(self.done[-1], after=value)
        return True

    def widths(self) -> dict[str, int]:
        """Return the number of neurons that each layer should have now."""
        plan = self.plan
        return {layer: width - len(plan.neurons.get(layer, ())) for layer, width in plan.widths.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, which ``torch.load(weights_only=True)`` accepts."""
        pending = self.pending
        return {
            "dense": None if self.dense is None else {**vars(self.dense), "widths": dict(self.dense.widths)},
            "done": [{**vars(one), "plan": one.plan.to_dict()} for one in self.done],
            "pending": None
            if pending is None
            else {
                "number": pending.number,
                "plan": pending.plan.to_dict(),
                "cuts": [asdict(one) for one in pending.tensor_cuts],
                "shifts": dict(pending.shifts),
                "decided": pending.decided,
            },
            "votes": self.votes,
            "undone": [{**vars(one), "plan": one.plan.to_dict()} for one in self.undone],
            "earlier": self.earlier,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Rounds":
        """Return the rounds that ``state_dict`` has made plain values of.

        Raises:
            ValueError: If a value is not what it has to be.
        """
        pending = state["pending"]
        return cls(
            dense=typed(Dense | None, state["dense"], "dense"),
            done=[_round(one) for one in state["done"]],
            undone=[_round(one) for one in state["undone"]],
            pending=None
            if pending is None
            else Cut(
                PruningPlan.from_dict(pending["plan"]),
                typed(tuple[TensorCut, ...], pending["cuts"], "cuts"),
                shifts=typed(Mapping[str, Tensor], pending["shifts"], "shifts"),
                number=typed(int, pending["number"], "number"),
                decided=typed(int, pending["decided"], "decided"),
            ),
            votes=typed(list[dict[str, list[int]]], state["votes"], "votes"),
            earlier=typed(int, state.get("earlier", 0), "earlier"),
        )


def _round(state: Mapping[str, Any]) -> PruningRound:
    kinds = {one.name: one.type for one in fields(PruningRound) if one.name != "plan"}
    plain = {name: typed(kind, state[name], name) for name, kind in kinds.items() if name in state}
    return PruningRound(**plain, plan=PruningPlan.from_dict(state["plan"]))
