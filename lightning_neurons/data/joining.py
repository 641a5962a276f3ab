"""Joining batches: what they must share, and one batch of the samples of several."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.data.batches import (
    batch_size_of,
    entries_of,
    has_entry_per_sample,
    is_one_piece,
    parts,
    with_contents,
)


def form_of(batch: Any) -> tuple[Any, ...]:
    """Return a key that batches must share to be joined: shape and type of a sample, and all that is not per sample.

    A tensor that is not per sample (a scale, a matrix, a graph) equals only itself.

    Example:
        >>> x, scales = torch.zeros(4, 2), torch.ones(3)
        >>> form_of((x, 0.1)) == form_of((x[:3], 0.1)), form_of((x, 0.1)) == form_of((x, 0.2))
        (True, False)
        >>> form_of((x, scales)) == form_of((x, scales)), form_of((x, scales)) == form_of((x, scales.clone()))
        (True, False)
    """
    return _form(batch, batch_size_of(batch))


def kind_of(batch: Any) -> tuple[Any, ...]:
    """Return a key of all by which a step may branch: types, and the strings and booleans in a batch.

    Example:
        >>> x = torch.zeros(4, 2)
        >>> kind_of({"x": x, "task": "a"}) == kind_of({"x": x[:3], "task": "a"})
        True
        >>> kind_of({"x": x, "task": "a"}) == kind_of({"x": x, "task": "b"})
        False
    """
    return _kind(batch, batch_size_of(batch))


def _kind(part: Any, size: int) -> tuple[Any, ...]:
    if isinstance(part, Tensor):
        return part.ndim, part.dtype
    if isinstance(part, bool | str | None):
        return type(part), part
    if isinstance(part, list | tuple) and has_entry_per_sample(part, size):
        return type(part), "entries"
    if isinstance(part, list | tuple | Mapping) or is_dataclass(part):
        return type(part), *(_kind(inside, size) for inside in parts(part))
    return (type(part),)


def _form(part: Any, size: int) -> tuple[Any, ...]:
    if isinstance(part, Tensor) and part.ndim and part.size(0) == size and not is_one_piece(part):
        return part.shape[1:], part.dtype, part.device
    if isinstance(part, bool | int | float | str | None):
        return type(part), part
    if isinstance(part, list | tuple):
        entries = not hasattr(part, "_fields") and has_entry_per_sample(part, size)
        return (type(part), "entries") if entries else (type(part), *(_form(p, size) for p in part))
    if (isinstance(part, Mapping) or is_dataclass(part)) and not is_one_piece(part):
        return type(part), *((key, _form(value, size)) for key, value in entries_of(part).items())
    return "alone", id(part)


def join(batches: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Join several batches of one form into one.

    Args:
        batches: Batches for which ``form_of`` is the same.
        sizes: Number of samples of each.

    Returns:
        A batch of the same form with the samples in the order of ``batches``; what is not per sample is that of the
        first.

    Example:
        >>> join([{"x": torch.zeros(1, 2), "name": ["a"]}, {"x": torch.ones(2, 2), "name": ["b", "c"]}], [1, 2])
        {'x': tensor([[0., 0.],
                [1., 1.],
                [1., 1.]]), 'name': ['a', 'b', 'c']}
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        per_sample = all(b.ndim and len(b) == n for b, n in zip(batches, sizes, strict=True))
        return torch.cat(list(batches)) if per_sample else first
    if isinstance(first, list | tuple):
        if not hasattr(first, "_fields") and all(
            has_entry_per_sample(b, n) for b, n in zip(batches, sizes, strict=True)
        ):
            return type(first)(entry for b in batches for entry in b)
        return with_contents(first, [join(column, sizes) for column in zip(*batches, strict=True)])
    if isinstance(first, Mapping) or is_dataclass(first):
        columns = [entries_of(batch) for batch in batches]
        return with_contents(first, {key: join([column[key] for column in columns], sizes) for key in columns[0]})
    return first
