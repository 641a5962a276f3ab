"""Base class of our callbacks: a callback of both of Lightning's namespaces, so that either Trainer takes it.

Each namespace, when it is loaded, makes itself the one that Lightning's messages come from and whose deprecations are
shown. A set-up of ``logging.getLogger("lightning.pytorch")`` would be lost by our loading the other one, so the
namespace that was there before keeps its place.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


class EitherCallback(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
    """A callback for the Trainers of ``lightning`` and of ``pytorch_lightning``."""
