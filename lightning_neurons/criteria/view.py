"""Values of one layer in one batch, and their reductions over space.

Shape words, used in the whole package: ``batch`` (samples), ``neuron`` (output channels or features), ``space``
(positions: pixels, tokens; one for a linear layer on vectors). Reductions over space give ``(batch, neuron)`` and are
computed once, however many statistics read them. Sums run in float64 where there is little to add, in at least float32
elsewhere; whether float32 was enough can be asked afterwards.
"""

import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32, as its sums overflow and stall.

    Returns:
        Values of the same shape; those that are not float16 or bfloat16 are returned as they are.
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


_LITTLE = 2**13
"""Number of values that are summed in float64 as fast as in float32: the calls are the cost."""

LARGEST_SQUARES = 1e290
"""Sums of squares over space end here: values beyond 1e154 have no square in float64, and are finite all the same."""

_TINY, _HUGE = 1e-30, 1e30
"""Between these, a float32 that comes of products and sums is exact to rounding."""

_MUCH = 2**16
_SCRATCH: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch_like(values: Tensor) -> Tensor:
    """Return memory for a temporary result of the shape of ``values``, the same each time if it is large.

    Fresh memory of the size of an activation comes from the operating system page by page, which takes longer than to
    compute what goes into it.
    """
    if values.numel() < _MUCH:
        return torch.empty_like(values, memory_format=torch.contiguous_format)
    key = values.device, values.dtype
    if key not in _SCRATCH or _SCRATCH[key].numel() < values.numel():
        with torch.inference_mode(False):
            _SCRATCH[key] = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
    return _SCRATCH[key][: values.numel()].view(values.shape)


def fitting(values: Tensor) -> Tensor:
    """Convert ``values`` to the type in which they are summed.

    Returns:
        float64 for small tensors on devices that have it, else float32 or the type that they have, if it is not
        lower.
    """
    little = values.numel() <= _LITTLE and values.device.type != "mps"  # float64 does not exist on Apple's GPUs
    return values.double() if little else at_least_float32(values)


def over_space(values: Float[Tensor, "batch neuron space"]) -> Float[Tensor, "batch neuron"]:
    """Sum over space.

    Returns:
        Sums that are never a view, as the model may overwrite its values before the batch is over.
    """
    return values.squeeze(-1).clone() if values.shape[-1] == 1 else values.sum(-1)


def sum_of_squares(values: Float[Tensor, "batch neuron space"]) -> Float[Tensor, "batch neuron"]:
    """Return the sum of squares over space."""
    if values.shape[-1] == 1:
        return values.squeeze(-1).square()
    if values.dtype == torch.float64:
        return values.square().sum(-1)
    # A vectorised norm, squared again, costs half of multiply-and-sum on a CPU, but it adds up one value after the
    # other: over more than a few hundred, the rounding would drown the variance of a nearly constant neuron.
    piece = next((length for length in (256, 64) if values.shape[-1] % length == 0), None)
    if piece is None:
        return values.square().sum(-1)
    norms: Tensor = torch.linalg.vector_norm(values.unflatten(-1, (-1, piece)), dim=-1)
    return norms.square_().sum(-1)


class LayerView:
    """The input of a statistic: the activation of one layer in one batch and, if asked for, its gradient.

    Args:
        activation: Values after the normalisation, activation function and dropout that follow the layer.
        gradient: The derivative of the summed loss with respect to ``activation``.
        inner: Where the loss is made of gradients (a penalty, forces): what these add to the derivative by a factor on
            each value, as the factor is on their way back as well.
        rectified: Whether the activation function makes every value zero or positive, as ReLU does.
        bounds: Lower and upper bound of a saturating activation function, or None.

    Example:
        >>> view = LayerView(torch.tensor([[[1.0, 0.0], [-2.0, 4.0]]]))
        >>> view.total.tolist(), view.positive.tolist()
        ([[1.0, 2.0]], [[1.0, 1.0]])
    """

    def __init__(
        self,
        activation: Float[Tensor, "batch neuron space"],
        gradient: Float[Tensor, "batch neuron space"] | None = None,
        inner: Float[Tensor, "batch neuron space"] | None = None,
        *,
        rectified: bool = False,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.activation = fitting(activation)
        self._gradient = None if gradient is None else fitting(gradient)
        self._inner = None if inner is None else fitting(inner)
        self.rectified = rectified
        self.bounds = bounds
        self._may_overflow = activation.dtype == torch.float64

    @property
    def gradient(self) -> Float[Tensor, "batch neuron space"]:
        """The derivative of the summed loss with respect to the activation."""
        if self._gradient is None:
            raise LookupError("this view carries no gradient: name 'gradient' in the statistic's `needs`")
        return self._gradient

    @cached_property
    def total(self) -> Float[Tensor, "batch neuron"]:
        """Sum over space."""
        return over_space(self.activation)

    @cached_property
    def squares(self) -> Float[Tensor, "batch neuron"]:
        """Sum of squares over space, at most ``LARGEST_SQUARES``."""
        squares = sum_of_squares(self.activation)
        return squares.clamp_max_(LARGEST_SQUARES) if self._may_overflow else squares

    @cached_property
    def magnitude(self) -> Float[Tensor, "batch neuron"]:
        """Sum of absolute values over space."""
        if self.rectified:
            return self.total
        if self.activation.shape[-1] == 1:
            return self.total.abs()
        # |a| = 2 max(a, 0) - a: the positive part is needed for ``positive`` anyway.
        return 2 * self._positive_part[0] - self.total

    @cached_property
    def positive(self) -> Float[Tensor, "batch neuron"]:
        """The number of values greater than zero."""
        if self.activation.shape[-1] == 1:
            return (self.total if self.rectified else self.total.clamp_min(0)).sign()
        if not self.rectified:
            return self._positive_part[1]
        return over_space(torch.sign(self.activation, out=scratch_like(self.activation)))

    @cached_property
    def _positive_part(self) -> tuple[Tensor, Tensor]:
        """Sum over space of the values above zero, and how many there are."""
        part = torch.clamp_min(self.activation, 0, out=scratch_like(self.activation))
        size = over_space(part)
        # A sum of signs takes a third of the time of a sum of truth values.
        return size, over_space(part.sign_())

    @cached_property
    def maximum(self) -> Float[Tensor, "batch neuron"]:
        """Largest value."""
        return self.total if self.activation.shape[-1] == 1 else self.activation.amax(-1)

    @cached_property
    def largest_magnitude(self) -> Float[Tensor, "batch neuron"]:
        """Largest absolute value."""
        if self.rectified:
            return self.maximum
        if self.activation.shape[-1] == 1:
            return self.magnitude
        return torch.maximum(self.maximum, -self.activation.amin(-1))

    @cached_property
    def gate_gradient(self) -> Float[Tensor, "batch neuron"]:
        """The loss's derivative by a factor on the neuron: the sum over space of activation times gradient."""
        dot: Tensor = torch.linalg.vecdot(self.activation, self.gradient)
        return dot if self._inner is None else dot + self._inner.sum(-1)

    @cached_property
    def gradient_squares(self) -> Float[Tensor, "batch neuron"]:
        """Sum over space of squared gradients."""
        return sum_of_squares(self.gradient)

    def in_double(self) -> "LayerView":
        """Return the same values in float64."""
        slopes = (None if slope is None else slope.double() for slope in (self._gradient, self._inner))
        return LayerView(self.activation.double(), *slopes, rectified=self.rectified, bounds=self.bounds)

    def went_out_of_range(self) -> bool:
        """Return True if any of the sums so far is out of float32's range, so that they must be computed in float64.

        A sum that is NaN counts as well. Always False on other devices than the CPU, as the test would wait for them.
        """
        if self.activation.dtype != torch.float32 or self.activation.device.type != "cpu":
            return False
        sums = vars(self)  # of cached properties, those that have been computed
        activity = "total" in sums and not _holds(self.total.abs(), sums.get("squares"))
        slopes = [sums[name] for name in ("gate_gradient", "gradient_squares") if name in sums]
        return activity or (bool(slopes) and not _slopes_hold(slopes))


def _slopes_hold(sums: list[Tensor]) -> bool:
    magnitudes = [s.abs() for s in sums]
    if sums[0].numel() and all(_TINY <= float(end) < _HUGE for m in magnitudes for end in m.aminmax()):
        return True  # the usual case, in a quarter of the time
    sizes = torch.stack(magnitudes)
    tiny = (sizes.amin(0) < _TINY) & (sizes[0] > 0)
    # Where nothing at all is left, everything may have been too small.
    return bool((sizes < _HUGE).all()) and bool(sizes.any()) and not bool(tiny.any())


def _holds(sizes: Tensor, squares: Tensor | None) -> bool:
    """Return True if sums, of magnitudes ``sizes``, and sums of squares lie in the range where float32 is exact."""
    if squares is None:
        return math.isfinite(sizes.sum())
    # |a| > 1e15 a^2 where the squares are too small, and the difference is infinite where they are too large.
    lowest, highest = torch.sub(sizes, squares, alpha=1 / math.sqrt(_TINY)).aminmax()
    return bool(highest <= 0) and bool(lowest > -math.inf)
