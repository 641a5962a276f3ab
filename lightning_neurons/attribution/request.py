"""A request for an attribution: an objective for each sample of a batch, and its gradient.

The gradient is that of the model's inputs or, for tokens, of the output of its embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_neurons.attribution.objective import ALLOWED, OF, Objective, Of, layer_of, logits_of, objective_of
from lightning_neurons.attribution.readout import Readout
from lightning_neurons.data.batches import map_tensors
from lightning_neurons.errors import ArgumentError, MeasurementError, check_choice, is_number
from lightning_neurons.isolation.isolation import eager
from lightning_neurons.layers.layer import candidates
from lightning_neurons.measurement.arguments import given_model
from lightning_neurons.measurement.outcomes import Forward

_ALLOWED = "a batch that the model takes: a tensor, or a tuple or dict of tensors"


class ExplainedInput:
    """The one tensor of a batch of inputs that is explained.

    Args:
        readout: The model.
        inputs: A batch: a tensor, a tuple of positional arguments or a dict of keyword arguments. If none of its
            tensors is of floating point, the output of the embedding that reads the first is explained.

    Raises:
        ArgumentError: If several tensors might be meant, or no gradient can reach any.
    """

    def __init__(self, readout: Readout, inputs: Any) -> None:
        self.inputs = inputs
        self._readout = readout
        tensors = _tensors(inputs)
        for tensor in tensors.values():
            if tensor.ndim < 1 or not len(tensor):
                raise ArgumentError.of("inputs", tuple(tensor.shape), "at least one sample along the first axis")
        floating = [key for key, tensor in tensors.items() if tensor.is_floating_point()]
        self.embedding: nn.Module | None = None
        self.values: Float[Tensor, "batch ..."]
        # Beside tokens, a tensor of floating point is likely a mask; a single number per sample is no token.
        tokens = {key: t for key, t in tensors.items() if key not in floating and (t.ndim > 1 or not floating)}
        read = self._embedded(tokens) if tokens else None
        if read is not None:
            self._key, self.embedding, self.values = read
        elif not floating:
            got = ", ".join(str(tensor.dtype) for tensor in tensors.values())
            raise ArgumentError.of(
                "inputs", got, "floating point, which gradients need, or tokens that an nn.Embedding reads"
            )
        elif len(floating) > 1:
            names = ", ".join(map(str, floating))
            raise ArgumentError.of("inputs", names, "one tensor of floating point; wrap the model, or pass forward=")
        else:
            self._key, self.values = floating[0], tensors[floating[0]].detach()
        if not bool(self.values.isfinite().all()):
            raise ArgumentError.of("inputs", "NaN or infinite values", "finite values")
        self.shape = tensors[self._key].shape

    def __len__(self) -> int:
        return len(self.values)

    def run(self, values: Tensor, rows: slice | Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Run the model on some rows of the batch, with ``values`` in place of what is explained.

        Returns:
            The model's output, and the activations of the layers that are read, by name.
        """
        size = len(self)
        part = map_tensors(self.inputs, lambda t: t[rows] if t.ndim and len(t) == size else t)
        if self.embedding is None:
            return self._readout(_with(part, self._key, values))
        with _replaced(self.embedding, _tensors(part)[self._key], values):
            return self._readout(part)

    def _embedded(self, tokens: Mapping[Any, Tensor]) -> tuple[Any, nn.Module, Tensor] | None:
        """Return the key of the tensor that an embedding reads first, the embedding, and its output; else None."""
        reads: list[tuple[Any, nn.Module, Tensor]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for key, ids in tokens.items():
                if args and isinstance(output, Tensor) and _same(args[0], ids):
                    reads.append((key, module, output.detach()))

        embeddings = [m for m in self._readout.model.modules() if isinstance(m, nn.Embedding)]
        if not embeddings:
            return None
        handles = [embedding.register_forward_hook(hook) for embedding in embeddings]
        try:
            with torch.no_grad(), eager():
                self._readout(self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return reads[0] if reads else None


def _tensors(inputs: Any) -> dict[Any, Tensor]:
    if isinstance(inputs, Tensor):
        return {0: inputs}
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs) if _is_list(inputs) else ()
    tensors = {key: value for key, value in pairs if isinstance(value, Tensor)}
    if not tensors:
        raise ArgumentError.of("inputs", type(inputs).__name__, _ALLOWED)
    return tensors


def _is_list(inputs: Any) -> bool:
    return isinstance(inputs, list | tuple)


def _with(inputs: Any, key: Any, values: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return values
    if isinstance(inputs, Mapping):
        return {**inputs, key: values}
    return type(inputs)(values if i == key else entry for i, entry in enumerate(inputs))


def _same(read: Any, ids: Tensor) -> bool:
    return isinstance(read, Tensor) and read.shape == ids.shape and torch.equal(read, ids)


@contextmanager
def _replaced(embedding: nn.Module, tokens: Tensor, values: Tensor) -> Iterator[None]:
    """Make an embedding return ``values`` wherever it reads ``tokens``."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        return values if args and _same(args[0], tokens) else None

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


_PART = 32

Values = Float[Tensor, "batch ..."]

AttributionTarget = int | str | tuple[str, int] | Sequence[int] | Tensor | None
"""A class, one per sample, a neuron, a layer, or None for each sample's predicted class."""


@dataclass(frozen=True)
class AttributionRequest:
    """The inputs of a batch, and the objective that is attributed to them.

    Attributes:
        readout: The model.
        explained: The inputs.
        objective: The objective.
        classes: The class of each sample, where the objective names none.
    """

    readout: Readout
    explained: ExplainedInput
    objective: Objective
    classes: Int[Tensor, " batch"] | None = None

    def value(self, values: Values, rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return the objective of some samples, with ``values`` as their inputs."""
        outputs, activations = self.explained.run(values, rows)
        classes = None if self.classes is None else self.classes[rows]
        return self.objective.read(outputs, activations, self.readout.layers, len(rows), classes)

    def gradient(self, values: Values, rows: Int[Tensor, " row"]) -> tuple[Float[Tensor, " row"], Values]:
        """Return the objective, and its gradient with respect to the inputs."""
        at = values.detach().requires_grad_()
        value = self.value(at, rows)
        total = value.sum()
        gradient = torch.autograd.grad(total, at, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise MeasurementError(
                f"target: {self.objective.name} does not depend on the inputs by anything that can be differentiated "
                "(does the model detach them, or run under no_grad?)"
            )
        return value.detach(), gradient

    def parts(self, rows: Int[Tensor, " row"] | None = None) -> Iterator[Int[Tensor, " part"]]:
        """Yield the samples in parts, so that the memory for gradients stays small."""
        rows = torch.arange(len(self.explained), device=self.explained.values.device) if rows is None else rows
        yield from rows.split(_PART)


@contextmanager
def open_request(
    model: nn.Module,
    inputs: Any,
    target: AttributionTarget,
    of: Of,
    forward: Forward | None,
    *,
    cam: bool = False,
    layer: str | None = None,
) -> Iterator[tuple[AttributionRequest, str | None]]:
    """Open a model, and yield the request and the layer of Grad-CAM, if that is asked for.

    Raises:
        ArgumentError: If an argument is out of range.
    """
    given_model(model)
    check_choice("of", of, OF)
    by_sample = target is None or (not isinstance(target, str) and _is_list_of_classes(target))
    allowed = f"{ALLOWED}, or one class for each sample, as a list or tensor"
    objective = Objective(None, None, of) if by_sample else objective_of(model, target, of, allowed=allowed)
    read = objective.layers if layer is None else objective.layers | {layer_of(model, layer)}
    readout = Readout(model, sorted(read), forward, stop=not objective.reads_output and not cam)
    with readout.open():
        explained = ExplainedInput(readout, inputs)
        if cam:
            layer = layer or _last_with_positions(readout, inputs)
            readout.modules[layer] = candidates(model)[layer]
        classes = _classes(readout, explained, target) if by_sample else None
        yield AttributionRequest(readout, explained, objective, classes), layer


def _is_list_of_classes(target: Any) -> bool:
    if isinstance(target, Tensor):
        return target.ndim == 1
    return isinstance(target, list | tuple) and bool(target) and all(is_number(entry) for entry in target)


def _classes(readout: Readout, explained: ExplainedInput, target: Any) -> Int[Tensor, " batch"]:
    """Return the class of each sample: given, or predicted."""
    device = explained.values.device
    if target is None:
        with torch.no_grad():
            parts = torch.arange(len(explained), device=device).split(_PART)
            return torch.cat([logits_of(explained.run(explained.values[rows], rows)[0]).argmax(1) for rows in parts])
    if isinstance(target, Tensor):
        classes = target
    else:
        beyond = [klass for klass in target if abs(klass) >= 2**31]
        if beyond:
            raise ArgumentError.of("target", beyond[0], "one of the model's outputs")
        classes = torch.as_tensor(target)
    if classes.is_floating_point() or classes.dtype == torch.bool or len(classes) != len(explained):
        got = f"{len(classes)} of {classes.dtype}"
        raise ArgumentError.of("target", got, f"one whole number for each of the {len(explained)} samples")
    return classes.to(device, torch.int64)


def _last_with_positions(readout: Readout, inputs: Any) -> str:
    names = [name for name, layer in readout.learn(inputs).items() if layer.calls and layer.axis == 1]
    if not names:
        raise MeasurementError("grad_cam needs a layer with positions, a convolution, and the model has none that runs")
    return names[-1]
