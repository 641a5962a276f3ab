"""Later steps and epochs at which training is tried: a step may depend on the epoch, the batch or the global step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from lightning_neurons.callbacks.trainer.namespaces import Trainer

STEPS, EPOCHS = 10, 10
"""Number of batches, and of epochs, from the next epoch on, each of which is tried."""

ROUND = 100, 1000, 10_000
"""Divisors: the next global step that each of them divides is tried too."""


@dataclass(frozen=True)
class Moment:
    """A step of training, or the end of an epoch.

    Attributes:
        kind: A step or the end of an epoch.
        epoch: Its epoch.
        batch_idx: The batch in that epoch; of an end, the last.
        batches: How many batches there will have been before it.
        steps: How many steps optimizers will have made before that batch, and after it.
        is_last: Whether no batch follows in that epoch.
    """

    kind: Literal["step", "end"]
    epoch: int
    batch_idx: int
    batches: int
    steps: tuple[int, int]
    is_last: bool


class Move(Protocol):
    """A function that sets a Trainer's counters."""

    def __call__(self, to: Moment, *, is_over: bool) -> None:
        """Set the counters to those of a moment, before or after its batch."""


def batches_trained(trainer: Trainer) -> int:
    """Return the number of training batches in the whole run, which identifies a validation."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def moments_to_come(trainer: Trainer) -> list[Moment]:
    """Return steps to try: the next batches, the last of the next epoch, the first of some epochs, and epochs' ends.

    Whatever begins at an epoch or a step, or happens at every n-th, happens at one of them if n is small,
    or one of the round numbers by which steps are counted.

    Args:
        trainer: In the validation of an epoch.

    Returns:
        Steps and ends of epochs in the order in which training would reach them.
    """
    now, progress = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress
    here, made, trained = progress.current.ready, trainer.global_step, max(batches_trained(trainer), 1)
    batches = here if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)
    epochs = trainer.max_epochs or -1
    final = epochs - 1 if epochs > 0 else now + EPOCHS + 1
    most = trainer.max_steps if trainer.max_steps > 0 else math.inf

    def moment(kind: Literal["step", "end"], epoch: int, batch_idx: int) -> Moment:
        ahead = (epoch - now) * batches + batch_idx - here
        before, after = (made + count * made // trained for count in (ahead, ahead + 1))
        return Moment(kind, epoch, batch_idx, trained + ahead, (before, after), batch_idx == batches - 1)

    places = {(now + 1 + number // batches, number % batches) for number in (*range(STEPS), batches - 1)}
    places |= {(epoch, 0) for epoch in (*range(now + 2, now + 2 + EPOCHS), final)}
    for number in ROUND if made else ():
        ahead = -(-(number - made % number) * trained // made)
        epochs, batch_idx = divmod(here + ahead, batches)
        places.add((now + epochs, batch_idx))
    steps = [moment("step", *place) for place in sorted(places) if now < place[0] <= final]
    ends = [moment("end", epoch, batches - 1) for epoch in {now + 1, final}]
    found = [*(one for one in steps if one.steps[0] < most), *ends]
    return sorted(found, key=lambda one: (one.epoch, one.kind == "end", one.batch_idx))


@contextmanager
def moving(trainer: Trainer) -> Iterator[Move]:
    """Yield a function that sets a Trainer's counters to any moment, and restore them at the end."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    places = [
        (fit.epoch_progress.current, "completed"),
        (epoch.batch_progress.current, "ready"),
        (epoch.batch_progress.total, "ready"),
        (epoch.batch_progress, "is_last_batch"),
        (epoch.automatic_optimization.optim_progress.optimizer.step.total, "completed"),
        (epoch.manual_optimization.optim_step_progress.total, "completed"),
    ]
    kept = [(thing, name, getattr(thing, name)) for thing, name in [*places, (trainer.state, "stage")]]

    def move(to: Moment, *, is_over: bool) -> None:
        trainer.training = True
        steps = to.steps[is_over]
        values = to.epoch, to.batch_idx + 1, to.batches + 1, to.is_last, steps, steps
        for (thing, name), value in zip(places, values, strict=True):
            setattr(thing, name, value)

    try:
        yield move
    finally:
        for thing, name, value in kept:
            setattr(thing, name, value)
