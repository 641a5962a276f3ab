"""A run that has to make the same calls as an earlier one.

It is not enough that the functions are the same: the order of two layers, or the tensor that is written into, may
depend on data. So layers have to be entered after the same calls, and writes have to go to the same memory.
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
    """An error of a run that makes other calls than an earlier one of the same model."""


class SameCalls(HookedMode):
    """A mode around a run, which raises as soon as its calls differ from those of an earlier run.

    Args:
        calls: The calls of the earlier run.
        modules: The layers that have to be entered after the same calls.

    Raises:
        DivergedError: In the middle of the run, if a call is another one.
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
            if isinstance(sys.exc_info()[1], KeyboardInterrupt):  # contexts are being left, whose calls restore modes
                return func(*args, **kwargs or {})
            raise DivergedError(f"call {self.now} was another one before")
        return self._answer(func, args, kwargs or {})

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call; by default, the call is made."""
        return self._call(func, args, kwargs)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.now
        versions = [(t, version_of(t)) for t in tensors_in((args, kwargs))]
        out = func(*args, **kwargs)
        touched = {address_of(t) for t, version in versions if version_of(t) != version}
        expected = {self._where.get(memory) for memory in self.calls.writes.get(now, ())}
        if touched != expected and (expected - touched or now not in self.calls.outside):
            raise DivergedError(f"call {now} wrote into other memory before")
        self._note(out)
        return out

    def _note(self, result: Any) -> None:
        """Record the addresses of memory that is written into."""
        tensors, memories = list(tensors_in(result)), self.calls.memory[self.now]
        if len(tensors) != len(memories):
            raise DivergedError(f"call {self.now} gave {len(memories)} tensors before")
        for tensor, memory in zip(tensors, memories, strict=True):
            if memory in self.written:
                self._where[memory] = address_of(tensor)

    def finish(self) -> None:
        """Check that the run has made all calls of the earlier one.

        Raises:
            DivergedError: Otherwise.
        """
        calls = len(self.calls.functions)
        if self.now + 1 != calls:
            raise DivergedError(f"the run ended after {self.now + 1} calls and not after {calls}")
