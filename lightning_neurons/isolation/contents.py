"""Contents of mutable objects: kept, compared, and put back into the same object.

Nothing here calls an object's hash or equality: those may be the user's code (the hash of a metric depends on its
states), and an object is written to only if its content has changed.

Classes of Python and of libraries whose instances hold other objects are listed here, with classes of iterators.
"""

import argparse
import itertools
import queue
import types
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Collection
from contextvars import ContextVar
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lightning_neurons.isolation.tensors import version_of

HOLDERS: tuple[type, ...] = (
    types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap, queue.Queue, LRScheduler,
    weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary,
)  # fmt: skip
"""Classes whose content is in their attributes."""

_EMPTY: tuple[Any, ...] = ([], (), {}, {}.values(), {}.items(), set(), "", b"", range(0))
ITERATORS: tuple[type, ...] = (
    *(type(iter(empty)) for empty in _EMPTY),
    enumerate, zip, map, filter, reversed, itertools.count, itertools.cycle, itertools.repeat, itertools.chain,
    itertools.islice, itertools.product, itertools.permutations, itertools.combinations, itertools.accumulate,
)  # fmt: skip
"""Iterators, whose position cannot be set."""


_MISSING: Any = object()


class Content:
    """The content of one object at the time when this was made."""

    __slots__ = ()

    def has_changed(self) -> bool:
        """Return whether the object's content is another one now."""
        return not self._is_same()

    def put_back(self) -> bool:
        """Put the content back into the object.

        Returns:
            False if that was needed and not possible.
        """
        return self._is_same() or self._refill()

    def _is_same(self) -> bool:
        raise NotImplementedError

    def _refill(self) -> bool:
        raise NotImplementedError


class Entries(Content):
    """The entries of a dict, or the attributes of an object as its ``__dict__`` has them, in their order.

    Args:
        thing: The dict, of any class.
    """

    __slots__ = ("_base", "_keys", "_thing", "_values")

    def __init__(self, thing: dict[Any, Any]) -> None:
        self._thing = thing
        self._base: Any = OrderedDict if isinstance(thing, OrderedDict) else dict  # whatever a class of its own does
        self._keys, self._values = list(self._base.keys(thing)), list(self._base.values(thing))

    def _is_same(self) -> bool:
        thing, base = self._thing, self._base
        return _are(base.keys(thing), self._keys) and _are(base.values(thing), self._values)

    def _refill(self) -> bool:
        thing, base = self._thing, self._base
        kept = dict(zip(self._keys, self._values, strict=True))
        for key in [key for key in base.keys(thing) if key not in kept]:
            base.__delitem__(thing, key)
        for key, value in kept.items():
            base.__setitem__(thing, key, value)
        if not _are(base.keys(thing), self._keys):
            for key, value in kept.items():
                base.__delitem__(thing, key)
                base.__setitem__(thing, key, value)
        return True


class Items(Content):
    """The items of a list, a deque, an array or a bytearray.

    Args:
        thing: The sequence.
        base: The class whose methods are used, whatever a class of its own does.
    """

    __slots__ = ("_base", "_items", "_thing")

    def __init__(self, thing: Any, base: Any) -> None:
        self._thing, self._base, self._items = thing, base, list(base.__iter__(thing))

    def _is_same(self) -> bool:
        if self._base in (list, deque):
            return _are(self._thing, self._items)
        return list(self._thing) == self._items  # numbers, each time made anew

    def _refill(self) -> bool:
        if hasattr(self._base, "clear"):
            self._base.clear(self._thing)
        else:
            del self._thing[:]
        self._base.extend(self._thing, self._items)
        return True


class Members(Content):
    """The members of a set."""

    __slots__ = ("_members", "_thing")

    def __init__(self, thing: set[Any]) -> None:
        self._thing, self._members = thing, set(set.__iter__(thing))

    def _is_same(self) -> bool:
        return set.__eq__(self._thing, self._members)

    def _refill(self) -> bool:
        set.clear(self._thing)
        set.update(self._thing, self._members)
        return True


class Values(Content):
    """The values of an array of numpy that may be written."""

    __slots__ = ("_thing", "_values")

    def __init__(self, thing: np.ndarray[Any, Any]) -> None:
        self._thing, self._values = thing, thing.copy()

    def _is_same(self) -> bool:
        if self._thing.dtype.hasobject:
            return _are(list(self._thing.flat), list(self._values.flat))
        return self._thing.tobytes() == self._values.tobytes()  # NaN is the same as NaN

    def _refill(self) -> bool:
        self._thing[...] = self._values
        return True


class Numbers(Content):
    """The values of a tensor, its memory, its ``.grad`` and whether it requires one.

    Args:
        thing: A tensor.
        copied: Whether to keep a copy of the values; else a change of them is noticed but cannot be undone.
    """

    __slots__ = ("_alias", "_asks", "_copy", "_grad", "_is_leaf", "_sum", "_thing", "_version")

    def __init__(self, thing: Tensor, *, copied: bool) -> None:
        self._thing, self._alias, self._version = thing, thing.data, version_of(thing)
        self._copy = self._alias.clone() if copied else None
        self._sum = None if copied else _sum_of(self._alias)
        self._asks, self._is_leaf = thing.requires_grad, thing.is_leaf
        self._grad = thing.grad if self._is_leaf else None

    def has_changed(self) -> bool:
        """Return whether the tensor was written into, also where the values are the same again."""
        return version_of(self._thing) != self._version or not self._is_same()

    def put_back(self) -> bool:
        """Put the values back; those on an accelerator without waiting to compare them.

        Returns:
            False if that was needed and not possible.
        """
        is_near = self._copy is None or self._alias.device.type == "cpu"
        return (is_near and self._is_same()) or self._refill()

    def _is_same(self) -> bool:
        thing = self._thing
        return (
            thing.requires_grad is self._asks
            and not (self._is_leaf and thing.grad is not self._grad)
            and self._is_in_place()
            and self._has_values()
        )

    def _refill(self) -> bool:
        thing = self._thing
        if self._copy is not None:
            self._alias.copy_(self._copy)
        if not self._is_in_place():
            thing.data = self._alias
        if thing.requires_grad is not self._asks and thing.is_leaf:
            thing.requires_grad_(self._asks)
        if self._is_leaf:
            thing.grad = self._grad
        return self._copy is not None or self._has_values()

    def _is_in_place(self) -> bool:
        now, then = self._thing, self._alias
        return now.dtype is then.dtype and now.device == then.device and now.is_set_to(then)

    def _has_values(self) -> bool:
        if self._copy is None:
            return self._sum == _sum_of(self._alias)
        try:
            return torch.equal(self._alias, self._copy)
        except RuntimeError:  # not every type of number can be compared
            return False


class Version(Content):
    """The number of writes into a tensor that is not one piece of memory (sparse, nested, quantized)."""

    __slots__ = ("_thing", "_version")

    def __init__(self, thing: Tensor) -> None:
        self._thing, self._version = thing, version_of(thing)

    def _is_same(self) -> bool:
        return version_of(self._thing) == self._version

    def _refill(self) -> bool:
        return False


class Place(Content):
    """A place that holds a value, or nothing: an attribute in a slot, a cell of a closure, a name of a module.

    Args:
        get: Returns the value; raises AttributeError, LookupError or ValueError where there is none.
        put: Sets the value.
        clear: Empties the place.
    """

    __slots__ = ("_clear", "_get", "_put", "value")

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], Any], clear: Callable[[], Any]) -> None:
        self._get, self._put, self._clear = get, put, clear
        self.value = self._now()

    def _now(self) -> Any:
        try:
            return self._get()
        except (AttributeError, LookupError, ValueError):
            return _MISSING

    def _is_same(self) -> bool:
        return self._now() is self.value

    def _refill(self) -> bool:
        if self.value is _MISSING:
            self._clear()
        else:
            self._put(self.value)
        return True


class Body(Content):
    """The attributes of a class."""

    __slots__ = ("_body", "_thing")

    def __init__(self, thing: type) -> None:
        self._thing, self._body = thing, dict(vars(thing))

    def _is_same(self) -> bool:
        now = vars(self._thing)
        return _are(now.keys(), list(self._body)) and _are(now.values(), list(self._body.values()))

    def _refill(self) -> bool:
        now = dict(vars(self._thing))
        for name in now.keys() - self._body.keys():
            type.__delattr__(self._thing, name)
        for name, value in self._body.items():
            if now.get(name, _MISSING) is not value:
                type.__setattr__(self._thing, name, value)
        return True


class Mark(Content):
    """A state that is read by one function and, where possible, set by another.

    Args:
        get: Returns the state, as a tensor or as an object whose ``repr`` tells it from others.
        put: Sets it; None where that is impossible.
    """

    __slots__ = ("_get", "_put", "_state")

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], Any] | None = None) -> None:
        self._get, self._put = get, put
        self._state = get()

    def _is_same(self) -> bool:
        now, then = self._get(), self._state
        return torch.equal(now, then) if isinstance(now, Tensor) else repr(now) == repr(then)

    def _refill(self) -> bool:
        if self._put is not None:
            self._put(self._state)
        return self._put is not None


def of_cell(cell: types.CellType) -> Place:
    """Return the place of a closure's variable."""
    return Place(
        lambda: cell.cell_contents,
        lambda value: setattr(cell, "cell_contents", value),
        lambda: delattr(cell, "cell_contents"),
    )


def of_name(names: dict[str, Any], name: str) -> Place:
    """Return the place of a module's global variable."""
    return Place(lambda: names[name], lambda value: names.__setitem__(name, value), lambda: names.pop(name, None))


def of_variable(variable: "ContextVar[Any]") -> Place:
    """Return the place of a context variable, which cannot be emptied again."""
    return Place(variable.get, variable.set, lambda: None)


def of_slot(thing: Any, slot: types.MemberDescriptorType) -> Place:
    """Return the place of an attribute that has a slot."""
    return Place(lambda: slot.__get__(thing), lambda value: slot.__set__(thing, value), lambda: slot.__delete__(thing))


def _are(now: Collection[Any], then: list[Any]) -> bool:
    """Return whether there are the same objects, in the same order."""
    return len(now) == len(then) and all(map(is_, now, then))


def _sum_of(tensor: Tensor) -> int | None:
    """Return the sum of a tensor's bits as integers, which nearly every change of its values changes."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    return None if kind is None else int(tensor.view(kind).sum())
