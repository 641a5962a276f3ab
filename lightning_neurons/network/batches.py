"""Looking into a batch of any form: how many samples, their targets, a part of them, their inputs."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_neurons.errors import MeasurementError

TARGET_KEYS = ("target", "targets", "label", "labels", "y")


def parts(batch: Any) -> list[Any]:
    """The values directly inside a tuple, list, mapping, dataclass or plain object; nothing inside anything else."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, f.name) for f in fields(batch)]
    if isinstance(batch, list | tuple):
        return list(batch)
    return [] if isinstance(batch, Tensor | str) else list(getattr(batch, "__dict__", {}).values())


def is_divisible(batch: Any) -> bool:
    """Whether samples can be taken out of it; an object of the user's own, a graph say, is taken whole."""
    return isinstance(batch, Tensor | Mapping | list | tuple) or is_dataclass(batch)


def is_list_of_samples(batch: Any) -> bool:
    """Whether it is a list with one record per sample, as in detection, instead of one tensor per quantity."""
    return isinstance(batch, list) and bool(batch) and all(isinstance(b, Mapping) or is_dataclass(b) for b in batch)


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a nested batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    return [t for part in parts(batch) for t in tensors_of(part)]


def batch_size_of(batch: Any) -> int:
    """Length of the first axis of the first tensor, or of a list of records.

    Raises:
        MeasurementError: If the batch has no tensor with an axis.

    Example:
        >>> batch_size_of({"image": torch.zeros(4, 3), "name": ["a", "b", "c", "d"]})
        4
    """
    if is_list_of_samples(batch):
        return len(batch)
    size = next((len(t) for t in tensors_of(batch) if t.ndim), None)
    if size is None:
        raise MeasurementError(
            f"batch of type {type(batch).__name__}: found no tensor that tells how many samples it has; "
            "make it a tuple, dict, dataclass or an object with tensors as attributes"
        )
    return size


def targets_of(batch: Any) -> Int[Tensor, " batch"] | None:
    """Class labels, if the batch shows them: the last of a pair, or under a name such as ``"label"``; else None.

    Example:
        >>> targets_of((torch.zeros(2, 3), torch.tensor([1, 0]))).tolist()
        [1, 0]
    """
    if isinstance(batch, Mapping):
        named = [batch[key] for key in TARGET_KEYS if key in batch]
    else:
        named = [getattr(batch, key) for key in TARGET_KEYS if hasattr(batch, key)]
    pair = [batch[1]] if isinstance(batch, list | tuple) and len(batch) == 2 else []
    return next((found for found in (*named, *pair) if _is_labels(found, batch)), None)


def _is_labels(found: Any, batch: Any) -> bool:
    whole = isinstance(found, Tensor) and found.ndim == 1 and not (found.is_floating_point() or found.is_complex())
    return whole and found.dtype != torch.bool and len(found) == batch_size_of(batch)


def rows_of(batch: Any, index: Tensor, size: int) -> Any:
    """The samples ``index`` of a batch of ``size``: of every tensor or list with one entry per sample.

    Example:
        >>> rows_of({"x": torch.arange(3), "name": ["a", "b", "c"], "step": 7}, torch.tensor([2, 0]), 3)
        {'x': tensor([2, 0]), 'name': ['c', 'a'], 'step': 7}
    """
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields") and _per_sample(batch, size):
        return type(batch)(batch[i] for i in index.tolist())
    return rebuilt(batch, lambda part: rows_of(part, index, size))


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same batch with ``function`` applied to each tensor."""
    return function(batch) if isinstance(batch, Tensor) else rebuilt(batch, lambda part: map_tensors(part, function))


def rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A container of the same kind with each of its parts changed; anything else as it is."""
    if isinstance(batch, Mapping):
        values = {key: change(value) for key, value in batch.items()}
        return values if type(batch) is dict else type(batch)(values)  # type: ignore[call-arg]
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: change(getattr(batch, f.name)) for f in fields(batch) if f.init})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(change, batch))
    if tensors_of(batch):  # an object of the user's own
        batch = copy.copy(batch)
        for name, value in vars(batch).items():
            setattr(batch, name, change(value))
    return batch


def _per_sample(entries: Sequence[Any], size: int) -> bool:
    """Whether a list has one entry per sample, rather than one tensor for each of several quantities."""
    columns = any(isinstance(v, Tensor) and v.ndim and len(v) == size for v in entries)
    return len(entries) == size and not columns


def inputs_of(batch: Any) -> Any:
    """What the model is called with: the batch without its targets, where they can be told apart.

    Example:
        >>> inputs_of((torch.zeros(2, 3), torch.tensor([1, 0]))).shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[0], Tensor)
    return batch[0] if pair else batch


def form_of(batch: Any) -> tuple[Any, ...]:
    """What two batches must share to be joined: the shape of a sample and type of each tensor."""
    return tuple((t.shape[1:], t.dtype, t.device) for t in tensors_of(batch))


def join(batches: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One batch of the samples of several of the same form; what is not per sample is the first one's.

    Args:
        batches: Batches for which ``form_of`` is the same.
        sizes: How many samples each has.

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
    if isinstance(first, Mapping):
        values = {key: join([b[key] for b in batches], sizes) for key in first}
        return values if type(first) is dict else type(first)(values)  # type: ignore[call-arg]
    if is_dataclass(first) and not isinstance(first, type):
        inner = {f.name: join([getattr(b, f.name) for b in batches], sizes) for f in fields(first) if f.init}
        return replace(first, **inner)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(join(column, sizes) for column in zip(*batches, strict=True)))
    if isinstance(first, list | tuple):
        if all(_per_sample(b, n) for b, n in zip(batches, sizes, strict=True)):
            return type(first)(entry for b in batches for entry in b)
        return type(first)(join(column, sizes) for column in zip(*batches, strict=True))
    return first
