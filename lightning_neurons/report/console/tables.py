"""The table at the end of a run."""

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_neurons.report.numbers import LayerRow, in_words, layer_rows
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport


def print_report(report: NeuronReport, history: NeuronHistory | None = None, console: Console | None = None) -> None:
    """Print one line per layer, what changed since the last measurement, and what the reader should know."""
    console = console or Console()
    console.print(table(report))
    for line in (*changes(history), *remarks(report)):
        console.print(line, highlight=False, markup=False)


def table(report: NeuronReport) -> Table:
    """Return one line per layer: neurons, dead, dormant, the ends of the ranking, and how unequal importance is."""
    when = "" if report.epoch is None else f" after epoch {report.epoch}"
    result = Table(
        title=f"Neurons{when}", caption=f"importance: {escape(report.main_criterion)}" if report.scores else None
    )
    result.add_column("layer", overflow="fold")
    for heading in ("neurons", "dead", "dormant"):
        result.add_column(heading, justify="right")
    result.add_column("most important")
    result.add_column("least important")
    result.add_column("top 10 % hold", justify="right")
    rows = layer_rows(report)
    for row in rows:
        result.add_row(*_cells(row))
    if rows:
        result.add_section()
        sums = [in_words(rows, name) for name in ("dead", "dormant")]
        result.add_row("all layers", str(sum(row.neurons for row in rows)), *sums, "", "", "")
    return result


def changes(history: NeuronHistory | None) -> list[str]:
    """Return a line on the neurons that died or revived since the last measurement; none without one."""
    if history is None or len(history) < 2:
        return []
    last = history.entries[-1]
    died, revived = (sum(map(len, by_layer.values())) for by_layer in (last.died, last.revived))
    always = sum(map(len, history.persistently_dead().values()))
    stable = "" if math.isnan(last.mean_stability) else f"; rank stability {last.mean_stability:.2f} (Spearman)"
    return [
        f"Since the measurement before: {died} died, {revived} revived; dead in all {history.measured} measurements: "
        f"{always}{stable}"
    ]


def remarks(report: NeuronReport) -> list[str]:
    """Return lines on the data behind the numbers, and on layers and values that were not measured."""
    lines = list(report.notes)
    if report.scores and report.main_criterion == "gradient":
        lines.append("gradient does not see deadness (a dead ReLU has one at its output); compare taylor or fisher")
    infinite = {n: int(c.nonfinite.sum()) for n, c in report.counts.items() if c.nonfinite.any()}
    if infinite:
        named = ", ".join(f"{name} ({count})" for name, count in infinite.items())
        lines.append(f"NaN or infinite values were left out, in samples x neurons: {named}")
    silent = [layer.name for layer in report.layers if not layer.calls]
    if silent:
        lines.append(f"did not run as modules and were not measured: {', '.join(silent)}")
    samples = max((int(c.samples.max()) for c in report.counts.values() if len(c.samples)), default=0)
    if report.deadness and samples:
        lines.append(
            f"dead: fired in none of {samples} samples, so in fewer than {min(3 / samples, 1):.2%} of all "
            "(95 % confidence)"
        )
    return lines


def _cells(row: LayerRow) -> list[str]:
    top = "" if math.isnan(row.top_share) else f"{row.top_share:.0%}"
    counts = [str(row.neurons), *(in_words([row], name) for name in ("dead", "dormant"))]
    return [escape(row.layer), *counts, " ".join(map(str, row.most)), " ".join(map(str, row.least)), top]
