"""The passes over the data that measurements share: one watched forward, one backward to the activations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_neurons.criteria.contract import Need
from lightning_neurons.errors import MeasurementError
from lightning_neurons.network.batches import batch_size_of, rows_of, tensors_of
from lightning_neurons.network.isolate import differentiable, eager, frozen
from lightning_neurons.network.layer import Layer, candidates
from lightning_neurons.network.samples import is_ambiguous
from lightning_neurons.network.trace import Trace
from lightning_neurons.network.watch import WatchActivations, WatchGradients
from lightning_neurons.studies.losses import normal_tensors

_CACHED_BYTES = 2 * 2**20
_SMALLEST_PART = 8
_FEW = 2


@runtime_checkable
class Receiver(Protocol):
    """Who wants to be told what a pass sees."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The layers that it wants to hear of."""

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Take note of what the layers are, before the first activation."""

    def receive(self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need) -> None:
        """Take one call of one layer."""


class Passes:
    """Runs passes over one model for any number of receivers.

    Where the activation points are is learnt from the first forward that is watched; no extra forward is run for it.

    Args:
        model: The model.
        receivers: Who listens; each hears of its own layers only.
    """

    def __init__(self, model: nn.Module, receivers: Sequence[Receiver]) -> None:
        self.model = model
        self.receivers = list(receivers)
        self.layers: dict[str, Layer] = {}
        self._known = False
        self._bytes_per_sample = 0
        self._ambiguous = False

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Watch whatever forward runs inside."""
        if self._known:
            watch = WatchActivations(self.layers, _modules(self.receivers), self._activation)
            with eager(), watch:
                yield
            self._known = not watch.unknown
            return
        trace = Trace(self.model, candidates(self.model))
        try:
            with eager(), trace:
                yield
            self._learn(trace)
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
    ) -> None:
        """Run a forward and the backward to the activations. Isolate the model around it.

        Args:
            loss_of: From the batch to the loss, summed over samples.
            batch: The batch.
            need: What the gradients are of.
            observe: Whether receivers are told the activations of this forward as well.
            receivers: Who listens; everybody if None.

        Raises:
            MeasurementError: If the loss does not depend on any watched layer in a differentiable way.
        """
        with differentiable(), frozen(self.model):
            batch = normal_tensors(batch)
            if not self._known or self._ambiguous:
                self.find(loss_of, batch)
            listening = self.receivers if receivers is None else receivers
            watch = WatchGradients(
                self.layers,
                _modules(listening),
                lambda name, activation, gradient: _tell(listening, name, activation, gradient, need),
                (lambda name, activation: _tell(listening, name, activation, None, "activation")) if observe else None,
            )
            with watch:
                loss = loss_of(batch)
            self._known = not watch.unknown
            if not loss.requires_grad:
                raise MeasurementError(
                    "the loss does not depend on any watched layer in a differentiable way: it is computed under "
                    "no_grad, detached, or from other layers; pass loss_fn=, or other layers="
                )
            watch.backward(loss)

    @property
    def known(self) -> bool:
        """Whether the activation points are known; else the next forward is traced."""
        return self._known

    def parts(self, batch: Any) -> Iterator[Any]:
        """The batch in parts whose activations stay in a CPU's cache; whole on other devices.

        Backward passes of large batches are bound by memory: parts take three quarters of the time and a fraction of
        the memory, and because losses are sums over samples, the result is the same.
        """
        size = batch_size_of(batch)
        part = max(_SMALLEST_PART, _CACHED_BYTES // max(self._bytes_per_sample, 1))
        on_cpu = all(t.device.type == "cpu" for t in tensors_of(batch))
        if not on_cpu or part >= size or any(t.ndim and len(t) != size for t in tensors_of(batch)):
            yield batch
            return
        for rows in torch.arange(size).chunk(-(-size // part)):
            yield rows_of(batch, rows, size)

    def find(self, forward: Callable[[Any], Any], batch: Any) -> None:
        """Learn the activation points from a forward of a few samples (of all, if the model does not run on a few)."""
        size = batch_size_of(batch)
        few = rows_of(batch, torch.arange(min(_FEW, size)), size)
        try:
            self._trace(forward, few, min(_FEW, size))
        except Exception:  # noqa: BLE001 (whatever a model raises on fewer samples than it expects)
            self._trace(forward, batch, None)

    def _trace(self, forward: Callable[[Any], Any], batch: Any, samples: int | None) -> None:
        trace = Trace(self.model, candidates(self.model))
        try:
            with torch.no_grad(), eager(), trace:
                forward(batch)
            self._learn(trace, samples)
        finally:
            trace.close()

    def _learn(self, trace: Trace, few: int | None = None) -> None:
        """Take note of the layers; ``few`` is how many samples ran, if they were chosen to tell the samples' axis."""
        finals = dict(trace.activations())
        for name, layer in trace.found().items():
            if layer.calls or name not in self.layers:
                rows = finals[name].shape[0] if name in finals and finals[name].ndim else 0
                whole = few is not None and rows > few and rows % few == 0
                self.layers[name] = replace(layer, rows_per_sample=rows // few) if whole and few else layer
        sizes = (v.numel() * v.element_size() // v.shape[0] for v in finals.values() if v.ndim and v.shape[0])
        self._bytes_per_sample = max(sizes, default=0)
        self._known, self._ambiguous = True, few is None and self._is_ambiguous(finals)
        for receiver in self.receivers:
            receiver.learn({name: self.layers[name] for name in receiver.modules})

    def _is_ambiguous(self, finals: Mapping[str, Tensor]) -> bool:
        """Whether some layer's samples may lie on one axis as well as on another, for any batch size."""
        return any(
            value.ndim > 2 and is_ambiguous(value, self.layers[name].axis, value.shape[1])
            for name, value in finals.items()
        )

    def _activation(self, name: str, activation: Tensor) -> None:
        _tell(self.receivers, name, activation, None, "activation")


def _modules(receivers: Sequence[Receiver]) -> dict[str, nn.Module]:
    """The layers that anybody wants."""
    return {name: module for r in receivers for name, module in r.modules.items()}


def _tell(receivers: Sequence[Receiver], name: str, activation: Tensor, gradient: Tensor | None, need: Need) -> None:
    for receiver in receivers:
        if name in receiver.modules:
            receiver.receive(name, activation, gradient, need)
