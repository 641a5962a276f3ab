"""Weights that reproduce, from the inputs that are left, what was computed from all of them.

Affine least squares with a ridge on the *change* of the weights. So no cut means no change, and the error never exceeds
that of folding means into biases, which is the case of no change.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.pruning.compensation.moments import Moments

RIDGE = 1e-3
"""The ridge, relative to the mean diagonal of the inputs' covariance."""

FEW = 1e-1
"""The ridge with fewer positions than inputs, when the covariance is singular."""

RIDGES = (RIDGE, 1e-2, FEW, 1.0, math.inf)
"""The ridges to choose from; the last changes no weight, so only means are made up for."""

_SINGULAR = 1e8


@dataclass(frozen=True, eq=False)
class Refined:
    """A solution of the regression.

    Attributes:
        matrix: ``(target, input)``.
        ridge: The ridge that was added to the diagonal, relative to its mean.
    """

    matrix: Float[Tensor, "target input"]
    ridge: float


def refine(
    moments: Moments, start: Float[Tensor, "target input"], *, ridge: float | None = None, centred: bool = True
) -> Refined:
    """Return the matrix ``M`` next to ``start`` for which ``M x`` (and a constant) comes closest to ``y``.

    Minimises ``E |y - M x - c|^2 + ridge * mean(diag(S)) * |M - start|^2`` with ``S`` the covariance of ``x``, in
    closed form: ``M = start + (S_yx - start S_xx) (S_xx + ridge)^-1``.

    Args:
        moments: Of inputs ``x`` and targets ``y``.
        start: The matrix without a correction.
        ridge: None takes 0.001, or 0.1 where there are fewer positions than inputs.
        centred: False leaves the constant out, for a layer that has none.

    Returns:
        ``M``, and the ridge, which is raised until the system can be solved.
    """
    if centred:
        s_xx, s_yx = moments.covariance_xx, moments.covariance_yx
    else:
        s_xx, s_yx = moments.xx / moments.count.clamp(min=1), moments.yx / moments.count.clamp(min=1)
    start = start.to(s_xx)
    few = float(moments.count) < len(s_xx)
    ridge = (FEW if few else RIDGE) if ridge is None else ridge
    scale = float(s_xx.diagonal().mean()) if len(s_xx) else 0.0
    if not varies(moments, scale) or math.isinf(ridge):  # constant inputs cannot tell anything
        return Refined(start, ridge)
    residual = s_yx - start @ s_xx
    while True:
        damped = s_xx + ridge * scale * torch.eye(len(s_xx), dtype=s_xx.dtype, device=s_xx.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and float(factor.diagonal().min()) ** 2 * _SINGULAR**2 > float(damped.diagonal().max()):
            return Refined(start + torch.cholesky_solve(residual.T, factor).T, ridge)
        ridge = max(10 * ridge, 1e-12)


def choose_ridge(
    first: Moments,
    second: Moments,
    start: Float[Tensor, "target input"],
    metric: Float[Tensor, "target target"] | None = None,
    *,
    centred: bool = True,
) -> float:
    """Return the ridge with which each half of the samples predicts the other best.

    Ridges are tried from the smallest on, until one predicts worse than the one before; then only the infinite one is,
    which costs nothing.

    Args:
        first: Moments of one half.
        second: Moments of the other.
        start: As in ``refine``.
        metric: Weights of the errors of targets, ``e' metric e``; None weighs them alike.
        centred: As in ``refine``.

    Returns:
        One of ``RIDGES``.
    """
    few = float(first.count + second.count) < len(first.xx)
    ridges = [ridge for ridge in RIDGES if ridge >= FEW or not few]
    if not float(first.count) or not float(second.count):
        return ridges[0]

    def loss(ridge: float) -> float:
        found = 0.0
        for seen, unseen in ((first, second), (second, first)):
            matrix = refine(seen, start, ridge=ridge, centred=centred).matrix
            found += _held_out(seen, unseen, matrix, metric, centred=centred)
        return found

    best, least = ridges[0], loss(ridges[0])
    for ridge in ridges[1:-1]:
        if (reached := loss(ridge)) >= least:
            break
        best, least = ridge, reached
    return ridges[-1] if loss(ridges[-1]) < least else best


def _held_out(
    seen: Moments,
    unseen: Moments,
    matrix: Float[Tensor, "target input"],
    metric: Float[Tensor, "target target"] | None,
    *,
    centred: bool,
) -> float:
    """Return the mean square of ``y - M x - c`` where it was not fitted, but for a term without ``M``."""
    offset = seen.mean_y - matrix @ seen.mean_x if centred else torch.zeros_like(seen.mean_y)
    weighed, turned = (matrix, offset) if metric is None else (metric @ matrix, metric @ offset)
    squares = (weighed * (matrix @ unseen.xx - 2 * unseen.yx)).sum() / unseen.count
    return float(squares + turned @ (offset - 2 * (unseen.mean_y - matrix @ unseen.mean_x)))


def varies(moments: Moments, variance: float) -> bool:
    """Return whether a variance is more than the rounding error of the squares that it is the difference of."""
    squares = float(moments.xx.diagonal().mean() / moments.count.clamp(min=1))
    return variance > 1e-12 * squares
