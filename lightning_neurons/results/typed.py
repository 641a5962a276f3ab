"""Plain values for JSON, which has no NaN, no infinity and no tensor, and back, checked by type annotations.

Such files come from anywhere.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_WORDS = ("inf", "-inf")


def plain(value: Any) -> Any:
    """Convert a value for JSON.

    Returns:
        Lists for tensors and tuples, strings for keys, None for NaN, ``"inf"`` and ``"-inf"`` for infinities; the
        rest as it is.

    Example:
        >>> plain({3: torch.tensor([1.0, float("nan")]), "high": float("inf")})
        {'3': [1.0, None], 'high': 'inf'}
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else repr(value)
    return value


def number(value: Any) -> float:
    """Return the number that ``plain`` made null or a word.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> number("-inf"), number(2)
        (-inf, 2.0)
    """
    if value is None or value in _WORDS:
        return float("nan" if value is None else value)
    if not isinstance(value, int | float):
        raise ValueError(f"a number is expected, and not a {type(value).__name__}")
    return float(value)


def floats(values: Any) -> Tensor:
    """Return the tensor that ``plain`` made a list of."""

    def numbers(value: Any) -> Any:
        return [numbers(v) for v in value] if isinstance(value, list) else number(value)

    return torch.tensor(numbers(values), dtype=torch.float64)


def typed(kind: Any, value: Any, where: str) -> Any:
    """Convert a value to the type of an annotation; words become the infinities that ``plain`` wrote so.

    Args:
        kind: A plain type, ``Any``, a union, a ``Literal``, a list, tuple or mapping of such, or a dataclass.
        value: What the document has in its place.
        where: The place, for errors.

    Returns:
        The value; dataclasses are built from mappings, and lists become tuples where the annotation is a tuple.

    Raises:
        ValueError: If the document has something else there.

    Example:
        >>> typed(tuple[float, ...], [1, None, "-inf"], "losses")
        (1.0, nan, -inf)
    """
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(inside, value, where)
    if origin is Literal:
        return value if value in inside else _refuse(kind, value, where)
    if origin in (list, tuple):
        return _several(origin, inside, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else _refuse(kind, value, where)
        return {typed(inside[0], key, where): typed(inside[1], entry, f"{where}.{key}") for key, entry in pairs}
    if is_dataclass(kind):
        return _made(kind, value, where)
    if kind is float:
        return number(value)
    if kind is int and isinstance(value, int) and abs(value) >= 2**63:
        _refuse(kind, value, where)
    fits = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
    return value if fits else _refuse(kind, value, where)


def _refuse(kind: Any, value: Any, where: str) -> Any:
    what = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise ValueError(f"{where} has to be {what}, and is a {type(value).__name__}")


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    options = [kind for kind in kinds if kind is not types.NoneType]
    for kind in options[:-1]:
        try:
            return typed(kind, value, where)
        except ValueError:
            continue
    return typed(options[-1], value, where)


def _several(kind: Any, inside: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        _refuse(kind, value, where)
    if kind is tuple and inside[-1] is not ...:
        if len(inside) != len(value):
            _refuse(kind, value, where)
        return tuple(typed(inner, entry, where) for inner, entry in zip(inside, value, strict=True))
    return kind(typed(inside[0], entry, where) for entry in value)


def _made(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        _refuse(kind, value, where)
    hints = get_type_hints(kind)
    own = {field.name: field for field in fields(kind)}
    strange = [name for name in value if name not in own]
    missing = [n for n, f in own.items() if n not in value and f.default is MISSING and f.default_factory is MISSING]
    if strange or missing:
        raise ValueError(f"{where} has {(strange or ['no ' + missing[0]])[0]!r}")
    return kind(**{name: typed(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})
