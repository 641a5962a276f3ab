"""Actions that one process does for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_neurons.callbacks.trainer.checks import said_of
from lightning_neurons.callbacks.trainer.namespaces import Trainer
from lightning_neurons.errors import ArgumentError, PruningError


class MisuseError(PruningError):
    """An error that is due to an argument, and not to the model or its data."""


def in_one_process(trainer: Trainer, action: Any) -> Any:
    """Run an action in the first process alone.

    Returns:
        What the action returned there, in every process.

    Raises:
        MisuseError: If an argument was at fault, in every process.
        PruningError: If it failed in another way, in every process.
    """
    answer: Any = None
    if trainer.is_global_zero:
        try:
            answer = action()
        except Exception as error:  # noqa: BLE001 (else the other processes would wait for ever)
            misuse = isinstance(error, ArgumentError | MisconfigurationException)
            answer = MisuseError(said_of(error)) if misuse else PruningError(said_of(error))
    answer = trainer.strategy.broadcast(answer, 0)
    if isinstance(answer, PruningError):
        raise answer
    return answer


@contextmanager
def costing_a_round(trainer: Trainer) -> Iterator[None]:
    """Turn errors in the preparation of a cut into a ``PruningError``, which costs the round, not the training.

    With several processes the error is raised as it is, since the others wait for a message that never comes.

    Raises:
        PruningError: If anything else but misuse went wrong.
    """
    try:
        yield
    except (PruningError, MisconfigurationException):
        raise
    except Exception as error:
        if trainer.world_size > 1:
            raise
        raise PruningError(f"{type(error).__name__}: {error}") from error


def end_together(trainer: Trainer) -> None:
    """Let processes that were spawned wait for one another at the end of a run.

    With gloo, one that ends while another is still busy with what they have gathered is often aborted (seen with torch
    2.13), and the run with it. Processes that were launched as scripts end by themselves.
    """
    if trainer.world_size > 1 and type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        trainer.strategy.barrier()
