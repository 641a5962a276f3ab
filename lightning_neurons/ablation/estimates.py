"""Estimates of single samples' loss changes, means over a finite population from some of its samples, and decisions.

Samples are drawn without replacement with probabilities in proportion to a size (sequential Poisson sampling: Ohlsson
1998), so that those on which much can change are seen early, and in the end all of them surely. A regression on control
variates that are known for the whole population predicts the rest; what it leaves is weighted by the inverse of the
probabilities (the generalised regression estimator: Saerndal, Swensson and Wretman 1992, chapter 6).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor, nn

from lightning_neurons.ablation.engine import AblationEngine
from lightning_neurons.criteria.contract import Need
from lightning_neurons.criteria.view import LayerView
from lightning_neurons.data.batches import batch_size_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.layers.layer import Layer
from lightning_neurons.layers.sample_axis import samples_of
from lightning_neurons.measurement.losses import summed
from lightning_neurons.measurement.passes import Passes


class GateGradients:
    """Gradients of batches with respect to gates on neurons; a receiver of ``Passes``.

    Args:
        study: The engine, whose model, loss and layers are used.
        neurons: The neurons, by layer.

    Attributes:
        works: Whether the loss can be differentiated.
    """

    def __init__(self, study: AblationEngine, neurons: Mapping[str, Sequence[int]]) -> None:
        self.modules: dict[str, nn.Module] = {name: study.modules[name] for name in neurons}
        self.works = True
        self._study, self._neurons = study, neurons
        self._layers: Mapping[str, Layer] = {}
        self._sums: dict[str, Tensor] = {}
        self._size = 0
        self._passes = Passes(study.model, [self])

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Store the layers and their activation points."""
        self._layers = layers

    def receive(
        self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need, inner: Tensor | None = None
    ) -> None:
        """Add the gate gradients of one call of one layer."""
        traced = self._layers[layer]
        view = LayerView(
            samples_of(activation, traced, self._size),
            None if gradient is None else samples_of(gradient, traced, self._size),
            None if inner is None else samples_of(inner, traced, self._size),
        )
        self._sums[layer] = self._sums.get(layer, 0) + view.gate_gradient

    def of(self, batch: Any) -> Float[Tensor, "batch neuron 2"]:
        """Return ``-u`` and ``u^2`` for each sample and neuron; zeros where the loss cannot be differentiated."""
        size = self._size = batch_size_of(batch)
        width = sum(map(len, self._neurons.values()))
        if not self.works:
            return torch.zeros(size, width, 2)
        study = self._study

        def loss_of(data: Any) -> Tensor:
            return summed(study.loss_fn(study.model, data), study.loss_reduction, batch_size_of(data))  # type: ignore[arg-type]

        self._sums = {}
        try:
            self._passes.differentiate(loss_of, batch)
        except (MeasurementError, RuntimeError):
            self.works = False
            return torch.zeros(size, width, 2)
        columns = [
            self._sums[name][:, list(indices)] if name in self._sums else torch.zeros(size, len(indices))
            for name, indices in self._neurons.items()
        ]
        gates = torch.cat([column.double().cpu() for column in columns], 1)
        return torch.stack([-gates, gates.square()], -1)


_TOGETHER = 64
"""Neurons whose regressions are solved at a time."""


class Estimates:
    """Running estimates for many neurons, each from the first so many samples of one order.

    Args:
        controls: For each sample and neuron, the control variates.
        sizes: For each sample, a number above 0: how much is to be expected of it.
        seed: Of the draws.

    Attributes:
        order: The samples, in the order in which they have to be measured.
        seen: By neuron, the number of samples that have been measured.
    """

    def __init__(
        self, controls: Float[Tensor, "sample neuron control"], sizes: Float[Tensor, " sample"], seed: int
    ) -> None:
        draws = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        keys = draws / sizes.double()
        self.order: Int[Tensor, " sample"] = keys.argsort()
        self._keys, self._sizes = keys[self.order], sizes.double()[self.order]
        self._controls = controls[self.order]
        samples, neurons = controls.shape[:2]
        self.seen = torch.zeros(neurons, dtype=torch.int64)
        self._values = torch.zeros(samples, neurons, dtype=torch.float32)
        self._found = torch.full((3, neurons), torch.nan, dtype=torch.float64)
        self._stale = torch.ones(neurons, dtype=torch.bool)

    def add(self, neuron: int, values: Float[Tensor, " value"]) -> None:
        """Add the effects of a neuron on the samples that come next in the order."""
        first = int(self.seen[neuron])
        self._values[first : first + len(values), neuron] = values.float().cpu()
        self.seen[neuron] += len(values)
        self._stale[neuron] = True

    def interval(self, confidence: float) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
        """Return means, and the half widths of their two-sided confidence intervals; NaN where nothing was measured."""
        for seen in self.seen[self._stale].unique().tolist():
            rows = (self._stale & (self.seen == seen)).nonzero().flatten()
            for some in rows.split(_TOGETHER) if seen else ():
                self._found[:, some] = self._estimate(some, seen)
        self._stale[:] = False
        middle, error, freedom = self._found
        return middle, error * torch.from_numpy(stats.t.ppf((1 + confidence) / 2, freedom.numpy()))

    def _estimate(self, neurons: Tensor, seen: int) -> Float[Tensor, "3 chosen"]:
        """Return mean, standard error and degrees of freedom from the first ``seen`` samples."""
        population, values = len(self._sizes), self._values[:seen, neurons].double().t()
        chance = torch.ones(seen, dtype=torch.float64)
        if seen < population:
            chance = (self._keys[seen] * self._sizes[:seen]).clamp(max=1)
        ones = torch.ones(population, len(neurons), 1, dtype=torch.float64)
        # (neuron, sample, control)
        controls = torch.cat([ones, self._controls[:, neurons].double()], 2).transpose(0, 1)
        controls = controls / controls.abs().amax(1, keepdim=True).clamp_min(1e-300)
        # Samples that are surely seen have no part in what has to be predicted.
        weights = (1 - chance) / chance.square()
        design = controls[:, :seen]
        normal = (design * weights[:, None]).transpose(1, 2) @ design
        normal = normal + torch.diag_embed(1e-9 * normal.diagonal(dim1=1, dim2=2) + 1e-30)
        slope = torch.linalg.solve(normal, (design * (weights * values)[..., None]).sum(1)[..., None])
        left = values - (design @ slope)[..., 0]
        middle = ((controls @ slope)[..., 0].sum(1) + (left / chance).sum(1)) / population
        freedom = max(int((chance < 1).sum()) - controls.shape[2], 1)
        error = ((weights * left.square()).sum(1) * (freedom + controls.shape[2]) / freedom).sqrt() / population
        return torch.stack([middle, error, torch.full_like(middle, freedom)])


def decided(
    low: Float[Tensor, " neuron"], high: Float[Tensor, " neuron"], bottom: int
) -> tuple[Bool[Tensor, " neuron"], Bool[Tensor, " neuron"]]:
    """Return the neurons that are surely among the ``bottom`` lowest, and those that surely are not.

    Args:
        low: Lower ends of intervals.
        high: Upper ends.
        bottom: Number of neurons that are looked for.

    Returns:
        Two masks.

    Example:
        >>> low, high = torch.tensor([0.0, 1.0, 1.5, 4.0]), torch.tensor([0.5, 2.0, 3.0, 5.0])
        >>> [found.tolist() for found in decided(low, high, 2)]
        [[True, False, False, False], [False, False, False, True]]
    """
    own = (low >= high).long()  # an interval without width lies beyond itself
    above = len(low) - torch.searchsorted(low.sort().values, high) - own
    below = torch.searchsorted(high.sort().values, low, right=True) - own
    return above >= len(low) - bottom, below >= bottom
