"""Schedules of cuts: the epochs of the rounds, and the share of the reduction that is due at each."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_neurons.errors import ArgumentError, check_choice, check_count

Shape = Literal["one_shot", "linear", "cubic", "geometric"]


@dataclass(frozen=True)
class PruningSchedule:
    """Rounds of cutting at the beginning of epochs ``start_epoch``, ``start_epoch + every_n_epochs``, ...

    Attributes:
        shape: ``"one_shot"`` goes all the way at once; ``"linear"`` in equal steps; ``"cubic"`` in steps that become
            smaller (Zhu and Gupta 2017, eq. 1, with no sparsity before the first round); ``"geometric"`` removes the
            same share of what is left in every round.
        start_epoch: The epoch at whose beginning the first round is made; at least 1, as something has to be measured
            first.
        end_epoch: The last epoch at whose beginning a round may be made; None for a single round.
        every_n_epochs: Number of epochs from one round to the next.

    Raises:
        ArgumentError: If a value is out of range, or they contradict one another.

    Example:
        >>> schedule = PruningSchedule("linear", start_epoch=2, end_epoch=8, every_n_epochs=2)
        >>> schedule.rounds, [schedule.due(epoch) for epoch in range(1, 6)], schedule.progress(1, 0.5)
        (4, [0, 1, 1, 2, 2], 0.25)
    """

    shape: Shape = "one_shot"
    start_epoch: int = 1
    end_epoch: int | None = None
    every_n_epochs: int = 1

    def __post_init__(self) -> None:
        check_choice("schedule", self.shape, get_args(Shape))
        check_count("start_epoch", self.start_epoch)
        check_count("every_n_epochs", self.every_n_epochs)
        if self.end_epoch is not None:
            check_count("end_epoch", self.end_epoch, least=self.start_epoch)
        elif self.shape != "one_shot":
            raise ArgumentError.of("end_epoch", None, f'the epoch of the last round, with schedule="{self.shape}"')

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        last = self.start_epoch if self.end_epoch is None else self.end_epoch
        return (last - self.start_epoch) // self.every_n_epochs + 1

    def due(self, epoch: int) -> int:
        """Return the number of rounds that are due when an epoch begins."""
        return (
            0 if epoch < self.start_epoch else min((epoch - self.start_epoch) // self.every_n_epochs + 1, self.rounds)
        )

    def epoch_of(self, number: int) -> int:
        """Return the epoch at whose beginning a round is due; rounds are counted from 1."""
        return self.start_epoch + (number - 1) * self.every_n_epochs

    def progress(self, number: int, removed: float) -> float:
        """Return the part of the whole reduction that is made after a round.

        Args:
            number: The round, counted from 1.
            removed: The share that is removed in the end.

        Returns:
            A share from 0 to 1.
        """
        way = 1.0 if self.shape == "one_shot" else number / self.rounds
        if self.shape == "cubic":
            return 1 - (1 - way) ** 3
        if self.shape == "geometric" and removed > 0:
            return float((1 - (1 - removed) ** way) / removed)
        return way
