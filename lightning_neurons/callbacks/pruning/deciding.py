"""Decision on a cut: made by the first process for all, from the measurements of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_neurons.callbacks.pruning.followers import Found
from lightning_neurons.callbacks.pruning.settings import PruningSettings
from lightning_neurons.callbacks.pruning.training_trial import TrainingTrial, failing
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.processes import costing_a_round, in_one_process
from lightning_neurons.callbacks.trainer.runner import Runner
from lightning_neurons.errors import PruningError
from lightning_neurons.isolation.copying import finally_hooked_parameters
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.weight_shifts import Wiring
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.decision import Evidence, candidates_of, gather, lossless_candidates, score
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.planning import allocations
from lightning_neurons.pruning.preparation import prepare
from lightning_neurons.pruning.rounds import Rounds
from lightning_neurons.pruning.selection.budget_fill import Dense
from lightning_neurons.pruning.selection.lossless import without_loss
from lightning_neurons.pruning.selection.select import select
from lightning_neurons.pruning.structure.followers import joined, shifts_with_followers
from lightning_neurons.pruning.structure.norm_streams import Norms
from lightning_neurons.pruning.structure.structure import Structure, discover
from lightning_neurons.pruning.surgery.surgery import TensorCut, cuts_of, stays_of
from lightning_neurons.results.neuron_report import NeuronReport


@dataclass(frozen=True)
class Survey:
    """The model's structure, sent from the deciding process to the others.

    Attributes:
        dense: The model before any cut.
        unprunable: Layers that cannot be cut, with the reason; without those that make the output.
        wiring: The connections between layers.
        ways_left: How many ways of running the model have not been tried.
        norms: Modules that may take their statistics over the neurons that stay.
    """

    dense: Dense
    unprunable: tuple[str, ...]
    wiring: Wiring
    ways_left: int
    norms: Norms


@dataclass(frozen=True)
class Verdict:
    """The result of a decision, sent from the deciding process to the others.

    Attributes:
        vote: The neurons that this measurement alone would remove, in original indices.
        candidates: Alternatives for the cut, with plans in original indices; none if no round is due.
        notes: Reasons why less is removed than the budget asks for.
    """

    vote: dict[str, list[int]]
    candidates: tuple[Cut, ...]
    notes: tuple[str, ...]

    @property
    def unmet(self) -> list[str]:
        """Notes on a budget that cannot be met: how close the cut comes, and what limits it; empty if it is met."""
        found = [note for note in self.notes if "not reached" in note]
        limits = [note for note in self.notes if note.startswith("as narrow as")]
        return ["; ".join([*found, *limits])] if found else []


class Decision:
    """One decision of all processes together.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        runner: Runs it on validation data; the deciding process has one.
        settings: The settings of the callback.
        rounds: The rounds so far.
        left_whole: By root, groups that training needs whole, with the reason; updated with those that are found.
        alike: Networks in the module that follow others, which are cut together, or that may.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        runner: Runner | None,
        settings: PruningSettings,
        rounds: Rounds,
        left_whole: dict[str, str],
        alike: Found,
    ) -> None:
        self.trainer, self.pl_module, self.runner = trainer, pl_module, runner
        self.settings, self.rounds, self.left_whole = settings, rounds, left_whole
        self._alike = alike
        self._structure: Structure | None = None  # of the deciding process
        self.survey: Survey = in_one_process(trainer, self._look)
        while runner is not None and runner.ways_left > self.survey.ways_left and runner.take_another(pl_module):
            pass  # all processes run the module in the same way
        self._evidence = Evidence()

    def gather(self, budget: PruningBudget, calibration: Calibration) -> None:
        """Collect activations of downstream layers, if the budget's criterion needs them."""
        with costing_a_round(self.trainer):
            lossless = self.settings.lossless
            self._evidence = gather(self.pl_module, budget, calibration, self.survey.wiring, lossless=lossless)

    def judge(
        self,
        budgets: Sequence[PruningBudget],
        report: NeuronReport | None,
        seed: int,
        *,
        is_due: bool,
        trial: TrainingTrial | None = None,
    ) -> Verdict:
        """Choose neurons to remove; groups that training turns out to need are left whole, and others chosen.

        Args:
            budgets: The budget of this round, and the final one, by which measurements vote.
            report: The latest measurement, if there is one.
            seed: Of random scores.
            is_due: Whether a round is due; else only the vote counts.
            trial: Tries training steps in this process.

        Returns:
            The vote, the candidates and the notes, the same in every process.

        Raises:
            PruningError: If the deciding process failed, in every process.
        """
        while True:
            verdict: Verdict = in_one_process(self.trainer, lambda: self._judge(budgets, report, seed, is_due))
            failed = {} if trial is None else self._failing(verdict, trial)
            if not failed:
                return verdict
            self.left_whole.update(failed)

    def _failing(self, verdict: Verdict, trial: TrainingTrial) -> dict[str, str]:
        found: dict[str, str] = {}
        for candidate in verdict.candidates:

            def part(roots: Sequence[str], units: Mapping[str, Sequence[int]] = candidate.units) -> list[TensorCut]:
                assert self._structure is not None, "the deciding process has looked"
                return cuts_of([self._structure.groups[root] for root in roots], units)

            with costing_a_round(self.trainer):
                found |= failing(self.trainer, trial, [*candidate.units], part, self.survey.norms)
        return found

    def prepare(self, verdict: Verdict, calibration: Calibration, number: int) -> Cut:
        """Compute the compensation of each candidate.

        Returns:
            The candidate with the lowest loss, ready to be cut.

        Raises:
            PruningError: If a lossless cut would change the outputs.
        """
        settings, wiring = self.settings, self.survey.wiring
        with costing_a_round(self.trainer):
            if settings.lossless:
                constants = self._evidence.constants
                prepared = without_loss(self.pl_module, verdict.candidates, constants, calibration, wiring)
            else:
                prepared = prepare(
                    self.pl_module,
                    verdict.candidates,
                    calibration,
                    wiring,
                    how=settings.compensation,
                    reestimate_norms=settings.reestimate_norms,
                )
        shifts = shifts_with_followers(prepared.shifts, self._alike.followers, {*wiring.calls})
        compensated = {name.rpartition(".")[0] for name in shifts.keys() - prepared.shifts.keys()}
        silent = {f"{path} is not compensated: it did not run" for path in compensated}
        plan = replace(prepared.plan, notes=tuple(note for note in prepared.plan.notes if note not in silent))
        return replace(prepared, plan=plan, shifts=shifts, number=number, decided=self.trainer.current_epoch)

    def _look(self) -> Survey:
        assert self.runner is not None, "the first process has had a batch"
        self._structure = joined(self._discover(self.runner), self._alike.followers)
        structure = self._without_left_whole()
        found, ignored = [], self.settings.budget.ignores(list(structure.widths))
        for root, reason in structure.refused.items():
            layers = structure.groups[root].layers
            if not {*layers} & {*structure.coupling.ends, *ignored}:
                found.append(f"{root}: {reason}")
        unseen = (
            f"{name}: {reason}"
            for name, reason in structure.unseen.items()
            if not any(_is_in(name, path) for path in self._alike.untrained)
        )
        return Survey(
            self.rounds.dense or Dense.of(structure),
            (*found, *unseen),
            structure.wiring,
            self.runner.ways_left,
            structure.preflight.norms,
        )

    def _discover(self, runner: Runner) -> Structure:
        """Return the module's structure, in the first way of running it that reaches the most layers."""
        best, chosen = self._followed(runner), runner
        for other in runner.other_ways(self.pl_module) if best.coupling.unseen else ():
            found = self._seeing_more(best, other)
            if found is not None:
                best, chosen = found, other
        runner.become(chosen)
        return best

    def _followed(self, runner: Runner) -> Structure:
        """Return the structure in the first way of running the module that can be traced at all."""
        try:
            return discover(self.pl_module, runner.example, self.settings.norm_streams)
        except PruningError as error:
            while runner.take_another(self.pl_module):
                try:
                    return discover(self.pl_module, runner.example, self.settings.norm_streams)
                except PruningError:
                    continue
            told = "; one of forward and validation_step has to be differentiable, and neither is"
            raise PruningError(f"{error}{told}") from error

    def _seeing_more(self, known: Structure, runner: Runner) -> Structure | None:
        """Return the structure in another way, or None if it reaches no more layers or loses some that could be cut."""
        if not runner.runs_any(self.pl_module, known.coupling.unseen):
            return None
        try:
            found = discover(self.pl_module, runner.example, self.settings.norm_streams)
        except PruningError:
            return None
        more = found.coupling.unseen.keys() < known.coupling.unseen.keys()
        return _also_refusing(found, known) if more and _cuttable(known) <= _cuttable(found) else None

    def _without_left_whole(self) -> Structure:
        structure = self._structure
        assert structure is not None, "the deciding process has looked"
        known = {root: reason for root, reason in self.left_whole.items() if root in structure.groups}
        for path, reason in self._alike.unclear.items():
            known |= {root: reason for root, g in structure.groups.items() if any(_is_in(n, path) for n in g.layers)}
        if hooked := {*finally_hooked_parameters(self.pl_module)}:
            for group in structure.offered.values():
                if held := hooked & stays_of(self.pl_module, cuts_of([group], {group.root: [0]})).keys():
                    known[group.root] = (
                        f"{min(held)} has a hook that runs when its gradient is complete, and what it holds, such as "
                        "an optimizer of its own, cannot be cut"
                    )
        return replace(structure, refused={**known, **structure.refused})

    def _judge(self, budgets: Sequence[PruningBudget], report: NeuronReport | None, seed: int, is_due: bool) -> Verdict:
        structure, dense, patience = self._without_left_whole(), self.survey.dense, self.settings.patience
        budget, final = budgets[0], budgets[-1]
        if patience > 1:  # measurements are compared neuron by neuron
            budget = replace(budget, scope=budget.scopes[0])
        before = Rounds(dense, self.rounds.done).plan
        scores, notes = score(structure, self.pl_module, budget, report=report, evidence=self._evidence, seed=seed)
        choices = allocations(structure, budget, scores, dense=dense)
        last = choices[0] if patience == 1 else select(structure, scores, final, dense)
        mine = PruningPlan({n: tuple(v) for n, v in structure.neurons(last.units).items()}).lifted(before)
        vote = {layer: list(neurons) for layer, neurons in mine.neurons.items()}
        votes = self.rounds.votes[len(self.rounds.votes) - patience + 1 :] if patience > 1 else []
        if not is_due or len(votes) < patience - 1:
            return Verdict(vote, (), (*choices[0].notes, *notes))
        earlier = [PruningPlan({n: tuple(v) for n, v in old.items()}).lowered(before).neurons for old in votes]
        if self.settings.lossless:
            options: dict[str, Any] = {"dense": dense, "earlier": earlier}
            found, _ = lossless_candidates(structure, self.pl_module, budget, self._evidence, report, **options)
        else:
            found = candidates_of(structure, budget, choices, earlier)
        lifted = (replace(one, plan=replace(one.plan.lifted(before), notes=(*one.plan.notes, *notes))) for one in found)
        return Verdict(vote, tuple(lifted), (*found[0].plan.notes, *notes))


def _cuttable(structure: Structure) -> set[str]:
    return {layer for group in structure.offered.values() for layer in group.layers}


def _also_refusing(structure: Structure, other: Structure) -> Structure:
    """Return a structure that also refuses the groups refused in another way of running the module."""
    why = {layer: reason for root, reason in other.refused.items() for layer in other.groups[root].layers}
    layers = {root: next((n for n in group.layers if n in why), None) for root, group in structure.groups.items()}
    refused = {root: why[layer] for root, layer in layers.items() if layer is not None}
    coupling = replace(structure.coupling, ends=structure.coupling.ends | other.coupling.ends)
    return replace(structure, refused={**structure.refused, **refused}, coupling=coupling)


def _is_in(path: str, network: str) -> bool:
    return f"{path}.".startswith(f"{network}.")
