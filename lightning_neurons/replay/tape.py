"""A recording of a run, and replays of the rest of the model from one of its calls on.

Only results that are read after a place where a replay will start are kept, and memory that is written into later is
copied just before. The model's own Python code runs as always, so nothing has to be traced or exported, and results are
bit for bit those of a whole forward. Cost: the calls from the start on, and a few microseconds for each before it.

In a batched replay the batch is repeated, and each repetition gets its own change: for devices on which a larger batch
costs hardly more than a small one. Rounding in a kernel may depend on the size of the batch, so those results are equal
to single replays up to rounding.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.hooks.intervention import Edit
from lightning_neurons.isolation.model_state import random_state, set_random_state
from lightning_neurons.isolation.tensors import address_of, map_tensors_in, tensors_in
from lightning_neurons.replay.call_log import ALWAYS, Calls
from lightning_neurons.replay.checked_run import DivergedError, SameCalls
from lightning_neurons.replay.linear_delta import through_reader


class Tape(SameCalls):
    """A mode that records a run, as far as replays from ``starts`` need it.

    Args:
        calls: The calls of an earlier run.
        modules: The layers that have to be entered after the same calls.
        starts: The calls at which replays will start; the results of calls before are taken from the tape.
        draws: Whether the model draws random numbers; their state is then kept at each start.
        shortcuts: Whether to keep inputs and outputs of the linear layers that read activations.

    Raises:
        DivergedError: If this run makes other calls.
    """

    def __init__(
        self,
        calls: Calls,
        modules: Mapping[str, nn.Module],
        starts: Sequence[int],
        *,
        draws: bool = False,
        shortcuts: bool = False,
    ) -> None:
        super().__init__(calls, modules)
        self.starts = sorted(starts)
        self.results: list[Any] = []
        self.rewritten: set[int] = set()  # calls in whose results lies memory that is written into later
        self.random: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._draws = draws
        self._before: dict[int, list[tuple[int, torch.UntypedStorage]]] = {}
        self._some: dict[int, Tensor] = {}
        self._unread = dict(calls.parameters)
        wanted = [calls.twins.get(start - 1, {}) for start in starts] if shortcuts else []
        self._extra = {call for twins in wanted for pair in twins.items() for call in pair}

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now, calls = self.now, self.calls
        for tensor in tensors_in((args, kwargs)):
            if self._unread and self._unread.pop(address_of(tensor), now) != now:
                raise DivergedError(f"call {now} is the first to read a parameter that another call read first before")
        if self._draws and now in self.starts:
            self.random[now] = random_state()
        for memory in calls.writes.get(now, ()):
            if self._has_start(calls.created[memory], now) and memory in self._some:
                copy = self._some[memory].untyped_storage().clone()
                self._before.setdefault(memory, []).append((now, copy))
        out = self._call(func, args, kwargs)
        memories = iter(calls.memory[now])
        self.results.append(map_tensors_in(out, lambda t: self._kept(t, next(memories), now)))
        return out

    def _kept(self, tensor: Tensor, memory: int, now: int) -> Tensor:
        is_needed = memory < 0 or self._has_start(now, self.calls.read[memory])
        if not is_needed and (now not in self._extra or memory in self.written):
            return HOLE
        if memory in self.written:
            self.rewritten.add(now)
            self._some.setdefault(memory, tensor)
        return tensor

    def _has_start(self, after: int, last: int) -> bool:
        """Return whether a replay starts after one call and at or before another."""
        place = bisect_right(self.starts, after)
        return place < len(self.starts) and self.starts[place] <= last

    def twins(self, start: int) -> dict[int, int]:
        """Pair each call that reads the activation before ``start`` with the call that made its input.

        Returns:
            Calls by the number of the call that reads; only pairs of which the tape holds both results, unchanged.
        """

        def is_kept(call: int) -> bool:
            intact = not any(memory in self.written for memory in self.calls.memory[call])
            return call in self._extra and intact and isinstance(self.results[call], Tensor)

        pairs = self.calls.twins.get(start - 1, {})
        return {reader: twin for reader, twin in pairs.items() if is_kept(reader) and is_kept(twin)}

    def answer(self, call: int, start: int, private: dict[int, torch.UntypedStorage]) -> Any:
        """Return the result of a call as it was at the start of a replay, in memory that the replay may write into.

        Args:
            call: The call.
            start: Call at which the replay starts.
            private: Memory that the replay has copied so far, by its number; it is extended.

        Returns:
            The result in its recorded form, with ``HOLE`` in place of tensors that were not kept.
        """
        if call not in self.rewritten:
            return self.results[call]
        memories = iter(self.calls.memory[call])

        def state(tensor: Tensor) -> Tensor:
            memory = next(memories)
            later = [copy for when, copy in self._before.get(memory, ()) if when >= start]
            if tensor is HOLE or not later:
                return tensor
            if memory not in private:
                private[memory] = later[0].clone()
            return _on(private[memory], tensor)

        return map_tensors_in(self.results[call], state)


HOLE = torch.empty(0)
"""The mark of a result that was not kept, as no call reads it after a replay has started."""


def _on(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    fresh = torch.empty(0, dtype=like.dtype, device=like.device)
    return fresh.set_(storage, like.storage_offset(), like.size(), like.stride())


class Replay(SameCalls):
    """A mode around the same run that the tape has recorded. If the run diverges, the tape may be spoilt.

    Args:
        tape: The recording.
        modules: The layers that are changed.
        start: The first call that is run; one of the tape's starts.
        edits: By call, the change of its result; of calls before ``start``, only the very last may have one.
        shortcuts: Whether linear layers that read the activation changed before ``start`` compute the difference alone.

    Raises:
        DivergedError: If the run calls other functions than the recorded one, or needs a result that was not kept.
    """

    def __init__(
        self,
        tape: Tape,
        modules: Mapping[str, nn.Module],
        start: int,
        edits: Mapping[int, Edit],
        *,
        shortcuts: bool = False,
    ) -> None:
        super().__init__(tape.calls, modules)
        self._tape, self._start, self._edits = tape, start, edits
        self._private: dict[int, torch.UntypedStorage] = {}
        self._twins = tape.twins(start) if shortcuts and list(edits) == [start - 1] else {}
        self._before: Tensor | None = None
        self._undo: list[tuple[Edit, Tensor, Tensor]] = []

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for edit, tensor, before in reversed(self._undo):
            edit.undo(tensor, before)

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.now
        if now < self._start:
            result = self._tape.answer(now, self._start, self._private)
            if now in self._tape.rewritten:
                self._note(result)
            return self._changed(result, is_recorded=True) if now in self._edits else result
        if now == self._start and now in self._tape.random:
            set_random_state(self._tape.random[now])
        if any(t is HOLE for t in tensors_in((args, kwargs))):
            raise DivergedError(f"call {now} reads what no call read before")
        if now in self._twins:
            return self._shortcut(func, args, kwargs)
        out = self._call(func, args, kwargs)
        return self._changed(out, is_recorded=False) if now in self._edits else out

    def _changed(self, result: Tensor, *, is_recorded: bool) -> Tensor:
        edit, calls = self._edits[self.now], self.calls
        if is_recorded and any(memory < 0 or calls.read[memory] == ALWAYS for memory in calls.memory[self.now]):
            result = result.clone()  # it may be held after the replay
        if result.requires_grad:
            result = result.clone()  # a loss may differentiate within
        before = self._before = edit.write(result)
        if is_recorded and result is self._tape.results[self.now]:
            self._undo.append((edit, result, before))
        return result

    def _shortcut(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        twin, (edit,) = self._twins[self.now], self._edits.values()
        before = self._before
        if twin != self._start - 1:
            recorded = self._tape.results[twin]
            before = recorded.index_select(edit.axis % recorded.ndim, edit.neurons)
        assert before is not None, "the edit comes first"
        return through_reader(func, args, kwargs, edit.neurons, before, self._tape.results[self.now])


class StackedReplay(Replay):
    """A mode for a run of the batch, repeated once for each change.

    Args:
        tape: The recording of the single batch; no memory on it is written into later.
        modules: The layers that are changed.
        start: The first call that is run; the one before it makes the activation.
        edits: The changes of that activation, one for each repetition.
        samples: Number of samples of the batch.

    Raises:
        DivergedError: If the run calls other functions than the recorded one, or needs a result that was not kept.
    """

    def __init__(
        self, tape: Tape, modules: Mapping[str, nn.Module], start: int, edits: Sequence[Edit | None], samples: int
    ) -> None:
        super().__init__(tape, modules, start, {})
        self._changes, self._samples = edits, samples

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super()._answer(func, args, kwargs)
        if self.now >= self._start:
            return result
        result = map_tensors_in(result, self._repeated)
        if self.now == self._start - 1:
            for place, edit in enumerate(self._changes):
                if edit is not None:
                    edit.write(result.narrow(0, place * self._samples, self._samples))
        return result

    def _repeated(self, tensor: Tensor) -> Tensor:
        if tensor is HOLE or not tensor.ndim or len(tensor) != self._samples:
            return tensor
        return tensor.repeat(len(self._changes), *[1] * (tensor.ndim - 1))
