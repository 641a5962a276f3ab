"""State of the guard of a metric: its value before the first cut, and the last state within the bound."""

from dataclasses import dataclass
from typing import Any

from lightning_neurons.callbacks.pruning.snapshot import Snapshot
from lightning_neurons.results.typed import typed


@dataclass
class Keeping:
    """The state of a guard; goes into checkpoints as plain values and tensors.

    Attributes:
        baseline: The metric of the model before the first cut.
        good: The last state whose metric was within the bound, if one is kept.
        good_rounds: The number of rounds that had been made in it.
        progress: The share of the final budget that had been removed in it.
        judge_after: The last epoch of the recovery of the latest cut; None if it has been judged.
        latest: The metric as it was logged last.
        validated: The epoch of ``latest``.
        measured: Whether ``latest`` was logged after the latest cut.
        step_of_latest: The number of optimizer steps at ``latest``.
        step: The share of a round's step that is tried.
        stopped: Whether nothing is cut any more.
    """

    baseline: float | None = None
    good: Snapshot | None = None
    good_rounds: int = 0
    progress: float = 0.0
    judge_after: int | None = None
    latest: float | None = None
    validated: int = -1
    measured: bool = True
    step_of_latest: int = -1
    step: float = 1.0
    stopped: bool = False

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Keeping":
        """Restore the state that ``state_dict`` returned.

        Raises:
            ValueError: If a value is not what it has to be.
        """
        found: Keeping = typed(cls, state, "keeping")
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        return dict(vars(self))
