"""The logits in a model's output, the layers that make it, and those that only lead to it.

One forward in which every tensor carries the layers that it comes from: nearest, those with no other layer in between,
and all of them.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_neurons.data.batches import tensors_of
from lightning_neurons.hooks.function_mode import After, HookedMode
from lightning_neurons.isolation.tensors import Weights, address_of, has_weights, tensors_in, version_of, weights_of


def logits_in(output: Any) -> Tensor | None:
    """Find the logits in an output: itself, its entry ``logits``, or its only floating-point tensor.

    Args:
        output: A tensor, mapping, dataclass or any object with tensors as attributes.

    Returns:
        The tensor, or None if there is none, or more than one that could be meant.

    Example:
        >>> import torch
        >>> logits_in({"logits": torch.ones(1, 2), "hidden": torch.zeros(1, 8)})
        tensor([[1., 1.]])
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    floating = [t for t in tensors_of(output) if t.is_floating_point()]
    return floating[0] if len(floating) == 1 else None


Origin = tuple[frozenset[str], frozenset[str]]
"""The layers with no other layer in between, and all layers, from which a tensor comes."""

_NOWHERE: Origin = frozenset(), frozenset()


class Origins(HookedMode):
    """A mode around a forward; ``of`` then tells from which layers a result comes.

    Args:
        modules: The layers, by name.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with Origins({"first": net[0], "last": net[2]}) as origins:
        ...     out = net(torch.zeros(1, 2))
        >>> nearest, every = origins.of(out)
        >>> sorted(nearest), sorted(every)
        (['last'], ['first', 'last'])
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules = modules
        self._known: dict[int, Origin] = {}
        self._written: dict[int, Origin] = {}  # by address
        self._alive: list[Tensor] = []  # ids stay unique while tensors live

    def _after_runs(self) -> Iterable[tuple[nn.Module, After]]:
        return [(module, partial(self._made, name, weights_of(module))) for name, module in self._modules.items()]

    def of(self, result: Any) -> Origin:
        """Return the layers from which the tensors in a result come."""
        tensors = list(tensors_in(result))
        origins = [self._known.get(id(tensor), _NOWHERE) for tensor in tensors]
        origins += [self._written.get(address_of(tensor), _NOWHERE) for tensor in tensors]
        return frozenset().union(*(f[0] for f in origins)), frozenset().union(*(f[1] for f in origins))

    def _made(self, name: str, weights: Weights, module: nn.Module, inputs: Any, output: Any) -> None:
        if not has_weights(module, weights):
            return  # it runs with other weights, as another network
        every = self.of(output)[1] | {name}
        for tensor in tensors_in(output):
            self._note(tensor, (frozenset({name}), every))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        versions = [(t, version_of(t)) for t in tensors_in((args, kwargs or {}))]
        origin = self.of([t for t, _ in versions])
        out = func(*args, **(kwargs or {}))
        for tensor, version in versions:
            if version_of(tensor) != version:  # and with it, everything that shares its memory
                self._written[address_of(tensor)] = origin
                self._alive.append(tensor)
        for tensor in tensors_in(out):
            self._note(tensor, origin)
        return out

    def _note(self, tensor: Tensor, origin: Origin) -> None:
        self._known[id(tensor)] = origin
        self._alive.append(tensor)
