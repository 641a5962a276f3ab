"""What the runs of one model on batches of one form have in common: learnt from the first, used by the rest."""

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
"""From a batch to what is wanted of it, such as losses and outputs: tensors in tuples, lists or dicts."""


class Reruns:
    """What runs of one model on batches of one form have in common: learnt from the first, used by the rest.

    Args:
        model: The model; isolate it around everything.
        layers: What ``hooks/trace.py`` found.
        modules: Their modules.
        run: Runs the model on a batch.
        memory_limit: How many bytes a tape may take; what does not fit is recorded in several runs.
        exact: Whether results are those of whole forwards bit for bit; else first readers take a shortcut.

    Attributes:
        replays: How many runs were answered from a tape, in part.
        forwards: How many were whole.
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
        """Learn what a run calls."""
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
