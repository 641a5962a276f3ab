"""Images in the folder of a run, and the JSON lists that describe them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_neurons.errors import ArgumentError
from lightning_neurons.report.html.embed import LARGEST, media_type
from lightning_neurons.results.plain import number


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

    Raises:
        ArgumentError: If it is no such list.
    """
    return tuple(
        ListedPicture(picture, str(entry.get("title", "")), str(entry.get("caption", "")))
        for entry, picture in _entries(path, notes)
    )


def read_cards(path: Path, notes: list[str]) -> tuple[ListedCard, ...]:
    """Read the neurons that a list names; those whose images cannot be shown make a note instead.

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
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not all(isinstance(e, dict) and isinstance(e.get("file"), str) for e in found):
        raise ArgumentError.of("path", str(path), 'a list of entries such as {"file": "a.png", ...}')
    entries = []
    for entry in found:
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
            return f"it has {file.stat().st_size >> 20} MB, and a page takes pictures of at most {LARGEST >> 20} MB"
        with file.open("rb") as opened:
            return "" if media_type(opened.read(16)) else "it is no PNG, JPEG, GIF or WebP"
    except (OSError, ValueError) as error:
        return str(error)
