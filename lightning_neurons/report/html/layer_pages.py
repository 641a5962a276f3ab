"""The pages of single layers."""

from lightning_neurons.report.html.layer_figures import layer_figures
from lightning_neurons.report.html.parts import Facts, LayerPage, LayerPages, Part, Section, Side
from lightning_neurons.report.html.run_folder import RunFolder
from lightning_neurons.report.html.wording import many, percent, real, whole
from lightning_neurons.report.numbers import LayerRow, layer_rows
from lightning_neurons.results.neuron_report import NeuronReport


def layer_pages(run: RunFolder, *, drawing: bool) -> Section:
    """Return a page for each layer, in the order of the model."""
    pages = tuple(_page(run, row, place, drawing) for place, row in enumerate(layer_rows(run.report)))
    lead = "One page for each layer, in the order of the model."
    return Section("pages", "Layer by layer", lead, (LayerPages(pages),) * bool(pages))


def _page(run: RunFolder, row: LayerRow, place: int, drawing: bool) -> LayerPage:
    known = [f"{count} {word}" for word in ("dead", "dormant", "constant") if (count := getattr(row, word))]
    parts: list[Part] = [Facts("", _facts(run.report, row))]
    figures = layer_figures(run.report, run.history, row.layer) if drawing else []
    if figures:
        parts.append(Side(tuple(figures)))
    refused = {name: layers[row.layer] for name, layers in run.report.refused.items() if row.layer in layers}
    if refused:
        parts.append(Facts("Criteria that cannot judge this layer", refused))
    return LayerPage(f"layer-{place}", row.layer, ", ".join([many(row.neurons, "neuron"), *known]), tuple(parts))


def _facts(report: NeuronReport, row: LayerRow) -> dict[str, str]:
    counts, found = report.counts[row.layer], _place(report, row.layer)
    for name, tensor in (("samples", counts.samples), ("samples with gradients", counts.gradient_samples)):
        if tensor.any():
            found[name] = whole(int(tensor.max()))
    if counts.rms is not None:
        found["root mean square"] = real(counts.rms)
    for word in ("dead", "dormant", "constant"):
        if (count := getattr(row, word)) is not None:
            found[word] = f"{whole(count)} of {whole(row.known[word])}"
    if row.dead:
        bound = float(report.never_fired_bound(row.layer)[report.dead(row.layer)].max())
        found["who never fired"] = f"fires in fewer than {percent(min(bound, 1))} of all samples (95 % confidence)"
    if counts.nonfinite.any():
        found["NaN or infinite"] = f"{whole(int(counts.nonfinite.sum()))} values left out (samples x neurons)"
    return found


def _place(report: NeuronReport, name: str) -> dict[str, str]:
    """Return facts on the layer's place in the model: its type, downstream layers and layers summed with it."""
    layer = next((layer for layer in report.layers if layer.name == name), None)
    if layer is None:
        return {}
    readers = ", ".join(reader for reader, _ in layer.readers or ())
    found = {"measured at": layer.activation_point, "type": layer.type, "read by": readers}
    found |= {"makes the output": "yes" * layer.output, "summed with": ", ".join(layer.twins), "note": layer.note}
    return {word: text for word, text in found.items() if text}
