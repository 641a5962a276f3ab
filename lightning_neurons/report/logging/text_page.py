"""Page of text in TensorBoard: the table, the ranking over all layers, and deadness by threshold."""

import math
from collections.abc import Iterable, Sequence

from lightning_neurons.report.console.tables import remarks
from lightning_neurons.report.numbers import THRESHOLDS, in_words, layer_rows, share, what_is_ranked
from lightning_neurons.results.history import HistoryEntry
from lightning_neurons.results.neuron_report import NeuronReport

_SHOWN = 20


def markdown(report: NeuronReport, entry: HistoryEntry) -> str:
    """Return the page as Markdown."""
    parts = [_layers(report), _changes(report, entry)]
    if report.scores:
        parts.append(_ranking(report))
    if "near_zero" in report.deadness_by:
        parts.append(_thresholds(report))
    parts.append("\n".join(f"- {line}" for line in remarks(report)))
    return "\n\n".join(part for part in parts if part)


def _layers(report: NeuronReport) -> str:
    heading = ("layer", "neurons", "dead", "dormant", "most important", "least important", "top 10 % hold")
    rows = [
        (
            f"`{row.layer}`",
            row.neurons,
            in_words([row], "dead"),
            in_words([row], "dormant"),
            " ".join(map(str, row.most)),
            " ".join(map(str, row.least)),
            _real(row.top_share, "{:.0%}"),
        )
        for row in layer_rows(report)
    ]
    return "### Layers\n\n" + table(heading, rows)


def _changes(report: NeuronReport, entry: HistoryEntry) -> str:
    heading = ("layer", "died", "revived", "constant", "effective neurons", "rank stability")
    rows = [
        (
            f"`{row.layer}`",
            len(entry.died.get(row.layer, [])),
            len(entry.revived.get(row.layer, [])),
            in_words([row], "constant"),
            _real(row.effective, "{:.1f}"),
            _real(entry.stability.get(row.layer, math.nan), "{:.2f}"),
        )
        for row in layer_rows(report)
    ]
    return "### Since the measurement before\n\n" + table(heading, rows)


def _ranking(report: NeuronReport) -> str:
    ranking = [neuron for neuron in report.ranking() if not math.isnan(neuron.score)]
    ends = {"most": ranking[:_SHOWN], "least": ranking[::-1][:_SHOWN]}
    rows = [
        (
            place + 1,
            *(
                cell
                for name, score in ((f"`{n.where}` {n.neuron}", f"{n.score:.3g}") for n in pair)
                for cell in (name, score)
            ),
        )
        for place, pair in enumerate(zip(*ends.values(), strict=True))
    ]
    listed = table(("", "most important", "score", "least important", "score"), rows)
    about = what_is_ranked(report)
    return f"### Ranking of all neurons by {report.main_criterion}\n\n{listed}" + f"\n\n({about})" * bool(about)


def _thresholds(report: NeuronReport) -> str:
    rows = []
    for threshold in THRESHOLDS:
        deadness = report.deadness_at(threshold)
        judged = sum(int((~d.isnan()).sum()) for d in deadness.values())
        dead = sum(int((d == 1).sum()) for d in deadness.values())
        seldom = sum(int((d >= 0.99).sum()) for d in deadness.values())
        rows.append((threshold, dead, _real(share(dead, judged), "{:.1%}"), seldom))
    return "### Deadness by threshold (in units of each layer's root mean square)\n\n" + table(
        ("threshold", "dead neurons", "share", "silent in 99 % of values or more"), rows
    )


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _real(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)
