"""Results in the folder of a run: reports, images and the JSON lists that describe them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning_neurons.errors import ArgumentError
from lightning_neurons.report.html.embed import LARGEST, media_type
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.class_report import ClassAccuracy
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.pruning_history import PruningHistory
from lightning_neurons.results.typed import number


@dataclass(frozen=True)
class ListedPicture:
    """An image in the gallery.

    Attributes:
        path: The file.
        title: Its heading.
        caption: A description of it.
    """

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class ListedCard:
    """The image of a neuron.

    Attributes:
        path: The file.
        name: The neuron, such as ``"net.conv2 7"``.
        why: The reason why it is shown, such as ``"most important"``.
        numbers: Its numbers, in the order to show.
    """

    path: Path
    name: str
    why: str
    numbers: Mapping[str, float]


def read_pictures(path: Path, notes: list[str]) -> tuple[ListedPicture, ...]:
    """Read the images that a list names; those that cannot be shown make a note instead.

    Returns:
        The images, embedded, with titles and captions, in the order of the list.

    Raises:
        ArgumentError: If it is no such list.
    """
    return tuple(
        ListedPicture(picture, str(entry.get("title", "")), str(entry.get("caption", "")))
        for entry, picture in _entries(path, notes)
    )


def read_cards(path: Path, notes: list[str]) -> tuple[ListedCard, ...]:
    """Read the neurons that a list names; those whose images cannot be shown make a note instead.

    Returns:
        The cards with their images, embedded, in the order of the list.

    Raises:
        ArgumentError: If it is no such list.
    """
    return tuple(
        ListedCard(
            picture,
            str(entry.get("name", "")),
            str(entry.get("why", "")),
            {str(name): number(value) for name, value in dict(entry.get("numbers", {})).items()},
        )
        for entry, picture in _entries(path, notes)
    )


def _entries(path: Path, notes: list[str]) -> list[tuple[dict[str, Any], Path]]:
    listed = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(listed, list) or not all(isinstance(e, dict) and isinstance(e.get("file"), str) for e in listed):
        raise ArgumentError.of("path", str(path), 'a list of entries such as {"file": "a.png", ...}')
    entries = []
    for entry in listed:
        why = _unfit(path.parent, entry["file"])
        if why:
            notes.append(f"{path.name}: {entry['file']!r} is left out: {why}")
        else:
            entries.append((entry, path.parent / entry["file"]))
    return entries


def _unfit(folder: Path, name: str) -> str:
    """Return the reason why an image cannot be shown; empty if it can."""
    try:
        file = (folder / name).resolve()
        # Whoever opens the page must not get a file that its author did not put there.
        if not file.is_relative_to(folder.resolve()):
            return f"it lies outside {folder.name}/"
        if not file.is_file():
            return "there is no such file"
        if file.stat().st_size > LARGEST:
            return f"it has {file.stat().st_size >> 20} MB, and a page takes images of at most {LARGEST >> 20} MB"
        with file.open("rb") as opened:
            return "" if media_type(opened.read(16)) else "it is no PNG, JPEG, GIF or WebP"
    except (OSError, ValueError) as error:
        return str(error)


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

        Returns:
            Everything in it that can be read; what cannot is named in ``notes``.

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
        reports = [path for path in folder.glob("*/" * depth + "neurons.json") if path.is_file()]
        if reports:
            return max(reports, key=lambda path: (path.stat().st_mtime, str(path))).parent
    return None


def _optional(path: Path, load: Callable[[Path], Found], notes: list[str]) -> Found | None:
    """Load a file that need not be there; one that cannot be read makes a note.

    Returns:
        What ``load`` returns, or None without a file that can be read.
    """
    if not path.exists():
        return None
    try:
        return load(path)
    except _BROKEN as error:
        said = str(error).replace(f"{path.parent}/", "") or type(error).__name__  # a page to send tells no paths
        notes.append(f"{path.name} is left out: {said}")
        return None


def _versions(path: Path) -> dict[str, str]:
    versions: Any = json.loads(path.read_text(encoding="utf-8")).get("versions")
    return {str(name): str(version) for name, version in versions.items()} if isinstance(versions, Mapping) else {}


def _classes(path: Path) -> tuple[ClassAccuracy, ...]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["format"] != "lightning_neurons classes" or document["version"] > 1:
        raise ArgumentError.of("path", str(path), "a JSON file that ClassReport.save wrote, of version 1 or older")
    rows = [ClassAccuracy(**row) for row in document["accuracies"]]
    return tuple(ClassAccuracy(str(row.model), int(row.klass), *map(number, row[2:])) for row in rows)
