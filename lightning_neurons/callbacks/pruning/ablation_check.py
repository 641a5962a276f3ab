"""Check by ablation before a cut: a plan's neurons are silenced together, and a cut that would hurt is not made."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_neurons.callbacks.pruning.pruner import NeuronPruner
from lightning_neurons.callbacks.trainer.runner import KeptBatches, metric_on
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.hooks.intervention import Silence, edit_of
from lightning_neurons.layers.layer import candidates
from lightning_neurons.measurement.passes import Passes
from lightning_neurons.pruning.rounds import Rounds


class ForesightedPruner(NeuronPruner):
    """A pruner that, with ``check="ablation"``, measures a plan's effect on the metric before it cuts."""

    def _decide(self, trainer: Any, pl_module: Any) -> None:
        before = self.rounds.pending
        super()._decide(trainer, pl_module)
        pending, guard, monitor = self.rounds.pending, self.pruning.guard, self.pruning.monitor
        if self.pruning.check is None or pending is None or pending is before or not pending.plan:
            return
        assert guard is not None and monitor is not None, "asked for together"
        earlier = Rounds(self.rounds.dense, self.rounds.done).plan
        neurons = pending.plan.lowered(earlier).neurons
        self.rounds.pending = None  # until it has been checked
        now = metric_on(trainer, pl_module, self._kept, monitor)
        without = metric_without(trainer, pl_module, self._kept, monitor, neurons)
        self.rounds.pending = pending
        if now is None or without is None:
            self._warn(f"validation_step does not log {monitor} for a batch, so no cut can be checked by ablation")
            return
        self._write(trainer, {"pruning/metric_predicted": without})
        if not guard.holds(without, now):
            self.rounds.pending = None
            self._warn(
                f"round {pending.number} is not made at epoch {trainer.current_epoch + 1}: with its "
                f"{len(pending.plan)} neurons silenced, {monitor} goes from {now:.4g} to {without:.4g} on the kept "
                "samples, and "
                f"{guard.bound(now):.4g} is the worst that is allowed"
            )


def metric_without(
    trainer: Any, pl_module: Any, kept: KeptBatches, monitor: str, neurons: Mapping[str, Sequence[int]]
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
    assert passes.known is not None, "just found"
    modules: dict[str, nn.Module] = candidates(pl_module)
    edits = {
        name: edit_of(passes.known.layers[name], indices, "zero", device=pl_module.device)
        for name, indices in neurons.items()
        if indices
    }
    with Silence(passes.known.layers, modules, edits):
        return metric_on(trainer, pl_module, kept, monitor)
