"""The calibration of a cut: data, a way to run a model on it, its loss, and sums over processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import is_divisible, samples_in, tensors_of
from lightning_neurons.data.joining import form_of, join
from lightning_neurons.errors import PruningError
from lightning_neurons.isolation.isolation import eager
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.pruning.compensation.moments import Reduce, alone

_ALIKE = 1e-4


def same(value: Any) -> Any:
    """Return the first process's value, where there is only one: the value itself."""
    return value


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration data of one process, and functions that combine values of all processes.

    Attributes:
        batches: On the model's device; they may be none in some process.
        run: Runs a model on a batch.
        loss: Returns the loss of a model on a batch.
        reduce: Sums a tensor over processes.
        agree: Returns the first process's value in all of them.
    """

    batches: Sequence[Any]
    run: Forward
    loss: Callable[[nn.Module, Any], Tensor]
    reduce: Reduce = alone
    agree: Callable[[Any], Any] = same

    def loss_of(self, model: nn.Module) -> float:
        """Return the mean loss of a copy of the model over the samples of all processes, in evaluation mode."""
        total = torch.zeros(2, dtype=torch.float32)
        with torch.no_grad(), eager():
            model.eval()
            for batch in self.batches:
                size = samples_in(batch)
                loss = self.loss(model, batch)
                if not isinstance(loss, Tensor):
                    raise PruningError(f"loss_fn returned {type(loss).__name__}: expected a tensor")
                total += torch.tensor([float(loss.detach().mean()) * size, float(size)])
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        total = self.reduce(total.to(device))
        return float(self.agree(float(total[0] / total[1].clamp(min=1))))


def in_few(batches: Sequence[Any], most: int, run: Callable[[Any], Any]) -> list[Any]:
    """Join samples to not many more than ``most`` batches, where joined batches give what they give alone.

    Args:
        batches: Batches of any form; those of different forms are not joined.
        most: Number of batches that is wanted at most.
        run: Runs a batch; tried on the first that would be joined.

    Returns:
        The same samples in the same order.
    """
    at_once = -(-len(batches) // most)
    found: list[list[Any]] = []
    for batch in batches if at_once > 1 else ():
        if found and len(found[-1]) < at_once and is_divisible(batch) and form_of(found[-1][0]) == form_of(batch):
            found[-1].append(batch)
        else:
            found.append([batch])
    several = [some for some in found if len(some) > 1]
    if not several or not _stand_alone(several[0], run):
        return list(batches)
    return [_joined(some) for some in found]


def _joined(some: Sequence[Any]) -> Any:
    return join(some, [samples_in(batch) for batch in some])


def _stand_alone(some: Sequence[Any], run: Callable[[Any], Any]) -> bool:
    """Return whether joined batches give the outputs that they give one by one: the same rows, or their means."""
    try:
        found = [[t.detach() for t in tensors_of(run(batch))] for batch in (_joined(some), *some)]
    except Exception:  # noqa: BLE001 (whatever a model raises on more samples than it expects)
        return False
    if len({len(tensors) for tensors in found}) > 1:
        return False
    sizes = [samples_in(batch) for batch in some]
    floats = [(tensor, pieces) for tensor, *pieces in zip(*found, strict=True) if tensor.is_floating_point()]
    return bool(floats) and all(_is_alike(tensor, pieces, sizes) for tensor, pieces in floats)


def _is_alike(whole: Tensor, pieces: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    if not whole.ndim:
        expected = sum(piece * size for piece, size in zip(pieces, sizes, strict=True)) / sum(sizes)
    elif [len(piece) for piece in pieces] == list(sizes) and len(whole) == sum(sizes):
        expected = torch.cat(list(pieces))
    else:
        return False
    assert isinstance(expected, Tensor), "of one or more pieces"
    scale = float(whole.abs().nan_to_num(posinf=0, neginf=0).max()) if whole.numel() else 0.0
    return whole.shape == expected.shape and torch.allclose(
        whole, expected, rtol=0, atol=_ALIKE * scale + 1e-30, equal_nan=True
    )
