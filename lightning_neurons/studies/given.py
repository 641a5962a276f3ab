"""What every study checks of its first arguments."""

from collections.abc import Iterable
from typing import Any, get_args

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_neurons.errors import (
    ArgumentError,
    MeasurementError,
    check_choice,
    check_count,
    check_flag,
    check_seed,
)
from lightning_neurons.network.batches import batch_size_of
from lightning_neurons.network.layer import require_materialized
from lightning_neurons.network.silence import Replacement
from lightning_neurons.studies.losses import LOSS_REDUCTIONS
from lightning_neurons.studies.whatif import WhatIf


def given_model(model: Any) -> None:
    """Refuse what is no module.

    Raises:
        ArgumentError: If it is a class, or anything else.
    """
    if not isinstance(model, nn.Module):
        got = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ArgumentError.of("model", got, "a torch.nn.Module (an instance, not its class)")


def given_loss(loss_fn: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        ArgumentError: If it is no function, or a module such as ``nn.CrossEntropyLoss()``, which takes other arguments.
    """
    if not callable(loss_fn) or isinstance(loss_fn, nn.Module | type):
        got = type(loss_fn).__name__
        raise ArgumentError.of("loss_fn", got, "a function (model, batch) -> loss, such as one that calls the model")


def check_batches(batches: Any) -> None:
    """Refuse what is no iterable of batches.

    Raises:
        ArgumentError: If it is a single tensor, a dataset, or no iterable.
    """
    if isinstance(batches, Tensor | Dataset) or not isinstance(batches, Iterable):
        raise ArgumentError.of("batches", type(batches).__name__, "an iterable of batches: a DataLoader, or [batch]")


def given_batches(batches: Any) -> list[Any]:
    """All batches that have samples.

    Raises:
        ArgumentError: If it is no iterable of batches.
        MeasurementError: If there are none.
    """
    check_batches(batches)
    found = [batch for batch in batches if batch_size_of(batch)]
    if not found:
        raise MeasurementError(
            f"batches={type(batches).__name__}: it gave no batch with a sample (has a generator been used up?)"
        )
    return found


def given_study(
    model: Any,
    loss_fn: Any,
    *,
    replacement: Any,
    loss_reduction: Any,
    memory_limit: Any,
    progress: Any,
    seed: Any,
    exact: Any = True,
) -> WhatIf:
    """The engine of an ablation study, if its arguments are right.

    Raises:
        ArgumentError: Naming the one that is not.
    """
    given_model(model)
    given_loss(loss_fn)
    require_materialized(model)
    check_flag("progress", progress)
    return WhatIf(
        model,
        loss_fn,
        loss_reduction=check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS),
        replacement=check_choice("replacement", replacement, get_args(Replacement)),  # type: ignore[arg-type]
        exact=check_flag("exact", exact),
        memory_limit=check_count("memory_limit", memory_limit),
        seed=check_seed("seed", seed),
    )
