"""Log of the calls in a run of a model: which call makes, reads last and overwrites which memory.

A ``TorchFunctionMode`` sees every call of a torch function. One run in which every tensor is kept gives the log
(``learn``); with that, ``tape.py`` records a second run, but only the results that replays will need.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_neurons.hooks.capture import FollowLayers
from lightning_neurons.hooks.function_mode import Before
from lightning_neurons.isolation.tensors import address_of, tensors_in, version_of
from lightning_neurons.layers.layer import Layer
from lightning_neurons.replay.linear_delta import Narrow

ALWAYS = 2**62
"""Number of a call after all others, which stands for the use of the run's result."""


@dataclass
class Calls:
    """The calls of one run, in order.

    Attributes:
        functions: The function of each call.
        memory: By call, the memory (a number) of each tensor in its result; -1 for memory of the model or the batch.
        created: By memory, the call that made it.
        read: By memory, the last call that read it.
        bytes: By memory, its size.
        writes: By call, the memory that it writes into.
        outside: The calls that write into memory of the model or the batch.
        entries: By layer, the number of calls before each run of it.
        points: By layer, the calls whose results are its activations.
        twins: For consumers of a changed activation; see ``linear_delta.py``.
        parameters: By address of a parameter's memory, the first call that reads it.
        samples: Number of samples in the run.
    """

    functions: list[Callable[..., Any]] = field(default_factory=list)
    memory: list[tuple[int, ...]] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    writes: dict[int, set[int]] = field(default_factory=dict)
    outside: set[int] = field(default_factory=set)
    entries: dict[str, list[int]] = field(default_factory=dict)
    points: dict[str, list[int]] = field(default_factory=dict)
    twins: dict[int, dict[int, int]] = field(default_factory=dict)
    parameters: dict[int, int] = field(default_factory=dict)
    samples: int = 1

    def needed(self, start: int) -> list[int]:
        """Return the memory that a replay from call ``start`` on reads, and that was made before."""
        return [m for m, (made, read) in enumerate(zip(self.created, self.read, strict=True)) if made < start <= read]

    def stretches(self, starts: Iterable[int], samples: int, limit: int) -> list[list[int]]:
        """Group starts so that each group needs at most ``limit`` bytes on its tape.

        Returns:
            Groups in the order of the calls; a start that needs more than ``limit`` is alone in its group.
        """
        groups: list[list[int]] = []
        held: set[int] = set()
        for start in sorted(set(starts)):
            wanted = held | set(self.needed(start))
            size = sum(self.bytes[m] for m in wanted) * samples // self.samples
            if groups and size <= limit:
                groups[-1].append(start)
                held = wanted
            else:
                groups.append([start])
                held = set(self.needed(start))
        return groups


class _Arrivals(FollowLayers):
    """A mode that reports activations while ``_Learn`` counts calls."""

    def __init__(self, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module], seen: "_Learn") -> None:
        super().__init__(layers, modules)
        self._seen = seen

    def _before_runs(self) -> Iterable[tuple[nn.Module, Before]]:
        return [(module, partial(self._entered, name)) for name, module in self._modules.items()]

    def _entered(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._seen.calls.entries.setdefault(name, []).append(len(self._seen.calls.functions))

    def _arrive(self, name: str, value: Tensor) -> Tensor:
        self._seen.arrive(name, value, self._layers[name].axis)
        return value


class _Learn(TorchFunctionMode):
    def __init__(self, parameters: Iterable[Tensor], others: Iterable[Tensor]) -> None:
        super().__init__()
        self.calls = Calls()
        self._parameters = {address_of(t) for t in parameters}
        self._own = self._parameters | {address_of(t) for t in others}
        self._number: dict[int, int] = {}
        self._call_of: dict[int, int] = {}
        self._narrow = Narrow(self.calls.twins)
        self._alive: list[Tensor] = []  # addresses and ids stay unique while tensors live
        self._now = -1

    def arrive(self, name: str, value: Tensor, axis: int) -> None:
        """Record an activation, which is a result of the call that is running, or of an earlier one."""
        inside = self._now if self._now == len(self.calls.memory) else None
        call = self._call_of.get(id(value)) if inside is None else inside
        self.calls.points.setdefault(name, []).append(-1 if call is None else call)
        if call is not None:
            self._narrow.begin(value, call, axis)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        calls, kwargs = self.calls, kwargs or {}
        now = self._now = len(calls.functions)
        calls.functions.append(func)
        versions = [(t, version_of(t)) for t in tensors_in((args, kwargs))]
        out = func(*args, **kwargs)
        for tensor, version in versions:
            address = address_of(tensor)
            number = self._number.get(address, -1)
            if number >= 0:
                calls.read[number] = now
            elif address in self._parameters:
                calls.parameters.setdefault(address, now)
            if version_of(tensor) != version and number < 0:
                calls.outside.add(now)
            elif version_of(tensor) != version:
                calls.writes.setdefault(now, set()).add(number)
        if out is None:  # an assignment has no result that a replay could change
            for points in calls.points.values():
                points[-1] = -1 if points[-1] == now else points[-1]
        calls.memory.append(tuple(self._memory(t, now) for t in tensors_in(out)))
        self._narrow.see(func, args, kwargs, out, now)
        return out

    def _memory(self, tensor: Tensor, now: int) -> int:
        self._call_of[id(tensor)] = now
        self._alive.append(tensor)
        address = address_of(tensor)
        if address in self._own:
            return -1
        if address not in self._number:
            self._number[address] = len(self.calls.created)
            self.calls.created.append(now)
            self.calls.read.append(now)
            self.calls.bytes.append(tensor.untyped_storage().nbytes() if address > 0 else 0)
        return self._number[address]

    def returns(self, result: Any) -> None:
        """Record the result of the run, which is read after all calls."""
        for tensor in tensors_in(result):
            number = self._number.get(address_of(tensor), -1)
            if number >= 0:
                self.calls.read[number] = ALWAYS


def learn(
    run: Callable[[], Any],
    layers: Mapping[str, Layer],
    modules: Mapping[str, nn.Module],
    parameters: Iterable[Tensor],
    others: Iterable[Tensor],
) -> Calls:
    """Log the calls of a run. Keeps every tensor of the run until it ends: give it few samples.

    Args:
        run: Runs the model and computes on its output, and returns the result that is needed.
        layers: The layers as ``hooks/trace.py`` found them, by name.
        modules: The modules by layer.
        parameters: The model's parameters.
        others: All other tensors that exist before the run: buffers, the batch.

    Returns:
        The log; its ``samples`` has still to be set.
    """
    seen = _Learn(parameters, others)
    with _Arrivals(layers, modules, seen), seen:
        result = run()
    seen.returns(result)
    return seen.calls
