"""The ways of making up for a cut, by name."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.layerwise import least_squares
from lightning_neurons.pruning.compensation.means import InputMeans, fold_means
from lightning_neurons.pruning.compensation.weight_shifts import Compensation, Repair, Wiring, readers_of
from lightning_neurons.pruning.surgery.surgery import Cut


def compensate(
    model: nn.Module,
    cuts: Sequence[Cut],
    calibration: Calibration,
    wiring: Wiring,
    how: Compensation,
) -> Repair:
    """What is to be changed in the readers of what goes. All processes have to take part.

    Args:
        model: As it is before the cut; it is left as it is.
        cuts: What goes.
        calibration: The data; each process has its own.
        wiring: How the model's layers follow one another.
        how: By name.
    """
    if how == "none" or not cuts:
        return Repair()
    if how == "mean":
        found = InputMeans(model, readers_of(cuts))
        with isolated(model), eager():
            model.eval()
            for batch in calibration.batches:
                found.observe(partial(calibration.run, model, batch))
        return fold_means(model, cuts, found.means(calibration.reduce), wiring.norm_behind)
    return least_squares(model, cuts, calibration, wiring, patchwise=how == "patch_least_squares")
