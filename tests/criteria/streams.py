"""Batches through ``StreamingCriteria`` in one call."""

from collections.abc import Iterable, Sequence

import torch
from hypothesis import settings
from torch import Tensor

from lightning_neurons.criteria import CRITERIA, Criterion, LayerTraits, LayerView
from lightning_neurons.metrics.streaming import StreamingCriteria

laws = settings(deadline=None, max_examples=25, derandomize=True)
"""For properties: a few examples, the same in each run."""

LAYER = "net.fc"
BOUNDS = (-1.0, 1.0)
"""Of a tanh: every criterion accepts a layer that has these, is said to be rectified, and has weights."""

ACTIVITY = [name for name, c in CRITERIA.items() if c.needs == {"activation"}]
GRADIENTS = [name for name, c in CRITERIA.items() if c.needs - {"activation"}]


def traits(neurons: int = 2, name: str = LAYER, rectified: bool = True) -> LayerTraits:
    """A layer that no criterion refuses, with the same weights in each call."""
    generator = torch.Generator().manual_seed(neurons)
    incoming, outgoing = (torch.randn(neurons, n, generator=generator) for n in (5, 4))
    scale = torch.randn(neurons, generator=generator)
    return LayerTraits(name, rectified=rectified, bounds=BOUNDS, incoming=incoming, outgoing=outgoing, norm_scale=scale)


def named(criteria: Iterable[str | Criterion]) -> list[Criterion]:
    return [CRITERIA[c] if isinstance(c, str) else c for c in criteria]


def view_of(activation: Tensor, gradient: Tensor | None = None, rectified: bool = False) -> LayerView:
    """The values are anything; that the traits say "rectified" lets APoZ accept them."""
    return LayerView(activation, gradient, rectified=rectified, bounds=BOUNDS)


def open_metric(criteria: Iterable[str | Criterion], layer: LayerTraits, neurons: int, calls: int = 1, **kwargs):
    """A metric of one layer that has been described."""
    metric = StreamingCriteria({layer.name: neurons}, named(criteria), **kwargs)
    metric.describe(layer, calls=calls)
    return metric


def stream(
    criteria: Iterable[str | Criterion],
    activations: Tensor,
    gradients: Tensor | None = None,
    sampled: Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    layer: LayerTraits | None = None,
    rectified: bool = False,
) -> dict[str, Tensor]:
    """Scores by criterion of ``(sample, neuron, space)``, given in batches of ``sizes`` (in one batch if None)."""
    neurons = activations.shape[1]
    layer = traits(neurons) if layer is None else layer
    metric = open_metric(criteria, layer, neurons)
    start = 0
    for size in sizes or [len(activations)]:
        rows = slice(start, start + size)
        metric.update(layer.name, view_of(activations[rows], rectified=rectified))
        if gradients is not None:
            metric.update(layer.name, view_of(activations[rows], gradients[rows]), "gradient")
        if sampled is not None:
            metric.update(layer.name, view_of(activations[rows], sampled[rows]), "sampled_gradient")
        metric.finish_batch()
        start += size
    return {name: by_layer[layer.name] for name, by_layer in metric.compute().items()}
