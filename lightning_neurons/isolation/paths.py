"""The path to an object: its holder, the holder of that, and so on up to the model."""

import types
from collections import deque
from typing import Any

Path = tuple[Any, Any, "Path"] | None
"""The holder of an object, its key there, and the path to the holder."""


def name_of(path: Path) -> str:
    """Return a path as code would write it."""
    parts: list[str] = []
    while path is not None:
        _, key, path = path
        if isinstance(key, str) and key.isidentifier():
            parts += [] if key in ("_modules", "_parameters", "_buffers") else [f".{key}"]
        elif key is not None:
            parts.append(f"[{key!r}]" if isinstance(key, int | str) else "[...]")
    return "".join(reversed(parts)).removeprefix(".")


def put_at(path: Path, value: Any) -> None:
    """Replace the object at a path by another one."""
    assert path is not None, "a root is no value that moves"
    holder, key, above = path
    if isinstance(holder, tuple):
        changed = [value if place == key else item for place, item in enumerate(_get(above, holder))]
        if above is not None:
            put_at(above, type(holder)(*changed) if hasattr(holder, "_fields") else tuple(changed))
    elif isinstance(holder, dict):
        dict.__setitem__(holder, key, value)
    elif isinstance(holder, list | deque):
        holder[key] = value
    elif isinstance(holder, types.CellType):
        holder.cell_contents = value
    elif isinstance(holder, type):
        type.__setattr__(holder, key, value)
    elif isinstance(key, str):
        object.__setattr__(holder, key, value)


def _get(path: Path, otherwise: Any) -> Any:
    """Return the tuple at a path as it is now, perhaps with a substitute in it already."""
    if path is None:
        return otherwise
    holder, key, _ = path
    if isinstance(holder, types.CellType):
        return holder.cell_contents
    if isinstance(holder, dict | list | deque | tuple):
        return holder[key]
    return getattr(holder, key, otherwise)
