"""A run that has to call what an earlier one called.

That the functions are the same is not enough: data may decide which of two layers runs first, or which of two tensors
is written into. So layers have to be entered after the same calls, and writes have to go to the same memory.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_neurons.hooks.function_mode import Before, HookedMode
from lightning_neurons.isolation.tensors import address_of, tensors_in, version_of
from lightning_neurons.replay.call_log import Calls


class DivergedError(RuntimeError):
    """A run did not call what an earlier one of the same model had called."""


class SameCalls(HookedMode):
    """Enter it around a run; it raises as soon as the run goes another way.

    Args:
        calls: What the earlier run has called.
        modules: The layers that have to be entered when they were.

    Raises:
        DivergedError: In the middle of the run, if it calls something else.
    """

    def __init__(self, calls: Calls, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls, self._modules = calls, modules
        self.now = -1
        self.written = {memory for writes in calls.writes.values() for memory in writes}
        self._where: dict[int, int] = {}
        self._entered: dict[str, int] = {}

    def _before_runs(self) -> Iterable[tuple[nn.Module, Before]]:
        return [(module, partial(self._enter, name)) for name, module in self._modules.items()]

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        entries, times = self.calls.entries.get(name, ()), self._entered.get(name, 0)
        self._entered[name] = times + 1
        if times >= len(entries) or entries[times] != self.now + 1:
            raise DivergedError(f"{name} was entered after other calls before")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.now += 1
        functions = self.calls.functions
        if self.now >= len(functions) or functions[self.now] != func:
            if isinstance(sys.exc_info()[1], KeyboardInterrupt):  # what is open is left, with calls that put modes back
                return func(*args, **kwargs or {})
            raise DivergedError(f"call {self.now} was another one before")
        return self._answer(func, args, kwargs or {})

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the call gives: by default, it is made."""
        return self._call(func, args, kwargs)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.now
        given = [(t, version_of(t)) for t in tensors_in((args, kwargs))]
        out = func(*args, **kwargs)
        touched = {address_of(t) for t, version in given if version_of(t) != version}
        expected = {self._where.get(memory) for memory in self.calls.writes.get(now, ())}
        if touched != expected and (expected - touched or now not in self.calls.outside):
            raise DivergedError(f"call {now} wrote into other memory before")
        self._note(out)
        return out

    def _note(self, result: Any) -> None:
        """Take note of where memory is that is written into."""
        tensors, memories = list(tensors_in(result)), self.calls.memory[self.now]
        if len(tensors) != len(memories):
            raise DivergedError(f"call {self.now} gave {len(memories)} tensors before")
        for tensor, memory in zip(tensors, memories, strict=True):
            if memory in self.written:
                self._where[memory] = address_of(tensor)

    def finish(self) -> None:
        """Make sure that the run came to its end.

        Raises:
            DivergedError: Otherwise.
        """
        calls = len(self.calls.functions)
        if self.now + 1 != calls:
            raise DivergedError(f"the run ended after {self.now + 1} calls and not after {calls}")
