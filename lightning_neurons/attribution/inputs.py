"""The tensor that gradients are taken for: a model's inputs or, for tokens, the output of its embedding."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.attribution.readout import Readout
from lightning_neurons.data.batches import map_tensors
from lightning_neurons.errors import ArgumentError
from lightning_neurons.isolation.isolation import eager

_ALLOWED = "a batch that the model takes: a tensor, or a tuple or dict of tensors"


class Entrance:
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
        found = _tensors(inputs)
        for tensor in found.values():
            if tensor.ndim < 1 or not len(tensor):
                raise ArgumentError.of("inputs", tuple(tensor.shape), "at least one sample along the first axis")
        floating = [key for key, tensor in found.items() if tensor.is_floating_point()]
        self.embedding: nn.Module | None = None
        self.values: Float[Tensor, "batch ..."]
        # Beside tokens, a tensor of floating point is likely a mask; a single number per sample is no token.
        tokens = {key: t for key, t in found.items() if key not in floating and (t.ndim > 1 or not floating)}
        read = self._embedded(tokens) if tokens else None
        if read is not None:
            self._key, self.embedding, self.values = read
        elif not floating:
            got = ", ".join(str(tensor.dtype) for tensor in found.values())
            raise ArgumentError.of(
                "inputs", got, "floating point, which gradients need, or tokens that an nn.Embedding reads"
            )
        elif len(floating) > 1:
            names = ", ".join(map(str, floating))
            raise ArgumentError.of("inputs", names, "one tensor of floating point; wrap the model, or pass forward=")
        else:
            self._key, self.values = floating[0], found[floating[0]].detach()
        if not bool(self.values.isfinite().all()):
            raise ArgumentError.of("inputs", "NaN or infinite values", "finite values")
        self.shape = found[self._key].shape

    def __len__(self) -> int:
        return len(self.values)

    def run(self, values: Tensor, rows: slice | Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Run the model on some rows of the batch, with ``values`` in place of what is explained."""
        size = len(self)
        part = map_tensors(self.inputs, lambda t: t[rows] if t.ndim and len(t) == size else t)
        if self.embedding is None:
            return self._readout(_with(part, self._key, values))
        with _replaced(self.embedding, _tensors(part)[self._key], values):
            return self._readout(part)

    def _embedded(self, tokens: Mapping[Any, Tensor]) -> tuple[Any, nn.Module, Tensor] | None:
        """Return the key of the tensor that an embedding reads first, the embedding, and its output; else None."""
        found: list[tuple[Any, nn.Module, Tensor]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for key, given in tokens.items():
                if args and isinstance(output, Tensor) and _same(args[0], given):
                    found.append((key, module, output.detach()))

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
        return found[0] if found else None


def _tensors(inputs: Any) -> dict[Any, Tensor]:
    if isinstance(inputs, Tensor):
        return {0: inputs}
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs) if _is_list(inputs) else ()
    found = {key: value for key, value in pairs if isinstance(value, Tensor)}
    if not found:
        raise ArgumentError.of("inputs", type(inputs).__name__, _ALLOWED)
    return found


def _is_list(inputs: Any) -> bool:
    return isinstance(inputs, list | tuple)


def _with(inputs: Any, key: Any, values: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return values
    if isinstance(inputs, Mapping):
        return {**inputs, key: values}
    return type(inputs)(values if i == key else one for i, one in enumerate(inputs))


def _same(read: Any, given: Tensor) -> bool:
    return isinstance(read, Tensor) and read.shape == given.shape and torch.equal(read, given)


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
