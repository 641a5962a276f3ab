"""Writing a report as JSON and reading it back bit by bit: floats in full, NaN as null, histograms compressed."""

import base64
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_neurons.layers.layer import Layer, Link
from lightning_neurons.metrics.histogram import BINS
from lightning_neurons.results.typed import floats, plain, typed
from lightning_neurons.results.whole_file import reading_document, write_whole

FORMAT, VERSION = "lightning_neurons report", 1

_READ_SETTINGS: dict[str, Any] = {
    "main_criterion": str | None,
    "in_loss_units": tuple[str, ...],
    "normalize": str,
    "threshold": float,
    "relative_threshold": bool,
}
"""Settings that reports, figures and pages read; others are only shown."""


def rows(report: Any) -> list[dict[str, Any]]:
    """Return one flat record per neuron, in the order of the model; measures that a layer refuses are NaN."""
    measures = {**report.scores, **report.deadness_by}
    by_layer = {
        name: {m: values[name].tolist() for m, values in measures.items() if name in values} for name in report.counts
    }
    return [
        {"layer": name, "neuron": i, **{m: values[m][i] if m in values else math.nan for m in measures}}
        for name, values in by_layer.items()
        for i in range(len(report.counts[name].samples))
    ]


def neurons(report: Any) -> list[dict[str, Any]]:
    """Return one readable entry per neuron: layer, index, deadness and importance."""
    deadness, importance = report.deadness, report.importance() if report.scores else {}
    return [
        {
            "layer": row["layer"],
            "neuron": row["neuron"],
            "deadness": _item(deadness, row),
            "importance": _item(importance, row),
        }
        for row in rows(report)
    ]


def save(report: Any, path: str | Path) -> None:
    """Write a report, whole or not at all."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "epoch": report.epoch,
        "step": report.step,
        "settings": dict(report.settings),
        "notes": list(report.notes),
        "neurons": neurons(report),
        "layers": [_layer(layer) for layer in report.layers],
        "scores": _nested(report.scores),
        "deadness": _nested(report.deadness_by),
        "per_class": _nested(report.per_class),
        "class_counts": list(report.class_counts),
        "refused": {name: dict(reasons) for name, reasons in report.refused.items()},
        "counts": {name: _counts(counts) for name, counts in report.counts.items()},
    }
    write_whole(path, json.dumps(plain(document), allow_nan=False))


def load(path: str | Path, counts_type: Callable[..., Any]) -> dict[str, Any]:
    """Read the fields of a report.

    Returns:
        The arguments with which a ``NeuronReport`` equal to the saved one is made.

    Raises:
        ArgumentError: If the file is no report, or of a newer version.
    """
    with reading_document(path, FORMAT, VERSION, "NeuronReport.save") as document:
        return _fields(document, counts_type)


def _fields(document: dict[str, Any], counts_type: Callable[..., Any]) -> dict[str, Any]:
    layers = [_read_layer(entry) for entry in document["layers"]]
    return _consistent({
        "layers": tuple(typed(Layer, asdict(layer), "layers") for layer in layers),
        "scores": _read_nested(document["scores"]),
        "deadness_by": _read_nested(document["deadness"]),
        "per_class": _read_nested(document["per_class"]),
        "class_counts": typed(tuple[int, ...], document["class_counts"], "class_counts"),
        "counts": {name: counts_type(**_read_counts(entry)) for name, entry in document["counts"].items()},
        "refused": typed(Mapping[str, Mapping[str, str]], document["refused"], "refused"),
        "settings": typed(Mapping[str, Any], document["settings"], "settings"),
        "notes": typed(tuple[str, ...], document["notes"], "notes"),
        "epoch": typed(int | None, document["epoch"], "epoch"),
        "step": typed(int | None, document["step"], "step"),
    })


def _consistent(document: dict[str, Any]) -> dict[str, Any]:
    """Return the fields, if every number belongs to a neuron.

    Raises:
        ValueError: If not.
    """
    widths = {name: len(counts.samples) for name, counts in document["counts"].items()}
    for name, kind in _READ_SETTINGS.items():
        if name in document["settings"]:
            value = typed(kind, document["settings"][name], name)
            if isinstance(value, float) and math.isnan(value):  # null
                raise ValueError(f"{name} has to be a number")
    for group, dimensions in (("scores", 1), ("deadness_by", 1), ("per_class", 2)):
        for criterion, by_layer in document[group].items():
            for layer, values in by_layer.items():
                if layer not in widths or values.ndim != dimensions or values.shape[-1] != widths[layer]:
                    raise ValueError(f"{criterion} of {layer} does not have one value for each of its neurons")
    return document


def _item(by_layer: Mapping[str, Tensor], row: Mapping[str, Any]) -> float | None:
    return float(by_layer[row["layer"]][row["neuron"]]) if row["layer"] in by_layer else None


def _nested(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {name: {layer: t.tolist() for layer, t in by_layer.items()} for name, by_layer in tensors.items()}


def _read_nested(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    return {name: {layer: floats(v) for layer, v in by_layer.items()} for name, by_layer in entries.items()}


def _layer(layer: Layer) -> dict[str, Any]:
    chains = [[list(vars(link).values()) for link in chain] for chain in layer.chains]
    readers = None if layer.readers is None else [list(reader) for reader in layer.readers]
    return {**vars(layer), "chains": chains, "readers": readers, "twins": list(layer.twins)}


def _read_layer(entry: dict[str, Any]) -> Layer:
    chains = tuple(tuple(_read_link(*link) for link in chain) for chain in entry["chains"])
    readers = None if entry["readers"] is None else tuple((name, spread) for name, spread in entry["readers"])
    return Layer(**{**entry, "chains": chains, "readers": readers, "twins": tuple(entry.get("twins", ()))})


def _read_link(
    kind: Any, function: str, module: str | None, rectified: bool = False, steps: Sequence[Any] = ()
) -> Link:
    """Read a link, also from a file of a version that kept three entries of it.

    Returns:
        The link, with tuples for the lists of JSON.
    """
    return Link(kind, function, module, rectified, tuple((name, tuple(reads)) for name, reads in steps))


def _counts(counts: Any) -> dict[str, Any]:
    entry = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(counts).items()}
    packed = zlib.compress(counts.histogram.numpy().astype("<i8").tobytes(), 6)
    return {**entry, "histogram": {"shape": list(counts.histogram.shape), "zlib": base64.b64encode(packed).decode()}}


def _read_counts(entry: dict[str, Any]) -> dict[str, Any]:
    entry = {"left_out": entry["nonfinite"], **entry}  # files of earlier versions tell no difference
    names = ("samples", "gradient_samples", "values", "nonfinite", "left_out")
    whole = {n: torch.tensor(typed(list[int], entry[n], n), dtype=torch.int64) for n in names}
    width = len(whole["samples"])
    largest = None if entry["largest"] is None else floats(entry["largest"])
    if any(len(counts) != width for counts in whole.values()) or (largest is not None and largest.shape != (width,)):
        raise ValueError("there is not one count for each neuron")
    rms = typed(float | None, entry["rms"], "rms")
    return {**whole, "rms": rms, "largest": largest, "histogram": _unpacked(entry["histogram"], width)}


def _unpacked(entry: Mapping[str, Any], width: int) -> Tensor:
    """Decompress a histogram, up to the size that a histogram of so many neurons has.

    Returns:
        Counts ``(neuron, bin)``, int64.
    """
    rows, bins = typed(tuple[int, int], entry["shape"], "histogram")
    if rows not in (0, width) or not 0 <= bins <= BINS:
        raise ValueError(f"a histogram of {width} neurons does not have {rows} rows and {bins} bins")
    size = 8 * rows * bins
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(entry["zlib"]), size + 1)
    if len(data) != size or not unpacker.eof:
        raise ValueError("a histogram has another size than it says")
    return torch.from_numpy(np.frombuffer(data, "<i8").astype(np.int64).reshape(rows, bins))
