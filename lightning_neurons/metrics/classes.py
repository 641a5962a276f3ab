"""Sums by class, which grow as targets with new classes come."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_neurons.errors import MeasurementError

PER_CLASS_LIMIT = 2 * 2**30
"""Bytes that the sums of a measurement per class may take."""


def class_index(layers: Sequence[str], rows: int, targets: Tensor | None) -> Int[Tensor, " batch"]:
    """Return the class of each sample of some layers.

    Raises:
        MeasurementError: If there is not one for each.
    """
    if targets is None or len(targets) != rows:
        got = "no targets" if targets is None else f"{len(targets)} targets"
        raise MeasurementError(
            f"per_class: {', '.join(layers)} saw {rows} samples but {got}; leave such layers out by layers="
        )
    return targets


def with_room(states: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return states enlarged to ``classes`` classes on the first axis; new classes start without any samples.

    Raises:
        MeasurementError: If they would take too much memory.
    """
    size = classes * 8 * sum(math.prod(state.shape[1:]) for state in states.values())
    if size > PER_CLASS_LIMIT:
        raise MeasurementError(
            f"per_class: sums for {classes} classes would take {size / 2**30:.1f} GiB of at most "
            f"{PER_CLASS_LIMIT / 2**30:g}; choose fewer layers=, or criteria= without 'near_zero'"
        )
    room = {
        name: state.new_full((classes - len(state), *state.shape[1:]), -torch.inf if name == "maxima" else 0)
        for name, state in states.items()
    }
    return {name: torch.cat([state, room[name]]) for name, state in states.items()}
