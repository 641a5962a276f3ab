"""A report as JSON and back, bit by bit: floats are written in full, NaN as null, histograms packed."""

import base64
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_neurons.errors import ArgumentError
from lightning_neurons.network.layer import Layer, Link
from lightning_neurons.results.plain import floats, plain
from lightning_neurons.results.whole_file import read_text, write_whole

FORMAT, VERSION = "lightning_neurons report", 1


def rows(report: Any) -> list[dict[str, Any]]:
    """One flat record per neuron, in the order of the model; measures that a layer refuses are NaN."""
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
    """One readable entry per neuron: deadness, importance, and all that lies behind them."""
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
    """The fields of a report.

    Raises:
        ArgumentError: If the file is no report, or of a newer version.
    """
    allowed = "a JSON file that NeuronReport.save wrote, whole"
    try:
        document = json.loads(read_text(path))
    except ValueError as error:
        raise ArgumentError.of("path", str(path), allowed) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArgumentError.of("path", str(path), allowed)
    if document.get("version", 0) > VERSION:
        raise ArgumentError.of("path", f"{path} of version {document['version']}", f"version {VERSION} or older")
    try:
        return _fields(document, counts_type)
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise ArgumentError.of("path", f"{path} ({type(error).__name__}: {error})", allowed) from error


def _fields(document: dict[str, Any], counts_type: Callable[..., Any]) -> dict[str, Any]:
    if document["version"] < 1:
        raise ValueError("version")
    return _consistent({
        "layers": tuple(_read_layer(entry) for entry in document["layers"]),
        "scores": _read_nested(document["scores"]),
        "deadness_by": _read_nested(document["deadness"]),
        "per_class": _read_nested(document["per_class"]),
        "class_counts": tuple(document["class_counts"]),
        "counts": {name: counts_type(**_read_counts(entry)) for name, entry in document["counts"].items()},
        "refused": document["refused"],
        "settings": document["settings"],
        "notes": tuple(document["notes"]),
        "epoch": document["epoch"],
        "step": document["step"],
    })


def _consistent(found: dict[str, Any]) -> dict[str, Any]:
    """The fields, if every number belongs to a neuron.

    Raises:
        ValueError: If not.
    """
    widths = {name: len(counts.samples) for name, counts in found["counts"].items()}
    if not isinstance(found["settings"], dict) or not isinstance(found["refused"], dict):
        raise ValueError("settings and refused have to be mappings")
    for key in ("epoch", "step"):
        if not isinstance(found[key], int | None):
            raise ValueError(f"{key} has to be a whole number")
    for group in ("scores", "deadness_by", "per_class"):
        for criterion, by_layer in found[group].items():
            for layer, values in by_layer.items():
                if layer not in widths or values.shape[-1:] != (widths[layer],):
                    raise ValueError(f"{criterion} of {layer} does not have one value for each of its neurons")
    return found


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
    """Also from a file of a version that kept three entries of a link."""
    return Link(kind, function, module, rectified, tuple((name, tuple(reads)) for name, reads in steps))


def _counts(counts: Any) -> dict[str, Any]:
    entry = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(counts).items()}
    packed = zlib.compress(counts.histogram.numpy().astype("<i8").tobytes(), 6)
    return {**entry, "histogram": {"shape": list(counts.histogram.shape), "zlib": base64.b64encode(packed).decode()}}


def _read_counts(entry: dict[str, Any]) -> dict[str, Any]:
    entry = {"left_out": entry["nonfinite"], **entry}  # files of earlier versions tell no difference
    names = ("samples", "gradient_samples", "values", "nonfinite", "left_out")
    whole = {n: torch.tensor(entry[n], dtype=torch.int64) for n in names}
    packed = zlib.decompress(base64.b64decode(entry["histogram"]["zlib"]))
    histogram = torch.from_numpy(np.frombuffer(packed, "<i8").astype(np.int64).reshape(entry["histogram"]["shape"]))
    largest = None if entry["largest"] is None else floats(entry["largest"])
    return {**whole, "rms": entry["rms"], "largest": largest, "histogram": histogram}
