"""Validations that Lightning leaves out when it resumes a run: cuts depend on every one, so they are made up for.

A checkpoint may be written after the last batch before a validation, in the middle of that validation, or while an
epoch begins. Lightning 2.6 goes on behind the validation in the first case, validates on the rest of the data in the
second, or not at all, and trains no batch of the epoch in the third; with ``max_steps``, it counts an epoch that had
ended twice.
"""

from collections.abc import Callable, Iterator
from typing import Any

from lightning_neurons.isolation.isolation import kept_random_state


def batches_trained(trainer: Any) -> int:
    """Return the number of training batches in the whole run, which identifies a validation."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def make_up(trainer: Any, validated: int | None, prepare: Callable[[], None]) -> None:
    """Run a validation that is missing from before the run ended. Call it in ``on_train_start``, in all processes.

    Callbacks and loggers get that validation as any other, in the epoch to which it belongs.

    Args:
        trainer: The Trainer.
        validated: ``batches_trained`` at the last validation that has been finished; None if that is not known.
        prepare: Called before such a validation.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if fit.restarted_on_epoch_start:  # the batches that are counted are those of the last epoch
        fit.epoch_progress.current.ready = fit.epoch_progress.current.started + 1
        _begin_epoch(fit)
        return
    if fit.restarted_on_epoch_end:
        fit.epoch_progress.increment_completed()
        _next_epoch(fit)
        return
    before_validation = epoch.restarted_on_train_batch_end
    in_validation = epoch.restarted_on_last and fit.restarted_mid_epoch and validated is not None
    if not (before_validation or in_validation) or validated == batches_trained(trainer):
        return
    # As it was when the batch had been trained; ``reset`` has closed its epoch, if the batch was the last.
    is_closed = bool(before_validation and fit.restarted_mid_epoch and epoch.batch_progress.is_last_batch)
    if before_validation:
        epoch.batch_progress.increment_completed()
    _move_epoch(fit, -is_closed)
    if epoch._should_check_val_fx(fit._data_fetcher):
        prepare()
        _validate(trainer)
        waiting = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        if is_closed and waiting <= trainer.callback_metrics.keys():  # what was logged before is not known any more
            epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epoch.val_loop.reset_restart_stage()  # it need not be finished any more,
        epoch.val_loop._has_run = False  # and is left out by the epoch itself, which else would never end its restart
    if is_closed:
        _move_epoch(fit, 1)
        epoch._batches_that_stepped += not epoch._should_accumulate()
        _next_epoch(fit)
    elif before_validation:
        epoch.batch_progress.total.completed -= 1  # ``reset`` is still going to count it
        epoch.batch_progress.current.completed -= 1


def first_batches(trainer: Any, count: int) -> Iterator[tuple[Any, int]]:
    """Yield the first training batches as the step gets them, with their index, from a new iterator."""
    loader, pl_module = trainer.fit_loop._combined_loader, trainer.lightning_module
    with kept_random_state(pl_module):
        for batch, batch_idx, _ in iter(type(loader)(loader.iterables, loader._mode)):
            if batch_idx >= count:
                return
            moved = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            yield trainer.strategy.batch_to_device(moved, dataloader_idx=0), batch_idx


def _validate(trainer: Any) -> None:
    """Run a validation as the loop of an epoch does."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = connector._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def _move_epoch(fit: Any, by: int) -> None:
    """Set an epoch's counters to over, or not yet; after an error they stay, for a checkpoint that is written then."""
    for progress in (fit.epoch_progress.current, fit.epoch_progress.total):
        progress.processed += by
        progress.completed += by


def _next_epoch(fit: Any) -> None:
    """Let the loop begin the next epoch as usual, and not as a resumed one."""
    fit._restarting = False
    fit.reset_restart_stage()
    _begin_epoch(fit)


def _begin_epoch(fit: Any) -> None:
    """Reset the counters of batches, so that an epoch has all of them."""
    fit.epoch_loop.restarting = False
    fit.epoch_loop.reset_restart_stage()
