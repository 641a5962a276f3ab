"""Whole numbers in modules' own attributes: reading them, setting them, and keeping them in state dicts.

A number of heads cannot be read off tensors. So a module whose numbers a cut has changed remembers them, and writes
them beside its version into the metadata of its state dicts, from which ``conform`` sets them.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_neurons.layers.attention import set_class
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import axes, handler_of, size_of

Sizes = Mapping[str, tuple[int, int]]
"""By attribute, such as ``"num_heads"``, ``"config.num_heads"`` or ``"sizes[1]"``: the first value, the present one."""

_RECORD = "_sizes_after_cuts"
_METADATA = "sizes_after_cuts"
_OF_EVERY_MODULE = frozenset((*vars(nn.Module()), _RECORD))
_NO_SETTINGS = ("torch", "lightning", "pytorch_lightning", "builtins", "functools")


def numbers_of(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Yield the whole numbers in a module's own attributes, and in objects of settings that it holds.

    Args:
        module: The module; its submodules are left out.

    Yields:
        Name of the attribute, with a dot before an entry of an object; place in a tuple or list, or None; value.

    Example:
        >>> list(numbers_of(nn.Unflatten(1, (4, 8))))
        [('dim', None, 1), ('unflattened_size', 0, 4), ('unflattened_size', 1, 8)]
    """
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE:
            continue
        yield from _numbers(name, value)
        if not name.startswith("_") and (entries := _entries(value)) is not None:
            for inner, entry in entries.items():
                if isinstance(inner, str):
                    yield from _numbers(f"{name}.{inner}", entry)


def _numbers(name: str, value: object) -> Iterator[tuple[str, int | None, int]]:
    if _is_number(value):
        yield name, None, value  # type: ignore[misc]
    elif type(value) in (tuple, list, torch.Size) and all(map(_is_number, value)):  # type: ignore[call-overload]
        for place, number in enumerate(value):  # type: ignore[arg-type, var-annotated]
            yield name, place, number


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _entries(value: object) -> dict[str, Any] | None:
    """Return the entries of an object of settings, such as a config; None of anything else."""
    if type(value) is dict:
        return value
    if isinstance(value, nn.Module | Tensor | type) or callable(value) or not hasattr(value, "__dict__"):
        return None
    return None if type(value).__module__.partition(".")[0] in _NO_SETTINGS else vars(value)


def key_of(name: str, place: int | None) -> str:
    """Return the key of an attribute in ``Sizes``."""
    return name if place is None else f"{name}[{place}]"


def size_at(module: nn.Module, key: str) -> int | None:
    """Return the whole number that a key names, or None if a module has no such."""
    return {key_of(name, place): value for name, place, value in numbers_of(module)}.get(key)


def set_sizes(module: nn.Module, new: Mapping[str, int]) -> None:
    """Set whole numbers of a module; it remembers them, and writes them into its state dicts.

    Objects that hold them may be shared with other modules, so the module gets copies of its own.

    Args:
        module: The module.
        new: Values by key; a module that has come back to its first values forgets them.
    """
    record = dict(sizes_of(module))
    for key, value in new.items():
        before = size_at(module, key)
        assert before is not None, "keys are those of the module"
        _set(module, key, value)
        record[key] = record.get(key, (before, before))[0], value
    record = {key: pair for key, pair in record.items() if pair[0] != pair[1]}
    hooks = module._state_dict_hooks
    for number in [number for number, hook in hooks.items() if hook is _write_sizes]:
        del hooks[number]
    vars(module).pop(_RECORD, None)
    if record:
        vars(module)[_RECORD] = record
        module.register_state_dict_post_hook(_write_sizes)


def putting_back(module: nn.Module, keys: Iterable[str]) -> Callable[[], None]:
    """Return a function that gives a module back the objects that it has now, whatever ``set_sizes`` does with keys."""
    own, hooks = vars(module), dict(module._state_dict_hooks)
    names = (*(re.split(r"[.\[]", key)[0] for key in keys), _RECORD)
    before = {name: own[name] for name in names if name in own}

    def put_back() -> None:
        own.pop(_RECORD, None)
        own.update(before)
        module._state_dict_hooks.clear()
        module._state_dict_hooks.update(hooks)

    return put_back


def _set(module: nn.Module, key: str, value: int) -> None:
    name, _, place = key.removesuffix("]").partition("[")
    outer, _, inner = name.partition(".")
    entries = vars(module)
    if inner:
        entries[outer] = copy.copy(entries[outer])
        entries = _entries(entries[outer]) or {}
    if place:
        several = list(entries[inner or outer])
        several[int(place)] = value
        entries[inner or outer] = type(entries[inner or outer])(several)
    else:
        entries[inner or outer] = value


def _write_sizes(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of ``state_dict``. A function of a module, as it is copied and pickled with it."""
    metadata[_METADATA] = {key: list(pair) for key, pair in sizes_of(module).items()}


def sizes_of(module: nn.Module) -> Sizes:
    """Return the numbers of a module that cuts have changed."""
    record: Sizes = vars(module).get(_RECORD, {})
    return record


def all_sizes(model: nn.Module) -> dict[str, Sizes]:
    """Return the numbers that cuts have changed, by path of a module."""
    return {path: dict(sizes) for path, module in model.named_modules() if (sizes := sizes_of(module))}


def put_sizes(model: nn.Module, sizes: Mapping[str, Sizes]) -> None:
    """Give all modules the numbers that ``all_sizes`` returned, and their first ones to modules that are not in it."""
    for path, module in model.named_modules():
        _put(module, sizes.get(path, {}))


def _put(module: nn.Module, saved: Sizes) -> None:
    own = sizes_of(module)
    new = {key: first for key, (first, _) in own.items() if key not in saved}
    for key, (first, now) in saved.items():
        here = size_at(module, key)
        if here is not None and own.get(key, (here, here))[0] == first:  # else it is of another architecture
            new[key] = now
    changed = {key: value for key, value in new.items() if size_at(module, key) != value}
    if changed:
        set_sizes(module, changed)


def exchange_sizes(model: nn.Module, changes: Mapping[str, tuple[int, int]]) -> None:
    """Give modules other numbers.

    Args:
        model: The model.
        changes: By name in the model, such as ``"blocks.0.num_heads"``, the number that is expected there and the new
            one; where the model has another one or none, it is left as it is.
    """
    modules = modules_by_name(model)
    for name, (before, after) in changes.items():
        words = name.split(".")
        for count in reversed(range(len(words))):
            module, key = modules.get(".".join(words[:count])), ".".join(words[count:])
            here = None if module is None else size_at(module, key)
            if module is not None and here is not None:
                if here == before != after:
                    set_sizes(module, {key: after})
                break


def sizes_in(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> dict[str, Sizes]:
    """Return the numbers that a state dict has for the modules of a model, by path; what it does not say is as it is.

    Args:
        model: The model.
        state: A state dict; one without metadata says nothing.
        prefix: Prefix of the names in ``state``.
    """
    metadata = getattr(state, "_metadata", None)
    found = all_sizes(model)
    for path, _ in model.named_modules() if isinstance(metadata, Mapping) else ():
        entry = metadata.get(f"{prefix}{path}".removesuffix("."))  # type: ignore[union-attr]
        if isinstance(entry, Mapping):
            found[path] = _checked(entry.get(_METADATA))
    return found


def _checked(saved: object) -> Sizes:
    """Return what is right of something that a file has as sizes."""
    pairs = saved.items() if isinstance(saved, Mapping) else ()
    return {
        key: (pair[0], pair[1])
        for key, pair in pairs
        if isinstance(key, str)
        and isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(_is_number(n) and n > 0 for n in pair)
    }


def refit(module: nn.Module) -> None:
    """Make a module's attributes say what its tensors are."""
    handler = handler_of(module)
    tensors = [getattr(module, name) for name in {**axes(module, "makes"), **axes(module, "reads")}]
    if handler is None or not tensors or any(map(is_lazy, tensors)):
        return
    found = {name: size_of(module, size) for name, size in handler.sizes.items()}
    for name, value in found.items():
        if value is not None:  # else the tensor is computed from others
            setattr(module, name, value)
    set_class(module)


def putting_back_fit(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives a module back what ``refit`` changes: its attributes of now, and its class."""
    handler, kind = handler_of(module), type(module)
    sizes = {name: getattr(module, name) for name in (handler.sizes if handler else ()) if name in vars(module)}

    def put_back() -> None:
        vars(module).update(sizes)
        if type(module) is not kind:
            module.__class__ = kind

    return put_back
