"""The tensors in arguments and results of torch functions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of a torch function."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from tensors_in(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from tensors_in(branch)


def map_tensors_in(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, torch.Size) or not isinstance(tree, list | tuple | dict):
        return tree
    if isinstance(tree, dict):
        return {key: map_tensors_in(value, change) for key, value in tree.items()}
    parts = [map_tensors_in(branch, change) for branch in tree]
    if isinstance(tree, list):
        return parts
    return type(tree)(parts) if type(tree).__module__ == "torch.return_types" else _tuple_like(tree, parts)


def _tuple_like(tree: tuple[Any, ...], parts: list[Any]) -> Any:
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def address_of(tensor: Tensor) -> int:
    """Which memory a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def version_of(tensor: Tensor) -> int:
    """A number that changes when the tensor is written into; inference tensors cannot be."""
    return -1 if tensor.is_inference() else tensor._version


def same_tensors(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    """Whether two results have the same tensors, bit for bit unless tolerated; NaN is the same as NaN."""
    one, other = list(tensors_in(first)), list(tensors_in(second))
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return False
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in pairs)
