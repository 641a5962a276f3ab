"""Interface of criteria: statistics over a stream, and criteria that make scores of their sums.

A **statistic** reduces one batch: ``observe`` gives one number per sample and neuron. What it gives is added over the
calls of the layer within the batch, passed through ``per_sample``, and added (or maximised) over samples. Sums merge
over batches, accumulation and processes, so nothing else has to know how.

A **criterion** names the statistics that it needs and turns their sums into one score per neuron. It is a value, not a
class to inherit from; a criterion of your own works everywhere without registration:

    >>> import torch
    >>> cubes = Statistic("cubes", lambda view: (view.activation ** 3).sum(-1))
    >>> skew = Criterion("third_moment", (cubes,), lambda summary: summary.per_value(cubes))

In the package, a new criterion is one definition, one line in ``criteria/__init__.py`` and one naive twin in
``tests/reference.py``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from lightning_neurons.criteria.view import LayerView

Need = Literal["activation", "gradient", "sampled_gradient"]
NEEDS: tuple[Need, ...] = ("activation", "gradient", "sampled_gradient")


@dataclass(frozen=True)
class Statistic:
    """One number per sample and neuron, summed (or maximised) over the stream.

    Attributes:
        name: Unique among the statistics that are measured together.
        observe: A view of one batch to ``(batch, neuron)``; additive over space and over the calls of a layer.
        needs: ``"activation"`` (a forward), ``"gradient"`` (of the loss) or ``"sampled_gradient"`` (of the loss on
            labels drawn from the model's own prediction).
        per_sample: Applied to each sample's number after space and calls have been added; None leaves it as it is.
        reduce: How numbers of several samples merge.
    """

    name: str
    observe: Callable[[LayerView], Tensor]
    needs: Need = "activation"
    per_sample: Callable[[Tensor], Tensor] | None = None
    reduce: Literal["sum", "max"] = "sum"


@dataclass(frozen=True)
class LayerTraits:
    """Properties of a layer that a criterion may use, besides its values.

    Attributes:
        name: The layer's path.
        activation: Name of the activation function behind the layer, or None.
        rectified: Whether that function makes every value zero or positive with zeros where it is silent.
        bounds: Lower and upper bound of a saturating function, or None.
        incoming: The layer's weights, neuron axis first, or None if it has none.
        outgoing: The weights of downstream layers for each neuron, or None where something else reads it.
        norm_scale: The scale of the normalisation layer directly behind, or None.
    """

    name: str
    activation: str | None = None
    rectified: bool = False
    bounds: tuple[float, float] | None = None
    incoming: Float[Tensor, "neuron incoming"] | None = None
    outgoing: Float[Tensor, "neuron outgoing"] | None = None
    norm_scale: Float[Tensor, " neuron"] | None = None


@dataclass(frozen=True)
class Summary:
    """The sums over the stream for one layer: the argument of a criterion's ``score``.

    Attributes:
        traits: The properties of the layer.
        totals: By name of the statistic, float64 sums (or maxima) over all samples.
        samples: By need, the number of finite samples, which have been counted.
        values: Number of single values (samples x positions) behind the activation statistics.
        left_out: Number of samples left out because their activation was NaN or infinite.
        near_zero: Maps a threshold in activation units to the share of values with ``|a|`` at most that.
    """

    traits: LayerTraits
    totals: Mapping[str, Float[Tensor, " neuron"]]
    samples: Mapping[Need, Int[Tensor, " neuron"]] = field(default_factory=dict)
    values: Int[Tensor, " neuron"] | None = None
    left_out: Int[Tensor, " neuron"] | None = None
    near_zero: Callable[[float], Float[Tensor, " neuron"]] | None = None

    def total(self, statistic: Statistic) -> Float[Tensor, " neuron"]:
        """Return the sum (or maximum) itself."""
        return self.totals[statistic.name]

    def per_sample(self, statistic: Statistic) -> Float[Tensor, " neuron"]:
        """Return the mean over samples; NaN where no finite sample was seen."""
        return self.total(statistic) / self.samples[statistic.needs]

    def per_value(self, statistic: Statistic) -> Float[Tensor, " neuron"]:
        """Return the mean over samples and positions; NaN where no finite value was seen."""
        assert self.values is not None, "values are counted wherever activations are"
        return self.total(statistic) / self.values


def mean_over_values(summary: Summary, statistic: Statistic) -> Float[Tensor, " neuron"]:
    """Return the mean of one statistic over samples and positions as the score."""
    return summary.per_value(statistic)


def mean_over_samples(summary: Summary, statistic: Statistic) -> Float[Tensor, " neuron"]:
    """Return the mean of one statistic over samples as the score."""
    return summary.per_sample(statistic)


def known_deadness(
    deadness: Float[Tensor, "*any neuron"], left_out: Int[Tensor, " neuron"]
) -> Float[Tensor, "*any neuron"]:
    """Replace deadness 1 by NaN where samples were left out, as the neuron may have fired in those.

    Returns:
        A copy of ``deadness``; values below 1 are kept, as a neuron that fired once is alive.

    Example:
        >>> import torch
        >>> known_deadness(torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0, 2, 2])).tolist()
        [1.0, nan, 0.5]
    """
    return deadness.masked_fill((deadness == 1) & (left_out > 0), math.nan)


def accept_every_layer(traits: LayerTraits) -> str | None:
    """Return None: the ``refuse`` of a criterion that is defined for every layer."""
    return None


@dataclass(frozen=True)
class Criterion:
    """A named rule from sums to one number per neuron.

    Attributes:
        name: The key in results.
        statistics: The statistics to sum over the stream; empty for rules that use weights only.
        score: From sums to scores. Pure.
        kind: ``"importance"``: higher is more important. ``"deadness"``: in [0, 1], 1 is dead.
        refuse: Returns the reason why a layer has no score by this rule and what to use instead, or None.
        histogram: Whether the rule reads ``Summary.near_zero``.
        in_loss_units: Whether scores of different layers are comparable as they are, so that normalising them layer by
            layer before a global ranking would destroy information.
    """

    name: str
    statistics: tuple[Statistic, ...]
    score: Callable[[Summary], Tensor]
    kind: Literal["importance", "deadness"] = "importance"
    refuse: Callable[[LayerTraits], str | None] = accept_every_layer
    histogram: bool = False
    in_loss_units: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """The kinds of pass over the data that this rule needs."""
        return frozenset(s.needs for s in self.statistics)

    def judge(self, summary: Summary) -> Tensor:
        """Compute ``score``, and mark what cannot be known.

        Returns:
            Scores ``(neuron,)``; deadness is NaN for a neuron that may have fired in samples that were not finite.
        """
        scores = self.score(summary)
        if self.kind == "importance" or summary.left_out is None:
            return scores
        return known_deadness(scores, summary.left_out)
