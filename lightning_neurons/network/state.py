"""Whether running a model changes it: what can be run again and again must not depend on how often it has run."""

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_neurons.network.isolate import plain_attributes
from lightning_neurons.network.trees import version_of

_LONG = 1000


class ModelState:
    """The state of a model, to be compared with that after a run. Take it inside of ``isolated``.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> state = ModelState(norm)
        >>> _ = norm(torch.randn(4, 2))
        >>> state.has_changed()
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._marks()

    def has_changed(self) -> bool:
        """Whether a buffer, a plain attribute, or the random numbers of Python or numpy have changed."""
        return self._marks() != self._before

    def _marks(self) -> list[Any]:
        marks: list[Any] = [random.getstate(), repr(np.random.get_state())]
        for module in self._model.modules():
            marks.append({name: _mark(value) for name, value in plain_attributes(module).items()})
            marks.append({name: _mark(buffer) for name, buffer in module._buffers.items()})
        return marks


def _mark(value: Any, depth: int = 3) -> Any:
    """Something that differs if the value does."""
    if isinstance(value, Tensor):
        return id(value), version_of(value)
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, list | tuple | set | dict | deque):
        if not depth or len(value) > _LONG:
            return id(value), len(value)
        entries = value.items() if isinstance(value, dict) else value
        return id(value), [_mark(entry, depth - 1) for entry in entries]
    return value if isinstance(value, int | float | str | bytes | None) else id(value)


def random_state() -> tuple[Tensor, list[Tensor]]:
    """The state of torch's random numbers, of the CPU and of every GPU in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Go back to a state of torch's random numbers."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
