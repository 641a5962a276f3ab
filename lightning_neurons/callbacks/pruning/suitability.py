"""Checks, before training, that the Trainer, its strategy, optimizers and callbacks allow pruning."""

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_neurons.callbacks.trainer.checks import lightning_errors, sharding_of, why_no_validation
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer, callbacks_of, is_fast_dev_run
from lightning_neurons.errors import UnknownNameError
from lightning_neurons.layers.layer import makers
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.surgery.optimizers import why_not, with_held


def refuse_strategy(who: str, trainer: Trainer) -> None:
    """Refuse strategies under which layers cannot change their shape.

    Raises:
        MisconfigurationException: Naming the strategy and what works instead.
    """
    strategy = trainer.strategy
    sharded = sharding_of(strategy, "XLAStrategy")
    if sharded:
        raise MisconfigurationException(
            f'{who} cannot reshape the parameters that {sharded} spreads over processes; use strategy="ddp" or '
            '"auto", or prune() the gathered model before or after training.'
        )
    if type(strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise MisconfigurationException(
            f"{who} cannot work with a strategy that starts its processes by spawn or fork: their weights would be "
            'loaded into the unpruned module of the main process. Use strategy="ddp".'
        )


def refuse_run(who: str, trainer: Trainer, pl_module: LightningModule, start_epoch: int | None, patience: int) -> None:
    """Refuse runs in which nothing could be cut.

    Args:
        who: The callback.
        trainer: The Trainer.
        pl_module: Its module.
        start_epoch: The epoch of the next round; None if all have been made.
        patience: Number of measurements that a round needs.

    Raises:
        MisconfigurationException: Saying what is missing.
    """
    if (why := why_no_validation(trainer)) is not None:
        raise MisconfigurationException(
            f"{who} measures and decides on validation data, and this Trainer runs no validation ({why}); prune() "
            "works without."
        )
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise MisconfigurationException(
            f"{who} cannot cut a module that has been compiled as a whole, as its copies would run the original; "
            "compile the network in it: self.net.compile() or self.net = torch.compile(self.net)"
        )
    endless = trainer.max_epochs in (None, -1) or is_fast_dev_run(trainer)
    last = trainer.max_epochs or 0
    if start_epoch is not None and not endless and start_epoch >= last:
        raise MisconfigurationException(
            f"{who}(start_epoch={start_epoch}): the first cut would be made at the beginning of epoch {start_epoch}, "
            f"and max_epochs={last} ends before it; expected a start_epoch below {last}"
        )
    measured = patience * (trainer.check_val_every_n_epoch or 1)
    once = trainer.val_check_interval == 1.0  # else an epoch may have several validations
    if start_epoch is not None and not endless and once and measured >= last:
        raise MisconfigurationException(
            f"{who}(patience={patience}): the first cut could be made at the beginning of epoch {measured}, after as "
            f"many measurements, and max_epochs={last} ends before it"
        )
    masks = [c for c in callbacks_of(trainer) if any(b.__name__ == "ModelPruning" for b in type(c).__mro__)]
    if masks:
        raise MisconfigurationException(
            f"{who} cannot cut layers whose weights are masked by {type(masks[0]).__name__}; use one of the two"
        )


def refuse_company(who: str, trainer: Trainer, kind: type) -> None:
    """Refuse a second pruning callback: each would use the indices of a model that the other has changed.

    Raises:
        MisconfigurationException: If there is another one.
    """
    if sum(isinstance(callback, kind) for callback in callbacks_of(trainer)) > 1:
        raise MisconfigurationException(
            f"{who}: a Trainer can have one pruning callback; use one with several rounds (schedule=, end_epoch=), or "
            "prune() between two fits"
        )


def refuse_patterns(pl_module: LightningModule, budget: PruningBudget) -> None:
    """Refuse patterns that match no layer.

    Raises:
        CallbackArgumentError: Naming the nearest layers.
    """
    with lightning_errors():
        budget.ignores(list(makers(pl_module)))


def refuse_optimizers(who: str, trainer: Trainer) -> None:
    """Refuse optimizers whose state cannot be cut.

    Raises:
        MisconfigurationException: Naming the optimizer and what to use instead.
    """
    for optimizer in with_held(trainer.optimizers):
        why = why_not(optimizer)
        if why is not None:
            raise MisconfigurationException(f"{who} cannot cut the state of {type(optimizer).__name__}: use {why}")


def warn_of_stale_checkpoints(warn: Callable[[str], None], trainer: Trainer) -> None:
    """Warn if ``last.ckpt`` may not be the last state, as it is written with the best only."""
    saving: list[Any] = [*trainer.checkpoint_callbacks]
    for one in saving:
        if getattr(one, "monitor", None) and getattr(one, "save_last", None) and getattr(one, "save_top_k", -1) > 0:
            warn(
                f"ModelCheckpoint(monitor={one.monitor!r}, save_last=True) writes last.ckpt only when {one.monitor} is "
                "among the best, so it can hold the network before a cut; a ModelCheckpoint(save_last=True) without "
                "monitor holds the last"
            )


def is_over(trainer: Trainer) -> bool:
    """Return True if no other epoch will begin."""
    epochs = trainer.max_epochs
    steps = trainer.max_steps is not None and trainer.max_steps != -1
    last = epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
    return bool(last or (steps and trainer.global_step >= trainer.max_steps))


def require_monitor(who: str, trainer: Trainer, monitor: str | None) -> None:
    """Refuse to go on without the metric that is monitored, going by the first process.

    Raises:
        MisconfigurationException: Naming what is logged.
    """
    if monitor is not None and trainer.strategy.broadcast(monitor not in trainer.callback_metrics, 0):
        unknown = UnknownNameError.among("monitor", monitor, list(trainer.callback_metrics))
        raise MisconfigurationException(f"{who}: {unknown}")


def unknown_monitor(trainer: Trainer, monitor: str) -> str:
    """Return a warning for a metric that validation has not logged before training."""
    return f"{UnknownNameError.among('monitor', monitor, list(trainer.callback_metrics))} Fine if training logs it."


def warn_of_unseen_weights(warn: Callable[[str], None], trainer: Trainer) -> None:
    """Warn if the weights at the end of training will be others than those that were validated."""
    if any(base.__name__ == "StochasticWeightAveraging" for c in callbacks_of(trainer) for base in type(c).__mro__):
        warn("StochasticWeightAveraging ends with weights that no validation has seen: max_drop does not hold for them")
