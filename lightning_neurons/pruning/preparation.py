"""The preparation of a cut: each candidate is compensated, and the one with the lowest loss is taken."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_neurons.errors import PruningError, in_short
from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.pruning.compensation.batch_norm import reestimate, together
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.compensate import Compensation
from lightning_neurons.pruning.compensation.trial_model import TrialModel
from lightning_neurons.pruning.compensation.weight_shifts import Repair, Wiring
from lightning_neurons.pruning.cut import Cut


def prepare(
    model: nn.Module,
    candidates: Sequence[Cut],
    calibration: Calibration,
    wiring: Wiring,
    *,
    how: Compensation,
    reestimate_norms: bool = False,
) -> Cut:
    """Compensate for each candidate, and take the one with the lowest loss. Every process has to take part.

    Args:
        model: As it is before the cut; it is left as it is.
        candidates: At least one.
        calibration: The data that it is measured on.
        wiring: The order of the model's layers.
        how: The compensation.
        reestimate_norms: Whether running statistics are estimated anew, where that lowers the loss.

    Returns:
        The candidate that was taken, with its shifts and notes.
    """
    for one in candidates:
        _try_on(model, one, calibration)
    repairs = [how(model, one.tensor_cuts, calibration, wiring) for one in candidates]
    best, notes = 0, []
    if len({one.tensor_cuts for one in candidates}) > 1:
        losses = [_loss(model, one, repair, calibration) for one, repair in zip(candidates, repairs, strict=True)]
        if all(math.isnan(loss) for loss in losses):
            raise PruningError("the loss on the calibration data is NaN, so candidates cannot be compared")
        best = min(range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i]))
        listed = ", ".join(f"{one.scope} {loss:.4g}" for one, loss in zip(candidates, losses, strict=True))
        notes.append(f"calibration loss by scope: {listed}; {candidates[best].scope} was taken")
    chosen, repair = candidates[best], repairs[best]
    shifts = dict(repair.shifts)
    if reestimate_norms and chosen.tensor_cuts:
        shifts, note = _with_new_norms(model, chosen, shifts, calibration)
        notes.append(note)
    return replace(chosen, shifts=calibration.agree(shifts)).noted([*repair.notes, *notes])


def _try_on(model: nn.Module, candidate: Cut, calibration: Calibration) -> None:
    """Run the cut model on the calibration data: it may run code that the example does not run.

    Raises:
        PruningError: If it fails there.
    """
    if not candidate.tensor_cuts or not calibration.batches:
        return
    with isolated(model), torch.no_grad(), eager():
        twin = TrialModel(model, candidate.tensor_cuts).twin
        for number, batch in enumerate(calibration.batches):
            try:
                calibration.run(twin, batch)
            except Exception as error:
                raise PruningError(
                    f"the cut model fails on batch {number} ({in_short(error)}): something that the example does not "
                    "run reads what goes, or the model does not run on the batches at all"
                ) from error


def _loss(model: nn.Module, candidate: Cut, repair: Repair, calibration: Calibration) -> float:
    with isolated(model):
        model.eval()
        return calibration.loss_of(TrialModel(model, candidate.tensor_cuts, repair.shifts).twin)


def _with_new_norms(
    model: nn.Module, chosen: Cut, shifts: dict[str, Tensor], calibration: Calibration
) -> tuple[dict[str, Tensor], str]:
    with isolated(model):
        model.eval()
        rehearsal = TrialModel(model, chosen.tensor_cuts, shifts)
        before = calibration.loss_of(rehearsal.twin)
        more = reestimate(rehearsal, calibration)
        if not more:
            return shifts, "there are no running statistics to estimate anew"
        after = calibration.loss_of(rehearsal.twin)
    told = f"calibration loss {before:.4g} without, {after:.4g} with running statistics estimated anew"
    if not after < before:
        return shifts, f"{told}: left as they were"
    return together(shifts, more), f"{told}: taken"
