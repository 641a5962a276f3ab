"""A report in the Trainer's loggers: scalars in each of them, histograms and a page of text where they can be shown.

The series are listed in ``tags.py``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_neurons.metrics.histogram import BINS, INNER_BINS, LOWEST, PARTS, representatives
from lightning_neurons.report.numbers import LayerRow, layer_rows, share
from lightning_neurons.report.page import markdown
from lightning_neurons.report.tags import with_suffix
from lightning_neurons.results.history import HistoryEntry
from lightning_neurons.results.neuron_report import NeuronReport


def write_loggers(
    loggers: Sequence[Any], report: NeuronReport, entry: HistoryEntry, step: int, suffix: str = ""
) -> None:
    """Write a report to every logger.

    Args:
        loggers: Lightning loggers.
        report: The measurement.
        entry: Its comparison with the measurement before.
        step: The step to log at.
        suffix: What the groups of the series end with, such as ``"_2"``.
    """
    values = {with_suffix(name, suffix): value for name, value in scalars(report, entry).items()}
    for logger in loggers:
        logger.log_metrics(values, step=step)
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            _histograms(experiment, report, step, suffix)
        if hasattr(experiment, "add_text"):
            experiment.add_text(with_suffix("neurons/ranking", suffix), markdown(report, entry), step)


def scalars(report: NeuronReport, entry: HistoryEntry) -> dict[str, float]:
    """All scalar series; those that have no value yet (NaN) are left out."""
    rows = layer_rows(report)
    found = {
        "neurons/dead_share": _share(rows, "dead"),
        "neurons/dormant_share": _share(rows, "dormant"),
        "neurons/constant_share": _share(rows, "constant"),
        "neurons/effective_share": sum(r.effective for r in rows) / max(sum(r.neurons for r in rows), 1),
        "neurons/rank_stability": entry.mean_stability,
        "neurons/died": float(sum(map(len, entry.died.values()))),
        "neurons/revived": float(sum(map(len, entry.revived.values()))),
        "neurons/nonfinite": float(sum(int(c.nonfinite.sum()) for c in report.counts.values())),
    }
    for row in rows:
        found[f"neurons/dead_share/{row.layer}"] = _share([row], "dead")
        found[f"neurons/dormant_share/{row.layer}"] = _share([row], "dormant")
        found[f"neurons/effective/{row.layer}"] = row.effective
        found[f"neurons/rank_stability/{row.layer}"] = entry.stability.get(row.layer, math.nan)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _share(rows: Sequence[LayerRow], name: str) -> float:
    known = [row for row in rows if getattr(row, name) is not None]
    return share(sum(getattr(row, name) for row in known), sum(row.neurons for row in known))


def _histograms(experiment: Any, report: NeuronReport, step: int, suffix: str) -> None:
    for group, by_criterion in (("scores", report.scores), ("deadness", report.deadness_by)):
        for criterion, by_layer in by_criterion.items():
            for layer, values in by_layer.items():
                finite = values[values.isfinite()]
                if len(finite):
                    experiment.add_histogram(f"{group}{suffix}/{criterion}/{layer}", finite, step)
    if hasattr(experiment, "add_histogram_raw"):
        for layer, counts in report.counts.items():
            if counts.histogram.sum() > 0:
                experiment.add_histogram_raw(
                    f"magnitudes{suffix}/{layer}", **log_magnitudes(counts.histogram), global_step=step
                )


def log_magnitudes(histogram: torch.Tensor, parts: int = 4) -> dict[str, Any]:
    """A layer's histogram of log10 magnitudes, ``parts`` bars to a power of two, as TensorBoard takes it.

    Args:
        histogram: Counts of ``(neuron, bin)``.
        parts: How fine the picture is. Zeros are drawn in the lowest bar.
    """
    counts = histogram.sum(0)
    middle = representatives()
    middle[0], middle[-1] = LOWEST, middle[-2]
    width = PARTS // parts
    bars = torch.cat([counts[1:-1].view(INNER_BINS // width, width).sum(1), counts[-1:]])
    bars[0] += counts[0]
    power = math.log2(LOWEST) + torch.arange(len(bars), dtype=torch.float64) // parts
    upper = power.exp2() * (1 + (torch.arange(len(bars)) % parts + 1) / parts)
    used = bars.nonzero().flatten()
    first, last = int(used[0]), int(used[-1])
    logs = middle.log10()
    return {
        "min": float(logs[counts.nonzero()[0]].item()),
        "max": float(logs[counts.nonzero()[-1]].item()),
        "num": int(counts.sum()),
        "sum": float((logs * counts).sum()),
        "sum_squares": float((logs.square() * counts).sum()),
        "bucket_limits": upper.log10()[first : last + 1].tolist(),
        "bucket_counts": bars[first : last + 1].tolist(),
    }


assert BINS == INNER_BINS + 2, "log_magnitudes folds one outer bin on each side"
