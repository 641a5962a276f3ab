"""Calibration data of a running Trainer: its kept validation samples, over all processes."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.runner import KeptBatches, Runner
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.data.batches import map_tensors, tensors_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.measurement.measure import LossFunction
from lightning_neurons.pruning.compensation.calibration import Calibration


def calibration_of(
    trainer: Any, pl_module: Any, runner: Runner | None, kept: KeptBatches, loss_fn: LossFunction | None
) -> Calibration:
    """Return calibration data: the kept samples of every process.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        runner: Runs the module; None in a process that has had no batch.
        kept: Its samples.
        loss_fn: From module and batch to the loss; None takes what ``validation_step`` returns or logs.

    Returns:
        The samples of this process with functions that run the module on them and reduce over processes.
    """

    def run(module: nn.Module, batch: Any) -> Any:
        assert runner is not None, "samples were kept, so there was a batch"
        return runner(module, map_tensors(batch, Tensor.clone))  # a forward may change it

    def loss(module: nn.Module, batch: Any) -> Tensor:
        if module is not pl_module and getattr(module, "_trainer", None) is None:
            module.trainer = trainer
        replay = StepReplay(trainer, module, "validation_step", loss_fn)
        try:
            with replay.isolated():
                return replay.loss(batch)
        except MeasurementError:  # there is none: then let outputs stay what they are
            pairs = zip(*(tensors_of(run(m, batch)) for m in (pl_module, module)), strict=True)
            return torch.stack([(a - b).square().mean() for a, b in pairs if a.is_floating_point()]).sum()

    return Calibration(
        list(kept.on(pl_module.device)),
        run,
        loss,
        reduce=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"),
        agree=lambda value: trainer.strategy.broadcast(value, 0),
    )
