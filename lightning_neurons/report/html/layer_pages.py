"""The pages of single layers, with figures that are described in words."""

from lightning_neurons.metrics.histogram import representatives
from lightning_neurons.report.figures import history as history_figures
from lightning_neurons.report.figures import measurements as figures
from lightning_neurons.report.html.embed import embedded_figure, new_axes
from lightning_neurons.report.html.parts import Facts, LayerPage, LayerPages, Part, Picture, Section, Side
from lightning_neurons.report.html.run_folder import RunFolder
from lightning_neurons.report.html.wording import dead_by_threshold, many, percent, real, whole
from lightning_neurons.report.numbers import LayerRow, layer_rows
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport

_WIDE, _TALL = (4.6, 3.1), (4.6, 4.2)
_NAMED = 3
_BARS = 12


def layer_figures(report: NeuronReport, history: NeuronHistory | None, layer: str) -> list[Picture]:
    """Return all figures that can be drawn of a layer."""
    drawn = []
    if report.counts[layer].histogram.any():
        drawn.append(_magnitudes(report, layer))
        if layer in report.deadness_by.get("near_zero", {}):
            drawn.append(_curve(report, layer))
    if layer in report.deadness and len(report.deadness[layer]):
        drawn.append(_grid(report, layer))
    if report.scores and layer in report.importance():
        drawn.append(_bars(report, layer))
    if history is not None and sum(layer in entry.magnitudes for entry in history.entries) > 1:
        drawn.append(_heat_map(history, layer))
    return drawn


def _magnitudes(report: NeuronReport, layer: str) -> Picture:
    counts = report.counts[layer].histogram.sum(0)
    below = counts.cumsum(0) / counts.sum()
    median, high = (float(representatives()[int((below < share).sum())]) for share in (0.5, 0.95))
    alt = (
        f"Histogram of the magnitudes of activations of {layer}: {percent(float(below[0]))} are zero, half are at most "
        f"{real(median)}, 95 % at most {real(high)}."
    )
    axes = figures.activation_histogram(report, layer, axes=new_axes(*_WIDE))
    return embedded_figure(axes.figure, alt, "Magnitudes of activations")


def _grid(report: NeuronReport, layer: str) -> Picture:
    deadness = report.deadness[layer]
    alt = (
        f"One square for each of {many(len(deadness), 'neuron')} of {layer}, coloured by the share of values that are "
        f"silent: {int((deadness == 1).sum())} never fired; on average {percent(float(deadness.nanmean()))} are silent."
    )
    axes = figures.deadness_grid(report, layer, axes=new_axes(*_TALL))
    return embedded_figure(axes.figure, alt, "Deadness of each neuron")


def _curve(report: NeuronReport, layer: str) -> Picture:
    alt = f"Dead neurons of {layer} by threshold {dead_by_threshold(report, layer)}."
    axes = figures.deadness_curve(report, layer, axes=new_axes(*_WIDE))
    return embedded_figure(axes.figure, alt, "Deadness by threshold")


def _bars(report: NeuronReport, layer: str) -> Picture:
    ranking = report.ranking(layer=layer)
    words = ", ".join(f"neuron {n.neuron} with {real(n.score)}" for n in ranking[:_NAMED])
    alt = f"Bars of the most and least important neurons of {layer} by {report.main_criterion}: first {words}."
    axes = figures.importance_bars(report, layer=layer, shown=_BARS, axes=new_axes(*_TALL))
    return embedded_figure(axes.figure, alt, f"Importance by {report.main_criterion}")


def _heat_map(history: NeuronHistory, layer: str) -> Picture:
    zero = [b[0] / max(sum(b), 1) for e in history.entries if (b := e.magnitudes.get(layer))]
    alt = (
        f"Heat map of the magnitudes of {layer} over {len(zero)} measurements: {percent(zero[0])} of values are zero "
        f"in the first, {percent(zero[-1])} in the last."
    )
    axes = history_figures.magnitude_history(history, layer, axes=new_axes(*_WIDE))
    return embedded_figure(axes.figure, alt, "Magnitudes over the run")


def layer_pages(run: RunFolder, *, drawing: bool) -> Section:
    """Return a page for each layer, in the order of the model."""
    pages = tuple(_page(run, row, place, drawing) for place, row in enumerate(layer_rows(run.report)))
    lead = "One page for each layer, in the order of the model."
    return Section("pages", "Layer by layer", lead, (LayerPages(pages),) * bool(pages))


def _page(run: RunFolder, row: LayerRow, place: int, drawing: bool) -> LayerPage:
    counts = [f"{count} {word}" for word in ("dead", "dormant", "constant") if (count := getattr(row, word))]
    parts: list[Part] = [Facts("", _facts(run.report, row))]
    figures = layer_figures(run.report, run.history, row.layer) if drawing else []
    if figures:
        parts.append(Side(tuple(figures)))
    refused = {name: layers[row.layer] for name, layers in run.report.refused.items() if row.layer in layers}
    if refused:
        parts.append(Facts("Criteria that cannot judge this layer", refused))
    return LayerPage(f"layer-{place}", row.layer, ", ".join([many(row.neurons, "neuron"), *counts]), tuple(parts))


def _facts(report: NeuronReport, row: LayerRow) -> dict[str, str]:
    counts, facts = report.counts[row.layer], _place(report, row.layer)
    for name, tensor in (("samples", counts.samples), ("samples with gradients", counts.gradient_samples)):
        if tensor.any():
            facts[name] = whole(int(tensor.max()))
    if counts.rms is not None:
        facts["root mean square"] = real(counts.rms)
    for word in ("dead", "dormant", "constant"):
        if (count := getattr(row, word)) is not None:
            facts[word] = f"{whole(count)} of {whole(row.judged[word])}"
    if row.dead:
        bound = float(report.never_fired_bound(row.layer)[report.dead(row.layer)].max())
        facts["who never fired"] = f"fires in fewer than {percent(min(bound, 1))} of all samples (95 % confidence)"
    if counts.nonfinite.any():
        facts["NaN or infinite"] = f"{whole(int(counts.nonfinite.sum()))} values left out (samples x neurons)"
    return facts


def _place(report: NeuronReport, name: str) -> dict[str, str]:
    """Return facts on the layer's place in the model: its type, downstream layers and layers summed with it."""
    layer = next((layer for layer in report.layers if layer.name == name), None)
    if layer is None:
        return {}
    readers = ", ".join(reader for reader, _ in layer.readers or ())
    facts = {"measured at": layer.activation_point, "type": layer.type, "read by": readers}
    facts |= {"makes the output": "yes" * layer.output, "summed with": ", ".join(layer.twins), "note": layer.note}
    return {word: text for word, text in facts.items() if text}
