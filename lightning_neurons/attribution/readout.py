"""Forwards of a model for the activations of a few layers, no further than they need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import batch_size_of, map_tensors
from lightning_neurons.errors import ArgumentError, MeasurementError
from lightning_neurons.hooks.capture import FollowLayers
from lightning_neurons.hooks.find_neurons import call
from lightning_neurons.hooks.own_gradients import RetainedGraphs, backward_hooks, direct_checkpoints
from lightning_neurons.hooks.trace import Trace
from lightning_neurons.isolation.isolation import differentiable, eager, frozen, isolated
from lightning_neurons.layers.layer import Layer, Link, candidates, require_materialized
from lightning_neurons.measurement.outcomes import Forward


class _Reached(BaseException):
    """A signal that the last layer that is needed has run."""


class Capture(FollowLayers):
    """A context that keeps layers' activations; those of the last call, where there are several.

    Args:
        layers: The layers with their activation points.
        modules: The layers to keep.
        stop: Whether to leave the forward by ``_Reached`` as soon as all of them have run.
    """

    def __init__(self, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module], *, stop: bool = False) -> None:
        super().__init__(layers, modules)
        self.activations: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        """The values in front of the activation function, where there is one."""
        self._left = {name: layers[name].calls for name in modules} if stop else {}

    def _follow(self, name: str, links: tuple[Link, ...], value: Tensor) -> Tensor:
        if links and links[0].kind == "activation":
            # An activation function in place would overwrite it.
            self.before[name] = value.clone()
        return super()._follow(name, links, value)

    def _arrive(self, name: str, value: Tensor) -> Tensor:
        # Where gradients flow, what comes next has to come from the very value that is kept.
        self.activations[name] = value if value.requires_grad else value.clone()
        if self._left:
            self._left[name] -= 1
            if not any(self._left.values()):
                raise _Reached
        return value.clone()  # what comes next may write into it, as a residual sum does


class Readout:
    """A model as a function: from inputs to its output and to the activations of some layers.

    Args:
        model: Any module.
        layers: The layers to read.
        forward: Runs it on the inputs; None calls it.
        stop: Whether the output is not needed, so that the forward may end behind the last of the layers.

    Raises:
        ArgumentError: If the model is lazy, or ``forward`` is no function.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] = (), forward: Forward | None = None, *, stop: bool = False
    ) -> None:
        require_materialized(model)
        if forward is not None and (not callable(forward) or isinstance(forward, nn.Module | type)):
            raise ArgumentError.of("forward", forward, "a function (model, inputs) -> logits")
        self.model, self.stop = model, stop and bool(layers)
        self._forward: Forward = call if forward is None else forward
        everything = candidates(model)
        self.modules = {name: everything[name] for name in layers}
        self.layers: Mapping[str, Layer] = {}
        self.capture: Capture | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Run the model in evaluation mode, frozen, with gradients, inside the context; then restore its state."""
        with (
            isolated(self.model), frozen(self.model), differentiable(), _kept_embeddings(self.model),
            backward_hooks(), direct_checkpoints(),
        ):  # fmt: skip
            self.model.eval()
            yield

    def learn(self, inputs: Any) -> Mapping[str, Layer]:
        """Find the activation points of all layers that run, by one forward without gradients.

        Returns:
            The layers by name, in the order in which they run; those that were known already are not looked for
            again.

        Raises:
            MeasurementError: If the model refuses the inputs.
            ArgumentError: If a layer that is read does not run.
        """
        if not self.layers:
            trace = Trace(self.model, candidates(self.model))
            try:
                with torch.no_grad(), eager(), trace:
                    self._run(inputs)
                traced = trace.traced_layers()
                self.layers = {name: traced[name] for name in trace.in_order()}
            finally:
                trace.close()
        silent = [name for name in self.modules if name not in self.layers]
        if silent:
            raise ArgumentError.of("target or layer", silent[0], "one that runs in the model's forward as a module")
        return self.layers

    def __call__(self, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return the output (None where the forward was left early) and the activations by layer.

        Raises:
            MeasurementError: If the model refuses the inputs.
        """
        if not self.modules:
            return self._run(inputs), {}
        self.learn(inputs)
        outputs = None
        self.capture = Capture(self.layers, self.modules, stop=self.stop)
        try:
            with self.capture:
                outputs = self._run(inputs)
        except _Reached:
            pass
        missing = self.modules.keys() - self.capture.activations.keys()
        if missing:
            raise MeasurementError(f"target: {min(missing)} did not run as it did on the first inputs")
        return outputs, self.capture.activations

    def _run(self, inputs: Any) -> Any:
        # A model that differentiates itself, such as one that gives forces, shares its graph with the backward to come.
        shared = RetainedGraphs() if torch.is_grad_enabled() else nullcontext()
        try:
            with shared:
                return self._forward(self.model, map_tensors(inputs, Tensor.clone))  # which the model may write into
        except Exception as error:
            shape = [tuple(t.shape) for t in inputs.values()] if isinstance(inputs, Mapping) else _shape(inputs)
            raise MeasurementError(
                f"{type(self.model).__name__} refuses inputs of shape {shape}: {type(error).__name__}: {error}"
            ) from error


def _shape(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape)
    return [_shape(entry) for entry in inputs] if isinstance(inputs, list | tuple) else type(inputs).__name__


def require_samples(inputs: Any) -> int:
    """Return the number of samples.

    Raises:
        ArgumentError: If there are none.
    """
    size = batch_size_of(inputs)
    if not size:
        raise ArgumentError.of("inputs", _shape(inputs), "at least one sample along the first axis")
    return size


@contextmanager
def _kept_embeddings(model: nn.Module) -> Iterator[None]:
    """Put back the weights of embeddings with a maximal norm, which every forward writes into."""
    kept = [
        (m.weight, m.weight.detach().clone())
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)
