"""History of pruning as plain values, one entry per cut, for figures and reports."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_neurons.results.typed import plain, typed
from lightning_neurons.results.whole_file import reading_document, write_whole

FORMAT, VERSION = "lightning_neurons pruning", 1


@dataclass(frozen=True)
class PruningPoint:
    """One cut.

    Attributes:
        epoch: The epoch at whose beginning it was made.
        removed: Neurons removed.
        parameters: Parameters after it.
        macs: Multiply-accumulate operations per sample after it.
        before: The monitored metric at the validation before it, or None.
        cut: The same right after it, on kept samples, or None.
        after: The same at the next validation, or None.
        taken_back: Whether it was undone.
    """

    epoch: int
    removed: int
    parameters: int
    macs: int
    before: float | None = None
    cut: float | None = None
    after: float | None = None
    taken_back: bool = False


@dataclass(frozen=True)
class PruningHistory:
    """The model before any cut, and every cut, oldest first.

    Attributes:
        parameters: Parameters before any cut.
        macs: Multiply-accumulate operations per sample before any cut.
        widths: Neurons by layer before any cut.
        widths_after: Neurons by layer now.
        monitor: Name of the monitored metric, or None.
        points: The cuts.

    Example:
        >>> history = PruningHistory(100, 1000, {"fc": 4}, {"fc": 2}, None, (PruningPoint(1, 2, 50, 500),))
        >>> history.points[-1].macs / history.macs
        0.5
    """

    parameters: int
    macs: int
    widths: Mapping[str, int]
    widths_after: Mapping[str, int]
    monitor: str | None = None
    points: tuple[PruningPoint, ...] = field(default=())

    def save(self, path: str | Path) -> None:
        """Write the history as JSON, whole or not at all."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_whole(path, json.dumps(plain(document), allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> "PruningHistory":
        """Read what ``save`` wrote.

        Returns:
            A history equal to the one that was saved.

        Raises:
            ArgumentError: If the file is no such history, or of a newer version.
        """
        with reading_document(path, FORMAT, VERSION, "PruningHistory.save") as document:
            history: PruningHistory = typed(cls, {**document, "points": document["points"]}, "the document")
            return history
