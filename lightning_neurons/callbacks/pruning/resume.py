"""The resume of a run between, in and after the rounds of pruning, in the order in which it happens.

1. While a fit runs, ``Progress`` says where it stands.
2. A checkpoint is written: ``saved``.
3. Another run reads it: ``restored``; or, from a callback with other settings, ``adopted``.
4. Its fit starts: ``begin`` keeps what belongs to the module that is trained, and forgets the rest.
5. Its training starts: ``make_up`` runs a validation that Lightning leaves out, as cuts depend on every one.

The rounds themselves, and what is decided, are values: ``pruning/rounds.py``.
"""

import ast
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_neurons.callbacks.pruning.moments import batches_trained
from lightning_neurons.callbacks.pruning.part import Fit, Part
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.errors import ArgumentError
from lightning_neurons.layers.layer import widths_made
from lightning_neurons.pruning.rounds import Rounds
from lightning_neurons.pruning.surgery.surgery import Operation
from lightning_neurons.results.typed import typed

# -- 1. Where a fit stands


class Stage(Enum):
    """What has happened to a callback last."""

    NEW = "no fit has started"
    RESTORED = "a checkpoint has been read, and no fit has started since"
    TRAINING = "a fit has started, and no validation has ended in its training"
    VALIDATING = "a validation goes on"
    VALIDATED = "a validation has ended in this training"


@final
class Progress:
    """Where a pruning callback stands.

    Attributes:
        stage: What has happened last.
        validated_at: The number of training batches before the last validation that has ended; None before the first.
    """

    def __init__(self) -> None:
        self.stage = Stage.NEW
        self.validated_at: int | None = None
        self._module: weakref.ref[nn.Module] | None = None  # of the last fit
        self._before: Rounds | None = None  # as they were when the validation began that goes on

    def __getstate__(self) -> dict[str, Any]:
        stage = self.stage if self.stage is Stage.RESTORED else Stage.NEW  # a copy has had no fit
        return {**vars(self), "stage": stage, "_module": None}

    def is_of(self, module: nn.Module) -> bool:
        """Return True if what is known belongs to a module: of a checkpoint, or of the last fit, which was its own."""
        return self.stage is Stage.RESTORED or (self._module is not None and self._module() is module)

    def begin(self, module: nn.Module) -> None:
        """A fit of a module starts."""
        self.stage, self._module, self._before = Stage.TRAINING, weakref.ref(module), None

    def begin_training(self) -> None:
        """Training starts; what it logs in an epoch is not there yet, if a resume goes on at the end of one."""
        self.stage = Stage.TRAINING

    def begin_validation(self, rounds: Rounds) -> None:
        """A validation of a fit begins; in a checkpoint that is written before its end, rounds are these."""
        self.stage, self._before = Stage.VALIDATING, replace(rounds)

    def end_validation(self, trainer: Trainer) -> None:
        """A validation of a fit has ended."""
        self.stage, self.validated_at, self._before = Stage.VALIDATED, batches_trained(trainer), None

    def to_save(self, rounds: Rounds) -> Rounds:
        """Return the rounds for a checkpoint: a validation that goes on is made again, and decides again."""
        return rounds if self._before is None else self._before


# -- 2. A checkpoint is written


def saved(rounds: Rounds, progress: Progress, parts: Sequence[Part]) -> dict[str, Any]:
    """Return the state of a pruning callback as plain values and tensors."""
    state = {"rounds": progress.to_save(rounds).state_dict(), "validated": progress.validated_at, "distillation": None}
    for part in parts:
        state |= part.state_dict()
    return state


# -- 3. It is read


def restored(who: str, state: dict[str, Any], rounds: Rounds, progress: Progress, parts: Sequence[Part]) -> None:
    """Restore the state of a checkpoint, whole or not at all.

    Args:
        who: The callback, for messages.
        state: What ``saved`` has returned.
        rounds: Changed in place.
        progress: Changed in place.
        parts: Changed in place.

    Raises:
        ArgumentError: If it is broken; everything is then as it was.
    """
    with _whole(who, rounds, progress, *parts):
        rounds.become(Rounds.from_state(state["rounds"]))
        for part in parts:
            part.load_state_dict(state)
        progress.validated_at = typed(int | None, state.get("validated"), "validated")
        progress.stage = Stage.RESTORED


@contextmanager
def _whole(who: str, *targets: object) -> Iterator[None]:
    before = Operation()
    for target in targets:
        before.keep(target)
    try:
        yield
    except Exception as error:
        before.roll_back()
        got = f"the state of {who} in a checkpoint ({type(error).__name__}: {error})"
        raise ArgumentError.of("ckpt_path", got, "one that it has written, whole") from error


def adopted(rounds: Rounds, parts: Sequence[Part]) -> None:
    """Keep the rounds of other settings that have been restored; what they had decided is dropped."""
    rounds.pending, rounds.votes, rounds.earlier = None, [], len(rounds.done)
    for part in parts:
        part.adopt()


def state_of_other_settings(checkpoint: Mapping[str, Any], own: str) -> tuple[dict[str, Any], str] | None:
    """Return the state of a pruning callback with other settings, and these; None if there is none, or our own.

    Args:
        checkpoint: Of a Trainer.
        own: The key of the callback's own state.

    Returns:
        The state, and the settings that differ as a text.
    """
    states = checkpoint.get("callbacks") or {}
    others = [key for key, state in states.items() if isinstance(state, dict) and {"rounds", "seed"} <= state.keys()]
    if own in states or len(others) != 1:
        return None
    theirs, ours = _settings_in(others[0]), _settings_in(own)
    changed = [f"{name}={value!r}" for name, value in theirs.items() if name not in ours or ours[name] != value]
    return states[others[0]], "; ".join(f"{setting} before" for setting in changed)


def _settings_in(key: str) -> dict[str, Any]:
    try:
        return dict(ast.literal_eval(key[key.index("{") :]))
    except (ValueError, SyntaxError):  # a key in another form
        return {"": key}


# -- 4. A fit starts


def begin(fit: Fit, progress: Progress) -> None:
    """Keep the rounds of the module that is trained, and forget what was decided for another one.

    Raises:
        MisconfigurationException: If the rounds are those of another model.
    """
    is_resumed, is_known = progress.stage is Stage.RESTORED, progress.is_of(fit.pl_module)
    progress.begin(fit.pl_module)
    fresh = is_fresh(fit.who, fit.pl_module, fit.rounds)
    if fresh or not is_known:
        if fresh:
            fit.rounds.become(Rounds())
        fit.rounds.pending, fit.rounds.votes, fit.rounds.undone = None, [], []
        for part in fit.parts:
            part.forget()
    for part in fit.parts:
        part.on_fit_start(fit, is_resumed=is_resumed)


def is_fresh(who: str, pl_module: LightningModule, rounds: Rounds) -> bool:
    """Return True if the module has its original widths again, so that its rounds no longer hold.

    Raises:
        MisconfigurationException: If the rounds are those of another model.
    """
    found = widths_made(pl_module)
    if rounds.dense is None or found == rounds.widths():
        return False
    if found != dict(rounds.dense.widths):
        raise MisconfigurationException(
            f"{who} has pruned another model: it expects layers of {rounds.widths()}, and {type(pl_module).__name__} "
            f"has {found}. Use a new callback."
        )
    return True


# -- 5. Training starts

# A checkpoint may be written after the last batch before a validation, in the middle of that validation, or while an
# epoch begins. Lightning 2.6 goes on behind the validation in the first case, validates on the rest of the data in the
# second, or not at all, and trains no batch of the epoch in the third; with ``max_steps``, it counts an epoch that had
# ended twice.


def make_up(trainer: Trainer, validated: int | None, prepare: Callable[[], None]) -> None:
    """Run a validation that is missing from before the run ended. Call it in ``on_train_start``, in all processes.

    Callbacks and loggers get that validation as any other, in the epoch to which it belongs.

    Args:
        trainer: The Trainer.
        validated: ``batches_trained`` at the last validation that has been finished; None if that is not known.
        prepare: Called before such a validation.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if fit.restarted_on_epoch_start:  # the batches that are counted are those of the last epoch
        current: Any = fit.epoch_progress.current
        current.ready = current.started + 1
        _begin_epoch(trainer)
        return
    if fit.restarted_on_epoch_end:
        fit.epoch_progress.increment_completed()
        _next_epoch(trainer)
        return
    before_validation = epoch.restarted_on_train_batch_end
    in_validation = epoch.restarted_on_last and fit.restarted_mid_epoch and validated is not None
    if not (before_validation or in_validation) or validated == batches_trained(trainer):
        return
    # As it was when the batch had been trained; ``reset`` has closed its epoch, if the batch was the last.
    is_closed = bool(before_validation and fit.restarted_mid_epoch and epoch.batch_progress.is_last_batch)
    if before_validation:
        epoch.batch_progress.increment_completed()
    _move_epoch(trainer, -is_closed)
    fetcher = fit._data_fetcher
    assert fetcher is not None, "training starts"
    if epoch._should_check_val_fx(fetcher):
        prepare()
        _validate(trainer)
        waiting = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        if is_closed and waiting <= trainer.callback_metrics.keys():  # what was logged before is not known any more
            epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epoch.val_loop.reset_restart_stage()  # it need not be finished any more,
        epoch.val_loop._has_run = False  # and is left out by the epoch itself, which else would never end its restart
    if is_closed:
        _move_epoch(trainer, 1)
        epoch._batches_that_stepped += not epoch._should_accumulate()
        _next_epoch(trainer)
    elif before_validation:
        epoch.batch_progress.total.completed -= 1  # ``reset`` is still going to count it
        epoch.batch_progress.current.completed -= 1


def _validate(trainer: Trainer) -> None:
    """Run a validation as the loop of an epoch does."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = connector._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def _move_epoch(trainer: Trainer, by: int) -> None:
    """Set an epoch's counters to over, or not yet; after an error they stay, for a checkpoint that is written then."""
    both: tuple[Any, ...] = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_progress.total
    for progress in both:
        progress.processed += by
        progress.completed += by


def _next_epoch(trainer: Trainer) -> None:
    """Let the loop begin the next epoch as usual, and not as a resumed one."""
    trainer.fit_loop._restarting = False
    trainer.fit_loop.reset_restart_stage()
    _begin_epoch(trainer)


def _begin_epoch(trainer: Trainer) -> None:
    """Reset the counters of batches, so that an epoch has all of them."""
    trainer.fit_loop.epoch_loop.restarting = False
    trainer.fit_loop.epoch_loop.reset_restart_stage()
