"""One callback's part in a session: its measurement, its settings, and the error that has ended it, if any."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.criteria.contract import Need
from lightning_neurons.data.batches import batch_size_of, is_graph, targets_of
from lightning_neurons.data.stratified_sample import Picked, StratifiedSample
from lightning_neurons.errors import MeasurementError, NoLossError
from lightning_neurons.layers.layer import Layer
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.measurement.unmeasured import unmeasured

_TRIES = 8


@dataclass(eq=False)
class Member:
    """One callback's part in a session.

    Attributes:
        measurement: The sums over the data.
        settings: The settings of the measurement.
        replay: Computes the loss of a batch; None if no criterion needs gradients.
        sample: Picks the samples for gradients; None if no criterion needs gradients.
        failure: The error that has ended the measurement, or None.
        lost: The error that has ended all that needs gradients, or None.
        missing: The error of the first batch without a loss, or None.
        dataloaders: How many dataloaders the data comes from, one after the other.
        notes: Notes of the report.
    """

    measurement: Measurement
    settings: MeasurementSettings
    replay: StepReplay | None = None
    sample: StratifiedSample | None = None
    failure: Exception | None = None
    lost: Exception | None = None
    missing: NoLossError | None = None
    dataloaders: int = 1
    notes: list[str] = field(default_factory=list)
    _has_graphs: bool = False
    _has_loss: bool = False
    _left_out: int = 0
    _missed: dict[int, float] = field(default_factory=dict)  # by dataloader, how many batches running have had no loss

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Implement the receiver that ``Passes`` expects."""
        return self.measurement.modules

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Implement the receiver that ``Passes`` expects."""
        self.attempt(lambda: self.measurement.learn(layers))

    def receive(
        self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need, inner: Tensor | None = None
    ) -> None:
        """Implement the receiver that ``Passes`` expects."""
        if self.failure is None:
            self.attempt(lambda: self.measurement.receive(layer, activation, gradient, need, inner))

    def start_batch(self, batch: object) -> None:
        """Announce a batch to the measurement."""
        targets = self.settings.targets(batch) if self.settings.by_class else None
        self._has_graphs = self._has_graphs or is_graph(batch)
        self.measurement.start_batch(rows_in(batch), targets)

    def attempt(self, action: Callable[[], None]) -> None:
        """Run an action; an error ends this measurement only, and is kept."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
            self.failure = error

    def add_note(self, note: str) -> None:
        """Add a note to the report, once."""
        if note and note not in self.notes:
            self.notes.append(note)

    def forget(self) -> None:
        """Drop the errors: their tracebacks hold frames that hold this member."""
        self.failure = self.lost = self.missing = None

    def pick(self, batch: object, place: tuple[int, int], picked: list[Picked], *, whole: bool) -> None:
        """Add to ``picked`` what of a batch, and of those before, is to be differentiated now."""
        assert self.sample is not None, "members without a sample are in no group"
        picked += self.sample.add(batch, targets_of(batch), place, whole=whole)

    def expects_loss(self, dataloader: int) -> bool:
        """Return False once the first batches of a dataloader have had no loss: then no more of them are run for it."""
        return self._missed.get(dataloader, 0) < _TRIES

    def pass_over(self, batch: object) -> None:
        """Count a batch that is not run for its loss."""
        assert self.sample is not None, "members without a sample are in no group"
        self.sample.seen += batch_size_of(batch)
        self._left_out += batch_size_of(batch)

    def found_loss(self, dataloader: int) -> None:
        """Record that a batch of this dataloader has a loss."""
        self._has_loss = True
        self._missed[dataloader] = -math.inf

    def miss_loss(self, batch: object, dataloader: int, why: NoLossError) -> None:
        """Record that a batch has no loss; other samples are picked in its place."""
        assert self.sample is not None, "members without a sample are in no group"
        self.missing = self.missing or why
        self._missed[dataloader] = self._missed.get(dataloader, 0) + 1
        self._left_out += batch_size_of(batch)
        self.sample.give_back(batch_size_of(batch))

    @property
    def why_without_loss(self) -> NoLossError | None:
        """The error that says why no batch had a loss; None if one had."""
        return None if self._has_loss else self.missing

    def has_sensitivity(self, decide: Callable[..., bool]) -> bool:
        """Return True if gradients were measured in some process; otherwise set ``lost`` to the error.

        Args:
            decide: Reduces a bool over all processes with "all" or "any"; call this method in each of them.
        """
        all_well, any_loss = decide(self.lost is None, all=True), decide(self._has_loss, all=False)
        all_have = decide(self.missing is None, all=True)
        if all_well and (any_loss or all_have):
            if self.missing is None and not all_have:
                self.add_note("sensitivity leaves out batches of another process that have no loss")
            return True
        self.lost = self.lost or self.missing
        return False

    def described(self) -> list[str]:
        """Return the report's notes on data that was left out, joined or not measured."""
        notes = list(self.notes)
        if self.missing is not None and self.lost is None:
            notes.append(f"sensitivity leaves out {self._left_out} samples whose batches have no loss: {self.missing}")
        if self.dataloaders > 1:
            notes.append(f"measured on all {self.dataloaders} dataloaders together")
        if self._has_graphs:
            notes.append("graphs: every row of a layer's output (a node, an edge or a graph) counts as a sample")
        return [*notes, *unmeasured(self.measurement)]

    def rest(self) -> list[Picked]:
        """Return the samples that were picked and whose gradients were not computed yet."""
        return [] if self.sample is None else self.sample.rest()

    @property
    def replay_key(self) -> tuple[Any, ...] | None:
        """The key of the replay, which members with the same key share; None for a member without one."""
        if self.replay is None or self.sample is None or self.lost is not None:
            return None
        s, r = self.settings, self.replay
        return r.step, r.loss_fn, s.loss_reduction, s.inputs, s.eps, self.sample.max_samples


def rows_in(batch: object) -> int | None:
    """Return the number of samples in a batch; None if it is not that of the rows of layers, as in graphs."""
    try:
        return None if is_graph(batch) else batch_size_of(batch)
    except MeasurementError:
        return None


def together(members: list[Member], action: Callable[[], None]) -> None:
    """Run an action that several measurements share; an error ends all of them."""
    if members:
        members[0].attempt(action)
    for member in members:
        member.failure = member.failure or members[0].failure


def gradients_together(members: list[Member], action: Callable[[], None], *, all_rests_on_it: bool) -> None:
    """Run a shared action for gradients: an error ends activity too only where both come of the same passes."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
        for member in members:
            if all_rests_on_it:
                member.failure = member.failure or error
            else:
                member.lost = member.lost or error
