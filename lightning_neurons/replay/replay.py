"""Run a model from one of its calls on; the results of all calls before are taken from a tape.

The model's own Python code runs as always, so nothing has to be traced or exported, and results are bit for bit those
of a whole forward. Cost: the calls from the start on, and a few microseconds for each before it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.hooks.intervention import Edit
from lightning_neurons.isolation.model_state import set_random_state
from lightning_neurons.isolation.tensors import tensors_in
from lightning_neurons.replay.call_log import ALWAYS
from lightning_neurons.replay.checked_run import DivergedError, SameCalls
from lightning_neurons.replay.linear_delta import through_reader
from lightning_neurons.replay.tape import HOLE, Tape


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
