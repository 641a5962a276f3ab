"""Checks the shapes of tensors in signatures while testing, and nothing else.

What an argument may be besides is checked by the package itself, in words for people; a general type checker would get
in first.
"""

from collections.abc import Callable
from types import UnionType
from typing import Any, TypeVar, Union, get_origin

from beartype import beartype

Function = TypeVar("Function", bound=Callable[..., Any])


def check_shapes(function: Function) -> Function:
    """Check the arguments and results of ``function`` whose annotation is a shape of jaxtyping."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in hints.items() if _is_shape(hint)}
    return beartype(function)


def _is_shape(hint: object) -> bool:
    # Of a container, a type checker looks at an entry at random, and tests compare random states.
    container = get_origin(hint) not in (None, Union, UnionType)
    return not container and ("jaxtyping" in repr(hint) or "jaxtyping" in getattr(type(hint), "__module__", ""))
