"""Objects that a copy of a model shares with it, as they cannot be copied, such as locks and connections."""

import copy
import csv
import functools
import io
import traceback
import types
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.isolation.model_state import Refusing
from lightning_neurons.isolation.user_code import Users

_HOLDERS = (nn.Module, dict, list, tuple, set, frozenset, deque, types.MethodType, functools.partial, csv.DictWriter)
_CSV_WRITER = type(csv.writer(io.StringIO()))
_HOPELESS = (MemoryError, RecursionError, torch.OutOfMemoryError)


def refused_in(error: Exception, users: Users) -> Any:
    """Find the object that a failed deep copy may share with the original.

    It is the outermost that is neither a part of the model, nor a container or an object of the user's: a queue that
    holds a lock, for example, is shared as a whole.

    Args:
        error: The error that ``copy.deepcopy`` has raised.
        users: Tells which classes are the user's.

    Returns:
        The object, or None if the copy cannot do without.

    Example:
        >>> import queue
        >>> from lightning_neurons.isolation.user_code import Users
        >>> waiting = queue.Queue()
        >>> try:
        ...     copy.deepcopy({"waiting": [waiting]})
        ... except TypeError as error:
        ...     refused_in(error, Users(nn.Module)) is waiting
        True
    """
    if isinstance(error, _HOPELESS):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    copied = [frame.f_locals["x"] for frame in frames if frame.f_code is copy.deepcopy.__code__]
    alien = [thing for thing in copied if not isinstance(thing, _HOLDERS) and not users.own(type(thing))]
    return next(iter(alien), None if not copied or isinstance(copied[-1], nn.Module) else copied[-1])


def stand_in_for(thing: Any) -> Any:
    """Return the object that takes the place of one that cannot be copied.

    A file becomes one whose text is dropped, and an iterator one that refuses; anything else is shared.
    """
    if isinstance(thing, io.IOBase):
        return _sink(thing) if not thing.closed and thing.writable() else thing
    if isinstance(thing, _CSV_WRITER):
        return csv.writer(io.StringIO())
    if hasattr(type(thing), "__next__"):
        return Refusing(f"a {type(thing).__name__}")
    return thing.detach().clone() if isinstance(thing, Tensor) and not thing.is_leaf else thing


def _sink(file: io.IOBase) -> io.IOBase:
    return io.StringIO() if isinstance(file, io.TextIOBase) else io.BytesIO()
