"""Results in the folder of a run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning_neurons.errors import ArgumentError
from lightning_neurons.report.html.listed import ListedCard, ListedPicture, read_cards, read_pictures
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.class_report import ClassAccuracy
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.plain import number
from lightning_neurons.results.pruning_history import PruningHistory

Found = TypeVar("Found")

_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
_DEPTH = 3


@dataclass(frozen=True, eq=False)
class RunFolder:
    """The results of a run, as far as they are in its folder.

    Attributes:
        directory: The folder.
        report: Of neurons.json.
        history: Of history.json, or None.
        versions: Of the packages that the run was made with, from history.json.
        pruning: Of pruning.json, or None.
        ablation: Of ablation.json, or None.
        classes: The accuracies in classes.json.
        gallery: The images that pictures/pictures.json names.
        cards: The neurons that pictures/cards.json names.
        notes: Files that are there and could not be read.
    """

    directory: Path
    report: NeuronReport
    history: NeuronHistory | None
    versions: Mapping[str, str]
    pruning: PruningHistory | None
    ablation: AblationReport | None
    classes: tuple[ClassAccuracy, ...]
    gallery: tuple[ListedPicture, ...]
    cards: tuple[ListedCard, ...]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, directory: str | Path) -> "RunFolder":
        """Read a folder; only neurons.json is required.

        Raises:
            ArgumentError: If it is not, or is broken; names the nearest folder that has one.
        """
        folder, notes = Path(directory), list[str]()
        history = _optional(folder / "history.json", NeuronHistory.load, notes)
        return cls(
            directory=folder,
            report=_report(folder),
            history=history,
            versions={} if history is None else _versions(folder / "history.json"),
            pruning=_optional(folder / "pruning.json", PruningHistory.load, notes),
            ablation=_optional(folder / "ablation.json", AblationReport.load, notes),
            classes=_optional(folder / "classes.json", _classes, notes) or (),
            gallery=_optional(folder / "pictures" / "pictures.json", lambda path: read_pictures(path, notes), notes)
            or (),
            cards=_optional(folder / "pictures" / "cards.json", lambda path: read_cards(path, notes), notes) or (),
            notes=tuple(notes),
        )


def _report(folder: Path) -> NeuronReport:
    path = folder / "neurons.json"
    if not path.is_file():
        near = _nearest(folder)
        hint = "" if near is None else f"; did you mean {str(near)!r}?"
        raise ArgumentError.of("directory", str(folder), f"the folder of a run, which has a neurons.json{hint}")
    try:
        return NeuronReport.load(path)
    except _BROKEN as error:
        raise ArgumentError.of("directory", str(folder), f"a neurons.json that can be read ({error})") from error


def _nearest(folder: Path) -> Path | None:
    """Return the folder with a report that is the fewest levels below; the newest of several."""
    for depth in range(1, _DEPTH + 1):
        found = [path for path in folder.glob("*/" * depth + "neurons.json") if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime, str(path))).parent
    return None


def _optional(path: Path, load: Callable[[Path], Found], notes: list[str]) -> Found | None:
    """Load a file; None if there is none. One that cannot be read makes a note."""
    if not path.exists():
        return None
    try:
        return load(path)
    except _BROKEN as error:
        said = str(error).replace(f"{path.parent}/", "") or type(error).__name__  # a page to send tells no paths
        notes.append(f"{path.name} is left out: {said}")
        return None


def _versions(path: Path) -> dict[str, str]:
    found: Any = json.loads(path.read_text(encoding="utf-8")).get("versions")
    return {str(name): str(version) for name, version in found.items()} if isinstance(found, Mapping) else {}


def _classes(path: Path) -> tuple[ClassAccuracy, ...]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["format"] != "lightning_neurons classes" or found["version"] > 1:
        raise ArgumentError.of("path", str(path), "a JSON file that ClassReport.save wrote, of version 1 or older")
    rows = [ClassAccuracy(**row) for row in found["accuracies"]]
    return tuple(ClassAccuracy(str(row.model), int(row.klass), *map(number, row[2:])) for row in rows)
