"""Key numbers of a report, one row per layer, which every output shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neurons.criteria import effective_number, share_of_top
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.rankings import best_first, dead_in

TOP_SHARE = 0.1
THRESHOLDS = (0.001, 0.01, 0.05, 0.1, 0.5)
"""Thresholds, in units of a layer's root mean square, for which deadness is shown."""


@dataclass(frozen=True)
class LayerRow:
    """The numbers of one layer in a table.

    Attributes:
        layer: The layer's path.
        neurons: Its number of neurons.
        dead: How many never fired; None if deadness was not measured, or is known of none.
        dormant: How many are tau-dormant; None if not measured or known.
        constant: How many never change; None if not measured or known.
        most: The most important neurons, best first; empty if no importance was measured.
        least: The least important, worst first.
        top_share: The part of the layer's importance that its top 10 % of neurons hold; NaN if not measured.
        effective: The effective number of important neurons; NaN if not measured.
        judged: Of how many neurons each of ``dead``, ``dormant`` and ``constant`` is known: of the others, no finite
            sample fired and samples that were NaN or infinite have been left out.
    """

    layer: str
    neurons: int
    dead: int | None
    dormant: int | None
    constant: int | None
    most: tuple[int, ...]
    least: tuple[int, ...]
    top_share: float
    effective: float
    judged: Mapping[str, int]


def layer_rows(report: NeuronReport, shown: int = 3) -> list[LayerRow]:
    """Return one row per layer that ran, in the model's order, with ``shown`` neurons at each end of the ranking."""
    scores = report.importance() if report.scores else {}
    rows = []
    for name, counts in report.counts.items():
        importance = scores.get(name, torch.empty(0))
        ranked = _ranked(report, importance, name) if name in scores else []
        is_known = not importance.isnan().all()
        measured = {"dead": report.deadness.get(name)}
        measured |= {measure: report.deadness_by.get(measure, {}).get(name) for measure in ("dormant", "constant")}
        judged = {measure: 0 if d is None else int((~d.isnan()).sum()) for measure, d in measured.items()}
        counts_of = {m: int((d == 1).sum()) if d is not None and judged[m] else None for m, d in measured.items()}
        rows.append(
            LayerRow(
                layer=name,
                neurons=len(counts.samples),
                **counts_of,
                judged=judged,
                most=tuple(ranked[:shown]),
                least=tuple(ranked[::-1][:shown]),
                top_share=share_of_top(importance, TOP_SHARE) if is_known else math.nan,
                effective=effective_number(importance) if is_known else math.nan,
            )
        )
    return rows


def _ranked(report: NeuronReport, scores: Tensor, layer: str) -> list[int]:
    """Return the neurons of a layer that were measured, most important first."""
    places = best_first(scores, dead_in({(layer,): scores}, report.deadness))
    return places[~scores[places].isnan()].tolist()


def counted(rows: Sequence[LayerRow], measure: str) -> int | None:
    """Count the neurons of some layers that are dead (or what ``measure`` names).

    Returns:
        The sum over the layers of which it is known; None if that is none.
    """
    counts = [count for row in rows if (count := getattr(row, measure)) is not None]
    return sum(counts) if counts else None


def known_share(rows: Sequence[LayerRow], measure: str) -> float:
    """Return the count as a share of the neurons of which it is known; NaN if there are none."""
    return share(counted(rows, measure) or 0, sum(row.judged[measure] for row in rows))


def effective_share(rows: Sequence[LayerRow]) -> float:
    """Return the effective number of important neurons as a share of all, over layers of which it is known."""
    rated = [row for row in rows if not math.isnan(row.effective)]
    return sum(row.effective for row in rated) / sum(row.neurons for row in rated) if rated else math.nan


def in_words(rows: Sequence[LayerRow], measure: str) -> str:
    """Format the count for a table.

    Returns:
        The count, with how many are unknown if some are; ``"-"`` if it is known of no layer.
    """
    count = counted(rows, measure)
    if count is None:
        return "-"
    unknown = sum(row.neurons - row.judged[measure] for row in rows)
    return f"{count:,} ({unknown:,} unknown)" if unknown else f"{count:,}"


def what_is_ranked(report: NeuronReport) -> str:
    """Describe the layers that a ranking over all layers leaves out, and neurons that are one entry.

    Returns:
        A phrase without a full stop; empty if there is nothing to say.
    """
    outputs = [layer.name for layer in report.layers if layer.output and layer.name in report.counts]
    words = (
        [f"the model's outputs ({', '.join(outputs)}) are left out"] if 0 < len(outputs) < len(report.counts) else []
    )
    if any(layer.twins for layer in report.layers):
        words.append("neurons that are summed into one residual stream are one entry, with the mean of their scores")
    return "; ".join(words)


def share(part: int, whole: int) -> float:
    """Return ``part / whole``; NaN if ``whole`` is 0."""
    return part / whole if whole else math.nan
