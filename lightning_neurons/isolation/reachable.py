"""All that the user's code can reach from a model and change, found by walking from object to object.

The walk goes through modules, containers, objects of the user's own classes, the bodies of those classes, and what
their functions hold in closures, defaults and the names of their module that they use. It never goes into PyTorch,
Lightning or numpy, nor into datasets, and it calls no object's hash or equality.
"""

import contextvars
import enum
import functools
import gc
import io
import random
import sys
import threading
import types
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_neurons.isolation import contents
from lightning_neurons.isolation.contents import HOLDERS, ITERATORS, Content
from lightning_neurons.isolation.paths import Path
from lightning_neurons.isolation.user_code import Users, names_in

_ORDINARY = {Tensor, nn.Parameter, nn.Buffer}
_MOST = 200_000  # objects; to visit more would take longer than the step
_BOUND = {types.MethodType, types.BuiltinMethodType, types.MethodWrapperType}
_COPIED_BYTES = 2**30  # of parameters, and of everything else
_METRIC_RESULTS = {"_computed", "_forward_cache", "_cache"}

_Visit = Callable[["Reach", Any, Path], None]


class Reach:
    """The mutable objects that code can reach from some objects, with their content now.

    Args:
        roots: Objects where the walk begins. The packages of the first one's class count as the user's.

    Attributes:
        contents: The content of each object, with the path to it.
        metrics: The metrics of torchmetrics. Their states are not in ``contents``: give them other states.
        movable: The tensors and iterators that need a substitute while code runs, each with its path.
        is_whole: Whether all objects have been visited.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        roots = list(roots)
        self.contents: list[tuple[Content, Path]] = []
        self.empty: list[dict[Any, Any] | set[Any]] = []
        self.metrics: list[Metric] = []
        self.movable: list[tuple[Any, Path]] = []
        self.users, self._visits = _known_of(roots[0].__class__)
        self.seen: dict[int, Any] = {}  # alive, so that ids stay unique
        self.classes: set[type] = set()
        self._names: set[tuple[int, str]] = set()
        self._copied = {True: 0, False: 0}
        self._todo: list[tuple[Any, Path]] = [(root, None) for root in reversed(roots)]
        while self._todo and len(self.seen) < _MOST:
            thing, path = self._todo.pop()
            visit = self._visit_of(type(thing))
            if visit is not None and id(thing) not in self.seen:
                self.seen[id(thing)] = thing
                visit(self, thing, path)
        self.is_whole = not self._todo

    def keep(self, content: Content, path: Path) -> None:
        """Add the content of an object."""
        self.contents.append((content, path))

    def go(self, holder: Any, items: Iterable[tuple[Any, Any]], path: Path) -> None:
        """Queue the objects that another one holds for a visit."""
        visits = self._visits
        for key, value in items:
            kind = type(value)
            if (visits[kind] if kind in visits else self._visit_of(kind)) is None:
                continue
            if (kind is OrderedDict or kind is dict or kind is set) and not value:
                self.empty.append(value)  # as most dicts of a module are
                continue
            moves = any(self._visit_of(type(part)) is _movable for part in _runs(value))
            moves = moves or (isinstance(value, Tensor) and _is_replaced(holder, value))
            if moves:
                self.movable.append((value, (holder, key, path)))
            if not moves or isinstance(value, Tensor):  # a holder of the tensor may not be found
                self._todo.append((value, (holder, key, path)))

    def may_copy(self, tensor: Tensor) -> bool:
        """Return whether the values of one more tensor may be copied."""
        kind = isinstance(tensor, nn.Parameter)
        self._copied[kind] += tensor.nbytes
        return self._copied[kind] <= _COPIED_BYTES

    def add_name(self, module: dict[str, Any], name: str, path: Path) -> None:
        """Add a global variable of a module, and visit its value."""
        if (id(module), name) not in self._names:
            self._names.add((id(module), name))
            self.keep(contents.of_name(module, name), (module, name, path))
            if name in module:
                self.go(module, [(name, module[name])], path)

    def _visit_of(self, kind: type) -> _Visit | None:
        if kind not in self._visits:
            self._visits[kind] = self._resolve(kind)
        return self._visits[kind]

    def _resolve(self, kind: type) -> _Visit | None:
        inherited = next((visit for base, visit in _VISITS.items() if issubclass(kind, base)), None)
        if not self.users.own(kind):
            if inherited is None and hasattr(kind, "__next__"):
                return _movable
            return _attributes if inherited is None and self.users.accumulates(kind) else inherited
        if inherited is None:
            return _object
        return _container_and_object if inherited in _CONTAINERS else inherited


@functools.lru_cache(maxsize=64)
def _known_of(kind: type) -> tuple[Users, dict[type, _Visit | None]]:
    """Return what walks from a model of this class share: the user's packages, and how each type is visited."""
    return Users(kind), {}


# -- the visits of each type


def _attributes(reach: Reach, thing: Any, path: Path) -> None:
    try:
        attributes = object.__getattribute__(thing, "__dict__")
    except AttributeError:  # all are in slots
        attributes = {}
    reach.keep(contents.Entries(attributes), path)
    reach.go(attributes, attributes.items(), path)
    if type(thing) not in reach.classes:
        _class(reach, type(thing), path)


def _object(reach: Reach, thing: Any, path: Path) -> None:
    _attributes(reach, thing, path)
    for base in type(thing).__mro__:
        for name, slot in vars(base).items():
            if isinstance(slot, types.MemberDescriptorType) and reach.users.wrote(base.__module__):
                place = contents.of_slot(thing, slot)
                reach.keep(place, path)
                reach.go(thing, [(name, place.value)], path)


def _container_and_object(reach: Reach, thing: Any, path: Path) -> None:
    next(visit for base, visit in _VISITS.items() if isinstance(thing, base))(reach, thing, path)
    _object(reach, thing, path)


def _script(reach: Reach, thing: torch.jit.ScriptModule, path: Path) -> None:
    reach.keep(contents.Mark(lambda: thing.training, lambda mode: setattr(thing, "training", mode)), path)
    for tensors in (thing.named_parameters(), thing.named_buffers()):
        for name, tensor in tensors:
            _tensor(reach, tensor, (thing, name, path))


def _metric(reach: Reach, thing: Metric, path: Path) -> None:
    attributes = vars(thing)
    reach.metrics.append(thing)
    reach.keep(contents.Entries(attributes), path)
    results = thing._defaults.keys() | _METRIC_RESULTS
    reach.go(attributes, [item for item in attributes.items() if item[0] not in results], path)
    _class(reach, type(thing), path)


def _tensor(reach: Reach, thing: Tensor, path: Path) -> None:
    if thing.is_inference():
        return
    if type(thing) not in _ORDINARY and (nn.parameter.is_lazy(thing) or _wraps(thing)):
        return
    if thing.layout is torch.strided and not (thing.is_quantized or thing.is_nested or thing.is_meta):
        reach.keep(contents.Numbers(thing, copied=reach.may_copy(thing)), path)
    else:
        reach.keep(contents.Version(thing), path)


def _is_replaced(holder: Any, tensor: Tensor) -> bool:
    """Return whether a copy stands in for a tensor meanwhile, so that a buffer keeps even its version."""
    if tensor.is_inference():
        return True
    return isinstance(holder, dict) and not isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _wraps(thing: Tensor) -> bool:
    """Return whether a tensor is of a class that wraps other tensors, which may be anywhere."""
    return type(thing).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _dict(reach: Reach, thing: dict[Any, Any], path: Path) -> None:
    reach.keep(contents.Entries(thing), path)
    base: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
    reach.go(thing, base.items(thing), path)
    reach.go(thing, ((None, key) for key in base.keys(thing)), path)


def _list(reach: Reach, thing: list[Any], path: Path) -> None:
    reach.keep(contents.Items(thing, list), path)
    reach.go(thing, enumerate(list.__iter__(thing)), path)


def _deque(reach: Reach, thing: "deque[Any]", path: Path) -> None:
    reach.keep(contents.Items(thing, deque), path)
    reach.go(thing, enumerate(deque.__iter__(thing)), path)


def _set(reach: Reach, thing: set[Any], path: Path) -> None:
    reach.keep(contents.Members(thing), path)
    reach.go(thing, ((None, member) for member in set.__iter__(thing)), path)


def _fixed(reach: Reach, thing: Any, path: Path) -> None:
    reach.go(thing, enumerate(thing), path)


def _numbers(base: type) -> _Visit:
    return lambda reach, thing, path: reach.keep(contents.Items(thing, base), path)


def _array(reach: Reach, thing: Any, path: Path) -> None:
    if thing.flags.writeable and not isinstance(thing, np.memmap) and thing.nbytes <= _COPIED_BYTES:
        reach.keep(contents.Values(thing), path)
    if thing.dtype.hasobject:
        reach.go(thing, ((None, item) for item in thing.flat), path)


def _random(reach: Reach, thing: random.Random, path: Path) -> None:
    if not isinstance(thing, random.SystemRandom):
        reach.keep(contents.Mark(thing.getstate, thing.setstate), path)


def _random_state(reach: Reach, thing: np.random.RandomState, path: Path) -> None:
    reach.keep(contents.Mark(thing.get_state, thing.set_state), path)


def _bits(reach: Reach, thing: np.random.BitGenerator, path: Path) -> None:
    reach.keep(contents.Mark(lambda: thing.state, lambda state: setattr(thing, "state", state)), path)


def _torch_generator(reach: Reach, thing: torch.Generator, path: Path) -> None:
    reach.keep(contents.Mark(thing.get_state, thing.set_state), path)


def _stream(reach: Reach, thing: Any, path: Path) -> None:
    if thing.closed or not thing.writable() or not thing.seekable():
        return
    if not isinstance(thing, io.StringIO | io.BytesIO):
        reach.keep(contents.Mark(thing.tell), path)
        return

    def put(state: Any) -> None:
        thing.seek(0)
        thing.truncate()
        thing.write(state[0])
        thing.seek(state[1])

    reach.keep(contents.Mark(lambda: (thing.getvalue(), thing.tell()), put), path)


def _movable(reach: Reach, thing: Any, path: Path) -> None:
    """Add an iterator: its position cannot be set, so that a copy has to run, or nothing if there can be none."""
    reach.movable.append((thing, path))


def _runs(thing: Any) -> tuple[Any, ...]:
    """Return the objects that a call moves on if they are iterators; a bound method's own cannot be exchanged."""
    if type(thing) in _BOUND:
        return (thing.__self__,)
    return thing.args if type(thing) is functools.partial else (thing,)


def _partial(reach: Reach, thing: Any, path: Path) -> None:
    reach.go(thing, [("func", thing.func), *enumerate(thing.args), *thing.keywords.items()], path)


def _wrapper(*names: str) -> _Visit:
    def visit(reach: Reach, thing: Any, path: Path) -> None:
        reach.go(thing, [(name, getattr(thing, name)) for name in names], path)

    return visit


def _reference(reach: Reach, thing: Any, path: Path) -> None:
    reach.go(thing, [(None, thing())], path)


def _variable(reach: Reach, thing: "contextvars.ContextVar[Any]", path: Path) -> None:
    place = contents.of_variable(thing)
    reach.keep(place, path)
    reach.go(thing, [(None, place.value)], path)


def _cache(reach: Reach, thing: Any, path: Path) -> None:
    """Keep a cache of results empty if it was; other entries that a run adds cannot be dropped."""
    if not thing.cache_info().currsize:
        reach.keep(contents.Mark(lambda: thing.cache_info().currsize, lambda _: thing.cache_clear()), path)
    for held in gc.get_referents(thing):
        reach.go(thing, ((None, entry) for entry in (held.values() if isinstance(held, dict) else [held])), path)


def _optimizer(reach: Reach, thing: torch.optim.Optimizer, path: Path) -> None:
    """Visit an optimizer, but not its large state: only a step of its own changes that, see ``kept_optimizers``."""
    reach.keep(contents.Entries(vars(thing)), path)
    reach.go(thing, [("param_groups", thing.param_groups)], path)


def _class(reach: Reach, thing: type, path: Path) -> None:
    for base in thing.__mro__:
        if base in reach.classes:
            continue
        reach.classes.add(base)
        if not reach.users.wrote(base.__module__) or issubclass(base, enum.Enum):
            continue
        reach.keep(contents.Body(base), path)
        reach.go(base, [item for item in vars(base).items() if not _runs_apart(item[0])], path)


def _runs_apart(name: str) -> bool:
    """Return whether a function of this name is not called by a step."""
    apart = ("__init__", "setup", "teardown", "prepare_data", "__doc__", "__annotations__")
    return name in apart or name.endswith("_dataloader") or name.startswith(("configure_", "on_"))


def _function(reach: Reach, thing: types.FunctionType, path: Path) -> None:
    if not reach.users.wrote(thing.__module__):
        return
    for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
        if id(cell) not in reach.seen:
            reach.seen[id(cell)] = cell
            place = contents.of_cell(cell)
            reach.keep(place, (thing, name, path))
            reach.go(cell, [(name, place.value)], path)
    reach.go(thing, [(None, thing.__defaults__), (None, thing.__kwdefaults__)], path)
    reach.keep(contents.Entries(vars(thing)), path)
    reach.go(vars(thing), vars(thing).items(), path)
    names = thing.__globals__
    if not reach.users.wrote(names.get("__name__")):
        return
    used, attributes = names_in(thing.__code__)
    for name in used:
        value = names[name] if name in names else sys.modules.get(name)  # imported by the function itself
        if not isinstance(value, types.ModuleType):
            reach.add_name(names, name, None)
        elif reach.users.wrote(value.__name__):
            for attribute in attributes & vars(value).keys():
                reach.add_name(vars(value), attribute, (value, name, None))


_VISITS: dict[type, _Visit] = {
    torch.jit.ScriptModule: _script,
    Metric: _metric,
    nn.Module: _attributes,
    Tensor: _tensor,
    dict: _dict,
    list: _list,
    deque: _deque,
    set: _set,
    tuple: _fixed,
    frozenset: _fixed,
    bytearray: _numbers(bytearray),
    array: _numbers(array),
    np.ndarray: _array,
    random.Random: _random,
    np.random.RandomState: _random_state,
    np.random.Generator: _wrapper("bit_generator"),
    np.random.BitGenerator: _bits,
    torch.Generator: _torch_generator,
    io.IOBase: _stream,
    types.FunctionType: _function,
    types.MethodType: _wrapper("__self__", "__func__"),
    types.BuiltinMethodType: _wrapper("__self__"),
    types.MethodWrapperType: _wrapper("__self__"),
    functools.partial: _partial,
    functools.partialmethod: _partial,
    functools.cached_property: _wrapper("func"),
    functools._lru_cache_wrapper: _cache,
    staticmethod: _wrapper("__func__"),
    classmethod: _wrapper("__func__"),
    property: _wrapper("fget", "fset", "fdel"),
    weakref.ReferenceType: _reference,
    contextvars.ContextVar: _variable,
    threading.local: _wrapper("__dict__"),
    torch.optim.Optimizer: _optimizer,
    **dict.fromkeys(HOLDERS, _attributes),
    type: _class,
    **dict.fromkeys(ITERATORS, _movable),
}
_CONTAINERS = {_dict, _list, _deque, _set, _fixed}
