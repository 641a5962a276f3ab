"""Costs of a model, whole or with fewer neurons: parameters, multiply-accumulate operations (MACs), measured time.

MACs are those of one sample, of every operation that ``torch.utils.flop_counter`` has a formula for, and of attention
and recurrent layers in whatever kernel they run. An operation with a weight takes the number of positions at which it
is applied, times the weight's size. Both follow from the sizes of tensors, so the cost of a plan is known before
anything is cut. What has no weight of its own, as the products inside of attention, is counted on a cut copy.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_neurons.data.batches import results_of, samples_in, tensors_of
from lightning_neurons.dependency.groups import Group
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.layer import candidates, modules_by_name, public_name
from lightning_neurons.layers.width_handlers import axes, weight_name
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut

Removed = Mapping[tuple[str, int], int]
"""The number of places that are removed, by tensor and axis."""

Effects = list[tuple[str, int, tuple[int, ...]]]
"""Tensor, axis, and the number of places that are removed with each unit of a group."""

_RECURRENT = frozenset({"mkldnn_rnn_layer", "cudnn_rnn", "miopen_rnn"})


@dataclass(frozen=True)
class Costs:
    """The sizes of a model's tensors.

    Attributes:
        shapes: Shapes by parameter.
        positions: By weight, the number of positions at which it is applied, per sample.
        rest: MACs per sample of operations without a weight of their own.
        uncounted: Layers that ran without any operation whose MACs have a formula.
    """

    shapes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, float]
    rest: float = 0.0
    uncounted: tuple[str, ...] = ()

    def parameters(self, removed: Removed | None = None) -> int:
        """Return the number of parameters, when something has been removed."""
        return sum(self._size(name, removed or {}) for name in self.shapes)

    def macs(self, removed: Removed | None = None) -> int:
        """Return the multiply-accumulate operations per sample, when something has been removed."""
        weights = sum(count * self._size(name, removed or {}) for name, count in self.positions.items())
        return round(weights + self.rest)

    def macs_of(self, weight: str) -> int:
        """Return the multiply-accumulate operations per sample of one layer's weight."""
        return round(self.positions[weight] * self._size(weight, {})) if weight in self.positions else 0

    def _size(self, name: str, removed: Removed) -> int:
        shape = self.shapes[name]
        return math.prod(size - removed.get((name, axis), 0) for axis, size in enumerate(shape))


def costs_of(model: nn.Module, example: Example, run: Callable[[], Any] | None = None) -> Costs:
    """Run a model once, on a copy of the example, and count.

    Args:
        model: In evaluation mode; it may be a copy.
        example: The inputs to run it on.
        run: Runs it on them, where more is to be done with what it returns.

    Returns:
        MACs are per sample.
    """
    samples = samples_in(example.inputs)
    counting = _Counting(model)
    # The fast path of nn.MultiheadAttention and nn.TransformerEncoder has no formula; written out, all is counted.
    with counting.watched(), _written_out(), torch.inference_mode(False), torch.no_grad(), counting:
        example.run(model) if run is None else run()
    shapes = {public_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    positions = {
        name: macs / math.prod(shapes[name]) / samples for name, macs in counting.macs.items() if name in shapes
    }
    rest = sum(macs for name, macs in counting.macs.items() if name not in shapes) / samples
    return Costs(shapes, positions, rest, counting.uncounted())


@dataclass(frozen=True)
class Counter:
    """A counter of a model's costs. Weights may decide which layers run on what, as those of a router do.

    Attributes:
        twin: A copy with the weights of the model, in evaluation mode.
        example: The inputs that it is run on.
    """

    twin: nn.Module
    example: Example

    def costs(self, cuts: Sequence[TensorCut] = ()) -> Costs:
        """Return the costs when something has been cut; the copy is as it was afterwards."""
        operation = cut(self.twin, cuts)
        try:
            return costs_of(self.twin, self.example)
        finally:
            operation.roll_back()

    def changes(
        self,
        cuts: Sequence[TensorCut],
        shifts: Mapping[str, Tensor] | None,
        silence: Callable[[], AbstractContextManager[None]],
    ) -> tuple[float, float]:
        """Compare the outputs on the example when something has been cut with those before it.

        Args:
            cuts: The cuts.
            shifts: By parameter or buffer, what is added to it before the cut.
            silence: Makes a context in which the neurons are silent.

        Returns:
            The largest differences from the outputs of the whole model and of the silent one, as shares of the largest
            output.
        """
        with torch.no_grad():
            before = results_of(self.example.run(self.twin))
            with silence():
                silent = results_of(self.example.run(self.twin))
            operation = cut(self.twin, cuts, shifts=shifts)
            try:
                after = results_of(self.example.run(self.twin))
            finally:
                operation.roll_back()
        return _share(after, before), _share(after, silent)


def _share(values: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(values, others, strict=True) if b.is_floating_point() or b.is_complex()]
    shares = [float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30) for a, b in pairs if b.numel()]
    return max(shares, default=0.0)


def routed(costs: Costs, others: Costs) -> tuple[str, ...]:
    """Return the layers that run on other samples or positions with other weights, in the order of the model.

    Args:
        costs: Of a model.
        others: Of the same model with other weights.

    Returns:
        Paths of layers.

    Example:
        >>> weights = {"gate.weight": (2, 4), "experts.0.weight": (3, 4)}
        >>> first = Costs(weights, {"gate.weight": 1.0, "experts.0.weight": 0.5})
        >>> routed(first, Costs(weights, {"gate.weight": 1.0}))
        ('experts.0',)
    """
    return tuple(
        name.rpartition(".")[0]
        for name in costs.shapes
        if costs.positions.get(name, 0.0) != others.positions.get(name, 0.0)
    )


@contextmanager
def _written_out() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Counting(TorchDispatchMode):
    """A mode that adds up the MACs of a forward, by weight; those without any under an empty name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[str, int] = {}
        weights = {public_name(name): p for name, p in model.named_parameters() if p.ndim > 1}
        # cuDNN makes the weights of a recurrent layer views of one piece of memory.
        self._names = {key: name for name, p in weights.items() for key in (_memory(p), id(p))}
        inside = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
        known = {name: m for name, m in modules_by_name(model).items() if isinstance(m, inside)}
        self._layers = {**candidates(model), **known}
        self._running: list[str] = []
        self._ran: dict[str, int] = {}  # by layer, how many of its operations have a formula

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep track of the layer that is running."""
        hooks = [
            hook
            for name, layer in self._layers.items()
            for hook in (
                layer.register_forward_pre_hook(self._starts(name), prepend=True),
                layer.register_forward_hook(self._end, always_call=True),
            )
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def uncounted(self) -> tuple[str, ...]:
        """Return the layers that ran, and none of whose operations has a formula."""
        return tuple(name for name in self._layers if self._ran.get(name) == 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        macs = _macs_by_operands(func, args, kwargs or {}, out)
        for operands, number in macs:
            name = self._weight_of(operands)
            self.macs[name] = self.macs.get(name, 0) + number
        if macs:
            self._ran.update({layer: self._ran.get(layer, 0) + 1 for layer in self._running})
        return out

    def _starts(self, name: str) -> Callable[..., None]:
        def start(*_: Any) -> None:
            self._running.append(name)
            self._ran.setdefault(name, 0)

        return start

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def _weight_of(self, operands: Sequence[Tensor]) -> str:
        """Return the one parameter among operands, or what a layer has computed from its own; else no name."""
        names = (self._names.get(id(t)) or self._names.get(_memory(t)) for t in operands)
        found = {name for name in names if name is not None}
        running = self._layers[self._running[-1]] if self._running else None
        weight = None if running is None else running._parameters.get(weight_name(running))
        if len(found) != 1 and weight is not None:
            shapes = {tuple(t.shape) for t in operands} | {tuple(t.shape[::-1]) for t in operands if t.ndim == 2}
            return self._names.get(_memory(weight), "") if tuple(weight.shape) in shapes else ""
        return found.pop() if len(found) == 1 else ""


def _macs_by_operands(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> list[tuple[Sequence[Tensor], int]]:
    """Return the MACs of an operation, of each part of it with the operands among which its weight is; else nothing."""
    name = func._overloadpacket.__name__.strip("_")
    if name in _RECURRENT:  # a kernel for all steps, of one layer or of all layers and directions
        steps = math.prod(args[0].shape[:-1])
        return [([w], steps * w.numel()) for w in tensors_of(args[1:5]) if w.ndim == 2]
    if name.startswith("scaled_dot_product_"):
        query, key, value = args[:3]  # several heads of queries may share one of keys
        return [((), math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))]
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return []
    operands = [t for t in args[:3] if isinstance(t, Tensor)]
    return [(operands, int(formula(*args, **kwargs, out_val=out)) // 2)]


def _memory(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory: views of a parameter share its own. Sparse tensors have no such one."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def effects(group: Group, modules: Mapping[str, nn.Module]) -> Effects:
    """Return the number of places that each unit of a group takes from the model's parameters.

    Args:
        group: The group.
        modules: All modules of the model by path, in its order.

    Returns:
        Each parameter and axis once, also where several modules share the parameter.
    """
    names: dict[int, str] = {}
    for path, module in modules.items():
        for leaf, parameter in module._parameters.items():
            names.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
    places: dict[tuple[str, int], list[set[int]]] = {}
    for part in group.parts:
        owner, _, leaf = part.path.rpartition(".") if part.role == "holds" else (part.path, "", "")
        by_leaf = {leaf: part.axis or 0} if part.role == "holds" else axes(modules[owner], part.role)
        for leaf, axis in by_leaf.items():
            tensor = modules[owner]._parameters.get(leaf)
            if tensor is not None:
                units = places.setdefault((names[id(tensor)], axis % tensor.ndim), [set() for _ in part.indices])
                for unit, more in zip(units, part.indices, strict=True):
                    unit.update(more)
    return [(name, axis, tuple(map(len, units))) for (name, axis), units in places.items()]


def removed_by(effects_of: Mapping[str, Effects], units: Mapping[str, Iterable[int]]) -> dict[tuple[str, int], int]:
    """Return the number of places that are removed, by tensor and axis, with some units."""
    removed: dict[tuple[str, int], int] = {}
    for root, gone in units.items():
        gone = list(gone)
        for tensor, axis, taken in effects_of[root]:
            removed[tensor, axis] = removed.get((tensor, axis), 0) + sum(taken[u] for u in gone)
    return removed


def latency(model: nn.Module, example: Example, repeats: int = 10) -> float:
    """Measure the median time of a forward on an example; the model is left as it was.

    Args:
        model: Run in evaluation mode, without gradients.
        example: The inputs to run it on.
        repeats: Number of runs, after one that does not count.

    Returns:
        Seconds.
    """
    finish = _finisher(model)
    times = []
    with isolated(model), torch.no_grad():
        model.eval()
        for _ in range(repeats + 1):
            start = time.perf_counter()
            example.run(model)
            finish()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _finisher(model: nn.Module) -> Callable[[], None]:
    """Return a function that waits for the model's device."""
    kinds = {p.device.type for p in model.parameters()}
    if "cuda" in kinds:
        return torch.cuda.synchronize
    return torch.mps.synchronize if "mps" in kinds else lambda: None
