"""What a validation leaves to decide with: its first samples, a way of running the module, and steps to try."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning_neurons.callbacks.pruning.training_trial import BATCHES, TrainingTrial
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.runner import KeptBatches, Runner
from lightning_neurons.isolation.isolation import kept_random_state


class Samples:
    """The data of one process that a round is decided with.

    Attributes:
        kept: The first validation samples, as many as are asked for.
        runner: Runs the module on a validation batch; None before the first.
        trial: Training batches on which steps are tried without the neurons of a cut; None if there are none.
    """

    def __init__(self) -> None:
        self.kept = KeptBatches(0)
        self.runner: Runner | None = None
        self.trial: TrainingTrial | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "runner": None, "trial": None}  # they belong to a running fit

    def add_training(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep one of the first training batches of an epoch, to try steps on."""
        if batch_idx < BATCHES:
            if batch_idx == 0 or self.trial is None:
                self.trial = TrainingTrial(trainer, pl_module)
            self.trial.add(batch, batch_idx)

    def load_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the first training batches of a new iterator, where a resume has left them out."""
        self.trial = TrainingTrial(trainer, pl_module)
        for batch, batch_idx in _first_batches(trainer, BATCHES):
            self.trial.add(batch, batch_idx)

    def begin(self, max_samples: int) -> None:
        """Begin a validation, of which at most so many samples are kept."""
        self.runner, self.kept = None, KeptBatches(max_samples)

    def add(self, batch: object, make_runner: Callable[[], Runner]) -> None:
        """Keep samples of a validation batch; find out how to run the module, on the first."""
        if self.runner is None:
            self.runner = make_runner()
        self.kept.add(batch)
        if self.trial is not None:
            self.trial.add_validation(batch)

    def take_trial(self) -> TrainingTrial | None:
        """Return the trial of training steps, and keep it no longer."""
        trial, self.trial = self.trial, None
        return trial

    def drop_kept(self) -> None:
        """Drop the samples, but not the way of running the module."""
        self.kept = KeptBatches(0)

    def leave(self) -> None:
        """Drop everything."""
        self.begin(0)
        self.trial = None


def _first_batches(trainer: Trainer, count: int) -> Iterator[tuple[Any, int]]:
    """Yield the first training batches as the step gets them, with their index, from a new iterator."""
    loader, pl_module = trainer.fit_loop._combined_loader, trainer.lightning_module
    assert loader is not None, "training has data"
    with kept_random_state(pl_module):
        for batch, batch_idx, _ in iter(type(loader)(loader.iterables, loader._mode)):
            if batch_idx >= count:
                return
            moved = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            yield trainer.strategy.batch_to_device(moved, dataloader_idx=0), batch_idx
