"""Checks of arguments, module, Trainer and settings before a measurement, and the epochs at which one is due."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_neurons.callbacks.trainer.namespaces import EitherCallback, LightningModule, Trainer, is_fast_dev_run
from lightning_neurons.errors import ArgumentError, MeasurementError, PruningError
from lightning_neurons.layers.layer import Pattern, candidates, lazy_path
from lightning_neurons.layers.registry import widths_of
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.metrics.room import require_room

Step = Literal["validation", "training"]
"""The step of a module that computes the loss."""


class CallbackArgumentError(MisconfigurationException, ArgumentError):
    """An argument of a callback has a value that is not allowed; a ``ValueError`` and Lightning's own error."""


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Turn an ``ArgumentError`` into one that is a ``MisconfigurationException`` too."""
    try:
        yield
    except ArgumentError as error:
        raise CallbackArgumentError(str(error)) from error


INSTEAD = 'NeuronSensitivityCallback(source="train") measures on training batches.'

_OBSERVED: "WeakKeyDictionary[Any, ref[Any]]" = WeakKeyDictionary()
"""By callback, the module that it has observed in its last fit."""

_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}

_EVER = 10**9  # epochs; some packages set a larger period of validation where there is no validation data


def is_another(callback: EitherCallback, pl_module: LightningModule) -> bool:
    """Return True if the callback's last fit was of another module, and remember this one."""
    before, _OBSERVED[callback] = _OBSERVED.get(callback), ref(pl_module)
    return before is not None and before() is not pl_module


def why_no_validation(trainer: Trainer) -> str | None:
    """Return the reason why a fit will run no validation, or None if it will."""
    if not trainer.enable_validation:
        return "no validation_step, no validation data, or limit_val_batches=0"
    every, last = trainer.check_val_every_n_epoch or 1, trainer.max_epochs
    most = _EVER if last is None or last == -1 else last
    if not is_fast_dev_run(trainer) and every > most:
        period = "never" if every > _EVER else f"every {every} epochs"
        return f"it would run {period}, and training ends after {last}; pass check_val_every_n_epoch=1"
    return None


def sharding_of(strategy: Strategy, *more: str) -> str | None:
    """Return the name of a strategy that splits layers over processes (or is one of ``more``), or None."""
    # By name: Lightning's two namespaces have two classes of each.
    names = {base.__name__ for base in type(strategy).__mro__}
    return next(iter(sorted(names & (_SHARDED | {*more}))), None)


def refuse_sharded(who: str, strategy: Strategy) -> None:
    """Refuse strategies that split layers over processes.

    Raises:
        MisconfigurationException: Naming the strategy and what works instead.
    """
    sharded = sharding_of(strategy)
    if sharded:
        raise MisconfigurationException(
            f"{who} cannot see whole layers under {sharded}, which splits them over processes; use "
            'strategy="ddp" or "auto", or measure() on the gathered model.'
        )


def check_layers(who: str, pl_module: LightningModule, patterns: tuple[Pattern, ...] | None) -> None:
    """Make sure that each pattern matches a layer; of a module whose layers are still lazy nothing can be said.

    Call it when the module has been set up: its own ``setup`` and ``configure_model`` come after those of callbacks.

    Raises:
        MisconfigurationException: If one does not.
    """
    try:
        if not is_unfinished(pl_module):
            candidates(pl_module, patterns)
    except ArgumentError as error:
        raise MisconfigurationException(f"{who}: {error}") from error


def require_layers(pl_module: LightningModule, patterns: tuple[Pattern, ...] | None) -> None:
    """Make sure that there is something to measure; a module without layers is no mistake of who observes it.

    Raises:
        MeasurementError: If the module has no layer, or lazy ones.
    """
    if is_unfinished(pl_module):
        raise MeasurementError(
            f"{type(pl_module).__name__} has lazy layers, whose neurons are there after the first batch only; run one "
            "batch through the model first"
        )
    if not candidates(pl_module, patterns):
        raise MeasurementError(
            f"{type(pl_module).__name__} has no convolutional or linear layer; make your own layer types known by "
            "lightning_neurons.register_layer"
        )


def is_unfinished(pl_module: LightningModule) -> bool:
    """Return True if a module has lazy layers whose sizes are not known yet."""
    return lazy_path(pl_module) is not None


def check_room(who: str, pl_module: LightningModule, settings: MeasurementSettings, device: torch.device) -> None:
    """Make sure that the sums of a measurement fit into memory.

    Raises:
        MisconfigurationException: If they do not.
    """
    try:
        if not is_unfinished(pl_module):
            require_room(widths_of(candidates(pl_module, settings.layers)), settings.criteria, device)
    except MeasurementError as error:
        raise MisconfigurationException(f"{who}: {error}") from error


def overrides(pl_module: nn.Module, method: str) -> bool:
    """Return True if a module overrides a method of LightningModule, of either of Lightning's namespaces."""
    base = next(t for t in type(pl_module).__mro__ if t.__name__ == "LightningModule")
    own = vars(pl_module).get(method, getattr(type(pl_module), method, None))  # DDP leaves one in the instance
    return getattr(own, "__func__", own) is not getattr(base, method, None)


def is_due(epoch: int, every: int, measured: Sequence[int | None]) -> bool:
    """Return True if an epoch is to be measured; epochs may be skipped, or have several validations.

    Args:
        epoch: The current epoch.
        every: How many epochs lie between measurements.
        measured: The epoch of the last measurement, if there was one; one of a run before may be later than ``epoch``.
    """
    last = [e for e in measured if e is not None and e <= epoch]
    done = (last[0] + 1) // every if last else 0
    return (epoch + 1) // every > done or epoch in last


def stretch_of(trainer: Trainer) -> str:
    """Return a name for the current epoch or the sanity check, for messages."""
    return "the sanity check" if trainer.sanity_checking else f"epoch {trainer.current_epoch}"


def name_of(function: Callable[..., Any] | None) -> str | None:
    """Return a function's name and the plain values in its closure, which stay the same when its file is edited."""
    if function is None:
        return None
    function = inspect.unwrap(function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return f"{name}:{[c for c in cells if isinstance(c, int | float | str)]}"


def said_of(error: Exception) -> str:
    """Return an error's message, with its type unless it is an error of this package or Lightning."""
    ours = isinstance(error, ArgumentError | PruningError | MeasurementError | MisconfigurationException)
    return str(error) if ours else f"{type(error).__name__}: {error}"


def require_validation_step(who: str, pl_module: LightningModule) -> None:
    """Make sure that training batches have a loss.

    Raises:
        MisconfigurationException: If the module has no validation_step.
    """
    if not overrides(pl_module, "validation_step"):
        raise MisconfigurationException(
            f'{who}(source="train") needs a loss: {type(pl_module).__name__} has no validation_step; pass '
            'step="training" to take that of training_step, run in evaluation mode, or loss_fn=lambda module, batch: '
            "... that returns the loss."
        )


def require_training_step(who: str, pl_module: LightningModule) -> None:
    """Make sure that training_step can be run for its loss alone.

    Raises:
        MisconfigurationException: If the module has none, or optimizes by hand: it may step an optimizer.
    """
    name = type(pl_module).__name__
    if not overrides(pl_module, "training_step"):
        raise MisconfigurationException(f'{who}(step="training"): {name} has no training_step; leave step out')
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f'{who}(step="training"): {name} optimizes by hand (automatic_optimization=False), so to run its '
            "training_step again would step its optimizer; pass loss_fn=lambda module, batch: ... that returns the loss"
        )
