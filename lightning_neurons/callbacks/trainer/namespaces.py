"""Base class of our callbacks: a callback of both of Lightning's namespaces, so that either Trainer takes it.

``Trainer`` and ``LightningModule`` are the types of either namespace; type checkers see those of ``lightning.pytorch``,
as a method cannot override two whose arguments have different types.

Each namespace, when it is loaded, makes itself the one that Lightning's messages come from and whose deprecations are
shown. A set-up of ``logging.getLogger("lightning.pytorch")`` would be lost by our loading the other one, so the
namespace that was there before keeps its place.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import lightning_utilities.core.rank_zero as messages

_NAMESPACES = {"lightning.pytorch", "pytorch_lightning"}


@contextmanager
def first_keeps_its_place() -> Iterator[None]:
    """Load namespaces of Lightning, without taking the place of one that has been loaded before."""
    taken = not _NAMESPACES.isdisjoint(sys.modules)
    logger, deprecation = messages.log, messages.rank_zero_deprecation_category
    yield
    if taken:
        messages.log, messages.rank_zero_deprecation_category = logger, deprecation


with first_keeps_its_place():
    import lightning.pytorch
    import pytorch_lightning


if TYPE_CHECKING:
    from lightning.pytorch import Callback as EitherCallback
    from lightning.pytorch import LightningModule, Trainer
else:
    Trainer = lightning.pytorch.Trainer | pytorch_lightning.Trainer
    LightningModule = lightning.pytorch.LightningModule | pytorch_lightning.LightningModule

    class EitherCallback(lightning.pytorch.Callback, pytorch_lightning.Callback):
        """A callback for the Trainers of ``lightning`` and of ``pytorch_lightning``."""


def callbacks_of(trainer: Trainer) -> list[EitherCallback]:
    """Return a Trainer's callbacks, an attribute that its class does not declare."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return True in a trial run of a few batches, an attribute that its class does not declare."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def running(trainer: Trainer) -> str:
    """Return what a Trainer runs: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""
    assert trainer.state.fn is not None, "called from a hook"
    return trainer.state.fn.value


__all__ = [
    "EitherCallback",
    "LightningModule",
    "Trainer",
    "callbacks_of",
    "first_keeps_its_place",
    "is_fast_dev_run",
    "running",
]
