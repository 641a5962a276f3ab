"""Classes of Python and of libraries whose instances hold other objects, and classes of iterators."""

import argparse
import itertools
import queue
import types
import weakref
from collections import ChainMap, UserDict, UserList
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

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
