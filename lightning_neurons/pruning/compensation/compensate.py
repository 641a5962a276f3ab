"""The compensations for a cut, each a value with a name, what it needs, and one function.

A new one is a function here or in a file of its own, and one entry in ``COMPENSATIONS``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from lightning_neurons.errors import check_choice
from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.layers.attention import separated_heads
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.layerwise import least_squares
from lightning_neurons.pruning.compensation.means import InputMeans, fold_means
from lightning_neurons.pruning.compensation.weight_shifts import Repair, Wiring, consumers_of
from lightning_neurons.pruning.surgery.surgery import TensorCut

CompensationName = Literal["least_squares", "patch_least_squares", "mean", "none"]


@dataclass(frozen=True)
class Compensation:
    """A way of making up for removed neurons.

    Attributes:
        name: Its name in arguments.
        repair: Takes a model before a cut, which it leaves as it is, the cuts, this process's calibration data, and the
            order of the layers; returns the changes of the downstream layers. All processes take part.
        needs_data: Whether there must be calibration data.
    """

    name: CompensationName
    repair: Callable[[nn.Module, Sequence[TensorCut], Calibration, Wiring], Repair]
    needs_data: bool = True

    def __call__(self, model: nn.Module, cuts: Sequence[TensorCut], calibration: Calibration, wiring: Wiring) -> Repair:
        """Return the changes that go with a cut; none if nothing is cut."""
        if not cuts:
            return Repair()
        with separated_heads(model):
            return self.repair(model, cuts, calibration, wiring)


def _nothing(model: nn.Module, cuts: Sequence[TensorCut], calibration: Calibration, wiring: Wiring) -> Repair:
    return Repair()


def _means(model: nn.Module, cuts: Sequence[TensorCut], calibration: Calibration, wiring: Wiring) -> Repair:
    found = InputMeans(model, consumers_of(cuts, modules_by_name(model), wiring.standardised))
    with isolated(model), eager():
        model.eval()
        for batch in calibration.batches:
            found.observe(partial(calibration.run, model, batch))
    return fold_means(model, cuts, found.means(calibration.reduce), wiring.norm_behind, wiring.standardised)


NONE = Compensation("none", _nothing, needs_data=False)
LEAST_SQUARES = Compensation("least_squares", partial(least_squares, patchwise=False))

COMPENSATIONS: dict[str, Compensation] = {
    one.name: one
    for one in (
        LEAST_SQUARES,
        Compensation("patch_least_squares", partial(least_squares, patchwise=True)),
        Compensation("mean", _means),
        NONE,
    )
}
"""Every compensation, by name."""


def compensation_named(name: Any) -> Compensation:
    """Return the compensation of a name.

    Raises:
        ArgumentError: If there is none.

    Example:
        >>> compensation_named("mean").needs_data, compensation_named("none").needs_data
        (True, False)
    """
    return COMPENSATIONS[check_choice("compensation", name, tuple(COMPENSATIONS))]
