"""Errors in a callback's arguments are Lightning's, and stay ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_neurons.errors import ArgumentError

Step = Literal["validation", "training"]
"""Which step of a module the loss comes from."""


class CallbackArgumentError(MisconfigurationException, ArgumentError):
    """An argument of a callback has a value that is not allowed; a ``ValueError`` and Lightning's own error."""


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Turn an ``ArgumentError`` into one that Lightning's users expect."""
    try:
        yield
    except ArgumentError as error:
        raise CallbackArgumentError(str(error)) from error
