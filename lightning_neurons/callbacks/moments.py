"""Moments of the training that follows: what a step does may hang on the epoch, the batch, or the steps before."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from lightning_neurons.callbacks.resume import batches_trained

STEPS, EPOCHS = 10, 10
"""How many first batches of the next epoch, and how many epochs after it, are moments of their own."""


@dataclass(frozen=True)
class Moment:
    """A step of training, or the end of an epoch.

    Attributes:
        kind: Which of the two.
        epoch: Its epoch.
        batch_idx: The batch in that epoch; of an end, the last.
        step: How many steps optimizers will have made by then.
        is_last: Whether no batch follows in that epoch.
    """

    kind: Literal["step", "end"]
    epoch: int
    batch_idx: int
    step: int
    is_last: bool


def moments_to_come(trainer: Any) -> list[Moment]:
    """The first batches and the last one of the next epoch, the first of some later epochs, and the last epoch.

    Something that begins at an epoch or a step, or that happens with every n-th, is met by one of them if n is small.

    Args:
        trainer: In the validation of an epoch.
    """
    now, progress = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress
    batches = progress.current.ready if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)
    rate = trainer.global_step / max(batches_trained(trainer), 1)

    def moment(kind: Literal["step", "end"], epoch: int, batch_idx: int) -> Moment:
        ahead = (epoch - now) * batches + batch_idx - progress.current.ready
        return Moment(kind, epoch, batch_idx, trainer.global_step + int(rate * ahead), batch_idx == batches - 1)

    final = trainer.max_epochs - 1 if trainer.max_epochs and trainer.max_epochs > 0 else now + EPOCHS + 1
    places = [*range(min(STEPS, batches)), *([batches - 1] if batches > STEPS else [])]
    found = [moment("step", now + 1, batch_idx) for batch_idx in places]
    found.append(moment("end", now + 1, batches - 1))
    later = {epoch for epoch in range(now + 2, now + 2 + EPOCHS) if epoch < final} | ({final} - {now + 1})
    found += [moment("step", epoch, 0) for epoch in sorted(later)]
    return [*found, *([moment("end", final, batches - 1)] if later else [])]


@contextmanager
def moving(trainer: Any) -> Iterator[Callable[[Moment], None]]:
    """Let a Trainer stand at any moment, as often as wanted; afterwards it is where it was."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    places = [
        (fit.epoch_progress.current, "completed"),
        (epoch.batch_progress.current, "ready"),
        (epoch.batch_progress, "is_last_batch"),
        (epoch.automatic_optimization.optim_progress.optimizer.step.total, "completed"),
        (epoch.manual_optimization.optim_step_progress.total, "completed"),
    ]
    kept = [(thing, name, getattr(thing, name)) for thing, name in [*places, (trainer.state, "stage")]]

    def move(to: Moment) -> None:
        trainer.training = True
        values = to.epoch, to.batch_idx + 1, to.is_last, to.step, to.step
        for (thing, name), value in zip(places, values, strict=True):
            setattr(thing, name, value)

    try:
        yield move
    finally:
        for thing, name, value in kept:
            setattr(thing, name, value)
