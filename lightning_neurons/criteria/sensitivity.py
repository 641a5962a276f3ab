"""Criteria of sensitivity: dependence of the loss on a neuron, from gradients with respect to its activation.

Notation: ``a`` activation, ``g`` the derivative of the loss *summed over the batch* with respect to ``a``, ``u`` the
gate gradient of one sample, ``u = sum over space of a * g``: the derivative by a factor on the neuron. ``E`` is the
mean over samples. Because the loss is summed, no score depends on the batch size.

A dead ReLU still has a gradient at its output, so ``gradient`` does not see deadness; everything built on ``u`` does.
"""

from functools import partial
from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.criteria.contract import Criterion, Statistic, Summary, mean_over_samples

GRADIENT_SQUARES = Statistic("gradient_squares", attrgetter("gradient_squares"), "gradient")
GATE = Statistic("gate", attrgetter("gate_gradient"), "gradient")
GATE_MAGNITUDE = Statistic("gate_magnitude", attrgetter("gate_gradient"), "gradient", torch.abs)
GATE_SQUARES = Statistic("gate_squares", attrgetter("gate_gradient"), "gradient", torch.square)
SAMPLED_GATE_SQUARES = Statistic("sampled_gate_squares", attrgetter("gate_gradient"), "sampled_gradient", torch.square)


def gradient(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``E[sum over space of g^2]``, relative to its sum over the layer.

    A layer whose gradients all vanish scores 0 throughout.

    Returns:
        Shares that sum to 1 over the layer; 0 throughout a layer whose gradients all vanish.
    """
    squares = summary.per_sample(GRADIENT_SQUARES)
    layer = squares.nansum()
    return squares / layer if layer > 0 else squares


def second_order(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``-E[u] + E[u^2] / 2``, signed.

    The curvature is the empirical Fisher's: exact where the model's predictions match the labels' distribution.
    Signed scores rank single neurons; they must not choose many to remove at once.

    Returns:
        The change of the loss when the neuron is zeroed, to second order, in units of the loss.
    """
    return 0.5 * summary.per_sample(GATE_SQUARES) - summary.per_sample(GATE)


def second_order_ggn(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``-E[u] + E[v^2] / 2`` where ``v`` is ``u`` for a label drawn from the model's own prediction.

    The square term is then unbiased for the generalised Gauss-Newton matrix, since the covariance of ``p - onehot(y)``
    under ``y ~ p`` is ``diag(p) - p p^T``.

    Returns:
        The change of the loss when the neuron is zeroed, in units of the loss, signed.
    """
    return 0.5 * summary.per_sample(SAMPLED_GATE_SQUARES) - summary.per_sample(GATE)


def taylor_fo(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``E[u]^2``.

    Returns:
        The squared change of the loss to first order, in squared units of the loss.
    """
    return summary.per_sample(GATE).square()


def fisher(summary: Summary) -> Float[Tensor, " neuron"]:
    """Compute ``E[u^2] / 2``.

    Returns:
        The change of the loss by its curvature alone, in units of the loss; never negative.
    """
    return 0.5 * summary.per_sample(GATE_SQUARES)


GRADIENT = Criterion("gradient", (GRADIENT_SQUARES,), gradient)

TAYLOR = Criterion("taylor", (GATE_MAGNITUDE,), partial(mean_over_samples, statistic=GATE_MAGNITUDE))
"""``E|u|``: Molchanov et al. 2017 (arXiv:1611.06440), equation 8, without their constant 1 / positions."""

TAYLOR_FO = Criterion("taylor_fo", (GATE,), taylor_fo, in_loss_units=True)
"""``E[u]^2``: Molchanov et al. 2019 (CVPR), on gates, over the whole data set instead of each minibatch."""

FISHER = Criterion("fisher", (GATE_SQUARES,), fisher, in_loss_units=True)
"""``E[u^2] / 2``: Theis et al. 2018 (arXiv:1801.05787)."""

SECOND_ORDER = Criterion("second_order", (GATE, GATE_SQUARES), second_order, in_loss_units=True)
SECOND_ORDER_GGN = Criterion("second_order_ggn", (GATE, SAMPLED_GATE_SQUARES), second_order_ggn, in_loss_units=True)
