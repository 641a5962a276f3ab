"""Runs of one batch with changes: by replay where that gives the same numbers, else by whole forwards.

Replay is checked, not assumed. From every start, the unchanged run is replayed once and must give the recorded results
bit for bit; a run that makes other calls, or reads a result that was not kept, is done as a whole forward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import is_divisible, rows_of, tensors_of
from lightning_neurons.data.joining import join
from lightning_neurons.hooks.intervention import Edit, Silence
from lightning_neurons.isolation.isolation import eager, isolated, kept_optimizers, kept_random_state, returning_to
from lightning_neurons.isolation.model_state import ModelState, random_state, set_random_state
from lightning_neurons.isolation.tensors import address_of, map_tensors_in, same_tensors
from lightning_neurons.layers.layer import Layer
from lightning_neurons.replay.call_log import Calls, learn
from lightning_neurons.replay.checked_run import DivergedError, SameCalls
from lightning_neurons.replay.tape import Replay, StackedReplay, Tape

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
        """Log the calls of a run, and whether it draws random numbers or changes the model.

        Returns:
            The log, which is also kept in ``calls``.
        """
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


_FEW = 2
_ROUNDING = 1e-4


class Rerun:
    """A batch that is run again and again, each time with a change.

    Args:
        of: The log and the checks that runs on batches of this form share.
        batch: The batch.
        samples: Number of its samples.

    Attributes:
        result: The result of the unchanged run.
    """

    def __init__(self, of: Reruns, batch: Any, samples: int) -> None:
        self._of, self._batch, self._samples = of, batch, samples
        self._random = random_state()
        self._state: ModelState | None = None
        self._stretches: list[list[int]] = []
        self._tape: Tape | None = None
        self._fits = True  # whether this batch makes the logged calls
        if of.calls is None:
            few = min(_FEW, samples) if is_divisible(batch) else samples
            try:
                of.learn(rows_of(batch, torch.arange(few), samples), few)
            except Exception:  # noqa: BLE001 (whatever a model raises on fewer samples than it expects)
                of.learn(batch, samples)
        assert of.calls is not None, "just learnt"
        try:
            self.result = self._checked(SameCalls(of.calls, of.modules))
        except DivergedError:
            if of.calls.samples != samples and not of.trusted:  # a few samples made other calls than the whole batch
                of.learn(batch, samples)
            try:
                self.result = self._checked(SameCalls(of.calls, of.modules))
            except DivergedError:
                self._fits = False
                with self._again():
                    self.result = of.run(batch)

    def _checked(self, calls: SameCalls) -> Any:
        with self._again(), calls:
            result = self._of.run(self._batch)
        calls.finish()
        return result

    def plan(self, layers: Sequence[str]) -> list[str]:
        """Announce the layers that will be changed.

        Returns:
            The layers in the order that needs the fewest recordings.
        """
        calls = self._of.calls
        assert calls is not None, "learnt before"
        starts = {name: self._start(name) for name in layers}
        usable = [start for start in starts.values() if start is not None]
        self._stretches = calls.stretches(usable, self._samples, self._of.memory_limit)
        return sorted(layers, key=lambda name: starts[name] or 0)

    def silenced(self, edits: Mapping[str, Edit]) -> Any:
        """Return the result of the run with neurons of some layers changed.

        Args:
            edits: The change of each layer.

        Returns:
            The result of ``run``, in its own form.
        """
        starts = [self._start(name) for name in edits]
        start = None if None in starts else min(s for s in starts if s is not None)
        if start is not None:
            calls = self._of.calls
            assert calls is not None, "learnt before"
            changed = {call: edit for name, edit in edits.items() for call in calls.points[name]}
            replayed = self._replay(start, changed, list(edits))
            if replayed is not None:
                return replayed[0]
        return self._whole(edits)

    def silenced_together(self, layer: str, edits: Sequence[Edit]) -> Any:
        """Return the result of the run on the batch repeated, each time with another change of one layer.

        Args:
            layer: The layer.
            edits: The changes.

        Returns:
            The result of ``run`` for ``len(edits)`` times as many samples, or None if such a run is not possible.
        """
        start, of = self._start(layer), self._of
        if start is None or not self._trusted(start) or self._tape is None or self._tape.rewritten or of.draws:
            return None
        if of.calls is None or len(of.calls.points[layer]) != 1 or of.stackable.get(start) is False:
            return None
        if start not in of.stackable:
            result = self._stacked(layer, start, [None] * len(edits))
            repeated = map_tensors_in(self.result, partial(_repeated, times=len(edits), samples=self._samples))
            of.stackable[start] = result is not None and same_tensors(result, repeated, tolerance=_ROUNDING)
        return self._stacked(layer, start, edits) if of.stackable[start] else None

    def _stacked(self, layer: str, start: int, edits: Sequence[Edit | None]) -> Any:
        assert self._tape is not None, "recorded before"
        batch = join([self._batch] * len(edits), [self._samples] * len(edits))
        replay = StackedReplay(self._tape, {layer: self._of.modules[layer]}, start, edits, self._samples)
        try:
            with self._again(), replay:
                result = self._of.run(batch)
            replay.finish()
        except Exception:  # noqa: BLE001 (sizes that the model has remembered do not fit: one by one, then)
            return None
        self._of.replays += len(edits)
        return result

    def plan_parameters(self, parameters: Sequence[Tensor]) -> list[int]:
        """Announce the parameters that will be changed.

        Returns:
            Indices into ``parameters`` in the order that needs the fewest recordings.
        """
        assert self._of.calls is not None, "learnt before"
        starts = [self._reader(parameter) for parameter in parameters]
        usable = [start for start in starts if start is not None]
        self._stretches = self._of.calls.stretches(usable, self._samples, self._of.memory_limit)
        return sorted(range(len(starts)), key=lambda i: starts[i] or 0)

    def prepare_parameter(self, parameter: Tensor) -> None:
        """Record all that a run with this parameter changed needs, before it is changed."""
        start = self._reader(parameter)
        if start is not None:
            self._trusted(start)

    def with_changed(self, parameter: Tensor) -> Any:
        """Return the result of the run with a parameter that was changed after ``prepare_parameter``."""
        self._state = None  # it has other weights now
        start = self._reader(parameter)
        replayed = None if start is None else self._replay(start, {})
        result = self._whole({}) if replayed is None else replayed[0]
        self._state = None
        return result

    def _reader(self, parameter: Tensor) -> int | None:
        """Return the first call that reads a parameter."""
        assert self._of.calls is not None, "learnt before"
        return self._of.calls.parameters.get(address_of(parameter))

    def activation(self, layer: str) -> Tensor | None:
        """Return the recorded activation of a layer, if it ran once and is on the tape, else None."""
        calls, tape, start = self._of.calls, self._tape, self._start(layer)
        if calls is None or tape is None or start not in tape.starts or len(calls.points[layer]) != 1:
            return None
        value = tape.answer(calls.points[layer][0], start, {})
        return value if isinstance(value, Tensor) and value.numel() else None

    def prepare(self, layer: str) -> bool:
        """Record all that a change of a layer needs.

        Returns:
            False if the change cannot be replayed, so that whole runs are needed.
        """
        start = self._start(layer)
        return start is not None and self._trusted(start)

    def _start(self, layer: str) -> int | None:
        calls = self._of.calls
        points = calls.points.get(layer, []) if calls is not None else []
        return min(points) + 1 if points and min(points) >= 0 else None

    def _replay(self, start: int, edits: Mapping[int, Edit], layers: Sequence[str] = ()) -> tuple[Any] | None:
        if not self._trusted(start):
            return None
        assert self._tape is not None, "recorded before"
        modules = {name: self._of.modules[name] for name in layers}
        replay = Replay(self._tape, modules, start, edits, shortcuts=not self._of.exact)
        try:
            result = (self._checked(replay),)
        except Exception:  # noqa: BLE001 (it went another way, or failed because it did: the whole forward will tell)
            self._tape = None
            return None
        self._of.replays += 1
        return result

    def _trusted(self, start: int) -> bool:
        """Record all that a replay from ``start`` needs.

        Returns:
            Whether replays from there give the same results as a whole run.
        """
        of = self._of
        if not self._fits or of.trusted.get(start) is False:
            return False
        if self._tape is None or start not in self._tape.starts:
            self._tape = None  # let go of the old one first
            self._tape = self._record(next((s for s in self._stretches if start in s), [start]))
        if self._tape is None:
            self._fits = False
            return False
        if start not in of.trusted:
            of.trusted[start] = True
            again = self._replay(start, {})
            of.trusted[start] = again is not None and same_tensors(again[0], self.result)
        return of.trusted[start]

    def _record(self, starts: Sequence[int]) -> Tape | None:
        of = self._of
        assert of.calls is not None, "learnt before"
        tape = Tape(of.calls, of.modules, starts, draws=of.draws, shortcuts=not of.exact)
        try:
            result = self._checked(tape)
        except DivergedError:
            return None
        return tape if same_tensors(result, self.result) else None

    def _whole(self, edits: Mapping[str, Edit]) -> Any:
        self._of.forwards += 1
        with self._again(), Silence(self._of.layers, self._of.modules, edits):
            return self._of.run(self._batch)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Start a run in the same state as all others."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(eager())
            if self._of.is_stateful:
                self._state = self._state or ModelState(self._of.model)  # to look through a model takes time
                stack.enter_context(kept_random_state(self._of.model))
                stack.enter_context(returning_to(self._state))
                stack.enter_context(kept_optimizers())
            if self._of.draws:
                set_random_state(self._random)
            yield


def _repeated(tensor: Tensor, times: int, samples: int) -> Tensor:
    is_per_sample = tensor.ndim and len(tensor) == samples
    return tensor.repeat(times, *[1] * (tensor.ndim - 1)) if is_per_sample else tensor
