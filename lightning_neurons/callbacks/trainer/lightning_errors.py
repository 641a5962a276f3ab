"""Errors in a callback's arguments, which are both Lightning's and this package's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_neurons.errors import ArgumentError

Step = Literal["validation", "training"]
"""The step of a module that computes the loss."""


class CallbackArgumentError(MisconfigurationException, ArgumentError):
    """An argument of a callback has a value that is not allowed; a ``ValueError`` and Lightning's own error."""


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Turn an ``ArgumentError`` into one that is a ``MisconfigurationException`` too."""
    try:
        yield
    except ArgumentError as error:
        raise CallbackArgumentError(str(error)) from error
