"""The passes over the data that measurements share: one watched forward, one backward to the activations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_neurons.criteria.contract import Need
from lightning_neurons.data.batches import batch_size_of, is_divisible, rows_of, tensors_of
from lightning_neurons.errors import MeasurementError, NoLossError
from lightning_neurons.hooks.capture import StepDifferentiates, WatchActivations, WatchGradients
from lightning_neurons.hooks.function_mode import HookedMode
from lightning_neurons.hooks.own_gradients import backward_hooks, direct_checkpoints, kept_gradients
from lightning_neurons.hooks.trace import Trace
from lightning_neurons.isolation.exchanged_weights import MovingWeights
from lightning_neurons.isolation.fast_paths import fast_modules
from lightning_neurons.isolation.isolation import differentiable, eager, frozen, isolated
from lightning_neurons.isolation.model_state import ModelState
from lightning_neurons.layers.layer import Layer, candidates
from lightning_neurons.layers.registry import family_of
from lightning_neurons.layers.sample_axis import is_ambiguous, lie_apart
from lightning_neurons.measurement.losses import normal_tensors

_CACHED_BYTES = 2 * 2**20
_SMALLEST_PART = 8
_FEW = 2
_SOME = 3  # of two samples that are run three times, every second row is one, either way


@runtime_checkable
class Receiver(Protocol):
    """A receiver of the activations and gradients of a pass."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The layers that it is told of."""

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Store the layers and their activation points, before the first activation."""

    def receive(
        self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need, inner: Tensor | None = None
    ) -> None:
        """Take one call of one layer; ``inner`` is given where the loss is made of gradients, see ``LayerView``."""


@dataclass(frozen=True)
class TracedLayers:
    """Facts about the layers of a model that passes over it have found. Holds on to nothing of the model.

    Attributes:
        form: Names, identities and widths of the layers; another form has to be learnt anew.
        layers: By name, the layers with their activation points.
        bytes_per_sample: Size of the largest activation.
        ambiguous: Whether some layer's samples may lie in one way as well as in another.
    """

    form: tuple[tuple[str, int, int], ...]
    layers: Mapping[str, Layer]
    bytes_per_sample: int
    ambiguous: bool


class Passes:
    """Passes over one model for any number of receivers.

    Where the activation points are is learnt from the first forward that is watched; no extra forward is run for it.

    Args:
        model: The model.
        receivers: The receivers; each is told of its own layers only.
        traced: Facts that earlier passes have found; used as long as the layers are the same.
    """

    def __init__(self, model: nn.Module, receivers: Sequence[Receiver], traced: TracedLayers | None = None) -> None:
        self.model = model
        self._modules = candidates(model)  # the forward may hang modules elsewhere; each keeps its name
        self.receivers: list[Receiver] = []
        self.traced: TracedLayers | None = (
            traced if traced is not None and traced.form == _form_of(self._modules) else None
        )
        """If None, the next forward is traced."""
        self._learnt: Mapping[str, Layer] = self.traced.layers if self.traced else {}
        self._is_plain = True  # until the forward takes gradients of its own that need its parameters
        self.weights_move = False
        """True if the forward exchanges weights while it runs."""
        self.needs_gradients = False
        """True if the forward runs only where gradients are on, as it takes some of its own."""
        for receiver in receivers:
            self.add(receiver)

    def add(self, receiver: Receiver) -> None:
        """Add a receiver."""
        self.receivers.append(receiver)
        if self.traced is not None:
            receiver.learn({name: self.traced.layers[name] for name in receiver.modules})

    @cached_property
    def _fast(self) -> list[nn.Module]:
        return fast_modules(self.model)

    @contextmanager
    def observe(self, *, of_others: bool = False, samples: int | None = None) -> Iterator[None]:
        """Watch whatever forward runs inside.

        Args:
            of_others: Whether the values of the forward are used outside, as in training, so that they must not change.
            samples: Number of samples in the batch, if known.

        Raises:
            MeasurementError: At the end, if a part could not be watched.
        """
        fast = self._fast if of_others else ()
        if self.traced is not None:
            watch = WatchActivations(
                self.traced.layers, _modules(self.receivers), self._activation, fast, of_others=of_others
            )
            with eager(), watch:
                yield
            _check(watch)
            self._forget(watch.unknown)
            return
        trace = Trace(self.model, self._modules, fast, of_others=of_others)
        try:
            with eager(), trace:
                yield
            _check(trace)
            self._learn(trace, samples)
            for name, value in trace.activations():
                self._activation(name, value.detach())
        finally:
            trace.close()

    def differentiate(
        self,
        loss_of: Callable[[Any], Tensor],
        batch: Any,
        need: Need = "gradient",
        *,
        observe: bool = False,
        receivers: Sequence[Receiver] | None = None,
        start: ModelState | None = None,
    ) -> None:
        """Run a forward and the backward to the activations. Isolate the model around it.

        Args:
            loss_of: Returns the loss of a batch, summed over samples.
            batch: The batch.
            need: The kind of pass, as receivers are told it.
            observe: Whether receivers are told the activations of this forward as well.
            receivers: The receivers that are told; all if None.
            start: Model state from which every forward starts, where results depend on earlier forwards; else None.

        Raises:
            NoLossError: If the loss does not depend on any watched layer in a differentiable way.
        """
        with differentiable(), direct_checkpoints():
            batch = normal_tensors(batch)
            listening = self.receivers if receivers is None else receivers
            if self.traced is None or self.traced.ambiguous or not self._have_run(listening):
                self.find(loss_of, batch)
            is_plain, moves, told = self._is_plain, self.weights_move, 0
            while True:  # at most three ways, of which the first is nearly always good
                if start is not None:
                    start.put_back()
                    start.substitute()
                weights = MovingWeights(self.model)
                watch = self._watch(listening, need, weights, observe=observe, is_plain=is_plain, told=told)
                with ExitStack() as stack:
                    if not is_plain:
                        stack.enter_context(kept_gradients(self.model))
                    try:
                        with frozen(self.model) if is_plain else nullcontext():
                            loss = self._forward(watch, loss_of, batch, weights.keeping() if moves else nullcontext())
                    except (Exception, StepDifferentiates):
                        if not is_plain:
                            raise
                        is_plain, told = False, watch.told  # a step may find no parameter to differentiate by
                        continue
                    if weights.have_moved and not moves:
                        moves, told = True, watch.told
                        continue
                    self._is_plain, self.weights_move = is_plain, moves
                    self._backward(watch, loss)
                return

    def _have_run(self, listening: Sequence[Receiver]) -> bool:
        """Return whether any layer of some receivers has run: a watched forward need not run what the loss does."""
        return self.traced is not None and any(self.traced.layers[name].calls for name in _modules(listening))

    def _watch(
        self,
        listening: Sequence[Receiver],
        need: Need,
        weights: MovingWeights,
        *,
        observe: bool,
        is_plain: bool,
        told: int,
    ) -> WatchGradients:
        assert self.traced is not None, "just found"
        return WatchGradients(
            self.traced.layers,
            _modules(listening),
            lambda name, activation, gradient, inner: _tell(listening, name, activation, gradient, need, inner),
            (lambda name, activation: _tell(listening, name, activation, None, "activation")) if observe else None,
            is_plain=is_plain,
            told=told,
            weights=weights,
        )

    def _forward(
        self,
        watch: WatchGradients,
        loss_of: Callable[[Any], Tensor],
        batch: Any,
        keeping: AbstractContextManager[None],
    ) -> Tensor:
        with torch.enable_grad(), backward_hooks(watch.choose_hooks), keeping, watch:
            loss = loss_of(batch)
        self._forget(watch.unknown)
        return loss

    def _backward(self, watch: WatchGradients, loss: Tensor) -> None:
        if not loss.requires_grad or not watch.backward(loss):
            raise NoLossError(
                "the loss does not depend on any watched layer in a differentiable way: it is computed under "
                "no_grad, detached, or from other layers; pass loss_fn=, or other layers="
            )

    def parts(self, batch: Any) -> Iterator[Any]:
        """Yield the batch in parts whose activations stay in a CPU's cache; whole on other devices.

        Backward passes of large batches are bound by memory: parts take three quarters of the time and a fraction of
        the memory. The result is the same only where losses are sums over samples, which the caller has to check.
        """
        size = batch_size_of(batch)
        largest = self.traced.bytes_per_sample if self.traced else 0
        part = max(_SMALLEST_PART, _CACHED_BYTES // max(largest, 1))
        on_cpu = all(t.device.type == "cpu" for t in tensors_of(batch))
        whole = not on_cpu or part >= size or not is_divisible(batch)
        if whole or any(t.ndim and len(t) != size for t in tensors_of(batch)):
            yield batch
            return
        for rows in torch.arange(size).chunk(-(-size // part)):
            yield rows_of(batch, rows, size)

    def find(self, forward: Callable[[Any], Any], batch: Any) -> None:
        """Learn the activation points from a forward of a few samples (of all, if the model does not run on a few).

        Without gradients, unless the forward takes some of its own.
        """
        ways: list[tuple[Any, int | None, bool]] = [(batch, None, False), (batch, None, True)]
        if is_divisible(batch):
            size = batch_size_of(batch)
            few = rows_of(batch, torch.arange(min(_FEW, size)), size)
            ways = [(few, min(_FEW, size), False), (few, min(_FEW, size), True), *ways]
        with kept_gradients(self.model), direct_checkpoints():
            for part, samples, gradients in ways:
                try:
                    folded = self._trace(forward, part, samples, gradients)
                except Exception:  # (whatever a model raises on fewer samples than it expects)
                    if part is batch and gradients:
                        raise
                else:
                    self.needs_gradients = gradients
                    if folded:
                        self._tell_apart(forward, batch)
                    return

    def _trace(self, forward: Callable[[Any], Any], batch: Any, few: int | None, gradients: bool) -> dict[str, Tensor]:
        """Learn the layers and their activation points from a forward.

        Returns:
            By name, copies of the outputs of layers that have several rows for each of the ``few`` samples; none
            without ``few``.
        """
        trace = Trace(self.model, self._modules)
        try:
            with isolated(self.model), torch.set_grad_enabled(gradients), eager(), trace:
                forward(batch)
            self._learn(trace, few=few)
            assert self.traced is not None, "just learnt"
            several = [name for name, layer in self.traced.layers.items() if few and (layer.rows_per_sample or 1) > 1]
            finals = dict(trace.activations()) if several else {}
            return {name: finals[name].detach().clone() for name in several if name in finals}
        finally:
            trace.close()

    def _tell_apart(self, forward: Callable[[Any], Any], batch: Any) -> None:
        """Find the layout of the samples' rows, from two forwards of a few samples in opposite orders."""
        traced, size = self.traced, batch_size_of(batch)
        assert traced is not None, "just learnt"
        few, apart = min(_SOME, size), set[str]()
        with suppress(Exception):  # the model need not run on so many
            rows = torch.arange(few)
            values, turned = (
                self._trace(forward, rows_of(batch, order, size), few, self.needs_gradients)
                for order in (rows, rows.flip(0))
            )
            apart = {name for name in values.keys() & turned if lie_apart(values[name], turned[name], few)}
        self._take(replace(traced, layers={n: replace(la, rows_apart=n in apart) for n, la in traced.layers.items()}))

    def _learn(self, trace: Trace, samples: int | None = None, *, few: int | None = None) -> None:
        """Store the layers.

        Args:
            trace: Of the forward.
            samples: Number of samples that ran, if known.
            few: The same, if they were chosen to tell the samples' axis.
        """
        before = self._learnt
        finals = dict(trace.activations())
        layers = {}
        for name, layer in trace.traced_layers().items():
            rows = finals[name].shape[0] if name in finals and finals[name].ndim else 0
            several = few is not None and rows > few and rows % few == 0
            seen = replace(layer, rows_per_sample=rows // few) if few and several else layer
            layers[name] = before[name] if not layer.calls and name in before else seen
        sizes = (v.numel() * v.element_size() // v.shape[0] for v in finals.values() if v.ndim and v.shape[0])
        unclear = (v.ndim > 2 and is_ambiguous(v, layers[name].axis, v.shape[1]) for name, v in finals.items())
        lengths = {len(value) for value in finals.values() if value.ndim > 1}
        folded = samples and any(length > samples and length % samples == 0 for length in lengths)
        ambiguous = few is None and (bool(folded) or any(unclear))
        self._take(TracedLayers(_form_of(self._modules), layers, max(sizes, default=0), ambiguous))

    def _take(self, traced: TracedLayers) -> None:
        self.traced, self._learnt = traced, traced.layers
        for receiver in self.receivers:
            receiver.learn({name: traced.layers[name] for name in receiver.modules})

    def _forget(self, unknown: set[str]) -> None:
        """Forget the layers if some did not run as known, so that they are found again."""
        if unknown:
            self.traced = None

    def _activation(self, name: str, activation: Tensor) -> None:
        _tell(self.receivers, name, activation, None, "activation")


def _check(mode: HookedMode) -> None:
    if mode.failure is not None:
        error = mode.failure
        raise MeasurementError(f"the forward could not be watched ({type(error).__name__}: {error})") from error


def _form_of(modules: Mapping[str, nn.Module]) -> tuple[tuple[str, int, int], ...]:
    families = ((name, module, family_of(module)) for name, module in modules.items())
    return tuple((name, id(module), family.neurons(module)) for name, module, family in families if family)


def _modules(receivers: Sequence[Receiver]) -> dict[str, nn.Module]:
    """Return the layers of all receivers."""
    return {name: module for r in receivers for name, module in r.modules.items()}


def _tell(
    receivers: Sequence[Receiver],
    name: str,
    activation: Tensor,
    gradient: Tensor | None,
    need: Need,
    inner: Tensor | None = None,
) -> None:
    for receiver in receivers:
        if name in receiver.modules:
            receiver.receive(name, activation, gradient, need, *(() if inner is None else (inner,)))
