"""Output of a report to the Trainer's loggers: scalars to all, histograms and a page of text where they can be shown.

The series are listed in ``tags.py``. Each is written by itself: what a logger refuses does not keep it from the others.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from lightning_neurons.metrics.histogram import BINS, INNER_BINS, LOWEST, PARTS, representatives
from lightning_neurons.report.logging.tags import with_suffix
from lightning_neurons.report.logging.text_page import markdown
from lightning_neurons.report.numbers import effective_share, known_share, layer_rows
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
        suffix: The suffix of the series' groups, such as ``"_2"``.

    Raises:
        ExceptionGroup: If something could not be written, after all the rest has been.
    """
    values = {with_suffix(name, suffix): value for name, value in scalars(report, entry).items()}
    failures: list[Exception] = []
    for logger in loggers:
        for write in _writes(logger, values, report, entry, step, suffix):
            try:
                write()
            except Exception as error:  # noqa: BLE001 (loggers are other people's code)
                failures.append(error)
    if failures:
        first = f"{type(failures[0]).__name__}: {failures[0]}"
        raise ExceptionGroup(f"{len(failures)} could not be written, the first of them because of {first}", failures)


def _writes(
    logger: Any, values: dict[str, float], report: NeuronReport, entry: HistoryEntry, step: int, suffix: str
) -> Iterator[Callable[[], Any]]:
    """Yield the calls that write a report to one logger."""
    yield lambda: logger.log_metrics(values, step=step)
    experiment: Any = None

    def connect() -> None:
        nonlocal experiment
        experiment = getattr(logger, "experiment", None)

    yield connect
    if hasattr(experiment, "add_histogram"):
        yield from _histograms(experiment, report, step, suffix)
    if hasattr(experiment, "add_text"):
        yield lambda: experiment.add_text(with_suffix("neurons/ranking", suffix), markdown(report, entry), step)


def scalars(report: NeuronReport, entry: HistoryEntry) -> dict[str, float]:
    """Return all scalar series; those that have no value yet (NaN) are left out."""
    rows = layer_rows(report)
    series = {
        "neurons/dead_share": known_share(rows, "dead"),
        "neurons/dormant_share": known_share(rows, "dormant"),
        "neurons/constant_share": known_share(rows, "constant"),
        "neurons/effective_share": effective_share(rows),
        "neurons/rank_stability": entry.mean_stability,
        "neurons/died": float(sum(map(len, entry.died.values()))),
        "neurons/revived": float(sum(map(len, entry.revived.values()))),
        "neurons/nonfinite": float(sum(int(c.nonfinite.sum()) for c in report.counts.values())),
    }
    for row in rows:
        series[f"neurons/dead_share/{row.layer}"] = known_share([row], "dead")
        series[f"neurons/dormant_share/{row.layer}"] = known_share([row], "dormant")
        series[f"neurons/effective/{row.layer}"] = row.effective
        series[f"neurons/rank_stability/{row.layer}"] = entry.stability.get(row.layer, math.nan)
    return {name: value for name, value in series.items() if not math.isnan(value)}


def _histograms(experiment: Any, report: NeuronReport, step: int, suffix: str) -> Iterator[Callable[[], Any]]:
    has_bins = hasattr(experiment, "add_histogram_raw")
    for group, by_criterion in (("scores", report.scores), ("deadness", report.deadness_by)):
        for criterion, by_layer in by_criterion.items():
            for layer, values in by_layer.items():
                tag, finite = f"{group}{suffix}/{criterion}/{layer}", values[values.isfinite()]
                if len(finite) and has_bins:
                    yield partial(_with_bins, experiment, tag, spread, finite, step)
                elif len(finite):
                    yield partial(experiment.add_histogram, tag, finite, step)
    for layer, counts in report.counts.items():
        if has_bins and counts.histogram.any():
            yield partial(_with_bins, experiment, f"magnitudes{suffix}/{layer}", log_magnitudes, counts.histogram, step)


def _with_bins(
    experiment: Any, tag: str, bins: Callable[[torch.Tensor], dict[str, Any]], values: torch.Tensor, step: int
) -> None:
    experiment.add_histogram_raw(tag, **bins(values), global_step=step)


BUCKETS = 60
"""The most buckets that scores of one sign are spread over."""


def spread(values: torch.Tensor) -> dict[str, Any]:
    """Return the histogram of numbers of any size and sign, as TensorBoard takes it.

    TensorBoard's own bins begin at 1e-12. These grow by a tenth from the smallest magnitude to the largest, or by more
    where that would make more than ``BUCKETS`` of them; zeros have a bucket of their own.

    Args:
        values: Finite numbers; at least one.

    Returns:
        Arguments of ``SummaryWriter.add_histogram_raw``.
    """
    values = values.double().flatten().cpu()
    parts = [
        -_edges(-values[values < 0]).flip(0),
        values.new_zeros(int((values == 0).any())),
        _edges(values[values > 0]),
    ]
    limits = torch.cat(parts)
    # A bucket holds what is above the limit before its own and not above its own.
    counts = torch.bincount(torch.searchsorted(limits, values), minlength=len(limits))
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "num": len(values),
        "sum": float(values.sum()),
        "sum_squares": float(values.square().sum().clamp_max(torch.finfo(values.dtype).max)),
        "bucket_limits": limits.tolist(),
        "bucket_counts": counts.tolist(),
    }


def _edges(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return limits of buckets that grow by a factor, from the smallest magnitude to the largest."""
    if not len(magnitudes):
        return magnitudes
    low, high = magnitudes.min(), magnitudes.max()
    powers = (high.log2() - low.log2()).item()
    steps = min(math.ceil(powers / math.log2(1.1)), BUCKETS - 1)
    limits = (low.log2() + torch.linspace(0, powers, steps + 1, dtype=torch.float64)).exp2() if steps else low[None]
    limits[0], limits[-1] = low, high  # exactly, so that nothing falls outside
    return limits


def log_magnitudes(histogram: torch.Tensor, parts: int = 4) -> dict[str, Any]:
    """Return a layer's histogram of log10 magnitudes, ``parts`` bars to a power of two, as TensorBoard takes it.

    Args:
        histogram: Counts of ``(neuron, bin)``.
        parts: Bars to a power of two. Zeros are drawn in the lowest bar.

    Returns:
        Arguments of ``SummaryWriter.add_histogram_raw``.
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
