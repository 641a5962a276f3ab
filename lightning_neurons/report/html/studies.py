"""Sections on the other results in the folder: ablation, pruning, classes, images."""

import math

from lightning_neurons.report.html.embed import embedded_file
from lightning_neurons.report.html.parts import Card, Cards, Cell, Column, Facts, Part, Section, Side, Table, Words
from lightning_neurons.report.html.run_figures import agreement_figure, pruning_figure
from lightning_neurons.report.html.run_folder import RunFolder
from lightning_neurons.report.html.wording import percent, real, whole
from lightning_neurons.results.ablation_report import AblatedNeuron
from lightning_neurons.results.class_report import ClassAccuracy
from lightning_neurons.results.pruning_history import PruningHistory

_SHOWN = 10


def cards(run: RunFolder) -> Section:
    """Return the section of neurons that stand out, with images that excite them."""
    shown = tuple(
        Card(
            card.name,
            card.why,
            {name: real(value) for name, value in card.numbers.items()},
            embedded_file(card.path, f"What excites {card.name} most ({card.why})"),
        )
        for card in run.cards
    )
    return Section(
        "cards", "Neuron cards", "Neurons that stand out, and what excites them.", (Cards(shown),) * bool(shown)
    )


def gallery(run: RunFolder) -> Section:
    """Return the section of images that were saved with the run."""
    images = tuple(embedded_file(p.path, p.caption or p.title or p.path.name, p.title, p.caption) for p in run.gallery)
    return Section("pictures", "Images", "", (Side(images),) * bool(images))


def ablation(run: RunFolder, *, drawing: bool) -> Section:
    """Return the section on ablation: the change of the loss without neurons, and the main criterion against it."""
    title, report = "Agreement with ablation", run.ablation
    if report is None:
        return Section("ablation", title, "", ())
    ranking = report.ranking()
    facts = {"loss with all neurons": real(report.loss), "samples": whole(report.samples)}
    facts |= {
        "neurons measured": whole(len(ranking)),
        **{name: real(value) for name, value in report.metrics.items()},
    }
    figure = agreement_figure(run.report, report) if drawing and run.report.scores else None
    measured = Facts("What was measured", facts)
    ends = {"Hurts most to lose": ranking[:_SHOWN], "Hurts least to lose": ranking[::-1][:_SHOWN]}
    tables = tuple(_ablated(caption, rows) for caption, rows in ends.items() if rows)
    parts: list[Part] = [Side((figure, measured)) if figure else measured]
    parts += [Side(tables)] if tables else []
    parts += [Words(report.notes)] if report.notes else []
    lead = "The loss with a neuron switched off, minus the loss with all of them."
    return Section("ablation", title, lead, tuple(parts))


def _ablated(caption: str, rows: list[AblatedNeuron]) -> Table:
    columns = (
        Column("layer"), Column("neuron", numeric=True), Column("change", numeric=True),
        Column("standard error", numeric=True),
    )  # fmt: skip
    cells = tuple(
        (
            Cell(row.layer),
            Cell(str(row.neuron), row.neuron),
            Cell(f"{row.delta_loss:+.3g}", row.delta_loss),
            _number(row.standard_error),
        )
        for row in rows
    )
    return Table(caption, columns, cells)


def pruning(run: RunFolder, *, drawing: bool) -> Section:
    """Return the section on pruning: the cuts, and the metric and sizes after them."""
    title, history = "Pruning", run.pruning
    if history is None or not history.points:
        return Section("pruning", title, "", ())
    changed = {n: w for n, w in history.widths.items() if history.widths_after.get(n, w) != w}
    left = Facts("What is left", _left(history))
    parts: list[Part] = [Side((pruning_figure(history), left)) if drawing else left]
    parts += [_cuts(history)] + ([_widths(history, changed)] if changed else [])
    return Section("pruning", title, "", tuple(parts))


def _left(history: PruningHistory) -> dict[str, str]:
    standing = [point for point in history.points if not point.taken_back]
    back = len(history.points) - len(standing)
    facts = {"cuts": f"{len(history.points)}{f', {back} taken back' * bool(back)}"}
    facts["neurons removed"] = whole(sum(point.removed for point in standing))
    last = standing[-1] if standing else None
    for name, before, after in (
        ("parameters", history.parameters, last.parameters if last else history.parameters),
        ("multiply-accumulate operations", history.macs, last.macs if last else history.macs),
    ):
        facts[name] = f"{whole(after)} of {whole(before)}, {percent(after / max(before, 1))}"
    return facts


def _cuts(history: PruningHistory) -> Table:
    columns = [Column("cut", numeric=True), Column("epoch", numeric=True), Column("removed", numeric=True)]
    columns += [Column("parameters left", numeric=True), Column("operations left", numeric=True)]
    if history.monitor is not None:
        said = history.monitor
        columns += [
            Column("before", True, f"{said} at the validation before the cut"),
            Column("cut at once", True, f"{said} right after it, on kept samples"),
            Column("after", True, f"{said} at the next validation"),
        ]
    rows = []
    for place, point in enumerate(history.points, 1):
        macs, parameters = point.macs / max(history.macs, 1), point.parameters / max(history.parameters, 1)
        metrics = (point.before, point.cut, point.after) if history.monitor is not None else ()
        rows.append((
            Cell(f"{place} (taken back)" if point.taken_back else str(place), place),
            Cell(whole(point.epoch), point.epoch),
            Cell(whole(point.removed), point.removed),
            Cell(percent(parameters), parameters, share=min(parameters, 1)),
            Cell(percent(macs), macs, share=min(macs, 1)),
            *(_number(math.nan if metric is None else metric) for metric in metrics),
        ))
    return Table("Cuts, oldest first", tuple(columns), tuple(rows))


def _widths(history: PruningHistory, changed: dict[str, int]) -> Table:
    columns = (Column("layer"), *(Column(name, numeric=True) for name in ("before", "after", "left")))
    rows = []
    for layer, before in changed.items():
        after = history.widths_after[layer]
        left = after / max(before, 1)
        rows.append((
            Cell(layer),
            Cell(whole(before), before),
            Cell(whole(after), after),
            Cell(percent(left), left, share=left),
        ))
    return Table("Neurons of the layers that have changed", columns, tuple(rows))


_MODELS = {
    "whole": "whole network",
    "subnetwork": "only its neurons",
    "other subnetworks": "only the others' neurons",
    "random subnetwork": "only random neurons",
    "ablation": "without its neurons",
    "random ablation": "without random neurons",
}


def classes(run: RunFolder) -> Section:
    """Return the section on classes: accuracy of each class's neurons alone, and of the network without them."""
    title = "Classes"
    if not run.classes:
        return Section("classes", title, "", ())
    by_class: dict[int, dict[str, ClassAccuracy]] = {}
    for row in run.classes:
        by_class.setdefault(row.klass, {})[row.model] = row
    kinds = [kind for kind in _MODELS if any(kind in by_model for by_model in by_class.values())]
    columns = (Column("class", numeric=True), *(Column(_MODELS[kind], numeric=True) for kind in kinds))
    rows = tuple(
        (Cell(str(klass), klass), *(_accuracy(by_model.get(kind)) for kind in kinds))
        for klass, by_model in by_class.items()
    )
    lead = "Accuracy on the samples of the class, and on all others, of networks of some neurons or without some."
    return Section("classes", title, lead, (Table("On its own samples / on the others", columns, rows),))


def _accuracy(row: ClassAccuracy | None) -> Cell:
    if row is None:
        return Cell("-")
    return Cell(
        f"{percent(row.on_class)} / {percent(row.on_others)}", None if math.isnan(row.on_class) else row.on_class
    )


def _number(value: float) -> Cell:
    return Cell(real(value), None if math.isnan(value) else value)
