"""What to cut, decided by one process for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_neurons.callbacks.runner import KeptBatches, Runner
from lightning_neurons.errors import ArgumentError, PruningError
from lightning_neurons.network.isolate import eager, isolated
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation import Compensation, InputMeans, fold_means, readers_of
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.planning import choose, decide, units_of
from lightning_neurons.pruning.reach import Dense
from lightning_neurons.pruning.rounds import Pending, Rounds
from lightning_neurons.pruning.structure import Structure, discover
from lightning_neurons.pruning.surgery import Cut, cuts_of
from lightning_neurons.results.neuron_report import NeuronReport


@dataclass(frozen=True)
class Verdict:
    """What the deciding process tells the others.

    Attributes:
        dense: The model before any cut.
        unprunable: What cannot be cut, with the reason; without the layers that make the output.
        vote: What this measurement alone would remove, in original indices.
        plan: What goes, in original indices; None if it is not time yet.
        cuts: The same for every tensor.
        norm_behind: By layer, the norm layer that alone reads it.
        notes: What limits the choice.
    """

    dense: Dense
    unprunable: tuple[str, ...]
    vote: dict[str, list[int]]
    plan: PruningPlan | None
    cuts: tuple[Cut, ...]
    norm_behind: dict[str, str]
    notes: tuple[str, ...]

    @property
    def unmet(self) -> list[str]:
        """How close the budget comes, if it cannot be met, and what limits it."""
        found = [note for note in self.notes if "not reached" in note]
        limits = [note for note in self.notes if note.startswith("as narrow as")]
        return ["; ".join([*found, *limits])] if found else []

    @property
    def problems(self) -> list[str]:
        """What keeps the budget from being met."""
        return [*(f"cannot cut {reason}" for reason in self.unprunable), *self.unmet]


def look(pl_module: Any, runner: Runner, budget: PruningBudget) -> tuple[Structure, tuple[str, ...]]:
    """The structure of a module, and what of it cannot be cut although it is not to be ignored."""
    structure = discover(pl_module, runner.example)
    found, ignored = [], budget.ignores(list(structure.widths))
    for root, reason in structure.refused.items():
        layers = structure.groups[root].layers
        if not {*layers} & {*structure.coupling.ends, *ignored}:
            found.append(f"{root}: {reason}")
    return structure, (*found, *(f"{name}: it is not in the model's graph" for name in structure.coupling.unseen))


def judge(
    pl_module: Any,
    runner: Runner | None,
    budgets: Sequence[PruningBudget],
    report: NeuronReport | None,
    rounds: Rounds,
    is_due: bool,
    patience: int,
    seed: int,
) -> Verdict:
    """Choose what goes now.

    Args:
        pl_module: The module.
        runner: How to run it; the deciding process has one.
        budgets: What is due now, and what is due in the end; by that, measurements vote.
        report: The latest measurement; None for random scores.
        rounds: What has happened so far.
        is_due: Whether a round is due; else only the vote counts.
        patience: How many measurements must agree.
        seed: Of random scores.
    """
    assert runner is not None, "the first process has had a batch"
    budget, final = budgets[0], budgets[-1]
    structure, unprunable = look(pl_module, runner, budget)
    dense = rounds.dense or Dense.of(structure)
    before = Rounds(dense, rounds.done).plan
    choice = choose(structure, budget, report, dense=dense, seed=seed)
    last = choice if patience == 1 else choose(structure, final, report, dense=dense, seed=seed)
    mine = PruningPlan({n: tuple(v) for n, v in structure.neurons(last.units).items()}).lifted(before)
    vote = {layer: list(neurons) for layer, neurons in mine.neurons.items()}
    norms = dict(structure.coupling.norm_behind)
    votes = rounds.votes[len(rounds.votes) - patience + 1 :] if patience > 1 else []
    if not is_due or len(votes) < patience - 1:
        return Verdict(dense, unprunable, vote, None, (), norms, choice.selection.notes)
    earlier = [PruningPlan({n: tuple(v) for n, v in old.items()}).lowered(before).neurons for old in votes]
    plan = decide(structure, budget, choice, earlier)
    cuts = cuts_of(structure.groups.values(), units_of(structure, plan))
    return Verdict(dense, unprunable, vote, plan.lifted(before), tuple(cuts), norms, plan.notes)


def in_one_process(trainer: Any, action: Any) -> Any:
    """Do something in the first process and tell all of them, also how it failed.

    Raises:
        PruningError: If it failed, in every process.
    """
    answer: Any = None
    if trainer.is_global_zero:
        try:
            answer = action()
        except Exception as error:  # noqa: BLE001 (else the other processes would wait for ever)
            known = isinstance(error, ArgumentError | PruningError)
            answer = PruningError(str(error) if known else f"{type(error).__name__}: {error}")
    answer = trainer.strategy.broadcast(answer, 0)
    if isinstance(answer, PruningError):
        raise answer
    return answer


def prepare(
    trainer: Any,
    pl_module: Any,
    runner: Runner | None,
    kept: KeptBatches,
    verdict: Verdict,
    number: int,
    compensation: Compensation,
) -> Pending:
    """Make a decided plan ready to be carried out: measure what compensates for it, in all processes."""
    assert verdict.plan is not None, "only what is decided is prepared"
    shifts: dict[str, Tensor] = {}
    plan = verdict.plan
    if compensation == "mean" and verdict.cuts:
        found = InputMeans(pl_module, readers_of(verdict.cuts))
        with isolated(pl_module), eager():
            pl_module.eval()
            for batch in kept.on(pl_module.device):
                assert runner is not None, "samples were kept, so there was a batch"
                found.observe(partial(runner, pl_module, batch))
        means = found.means(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"))
        repair = fold_means(pl_module, verdict.cuts, means, verdict.norm_behind)
        shifts = {name: shift.cpu() for name, shift in repair.shifts.items()}
        plan = PruningPlan(plan.neurons, plan.widths, plan.reasons, plan.cost, (*plan.notes, *repair.notes))
    return Pending(number, plan, verdict.cuts, shifts)
