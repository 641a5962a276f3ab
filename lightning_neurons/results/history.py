"""History of measurements: neurons that died, revived or stay dead, and the stability of the ranking."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.criteria import agreement
from lightning_neurons.errors import ArgumentError
from lightning_neurons.metrics.histogram import folded
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.typed import plain, typed
from lightning_neurons.results.whole_file import reading_document, write_whole

FORMAT, VERSION = "lightning_neurons history", 1

MAGNITUDE_PARTS = 2
"""Bars per power of two in ``HistoryEntry.magnitudes``."""

RECENT = 100
"""Number of latest measurements that a history keeps in full; of those before, at most as many, spread over the run."""


@dataclass(frozen=True, eq=False)
class HistoryEntry:
    """One measurement, compared with the one before.

    Attributes:
        epoch: Epoch of the measurement, or None outside training.
        step: Optimizer steps, or None outside training.
        widths: Number of neurons by layer.
        dead: Dead neurons by layer.
        unknown: By layer, neurons that may be dead or alive, because samples that were NaN or infinite were left out.
        died: Dead now, alive before; empty for the first measurement. An unknown neuron has neither died nor revived.
        revived: Alive now, dead before.
        stability: Spearman correlation of the main criterion's scores with those of the measurement before, by layer;
            NaN for the first and where a layer's width has changed.
        magnitudes: By layer, the histogram of magnitudes of activations, over all of its neurons, in the bars of
            ``metrics.histogram.folded``; without layers where it was not measured.
    """

    epoch: int | None
    step: int | None
    widths: Mapping[str, int]
    dead: Mapping[str, list[int]]
    died: Mapping[str, list[int]]
    revived: Mapping[str, list[int]]
    stability: Mapping[str, float]
    magnitudes: Mapping[str, list[int]] = field(default_factory=dict)
    unknown: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def mean_stability(self) -> float:
        """The mean over layers that have a stability; NaN if none has."""
        defined = [s for s in self.stability.values() if not math.isnan(s)]
        return sum(defined) / len(defined) if defined else math.nan


@dataclass
class NeuronHistory:
    """The measurements so far, oldest first. Goes into a checkpoint as plain values and tensors.

    Its size is bounded: the latest ``RECENT`` measurements are all kept, and of older ones, at most as many, the fewer
    the older they are; the first always is.

    Attributes:
        entries: The measurements that are kept.
        measured: Number of measurements so far.
    """

    entries: list[HistoryEntry] = field(default_factory=list)
    _scores: dict[str, Tensor] = field(default_factory=dict)
    measured: int = 0
    _always_dead: dict[str, list[int]] = field(default_factory=dict)  # in each measurement, also those not kept

    def __post_init__(self) -> None:
        self.measured = max(self.measured, len(self.entries))
        if self.measured == len(self.entries):
            self._always_dead = _dead_in_each(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, report: NeuronReport) -> HistoryEntry:
        """Compare a report with the one before and keep it.

        Returns:
            The entry that is now the last of the history.
        """
        entry = self.compare(report)
        self.keep(report, entry)
        return entry

    def keep(self, report: NeuronReport, entry: HistoryEntry) -> None:
        """Keep a report that has been compared."""
        scores = {name: scores.clone() for name, scores in _main_scores(report).items()}
        still = {n: self._always_dead[n] for n in _unchanged(self.entries[-1:], entry) if n in self._always_dead}
        always_dead = {n: sorted({*ids} & {*entry.dead[n]}) for n, ids in still.items()}
        self._always_dead = always_dead if self.measured else _dead_in_each([entry])
        self._scores = scores
        self.measured += 1
        self.entries.append(entry)
        if len(self.entries) > 2 * RECENT:
            self.entries[:RECENT] = self.entries[:RECENT:2]

    def compare(self, report: NeuronReport) -> HistoryEntry:
        """Compare a report with the last one of the history.

        Returns:
            An entry that is not kept yet; layers whose width has changed since have no neurons that died or revived.
        """
        dead, unknown = (
            {name: neurons(name).nonzero().flatten().tolist() for name in report.deadness}
            for neurons in (report.dead, report.unknown)
        )
        widths = {name: len(c.samples) for name, c in report.counts.items()}
        before = self.entries[-1] if self.entries else None
        same = [n for n in dead if before and before.widths.get(n) == widths[n] and n in before.dead]
        unsure = {n: {*unknown[n], *before.unknown.get(n, [])} for n in same if before}
        return HistoryEntry(
            epoch=report.epoch,
            step=report.step,
            widths=widths,
            dead=dead,
            died={n: sorted({*dead[n]} - {*before.dead[n]} - unsure[n]) for n in same if before},
            revived={n: sorted({*before.dead[n]} - {*dead[n]} - unsure[n]) for n in same if before},
            stability={n: self._stability(n, s) for n, s in _main_scores(report).items()},
            magnitudes={
                n: folded(c.histogram, MAGNITUDE_PARTS).tolist() for n, c in report.counts.items() if c.histogram.any()
            },
            unknown={n: neurons for n, neurons in unknown.items() if neurons},
        )

    def persistently_dead(self, measurements: int | None = None) -> dict[str, list[int]]:
        """Return neurons that were dead in each of the last ``measurements`` (all if None), by layer.

        A layer whose width changed in between has none.

        Args:
            measurements: At most ``RECENT`` (100), or as many as there have been.

        Returns:
            By layer, indices of neurons in ascending order.

        Raises:
            ArgumentError: If some of so many measurements are not kept any more.
        """
        if measurements in (None, self.measured):
            return {name: [*neurons] for name, neurons in self._always_dead.items()}
        if measurements > self.measured:
            return {}
        if measurements > RECENT and self.measured > len(self.entries):
            raise ArgumentError.of("measurements", measurements, f"at most {RECENT}, or None for all {self.measured}")
        return _dead_in_each(self.entries[-measurements:] if measurements else [])

    def _stability(self, name: str, scores: Tensor) -> float:
        before = self._scores.get(name)
        return math.nan if before is None or len(before) != len(scores) else agreement(before, scores).spearman

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, which ``torch.load(weights_only=True)`` accepts."""
        return {
            "entries": [
                {n: dict(v) if isinstance(v, Mapping) else v for n, v in vars(e).items()} for e in self.entries
            ],
            "scores": dict(self._scores),
            "measured": self.measured,
            "always_dead": dict(self._always_dead),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the history that ``state_dict`` returned."""
        entries = [HistoryEntry(**entry) for entry in state["entries"]]
        scores = {name: torch.as_tensor(scores) for name, scores in state["scores"].items()}
        self.__init__(entries, scores, state.get("measured", 0), dict(state.get("always_dead", {})))  # type: ignore[misc]

    def save(self, path: str | Path, versions: Mapping[str, str] | None = None) -> None:
        """Write all measurements as JSON, whole or not at all.

        Args:
            path: The file.
            versions: Versions of the packages that they were made with.
        """
        entries = [vars(entry) for entry in self.entries]
        document = {
            "format": FORMAT,
            "version": VERSION,
            "versions": versions or {},
            "measured": self.measured,
            "always_dead": self._always_dead,
            "entries": entries,
        }
        write_whole(path, json.dumps(plain(document), allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> "NeuronHistory":
        """Read what ``save`` wrote.

        Returns:
            The history; later measurements are compared with it by ``dead`` alone, as scores are not in the file.

        Raises:
            ArgumentError: If the file is no such history, or of a newer version.
        """
        with reading_document(path, FORMAT, VERSION, "NeuronHistory.save") as document:
            entries = typed(list[HistoryEntry], document["entries"], "entries")
            always_dead = typed(Mapping[str, list[int]], document.get("always_dead", {}), "always_dead")
            for entry in entries:
                for neurons in (entry.dead, entry.unknown, entry.died, entry.revived):
                    _check_neurons(neurons, entry.widths)
            _check_neurons(always_dead, entries[-1].widths if entries else {})
            return cls(entries, {}, typed(int, document.get("measured", 0), "measured"), always_dead)


def _check_neurons(neurons: Mapping[str, list[int]], widths: Mapping[str, int]) -> None:
    for layer, indices in neurons.items():
        if not all(0 <= neuron < widths.get(layer, 0) for neuron in indices):
            raise ValueError(f"{layer!r} does not have all of these neurons")


def _unchanged(entries: Sequence[HistoryEntry], last: HistoryEntry) -> list[str]:
    """Return layers whose deadness was measured in each of ``entries``, with as many neurons as in the ``last``."""
    return [n for n in last.dead if all(n in e.dead and e.widths[n] == last.widths[n] for e in entries)]


def _dead_in_each(entries: Sequence[HistoryEntry]) -> dict[str, list[int]]:
    names = _unchanged(entries, entries[-1]) if entries else []
    return {name: sorted(set.intersection(*({*e.dead[name]} for e in entries))) for name in names}


def _main_scores(report: NeuronReport) -> Mapping[str, Tensor]:
    return report.scores[report.main_criterion] if report.scores else {}
