"""One callback's part in a session: its measurement, how it is measured, and why it was given up, if it was."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_neurons.callbacks.replay import StepReplay
from lightning_neurons.criteria.contract import Need
from lightning_neurons.network.batches import batch_size_of, targets_of, tensors_of
from lightning_neurons.network.layer import Layer
from lightning_neurons.studies.measurement import Measurement
from lightning_neurons.studies.sample import StratifiedSample
from lightning_neurons.studies.settings import MeasurementSettings


@dataclass(eq=False)
class Member:
    """One callback's part in a session.

    Attributes:
        measurement: Where the numbers go.
        settings: How it is measured.
        replay: How to get the loss; None if no criterion needs gradients.
        sample: Which samples are differentiated; None if no criterion needs gradients.
        failure: Why the measurement was dropped, or None.
    """

    measurement: Measurement
    settings: MeasurementSettings
    replay: StepReplay | None = None
    sample: StratifiedSample | None = None
    failure: Exception | None = None

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Receiver of ``Passes``."""
        return self.measurement.modules

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Receiver of ``Passes``."""
        self.attempt(lambda: self.measurement.learn(layers))

    def receive(self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need) -> None:
        """Receiver of ``Passes``."""
        if self.failure is None:
            self.attempt(lambda: self.measurement.receive(layer, activation, gradient, need))

    def start_batch(self, batch: Any) -> None:
        """Announce a batch to the measurement."""
        targets = self.settings.targets(batch) if self.settings.by_class else None
        sized = bool(tensors_of(batch))  # else each layer's first axis has to tell
        self.measurement.start_batch(batch_size_of(batch) if sized else None, targets)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it; if that fails, give up this measurement and nothing else."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
            self.failure = error

    def pick(self, batch: Any, batch_idx: int, picked: list[Any]) -> None:
        """Add to ``picked`` what of a batch, and of those before, is to be differentiated now."""
        assert self.replay is not None, "members without a replay are in no group"
        assert self.sample is not None, "members without a sample are in no group"
        self.replay.batch_idx = batch_idx
        picked += self.sample.add(batch, targets_of(batch))

    def rest(self) -> list[Any]:
        """What has been picked and not differentiated yet."""
        return [] if self.sample is None else self.sample.rest()

    @property
    def replay_key(self) -> tuple[Any, ...] | None:
        """Members with the same key share one replay."""
        if self.replay is None or self.sample is None:
            return None
        s = self.settings
        return self.replay.loss_fn, s.loss_reduction, s.inputs, s.eps, self.sample.max_samples


def together(members: list[Member], action: Callable[[], None]) -> None:
    """Do what several measurements wait for; if it fails, it fails for all of them."""
    if members:
        members[0].attempt(action)
    for member in members:
        member.failure = member.failure or members[0].failure
