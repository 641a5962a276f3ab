"""Checks of the arguments that every study takes: the model, the loss function and the batches."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_neurons.data.batches import batch_size_of
from lightning_neurons.errors import (
    ArgumentError,
    MeasurementError,
)


def given_model(model: Any) -> None:
    """Check that the model is a module.

    Raises:
        ArgumentError: If it is a class, or anything else.
    """
    if not isinstance(model, nn.Module):
        got = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ArgumentError.of("model", got, "a torch.nn.Module (an instance, not its class)")


def given_loss(loss_fn: Any) -> None:
    """Check that the loss function can be called.

    Raises:
        ArgumentError: If it is no function, or a module such as ``nn.CrossEntropyLoss()``, which takes other arguments.
    """
    if not callable(loss_fn) or isinstance(loss_fn, nn.Module | type):
        got = type(loss_fn).__name__
        raise ArgumentError.of("loss_fn", got, "a function (model, batch) -> loss, such as one that calls the model")


def check_batches(batches: Any) -> None:
    """Check that ``batches`` is an iterable of batches.

    Raises:
        ArgumentError: If it is a single tensor, a dataset, or no iterable.
    """
    if isinstance(batches, Tensor | Dataset) or not isinstance(batches, Iterable):
        raise ArgumentError.of("batches", type(batches).__name__, "an iterable of batches: a DataLoader, or [batch]")


def given_batches(batches: Any) -> list[Any]:
    """Return all batches that have samples.

    Raises:
        ArgumentError: If it is no iterable of batches.
        MeasurementError: If there are none.
    """
    check_batches(batches)
    nonempty = [batch for batch in batches if batch_size_of(batch)]
    if not nonempty:
        raise MeasurementError(
            f"batches={type(batches).__name__}: it gave no batch with a sample (has a generator been used up?)"
        )
    return nonempty
