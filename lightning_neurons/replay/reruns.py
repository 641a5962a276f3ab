"""Shared knowledge on the runs of one model: learnt from the first batch, used for all of the same form."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import tensors_of
from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.isolation.model_state import ModelState, random_state
from lightning_neurons.layers.layer import Layer
from lightning_neurons.replay.call_log import Calls, learn

Run = Callable[[Any], Any]
"""A function from a batch to results such as losses and outputs: tensors in tuples, lists or dicts."""


class Reruns:
    """A record that the runs of one model on batches of one form share: learnt from the first, used by the rest.

    Args:
        model: The model; isolate it around all runs.
        layers: The layers as ``hooks/trace.py`` found them, by name.
        modules: The modules by layer.
        run: Runs the model on a batch.
        memory_limit: Limit in bytes for a tape; results beyond it are recorded in several runs.
        exact: Whether results are those of whole forwards bit for bit; else linear downstream layers take a shortcut.

    Attributes:
        replays: Number of runs that were answered from a tape in part.
        forwards: Number of whole forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        modules: Mapping[str, nn.Module],
        run: Run,
        memory_limit: int,
        *,
        exact: bool = True,
    ) -> None:
        self.model, self.layers, self.modules, self.run = model, layers, modules, run
        self.memory_limit, self.exact = memory_limit, exact
        self.calls: Calls | None = None
        self.is_stateful = self.draws = False
        self.trusted: dict[int, bool] = {}
        self.stackable: dict[int, bool] = {}
        self.replays = self.forwards = 0

    def learn(self, batch: Any, samples: int) -> Calls:
        """Log the calls of a run, and whether it draws random numbers or changes the model."""
        others = [*self.model.buffers(), *tensors_of(batch)]
        with torch.no_grad(), eager(), isolated(self.model):
            random, state = random_state(), ModelState(self.model)
            run = partial(self.run, batch)
            self.calls = learn(run, self.layers, self.modules, self.model.parameters(), others)
            self.calls.samples = samples
            self.draws = not all(torch.equal(a, b) for a, b in zip(_flat(random), _flat(random_state()), strict=True))
            self.is_stateful = bool(self.calls.outside) or state.has_changed()
        return self.calls


def _flat(state: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [state[0], *state[1]]
