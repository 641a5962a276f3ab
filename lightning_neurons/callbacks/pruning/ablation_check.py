"""Check by ablation before a cut: a plan's neurons are silenced together, and a cut that would hurt is not made."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import final

import torch
from torch import nn

from lightning_neurons.callbacks.pruning.part import Fit, Part
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.runner import KeptBatches, metric_on
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.hooks.intervention import Silence, edit_of
from lightning_neurons.layers.attention import silent_rows
from lightning_neurons.layers.layer import candidates, makers
from lightning_neurons.measurement.passes import Passes
from lightning_neurons.pruning.cut import Cut


@final
class AblationCheck(Part):
    """A part that measures the effect of a decided cut on the metric, with neurons silenced."""

    def on_decide(self, fit: Fit, cut: Cut) -> str | None:
        """Compare the metric on the kept samples without the neurons and with them.

        Returns:
            The reason, if the metric would be beyond its bound.
        """
        guard, monitor, kept = fit.settings.guard, fit.settings.monitor, fit.samples.kept
        assert guard is not None and monitor is not None, "asked for together"
        if not cut.plan:
            return None
        neurons = cut.plan.lowered(fit.rounds.plan).neurons
        now = metric_on(fit.trainer, fit.pl_module, kept, monitor)
        without = metric_without(fit.trainer, fit.pl_module, kept, monitor, neurons)
        if now is None or without is None:
            fit.warn(f"validation_step does not log {monitor} for a batch, so no cut can be checked by ablation")
            return None
        fit.write({"pruning/metric_predicted": without})
        if guard.holds(without, now):
            return None
        return (
            f"with its {len(cut.plan)} neurons silenced, {monitor} goes from {now:.4g} to {without:.4g} on the kept "
            f"samples, and {guard.bound(now):.4g} is the worst that is allowed"
        )


def metric_without(
    trainer: Trainer, pl_module: LightningModule, kept: KeptBatches, monitor: str, neurons: Mapping[str, Sequence[int]]
) -> float | None:
    """Return a logged metric on kept samples with some neurons set to zero, over all processes.

    Args:
        trainer: The Trainer.
        pl_module: Its module; it is left as it was.
        kept: The samples.
        monitor: The name under which it is logged.
        neurons: By layer, the neurons to set to zero.

    Returns:
        The metric; None if the validation step does not log it.
    """
    batch = next(kept.on(pl_module.device), None)
    if batch is None:  # this process has no samples; the others wait for it
        return metric_on(trainer, pl_module, kept, monitor)
    replay, passes = StepReplay(trainer, pl_module, "validation_step", None), Passes(pl_module, [])
    with replay.isolated(), torch.inference_mode(False):
        passes.find(replay.run, batch)
    assert passes.traced is not None, "just found"
    modules: dict[str, nn.Module] = candidates(pl_module)
    some = {name: indices for name, indices in neurons.items() if indices}
    layers = passes.traced.layers
    edits = {
        name: edit_of(layers[name], indices, "zero", device=pl_module.device)
        for name, indices in some.items()
        if name in modules
    }
    with ExitStack() as stack:
        for name, attention in makers(pl_module).items():
            if name in some and name not in modules:
                stack.enter_context(silent_rows(attention, some[name]))
        with Silence(layers, modules, edits):
            return metric_on(trainer, pl_module, kept, monitor)
