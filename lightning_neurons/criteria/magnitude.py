"""Criteria of the weights alone. Data-free; biases are left out."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.criteria.contract import Criterion, LayerTraits, Summary

Side = Literal["incoming", "outgoing"]


def weight_norm(summary: Summary, *, side: Side, order: int) -> Float[Tensor, " neuron"]:
    """Compute the L1 or L2 norm of each neuron's incoming or outgoing weights.

    Returns:
        Norms, float64, in units of the weights.
    """
    weight = getattr(summary.traits, side)
    norm: Tensor = torch.linalg.vector_norm(weight.double(), order, dim=1)
    return norm


def refuse_without_weight(traits: LayerTraits, *, side: Side) -> str | None:
    """Return the reason to refuse a layer without such weights, or None."""
    if getattr(traits, side) is not None:
        return None
    if side == "incoming":
        return f"{traits.name!r} has no weight tensor; use a criterion on activations such as 'rms'"
    return (
        f"the activation of {traits.name!r} is read by something else than convolutional and linear layers "
        "(a residual sum, or whoever takes the model's output); use 'weight_l2'"
    )


def norm_scale(summary: Summary) -> Float[Tensor, " neuron"]:
    """Return |scale| of the normalisation after the layer: Liu et al. 2017, network slimming (arXiv:1708.06519)."""
    assert summary.traits.norm_scale is not None, "other layers are refused"
    return summary.traits.norm_scale.double().abs()


def refuse_without_norm(traits: LayerTraits) -> str | None:
    """Return the reason to refuse a layer that no normalisation with a scale per neuron follows, or None."""
    if traits.norm_scale is not None:
        return None
    return f"no normalisation layer with a scale follows {traits.name!r}; use 'weight_l2'"


def _norm(name: str, side: Side, order: int) -> Criterion:
    return Criterion(
        name,
        (),
        partial(weight_norm, side=side, order=order),
        refuse=partial(refuse_without_weight, side=side),
    )


WEIGHT_L1 = _norm("weight_l1", "incoming", 1)
WEIGHT_L2 = _norm("weight_l2", "incoming", 2)
OUTGOING_L1 = _norm("outgoing_l1", "outgoing", 1)
OUTGOING_L2 = _norm("outgoing_l2", "outgoing", 2)
NORM_SCALE = Criterion("norm_scale", (), norm_scale, refuse=refuse_without_norm)
