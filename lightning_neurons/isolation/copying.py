"""Deep copies of a model: functions that hold parts of it hold those of the copy, and kept values lose their graphs.

Objects that cannot be copied, such as locks and connections, are shared with the copy.
"""

import copy
import csv
import functools
import io
import traceback
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.isolation.model_state import Refusing
from lightning_neurons.isolation.user_code import Users, is_framework
from lightning_neurons.layers.layer import public_name

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


_COLLECTIONS = (list, tuple, set, frozenset, deque)
_HELD = (*_COLLECTIONS, dict, Tensor, types.FunctionType, types.MethodType, functools.partial)
"""Types of values in a closure that are copied, as another run can change them; the copy shares all others."""
_MOST = 200_000  # objects; a deep copy of more would take too long as well
_MOST_SHARED = 100  # each of them costs another copy


def copy_of(model: nn.Module, *, shared: bool = False) -> nn.Module:
    """Return a deep copy, on which running leaves no trace in the original.

    Unlike ``copy.deepcopy``, it takes hooks and other functions along that hold a part of the model or a container in
    their closure or defaults, the user's hooks on gradients of parameters, and values that a forward or a step has left
    behind, a list of losses for example. Objects that cannot be copied, a lock for example, are shared.

    Args:
        model: Any module.
        shared: Whether the copy has the same parameters and buffers, so that only its modules are copied.

    Returns:
        The copy, in the same mode and on the same device.

    Raises:
        Exception: The error of a part that can neither be copied nor shared.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> net.losses = [net(torch.ones(1, 2)).sum()]  # copy.deepcopy refuses what has a graph
        >>> copied = copy_of(net)
        >>> copied.losses == net.losses, copied.losses[0].requires_grad
        (True, False)
    """
    with torch.inference_mode(False), torch.no_grad():
        own: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())} if shared else {}
        things = list(_reachable(model))
        own |= {id(t): t.detach().clone() for t in things if isinstance(t, Tensor) and not t.is_leaf}
        functions = [thing for thing in things if isinstance(thing, types.FunctionType)]
        users, shares = Users(type(model)), list[Any]()  # alive, so that ids stay unique
        while True:
            try:
                return _copy(model, own, functions)
            except Exception as error:
                refused = refused_in(error, users)
                if refused is None or len(shares) == _MOST_SHARED:
                    raise
                shares.append(refused)
                own[id(refused)] = stand_in_for(refused)


def hooked_parameters(model: nn.Module) -> list[str]:
    """Return the paths of the parameters that have hooks of the user's own on their gradients."""
    final = finally_hooked_parameters(model)
    names = ((public_name(name), parameter) for name, parameter in model.named_parameters())
    return [name for name, parameter in names if _gradient_hooks(parameter) or name in final]


def finally_hooked_parameters(model: nn.Module) -> list[str]:
    """Return the paths of parameters with post-accumulate hooks, which may run an optimizer; copies lack them."""
    hooks = {name: getattr(p, "_post_accumulate_grad_hooks", None) or {} for name, p in model.named_parameters()}
    return [public_name(name) for name, registered in hooks.items() if _of_users(registered.values())]


def what_fails(model: nn.Module) -> str:
    """Return the path of the innermost module that cannot be copied; "" if that is the model itself."""
    for path, module in reversed(list(model.named_modules())):
        try:
            copy_of(module)
        except Exception:  # noqa: BLE001 (whatever it is)
            return public_name(path)
    return ""


def _copy(model: nn.Module, own: Mapping[int, Any], functions: Iterable[types.FunctionType]) -> nn.Module:
    memo = dict(own)
    cells = {id(cell): (cell, types.CellType()) for function in functions for cell in function.__closure__ or ()}
    pairs = [(function, _empty(function, cells)) for function in functions]
    memo |= {id(old): new for old, new in pairs}
    made = copy.deepcopy(model, memo)
    for was, now in cells.values():
        if was != types.CellType():
            now.cell_contents = _held(was.cell_contents, memo)
    for old, new in pairs:
        new.__defaults__ = old.__defaults__ and tuple(_held(value, memo) for value in old.__defaults__)
        new.__kwdefaults__ = old.__kwdefaults__ and {k: _held(v, memo) for k, v in old.__kwdefaults__.items()}
    for parameter, twin in zip(model.parameters(), made.parameters(), strict=True):
        if twin is not parameter:  # torch leaves these hooks out of copies
            is_trained = twin.requires_grad
            for hook in _gradient_hooks(parameter):
                is_method = isinstance(hook, types.MethodType)  # a callback's, say, which is no part of the model
                kept = hook if is_method and id(hook.__self__) not in memo else _held(hook, memo)
                twin.requires_grad_(True).register_hook(kept)  # it may have been frozen since
            twin.requires_grad_(is_trained)
    return made


def _gradient_hooks(parameter: Tensor) -> list[Any]:
    """Return the user's hooks on the gradient of a parameter."""
    return _of_users((parameter._backward_hooks or {}).values())


def _of_users(hooks: Iterable[Any]) -> list[Any]:
    return [hook for hook in hooks if not is_framework(getattr(hook, "__module__", None))]


def _empty(
    function: types.FunctionType, cells: Mapping[int, tuple[types.CellType, types.CellType]]
) -> types.FunctionType:
    """Return the same function with empty cells for its closure, which may hold the function itself."""
    closure = None if function.__closure__ is None else tuple(cells[id(cell)][1] for cell in function.__closure__)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(made).update(vars(function))
    return made


def _held(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, weakref.ref):
        return weakref.ref(memo[id(value())]) if id(value()) in memo else value
    return copy.deepcopy(value, memo) if id(value) in memo or isinstance(value, _HELD) else value


def _reachable(model: nn.Module) -> Iterator[Any]:
    """Yield tensors, and functions that hold values, as far as a deep copy goes."""
    seen: dict[int, Any] = {}  # alive, so that ids stay unique
    todo: list[Any] = [model]
    while todo and len(seen) < _MOST:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | str | bytes | int | float | None):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, types.FunctionType):
            if is_framework(thing.__module__) or not (thing.__closure__ or thing.__defaults__ or thing.__kwdefaults__):
                continue
            todo += [value for value in _inside_function(thing) if isinstance(value, _HELD)]
            yield thing
        elif isinstance(thing, Tensor):
            hooks = _gradient_hooks(thing) if thing.is_leaf else []
            todo += [hook for hook in hooks if isinstance(hook, types.FunctionType | functools.partial)]
            yield thing
        else:
            todo += _inside(thing)


def _inside_function(function: types.FunctionType) -> list[Any]:
    filled = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    return [*filled, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _inside(thing: Any) -> list[Any]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, _COLLECTIONS):
        return list(thing)
    if isinstance(thing, types.MethodType):
        return [thing.__self__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if hasattr(type(thing), "__deepcopy__") and not isinstance(thing, nn.Module):
        return []  # it defines its own copies
    state = getattr(thing, "__dict__", {})
    if isinstance(thing, nn.Module) and "_trainer" in state:  # a copy belongs to no Trainer
        state = {name: value for name, value in state.items() if name != "_trainer"}
    return list(state.values())
