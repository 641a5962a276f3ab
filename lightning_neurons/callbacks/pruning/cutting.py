"""Cuts inside a running Trainer, also of models that DDP wraps, and of averages of the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_neurons.callbacks.trainer.runner import KeptBatches, metric_on
from lightning_neurons.pruning.surgery.surgery import Operation, TensorCut, cut


def metric_now(trainer: Any, pl_module: Any, kept: KeptBatches, monitor: str | None) -> float | None:
    """Return the metric of the network that validation uses: with averaged weights, that of the average.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        kept: Validation samples.
        monitor: The metric, if there is one.

    Returns:
        The metric on the kept samples of all processes, or None if it cannot be known.

    Raises:
        PruningError: If it could not be measured in some process; in every process.
    """
    # What all processes do together must not depend on what one of them has seen.
    if monitor is None or not trainer.strategy.broadcast(kept.samples > 0, 0):
        return None
    averaging = [c for c in trainer.callbacks if hasattr(c, "_swap_models") and c._average_model is not None]
    for callback in averaging:
        callback._swap_models(pl_module)
    try:
        return metric_on(trainer, pl_module, kept, monitor)
    finally:
        for callback in reversed(averaging):
            callback._swap_models(pl_module)


def cut_in_fit(
    trainer: Any,
    pl_module: Any,
    cuts: Sequence[TensorCut],
    shifts: Mapping[str, Tensor],
    also: Callable[[Operation], None],
) -> None:
    """Cut the model, its optimizers' state and its averages; after an error everything is as it was.

    Args:
        trainer: The Trainer, at the beginning of a training epoch.
        pl_module: Its module.
        cuts: The neurons to remove.
        shifts: Changes of weights and biases that compensate for them.
        also: Records the cut as its last step; undone with the cut after an error.
    """
    if not cuts:
        also(Operation())
        return
    strategy = trainer.strategy
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        # The wrapper's reducer knows the old shapes: ranks would diverge without an error.
        strategy.model = strategy.lightning_module
    try:
        cut(pl_module, cuts, optimizers=trainer.optimizers, copies=averages_of(trainer), shifts=shifts, also=also)
    finally:
        if wrapped:
            strategy.configure_ddp()


def averages_of(trainer: Any) -> list[nn.Module]:
    """Return the copies that weight-averaging callbacks (EMA, SWA) keep of the model."""
    averaged = torch.optim.swa_utils.AveragedModel
    return [one.module if isinstance(one, averaged) else one for one in average_models(trainer)]


def average_models(trainer: Any) -> list[nn.Module]:
    """Return the averages of weight-averaging callbacks as they keep them, with ``AveragedModel`` around the copy."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [average for average in found if isinstance(average, nn.Module)]


def average_again(trainer: Any, pl_module: nn.Module, who: Any) -> None:
    """Put averaged weights into the module again, after an earlier state was restored in both.

    Args:
        trainer: At the end of training.
        pl_module: Its module.
        who: The callback that has restored the state; averaging callbacks before it had ended already.
    """
    for callback in trainer.callbacks[: trainer.callbacks.index(who)]:
        if isinstance(getattr(callback, "_average_model", None), torch.optim.swa_utils.AveragedModel):
            callback.on_train_end(trainer, pl_module)


def reset_early_stopping(trainer: Any) -> None:
    """Reset the best score and the patience of early stopping, as they are those of the larger model."""
    for callback in trainer.callbacks:
        if any(base.__name__ == "EarlyStopping" for base in type(callback).__mro__):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.monitor_op is torch.lt else -math.inf)
