"""Cuts inside a running Trainer, also of models that DDP wraps, and of averages of the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_neurons.callbacks.trainer.namespaces import EitherCallback, LightningModule, Trainer, callbacks_of
from lightning_neurons.pruning.surgery.surgery import Operation, TensorCut, cut


def cut_in_fit(
    trainer: Trainer,
    pl_module: LightningModule,
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
    strategy: Any = trainer.strategy  # of DDP, if it wraps the module
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        # The wrapper's reducer knows the old shapes: ranks would diverge without an error.
        strategy.model = strategy.lightning_module
    try:
        cut(pl_module, cuts, optimizers=trainer.optimizers, copies=averages_of(trainer), shifts=shifts, also=also)
    finally:
        if wrapped:
            strategy.configure_ddp()


def averages_of(trainer: Trainer) -> list[nn.Module]:
    """Return the copies that weight-averaging callbacks (EMA, SWA) keep of the model."""
    averaged = torch.optim.swa_utils.AveragedModel
    return [one.module if isinstance(one, averaged) else one for one in average_models(trainer)]


def average_models(trainer: Trainer) -> list[nn.Module]:
    """Return the averages of weight-averaging callbacks as they keep them, with ``AveragedModel`` around the copy."""
    found = [getattr(callback, "_average_model", None) for callback in callbacks_of(trainer)]
    return [average for average in found if isinstance(average, nn.Module)]


def average_again(trainer: Trainer, pl_module: LightningModule, who: EitherCallback) -> None:
    """Put averaged weights into the module again, after an earlier state was restored in both.

    Args:
        trainer: At the end of training.
        pl_module: Its module.
        who: The callback that has restored the state; averaging callbacks before it had ended already.
    """
    for callback in callbacks_of(trainer)[: callbacks_of(trainer).index(who)]:
        if isinstance(getattr(callback, "_average_model", None), torch.optim.swa_utils.AveragedModel):
            callback.on_train_end(trainer, pl_module)


def reset_early_stopping(trainer: Trainer) -> None:
    """Reset the best score and the patience of early stopping, as they are those of the larger model."""
    stopping: list[Any] = [c for c in callbacks_of(trainer) if _is_early_stopping(type(c))]
    for callback in stopping:
        callback.wait_count = 0
        callback.best_score = torch.tensor(math.inf if callback.monitor_op is torch.lt else -math.inf)


def _is_early_stopping(kind: type) -> bool:
    return any(base.__name__ == "EarlyStopping" for base in kind.__mro__)  # each namespace has a class of its own
