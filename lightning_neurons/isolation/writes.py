"""Calls that write into an existing tensor, found before they run, so that the old values can be copied."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from lightning_neurons.isolation.tensors import address_of
from lightning_neurons.layers.registry import LINKS


@lru_cache(maxsize=4096)
def _writes_by_name(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "").partition(".")[0]  # "relu_.default", of an operation of ATen
    if name.startswith("__"):
        return name == "__setitem__" or name in _IN_PLACE_OPERATORS
    return name.endswith("_")


_IN_PLACE_OPERATORS = {
    f"__i{operator}__"
    for operator in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    ]
}


def target_of_write(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that this call is about to overwrite, or None.

    A positional True of an activation or dropout function is taken for ``inplace``: a needless copy at worst.
    """
    if kwargs and isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]  # type: ignore[no-any-return]
    writes = (
        _writes_by_name(function)
        or (kwargs and kwargs.get("inplace"))
        or (function in LINKS and any(a is True for a in args[1:]))
    )
    target = args[0] if args else kwargs.get("input")
    return target if writes and isinstance(target, Tensor) else None


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are views of one storage; they need not overlap."""
    return address_of(first) == address_of(second)
