"""One callback's part in a session: its measurement, how it is measured, and why it was given up, if it was."""

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
        measurement: Where the numbers go.
        settings: How it is measured.
        replay: How to get the loss; None if no criterion needs gradients.
        sample: Which samples are differentiated; None if no criterion needs gradients.
        failure: Why the measurement was dropped, or None.
        lost: Why nothing that needs gradients is measured, or None.
        missing: Why the first batch without a loss has none, or None.
        dataloaders: How many dataloaders the data comes from, one after the other.
        notes: What a reader of the report should know.
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
        """Receiver of ``Passes``."""
        return self.measurement.modules

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Receiver of ``Passes``."""
        self.attempt(lambda: self.measurement.learn(layers))

    def receive(
        self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need, inner: Tensor | None = None
    ) -> None:
        """Receiver of ``Passes``."""
        if self.failure is None:
            self.attempt(lambda: self.measurement.receive(layer, activation, gradient, need, inner))

    def start_batch(self, batch: Any) -> None:
        """Announce a batch to the measurement."""
        targets = self.settings.targets(batch) if self.settings.by_class else None
        self._has_graphs = self._has_graphs or is_graph(batch)
        self.measurement.start_batch(rows_in(batch), targets)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it; if that fails, give up this measurement and nothing else."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
            self.failure = error

    def add_note(self, note: str) -> None:
        """Say something in the report, once."""
        if note and note not in self.notes:
            self.notes.append(note)

    def forget(self) -> None:
        """Let go of what went wrong: its traceback holds frames that hold this member."""
        self.failure = self.lost = self.missing = None

    def pick(self, batch: Any, place: tuple[int, int], picked: list[Picked], *, whole: bool) -> None:
        """Add to ``picked`` what of a batch, and of those before, is to be differentiated now."""
        assert self.sample is not None, "members without a sample are in no group"
        picked += self.sample.add(batch, targets_of(batch), place, whole=whole)

    def expects_loss(self, dataloader: int) -> bool:
        """Whether it is worth while to ask the batches of a dataloader for their loss: not where none has had one."""
        return self._missed.get(dataloader, 0) < _TRIES

    def pass_over(self, batch: Any) -> None:
        """Take note of a batch that is not asked."""
        assert self.sample is not None, "members without a sample are in no group"
        self.sample.seen += batch_size_of(batch)
        self._left_out += batch_size_of(batch)

    def found_loss(self, dataloader: int) -> None:
        """Take note of a batch that has a loss."""
        self._has_loss = True
        self._missed[dataloader] = -math.inf

    def miss_loss(self, batch: Any, dataloader: int, why: NoLossError) -> None:
        """Take note of a batch that has no loss; others are picked in its place."""
        assert self.sample is not None, "members without a sample are in no group"
        self.missing = self.missing or why
        self._missed[dataloader] = self._missed.get(dataloader, 0) + 1
        self._left_out += batch_size_of(batch)
        self.sample.give_back(batch_size_of(batch))

    @property
    def why_without_loss(self) -> NoLossError | None:
        """Why no batch had a loss, if none had."""
        return None if self._has_loss else self.missing

    def has_sensitivity(self, decide: Callable[..., bool]) -> bool:
        """Whether anything that needs gradients was measured, in some process; else ``lost`` says why not.

        Args:
            decide: What all processes find; call this in each of them.
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
        """What the numbers are over, in words."""
        notes = list(self.notes)
        if self.missing is not None and self.lost is None:
            notes.append(f"sensitivity leaves out {self._left_out} samples whose batches have no loss: {self.missing}")
        if self.dataloaders > 1:
            notes.append(f"measured on all {self.dataloaders} dataloaders together")
        if self._has_graphs:
            notes.append("graphs: every row of a layer's output (a node, an edge or a graph) counts as a sample")
        return [*notes, *unmeasured(self.measurement)]

    def rest(self) -> list[Picked]:
        """What has been picked and not differentiated yet."""
        return [] if self.sample is None else self.sample.rest()

    @property
    def replay_key(self) -> tuple[Any, ...] | None:
        """Members with the same key share one replay."""
        if self.replay is None or self.sample is None or self.lost is not None:
            return None
        s, r = self.settings, self.replay
        return r.step, r.loss_fn, s.loss_reduction, s.inputs, s.eps, self.sample.max_samples


def rows_in(batch: Any) -> int | None:
    """How many samples there are, if the rows of layers are those samples; else each layer's first axis has to tell."""
    try:
        return None if is_graph(batch) else batch_size_of(batch)
    except MeasurementError:
        return None


def together(members: list[Member], action: Callable[[], None]) -> None:
    """Do what several measurements wait for; if it fails, it fails for all of them."""
    if members:
        members[0].attempt(action)
    for member in members:
        member.failure = member.failure or members[0].failure


def gradients_together(members: list[Member], action: Callable[[], None], *, all_rests_on_it: bool) -> None:
    """As ``together``, for what needs gradients: activity is measured without, unless all comes of the same passes."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
        for member in members:
            if all_rests_on_it:
                member.failure = member.failure or error
            else:
                member.lost = member.lost or error
