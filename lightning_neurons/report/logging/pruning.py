"""Output of pruning: series for loggers, and the tables at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_neurons.pruning.rounds import PruningRound, Rounds
from lightning_neurons.pruning.selection.budget_fill import Dense
from lightning_neurons.results.pruning_history import PruningHistory, PruningPoint


def pruning_history(rounds: Rounds, monitor: str | None) -> PruningHistory | None:
    """Return the cuts so far as plain values; None before the model's structure is known."""
    dense = rounds.dense
    if dense is None:
        return None
    points, parameters, macs = [], dense.parameters, dense.macs
    for made in sorted((*rounds.done, *rounds.undone), key=lambda cut: cut.step):
        if (cost := made.plan.cost) is not None:
            parameters, macs = cost.parameters_after, cost.macs_after
        taken_back = any(made is cut for cut in rounds.undone)
        metrics = {"before": made.before, "cut": made.cut, "after": made.after}
        points.append(PruningPoint(made.epoch, len(made.plan), parameters, macs, **metrics, taken_back=taken_back))
    return PruningHistory(dense.parameters, dense.macs, dict(dense.widths), rounds.widths(), monitor, tuple(points))


def start_scalars(dense: Dense) -> dict[str, float]:
    """Return the series of a model before any cut."""
    return _sizes(dense.parameters, dense.macs, dense.widths)


def round_scalars(made: PruningRound, widths: Mapping[str, int]) -> dict[str, float]:
    """Return the series of one cut; what was not measured is left out.

    Args:
        made: The cut.
        widths: Neurons by layer after it.

    Returns:
        Values by name of the series.
    """
    series: dict[str, float | None] = {"pruning/removed": float(len(made.plan))}
    if made.plan.cost is not None:
        series |= _sizes(made.plan.cost.parameters_after, made.plan.cost.macs_after, widths)
    series["pruning/latency_ms"] = None if made.latency is None else 1000 * made.latency
    series |= {"pruning/metric_before": made.before, "pruning/metric_cut": made.cut, "pruning/metric_after": made.after}
    return {name: value for name, value in series.items() if value is not None}


def taken_back_scalars(rounds: Rounds) -> dict[str, float]:
    """Return the series of a model in which an earlier state was restored."""
    cost, widths = rounds.plan.cost, rounds.widths()
    dense = rounds.dense
    assert dense is not None, "a round has been made"
    parameters, macs = (dense.parameters, dense.macs) if cost is None else (cost.parameters_after, cost.macs_after)
    return {"pruning/taken_back": float(len(rounds.undone)), **_sizes(parameters, macs, widths)}


def write_scalars(loggers: Sequence[Any], values: Mapping[str, float], step: int) -> None:
    """Write series to every logger."""
    for logger in loggers:
        logger.log_metrics(dict(values), step=step)


def _sizes(parameters: int, macs: int, widths: Mapping[str, int]) -> dict[str, float]:
    by_layer = {f"pruning/neurons/{layer}": float(width) for layer, width in widths.items()}
    return {"pruning/parameters": float(parameters), "pruning/macs": float(macs), **by_layer}


def print_rounds(
    done: Sequence[PruningRound],
    dense: Dense,
    widths: Mapping[str, int],
    monitor: str | None = None,
    console: Console | None = None,
    *,
    undone: Sequence[PruningRound] = (),
) -> None:
    """Print every round, the widths of layers that have changed, and the layers that were not cut."""
    console = console or Console()
    console.print(rounds_table(done, dense, monitor, undone))
    console.print(widths_table(dense.widths, widths))
    for note in dict.fromkeys(note for made in done for note in made.plan.notes):
        console.print(note, highlight=False, markup=False)


def rounds_table(
    done: Sequence[PruningRound], dense: Dense, monitor: str | None, undone: Sequence[PruningRound] = ()
) -> Table:
    """Return one line per round, also for those that were undone."""
    table = Table(title="Pruning", caption=_caption(monitor))
    for heading in ("epoch", "removed", "params", "MACs", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    if monitor is not None:
        for heading in ("before", "cut", "after"):
            table.add_column(heading, justify="right")
    for made in sorted((*done, *undone), key=lambda cut: cut.step):
        taken_back = any(made is cut for cut in undone)
        cost = made.plan.cost
        sizes = ["", ""]
        if cost is not None:
            left = cost.parameters_after / max(dense.parameters, 1), cost.macs_after / max(dense.macs, 1)
            sizes = [f"{share:.1%}" for share in left]
        times = [made.latency_before, made.latency]
        latency = " > ".join(f"{1000 * t:.2g}" for t in times if t is not None)
        metrics = [made.before, made.cut, made.after] if monitor is not None else []
        cells = ["" if value is None else f"{value:.4g}" for value in metrics]
        table.add_row(f"{made.epoch}{' (taken back)' * taken_back}", str(len(made.plan)), *sizes, latency, *cells)
    return table


def widths_table(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Return one line per layer that has become narrower."""
    table = Table(title="Neurons")
    table.add_column("layer", overflow="fold")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for layer, width in before.items():
        if after.get(layer, width) != width:
            table.add_row(escape(layer), str(width), str(after[layer]))
    return table


def _caption(monitor: str | None) -> str:
    text = "parameters and MACs left; ms of a forward before > after the cut"
    if monitor is None:
        return text
    return f"{text}; {escape(monitor)} before the cut, right after it (on kept samples), and at the next validation"
