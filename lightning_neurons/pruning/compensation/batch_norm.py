"""Norm layers after a cut: running statistics estimated anew (Li et al. 2020, EagleEye), where that helps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import samples_in
from lightning_neurons.isolation.isolation import eager
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import keeps_statistics
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.trial_model import TrialModel


def reestimate(trial: TrialModel, calibration: Calibration) -> dict[str, Tensor]:
    """Estimate the running statistics of a cut copy anew; return their changes at the model's full width.

    The copy gets the new ones. Every process has to take part.

    Args:
        trial: The cut copy.
        calibration: The data; every batch counts the same.

    Returns:
        By name of a buffer, what is added to it; zero for removed neurons.
    """
    norms = {path: module for path, module in modules_by_name(trial.twin).items() if keeps_statistics(module)}
    before = {path: (norm.running_mean.clone(), norm.running_var.clone()) for path, norm in norms.items()}  # type: ignore[union-attr]
    trial.twin.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # the mean over batches
    with torch.no_grad(), eager():
        for batch in calibration.batches:
            if samples_in(batch) > 1:  # one sample alone may have no variance
                calibration.run(trial.twin, batch)
    trial.twin.eval()
    found = {}
    for path, norm in norms.items():
        ran = _count(norm)
        total = calibration.reduce(ran.clone()).clamp(min=1)
        for leaf, old in zip(("running_mean", "running_var"), before[path], strict=True):
            tensor: Tensor = getattr(norm, leaf)
            new = calibration.reduce(tensor * ran) / total
            new = torch.where(calibration.reduce(ran.clone()) > 0, new, old)
            tensor.copy_(new)
            found[f"{path}.{leaf}"] = trial.widened(f"{path}.{leaf}", new - old).cpu()
    return found


def _count(norm: nn.Module) -> Tensor:
    tracked = norm.num_batches_tracked
    assert isinstance(tracked, Tensor), "it has running statistics"
    return tracked.to(torch.float32)


def together(shifts: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of two sets of shifts."""
    return {name: _sum(shifts.get(name), more.get(name)) for name in dict.fromkeys((*shifts, *more))}


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        found = b if a is None else a
        assert found is not None, "it is in one of them"
        return found
    return a + b.to(a)
