"""Plans as JSON, checked when they are read: such files are written by hand too."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_neurons.errors import ArgumentError, is_number
from lightning_neurons.results.whole_file import read_text, write_whole

_AS_SAVED = "a plan as PruningPlan.save wrote it"
FORMAT, VERSION = "lightning_neurons pruning plan", 1
_DIGITS = 19  # of the largest whole number that a tensor can hold


def to_dict(plan: Any) -> dict[str, Any]:
    """Return a plan as plain values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "neurons": {layer: list(neurons) for layer, neurons in plan.neurons.items()},
        "widths": dict(plan.widths),
        "reasons": {layer: {str(i): why for i, why in by.items()} for layer, by in plan.reasons.items()},
        "cost": None if plan.cost is None else dict(vars(plan.cost)),
        "notes": list(plan.notes),
    }


def save(plan: Any, path: str | Path) -> None:
    """Write a plan, whole or not at all."""
    write_whole(path, json.dumps(to_dict(plan), indent=1))


def read(path: str | Path) -> Any:
    """Return the document in a file.

    Raises:
        ArgumentError: If it is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ArgumentError.of("path", str(path), "a JSON file that PruningPlan.save wrote, whole") from error


def fields(
    document: Any, cost_type: Callable[..., Any], checked: Callable[[str, Any], tuple[int, ...]]
) -> dict[str, Any]:
    """Return the fields of a plan in a document.

    Args:
        document: The value of ``to_dict``, or a document written by hand.
        cost_type: Makes the cost.
        checked: Checks the neurons of one layer.

    Returns:
        The arguments of ``PruningPlan``.

    Raises:
        ArgumentError: If the document is no plan, of a newer version, or contradicts itself.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT or not _is_map(document.get("neurons")):
        got = document if not isinstance(document, dict) else document.get("format")
        raise ArgumentError.of("plan", got, f"a document with format {FORMAT!r} and neurons by layer")
    if not is_number(document.get("version")) or not 1 <= document["version"] <= VERSION:
        raise ArgumentError.of("plan", f"version {document.get('version')!r}", f"version 1 to {VERSION}")
    neurons = {layer: checked(layer, indices) for layer, indices in document["neurons"].items()}
    widths, reasons, cost = document.get("widths") or {}, document.get("reasons") or {}, document.get("cost")
    if not _is_map(widths) or not all(is_number(w) and isinstance(w, int) and w > 0 for w in widths.values()):
        raise ArgumentError.of("plan", widths, "widths that are positive whole numbers by layer")
    for layer, indices in neurons.items():
        if layer in widths and indices and indices[-1] >= widths[layer]:
            raise ArgumentError.of(
                "plan", {layer: indices[-1]}, f"neurons below the width {widths[layer]} in {layer!r}"
            )
    _check_reasons(reasons, neurons)
    if not (cost is None or (_is_map(cost) and all(is_number(n) and isinstance(n, int) for n in cost.values()))):
        raise ArgumentError.of("plan", cost, f"a cost of whole numbers, in {_AS_SAVED}")
    if not isinstance(document.get("notes", []), list):
        raise ArgumentError.of("plan", document["notes"], f"a list of notes, in {_AS_SAVED}")
    try:
        return {
            "neurons": neurons,
            "widths": widths,
            "reasons": {layer: {int(i): str(why) for i, why in by.items()} for layer, by in reasons.items()},
            "cost": None if cost is None else cost_type(**cost),
            "notes": tuple(map(str, document.get("notes", []))),
        }
    except TypeError as error:
        raise ArgumentError.of("plan", str(error), _AS_SAVED) from error


def _check_reasons(reasons: Any, neurons: Mapping[str, tuple[int, ...]]) -> None:
    by_layer: dict[str, Any] = reasons if _is_map(reasons) else {"": None}
    for layer, by in by_layer.items():
        if not _is_map(by) or not all(i.isdecimal() and len(i) < _DIGITS for i in by):
            raise ArgumentError.of("plan", reasons, f"reasons by layer and neuron, in {_AS_SAVED}")
        strange = [i for i in by if int(i) not in neurons.get(layer, ())]
        if strange:
            raise ArgumentError.of("plan", {layer: strange[0]}, "reasons for neurons that it removes")


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
