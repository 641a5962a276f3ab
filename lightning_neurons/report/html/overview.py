"""The first sections: key numbers, the table of layers, both ends of the ranking, and deadness."""

import math
from pathlib import Path

import torch

from lightning_neurons.report.console.tables import remarks
from lightning_neurons.report.figures.measurements import SELDOM
from lightning_neurons.report.html.parts import Cell, Column, Part, Section, Side, Table, Tile, Tiles, Words
from lightning_neurons.report.html.run_figures import layer_comparisons, threshold_figure
from lightning_neurons.report.html.run_folder import RunFolder
from lightning_neurons.report.html.wording import many, percent, real, whole
from lightning_neurons.report.numbers import (
    THRESHOLDS,
    LayerRow,
    counted,
    in_words,
    known_share,
    layer_rows,
    share,
    what_is_ranked,
)
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport

_SHOWN = 20


def overview(run: RunFolder) -> Section:
    """Return the section of key numbers and notes."""
    lines = list(remarks(run.report))
    if run.notes:
        lines.append(f"{many(len(run.notes), 'file or image', 'files or images')} could not be shown: see the notes")
    return Section("overview", "Overview", "", (_tiles(run), Words(tuple(lines))))


def _tiles(run: RunFolder) -> Tiles:
    report, rows = run.report, layer_rows(run.report)
    neurons = sum(row.neurons for row in rows)
    tiles = [Tile("neurons", whole(neurons), f"in {many(len(rows), 'layer')}")]
    for label, meaning in (("dead", "never fired"), ("dormant", "hardly active")):
        if (count := counted(rows, label)) is not None:
            of = f"{percent(known_share(rows, label))}, {meaning}"
            tiles.append(Tile(label, whole(count), of, alarming=label == "dead" and count > 0))
    tiles += _changes(run.history)
    if report.epoch is not None:
        tiles.append(Tile("epoch", whole(report.epoch), "" if report.step is None else many(report.step, "step")))
    samples = max((int(c.samples.max()) for c in report.counts.values() if len(c.samples)), default=0)
    return Tiles((*tiles, Tile("samples", whole(samples), "measured on")))


def _changes(history: NeuronHistory | None) -> list[Tile]:
    if history is None or len(history) < 2:
        return []
    last = history.entries[-1]
    died, revived = (sum(map(len, by_layer.values())) for by_layer in (last.died, last.revived))
    tiles = [Tile("died, revived", f"{died}, {revived}", "since the last time")]
    if not math.isnan(last.mean_stability):
        tiles.append(Tile("rank stability", f"{last.mean_stability:.2f}", "Spearman, with the last time"))
    return tiles


_JUDGED = ("dead", "dormant", "constant")
_COLUMNS = (
    Column("layer"),
    Column("neurons", numeric=True),
    Column("dead", numeric=True, meaning="never fired on any sample; the bar is their share of the layer"),
    Column("dormant", numeric=True, meaning="activity far below the layer's mean (tau-dormant)"),
    Column("constant", numeric=True, meaning="the value never changes"),
    Column("most important"),
    Column("least important"),
    Column("top 10 % hold", numeric=True, meaning="part of the layer's importance in a tenth of its neurons"),
    Column("effective", numeric=True, meaning="effective number of important neurons: exp(entropy of importance)"),
)


def layers(report: NeuronReport) -> Section:
    """Return the section with one row for each layer, in the order of the model."""
    rows = layer_rows(report)
    total = [_count(sum(row.neurons for row in rows)), *(_judged(rows, name) for name in _JUDGED)]
    table = Table(
        caption=f"{many(len(rows), 'layer')} in the order of the model",
        columns=_COLUMNS,
        rows=tuple(_cells(row, place) for place, row in enumerate(rows)),
        total=(Cell("all layers"), *total, *(Cell("") for _ in range(4))),
        filter_words="Filter layers",
    )
    by = f" Importance is judged by {report.main_criterion}." if report.scores else ""
    return Section("layers", "Layers", f"Each name leads to the page of its layer.{by}", (table,) if rows else ())


def _cells(row: LayerRow, place: int) -> tuple[Cell, ...]:
    ends = (Cell(" ".join(map(str, neurons)) or "-") for neurons in (row.most, row.least))
    return (
        Cell(row.layer, link=f"layer-{place}"),
        _count(row.neurons),
        *(_judged([row], name) for name in _JUDGED),
        *ends,
        Cell(percent(row.top_share), _known(row.top_share)),
        Cell(real(row.effective), _known(row.effective)),
    )


def rankings(report: NeuronReport) -> Section:
    """Return the section of the neurons that matter most and least, over all layers."""
    if not report.scores:
        return Section("rankings", "Rankings", "", ())
    ranking = report.ranking()
    least = [n for n in reversed(ranking) if not math.isnan(n.score)]
    place = {layer: f"layer-{i}" for i, layer in enumerate(report.counts)}
    columns = (
        Column("place", numeric=True), Column("layer"), Column("neuron", numeric=True), Column("score", numeric=True)
    )  # fmt: skip
    tables = tuple(
        Table(
            caption=f"{words} important",
            columns=columns,
            rows=tuple(
                (_count(i), Cell(n.where, link=place[n.layer]), _count(n.neuron), Cell(real(n.score), _known(n.score)))
                for i, n in enumerate(chosen[:_SHOWN], 1)
            ),
        )
        for words, chosen in (("Most", ranking), ("Least", least))
    )
    about = what_is_ranked(report)
    lead = f"Neurons of all layers together, by {report.main_criterion}; {_SHOWN} from each end" + f"; {about}" * bool(
        about
    )
    return Section("rankings", "Rankings", f"{lead}.", (Side(tables),) if ranking else ())


def title_of(directory: Path) -> str:
    """Return the title of the page."""
    return f"Neurons of {directory.resolve().name or directory}"


def _count(value: int | None) -> Cell:
    return Cell(whole(value), value)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _judged(rows: list[LayerRow], name: str) -> Cell:
    count = counted(rows, name)
    bar = known_share(rows, name) if name == "dead" and len(rows) == 1 and count else None
    return Cell(in_words(rows, name), count, share=bar)


def deadness(run: RunFolder, *, drawing: bool) -> Section:
    """Return the section: dead neurons at other thresholds, and layers compared."""
    parts: list[Part] = []
    if any(len(silent) for silent in run.report.deadness_by.get("near_zero", {}).values()):
        figures = (threshold_figure(run.report),) if drawing else ()
        parts.append(Side((*figures, _thresholds(run.report))))
    compared = layer_comparisons(run.report, run.history) if drawing else []
    parts += [Side(tuple(compared))] if compared else []
    return Section("deadness", "Deadness and sensitivity", "", tuple(parts))


def _thresholds(report: NeuronReport) -> Table:
    columns = (
        Column("threshold", True, "magnitudes up to it count as silent, in units of each layer's root mean square"),
        Column("dead", numeric=True),
        Column("share", numeric=True),
        Column("silent in 99 %", True, f"neurons of which {SELDOM:.0%} of values or more are silent"),
    )
    rows = []
    for threshold in THRESHOLDS:
        silent = torch.cat(list(report.deadness_at(threshold).values()))
        dead, seldom = int((silent == 1).sum()), int((silent >= SELDOM).sum())
        part = share(dead, int((~silent.isnan()).sum()))
        rows.append((
            Cell(f"{threshold:g}", threshold),
            Cell(whole(dead), dead),
            Cell(percent(part), None if math.isnan(part) else part, share=part if part > 0 else None),
            Cell(whole(seldom), seldom),
        ))
    return Table("Dead neurons by threshold", columns, tuple(rows))
