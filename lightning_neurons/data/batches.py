"""Size, targets, inputs and single samples of a batch of any form."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_neurons.errors import MeasurementError

TARGET_KEYS = ("target", "targets", "label", "labels", "y")

_LEAVES = (Tensor, str, bytes, type, np.ndarray, nn.Module)


def parts(batch: Any) -> list[Any]:
    """Return the values directly inside a tuple, list, mapping, dataclass or plain object; none for anything else."""
    if isinstance(batch, _LEAVES):
        return []
    return list(batch) if isinstance(batch, list | tuple) else list(entries_of(batch).values())


def entries_of(batch: Any) -> dict[Any, Any]:
    """Return the values of a mapping by key, or of any other object by attribute, ``__slots__`` included."""
    if isinstance(batch, Mapping):
        return dict(batch.items())
    declared = (vars(base).get("__slots__", ()) for base in reversed(type(batch).__mro__))
    slots = [name for names in declared for name in ([names] if isinstance(names, str) else names)]
    return {n: getattr(batch, n) for n in slots if hasattr(batch, n) and n != "__dict__"} | getattr(
        batch, "__dict__", {}
    )


def is_divisible(batch: Any) -> bool:
    """Return whether samples can be taken out of a batch; graphs and objects of unknown classes stay whole."""
    has_samples = isinstance(batch, Tensor | Mapping | list | tuple) or is_dataclass(batch)
    return has_samples and not any(is_one_piece(value) for value in _nested(batch))


def is_graph(batch: Any) -> bool:
    """Return whether a batch holds a graph: a layer's rows may then be nodes, edges or graphs."""
    return any(_is_graph(value) for value in _nested(batch))


def _is_graph(value: Any) -> bool:
    if isinstance(value, (*_LEAVES, list, tuple)):
        return False
    if isinstance(value, Mapping):
        return "edge_index" in value
    return any(_attribute(value, name) is not None for name in ("edge_index", "batch_num_nodes", "num_graphs"))


def is_one_piece(value: Any) -> bool:
    """Return whether no samples can be taken out of a value: packed, nested or sparse tensors, and graphs."""
    odd_tensor = isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided)
    return odd_tensor or isinstance(value, PackedSequence) or _is_graph(value)


def _nested(batch: Any, above: tuple[int, ...] = ()) -> Iterator[Any]:
    """Yield the batch and all that is in it, from the outside to the inside, in order."""
    if id(batch) in above:  # an object that is reachable from itself
        return
    yield batch
    for part in parts(batch):
        yield from _nested(part, (*above, id(batch)))


def _attribute(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001 (a property of the user's own, which may raise anything)
        return None


def is_list_of_samples(batch: Any) -> bool:
    """Return whether a batch is a list with one record per sample, as in detection, not one tensor per quantity."""
    if not isinstance(batch, list) or not batch:
        return False
    return all(isinstance(entry, Mapping) or is_dataclass(entry) or _is_row(entry) for entry in batch)


def _is_row(entry: Any) -> bool:
    """Return whether a tuple is one sample and not a batch: its values have different first axes."""
    values = entry if isinstance(entry, list | tuple) else ()
    return len({torch.as_tensor(v).shape[:1] for v in values if isinstance(v, int | float) or _is_plain(v)}) > 1


def tensors_of(batch: Any) -> list[Tensor]:
    """Return all tensors of a nested batch, in order."""
    return [value for value in _nested(batch) if isinstance(value, Tensor)]


def results_of(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order, without caches.

    A cache of keys and values is what a model keeps for its own next call: a Hugging Face entry ``past_key_values``, or
    an object whose type is named so.

    Example:
        >>> results_of({"logits": torch.zeros(2), "past_key_values": ((torch.ones(3), torch.ones(3)),)})
        [tensor([0., 0.])]
    """
    values = list(_nested(output))
    caches = [value["past_key_values"] for value in values if isinstance(value, Mapping) and "past_key_values" in value]
    caches += [value for value in values if type(value).__name__.endswith("Cache")]
    kept = {id(tensor) for tensor in tensors_of(caches)}
    return [value for value in values if isinstance(value, Tensor) and id(value) not in kept]


def batch_size_of(batch: Any) -> int:
    """Return the number of samples.

    That is the size that the batch declares (graphs, packed sequences, objects with a length), or the number of records
    or tensors of several sizes in a list; else the length of the first axis of the first tensor.

    Raises:
        MeasurementError: If nothing in the batch tells its size.

    Example:
        >>> batch_size_of({"image": torch.zeros(4, 3), "name": ["a", "b", "c", "d"]})
        4
        >>> batch_size_of(([torch.zeros(3, 8, 8), torch.zeros(3, 6, 9)], torch.tensor([1, 0])))
        2
    """
    size = _size_of(batch)
    if size is None:
        size = next((len(value) for value in _nested(batch) if isinstance(value, np.ndarray) and value.ndim), None)
    if size is None:
        raise MeasurementError(
            f"batch of type {type(batch).__name__}: found no tensor that tells how many samples it has; "
            "make it a tuple, dict, dataclass or an object with tensors as attributes"
        )
    return size


def samples_in(batch: Any) -> int:
    """Return the number of samples; 1 if nothing tells it, as the batch is then one piece.

    Example:
        >>> samples_in({"seed": torch.tensor(3)}), samples_in(torch.zeros(4, 2))
        (1, 4)
    """
    try:
        return batch_size_of(batch)
    except MeasurementError:
        return 1


def _size_of(batch: Any, *, is_inside: bool = False) -> int | None:
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else None
    if is_list_of_samples(batch):
        return len(batch)
    declared = _declared_size(batch)
    if declared is not None:
        return declared
    if _is_one_sample(batch):
        return 1
    inside = _without_constants(parts(batch))
    if isinstance(batch, list | tuple) and is_inside and len({t.shape[:1] for t in _alike(batch)}) > 1:
        return len(batch)
    for part in inside:  # records and tensors of several sizes beside something with one entry for each
        entries = isinstance(part, list | tuple) and len(part)
        others = [len(o) for o in inside if (o is not part and isinstance(o, list | tuple)) or _has_rows(o)]
        if entries and entries in others and len({t.shape for t in _alike(part)}) > 1:
            return entries
        if entries and isinstance(part, tuple) and is_list_of_samples(list(part)):
            return entries
    return next((s for part in inside if (s := _size_of(part, is_inside=True)) is not None), None)


def _is_one_sample(batch: Any) -> bool:
    """Return whether there is a single label: beside inputs, or under its name."""
    if isinstance(batch, Mapping):
        return any(isinstance(batch.get(key), Tensor) and batch[key].ndim == 0 for key in TARGET_KEYS)
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and _has_rows(batch[0])):
        return False
    label = batch[1]
    if isinstance(label, Tensor):
        return label.ndim == 0 and not label.is_floating_point()
    return isinstance(label, int) and not isinstance(label, bool)


def _without_constants(inside: list[Any]) -> list[Any]:
    """Return the parts that may have one entry per sample: no vectors of a length of their own (class weights)."""
    lengths = [len(v) for v in _nested(inside) if _has_rows(v) or (isinstance(v, list | tuple) and v is not inside)]
    left = [p for p in inside if not (_is_numbers(p) and lengths.count(len(p)) == 1)]
    return left if any(_has_rows(value) for value in _nested(left)) else inside


def _is_numbers(value: Any) -> bool:
    return _is_plain(value) and value.ndim == 1 and value.is_floating_point()


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_nested


def _has_rows(value: Any) -> bool:
    return _is_plain(value) and value.ndim > 0


def _alike(entries: Sequence[Any]) -> list[Tensor]:
    """Return the entries if they are tensors of one type and number of axes, else none."""
    kinds = {(t.ndim, t.dtype) if _has_rows(t) else None for t in entries}
    return list(entries) if len(kinds) == 1 and None not in kinds else []


def _declared_size(batch: Any) -> int | None:
    """Return the number of samples that an object declares, or None."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, (*_LEAVES, list, tuple)):
        return None
    get = batch.get if _is_graph(batch) and isinstance(batch, Mapping) else lambda name: _attribute(batch, name)
    graphs, ends, size = (get(name) for name in ("num_graphs", "ptr", "batch_size"))
    if isinstance(size, torch.Size):
        size = size[0] if size else None
    declared = graphs if graphs is not None else len(ends) - 1 if isinstance(ends, Tensor) and ends.ndim else size
    if isinstance(declared, int) and not isinstance(declared, bool):
        return declared
    # The length of a single graph of some packages is that of the list of its attributes.
    own = hasattr(type(batch), "__len__") and not isinstance(batch, Mapping) and _attribute(batch, "num_nodes") is None
    return len(batch) if own and tensors_of(batch) else None


def targets_of(batch: Any) -> Int[Tensor, " batch"] | None:
    """Return the class labels: the last of a pair, or those under a name such as ``"label"``; None if there are none.

    Example:
        >>> targets_of((torch.zeros(2, 3), torch.tensor([1, 0]))).tolist()
        [1, 0]
    """
    if isinstance(batch, Mapping):
        named = [batch[key] for key in TARGET_KEYS if key in batch]
    else:
        named = [getattr(batch, key) for key in TARGET_KEYS if hasattr(batch, key)]
    pair = [batch[1]] if isinstance(batch, list | tuple) and len(batch) == 2 else []
    return next((labels for labels in (*named, *pair) if _is_labels(labels, batch)), None)


def _is_labels(labels: Any, batch: Any) -> bool:
    whole = isinstance(labels, Tensor) and labels.ndim == 1 and not (labels.is_floating_point() or labels.is_complex())
    return whole and labels.dtype != torch.bool and len(labels) == batch_size_of(batch)


def rows_of(batch: Any, index: Tensor, size: int) -> Any:
    """Return the samples ``index`` of a batch of ``size``, of every tensor or list with one entry per sample.

    Example:
        >>> rows_of({"x": torch.arange(3), "name": ["a", "b", "c"], "step": 7}, torch.tensor([2, 0]), 3)
        {'x': tensor([2, 0]), 'name': ['c', 'a'], 'step': 7}
    """
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, np.ndarray):
        return batch[index.cpu().numpy()] if batch.ndim and len(batch) == size else batch
    if _is_tensor_collection(batch):
        return batch[index.to(batch.device)] if batch.device is not None else batch[index]
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields") and has_entry_per_sample(batch, size):
        return type(batch)(batch[i] for i in index.tolist())
    return rebuilt(batch, lambda part: rows_of(part, index, size))


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the same batch with ``function`` applied to each tensor."""
    try:
        return _mapped(batch, function)
    except RecursionError:  # an object that is reachable from itself
        return copy.deepcopy(batch, {id(t): function(t) for t in tensors_of(batch)})


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return function(batch) if isinstance(batch, Tensor) else rebuilt(batch, lambda part: _mapped(part, function))


def rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container of the same kind with each of its parts changed; anything else as it is."""
    if isinstance(batch, _LEAVES):
        return batch
    if isinstance(batch, PackedSequence):  # which wants the lengths on the CPU
        data, lengths, *order = batch
        return PackedSequence(change(data), lengths, *(None if t is None else change(t) for t in order))
    if _is_tensor_collection(batch):
        return batch.apply(change)
    if isinstance(batch, list | tuple):
        return with_contents(batch, list(map(change, batch)))
    is_container = isinstance(batch, Mapping) or is_dataclass(batch)
    if not is_container and not tensors_of(batch):
        return batch
    return with_contents(batch, {key: change(value) for key, value in entries_of(batch).items()})


def _is_tensor_collection(batch: Any) -> bool:
    """Return whether a batch is a tensordict or the like: tensors with common first axes that it indexes itself."""
    if isinstance(batch, (*_LEAVES, list, tuple)) or type(batch) is dict:
        return False
    return isinstance(_attribute(batch, "batch_size"), torch.Size) and callable(_attribute(batch, "apply"))


def with_contents(batch: Any, values: Any) -> Any:
    """Return a container of the same kind with other contents, or the same one if none can be made."""
    kind = type(batch)
    if kind in (dict, list, tuple):
        return kind(values)
    try:
        if isinstance(batch, list | tuple):
            return kind(*values) if hasattr(batch, "_fields") else kind(values)
        if hasattr(kind, "__deepcopy__") and not isinstance(batch, Mapping):  # which copies all that belongs to it
            return copy.deepcopy(batch, {id(old): new for old, new in zip(parts(batch), values.values(), strict=True)})
        made = copy.copy(batch)
        for key, value in values.items():
            if isinstance(batch, Mapping):
                made[key] = value
            elif key in getattr(made, "__dict__", {}):
                vars(made)[key] = value
            else:
                object.__setattr__(made, key, value)  # also where it is frozen
    except Exception:  # noqa: BLE001 (whatever a class of the user's own does not allow)
        return _by_its_constructor(batch, values)
    return made


def _by_its_constructor(batch: Any, values: Any) -> Any:
    try:
        return type(batch)(values) if isinstance(batch, Mapping) else batch  # type: ignore[call-arg]
    except Exception:  # noqa: BLE001
        return batch


def has_entry_per_sample(entries: Sequence[Any], size: int) -> bool:
    """Return whether a list has one entry per sample, rather than one tensor for each of several quantities."""
    columns = any(isinstance(v, Tensor) and v.ndim and len(v) == size for v in entries)
    return len(entries) == size and not columns


def inputs_of(batch: Any) -> Any:
    """Return the model's inputs: the batch without its targets, where they can be told apart.

    Example:
        >>> inputs_of((torch.zeros(2, 3), torch.tensor([1, 0]))).shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[0], Tensor)
    return batch[0] if pair else batch


PerClass = bool | Callable[[Any], Tensor]
"""False, True (the targets are taken from the batch), or a function from a batch to its targets."""


def targets_in(batch: Any, per_class: PerClass) -> Int[Tensor, " batch"]:
    """Return the class of each sample.

    Raises:
        MeasurementError: If no targets are found in the batch, or they are no class numbers.
    """
    targets = per_class(batch) if callable(per_class) else targets_of(batch)
    if targets is None:
        raise MeasurementError(
            f"per_class=True: found no targets in a batch of type {type(batch).__name__}; expected a pair (inputs, "
            f"targets) or one of the keys {', '.join(TARGET_KEYS)} with one whole number per sample, or pass a "
            "function per_class=lambda batch: ..."
        )
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point() or (targets < 0).any():
        got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise MeasurementError(f"per_class: targets must be one whole number of at least 0 per sample, got {got}")
    if len(targets) != batch_size_of(batch):
        raise MeasurementError(f"per_class: {len(targets)} targets for a batch of {batch_size_of(batch)} samples")
    return targets.to(torch.int64)
