"""Parts of the page as plain values, each shown by the template in ``templates/parts`` that its ``kind`` names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: The text.
        number: The key by which a numeric column is sorted; None, for what was not measured, stays at the end.
        link: Id of the place that it leads to.
        share: Drawn as a thin bar below the text, in [0, 1].
    """

    text: str
    number: float | None = None
    link: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Attributes:
        heading: The text.
        numeric: Whether it is set right and sorted by number.
        meaning: More words, shown below the table.
    """

    heading: str
    numeric: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row; can be sorted where scripts run.

    Attributes:
        caption: The heading of the table.
        columns: Their heads.
        rows: One cell for each column.
        total: A last line that stays where it is; may be empty.
        filter_words: Label of the box that filters rows by name; no box if empty.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] = ()
    filter_words: str = ""

    @property
    def legend(self) -> tuple[tuple[str, str], ...]:
        """Headings that need an explanation, with it."""
        return tuple((column.heading, column.meaning) for column in self.columns if column.meaning)


@dataclass(frozen=True)
class Picture:
    """An image inside the page.

    Attributes:
        uri: All of it, as a ``data:`` address.
        alt: A description, for those who do not see it.
        title: Shown above; may be empty.
        caption: Shown below; may be empty.
        width: In pixels of the page; None shows it as large as it is.
        height: The same.
    """

    kind: ClassVar[str] = "picture"
    uri: str
    alt: str
    title: str = ""
    caption: str = ""
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Side:
    """Parts side by side where the page is wide enough."""

    kind: ClassVar[str] = "side"
    parts: "tuple[Part, ...]"


@dataclass(frozen=True)
class Words:
    """Paragraphs, or a list if there are several."""

    kind: ClassVar[str] = "words"
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names and their values.

    Attributes:
        title: Shown above; may be empty.
        facts: The text by name.
    """

    kind: ClassVar[str] = "facts"
    title: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Tile:
    """One key number.

    Attributes:
        label: The name of the number.
        value: The number.
        detail: More words below it.
        alarming: Whether it should catch the eye.
    """

    label: str
    value: str
    detail: str = ""
    alarming: bool = False


@dataclass(frozen=True)
class Tiles:
    """The key numbers."""

    kind: ClassVar[str] = "tiles"
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Card:
    """One neuron: its image and numbers.

    Attributes:
        name: The neuron.
        why: The reason why it is shown.
        facts: Its numbers, as they are shown.
        picture: An image with what excites it.
    """

    name: str
    why: str
    facts: Mapping[str, str]
    picture: Picture


@dataclass(frozen=True)
class Cards:
    """Neurons side by side."""

    kind: ClassVar[str] = "cards"
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class LayerPage:
    """All about one layer, folded.

    Attributes:
        place: Id that links lead to.
        name: The layer.
        summary: The line that is shown while it is folded.
        parts: The parts of the page.
    """

    place: str
    name: str
    summary: str
    parts: "tuple[Part, ...]"


@dataclass(frozen=True)
class LayerPages:
    """The pages of all layers."""

    kind: ClassVar[str] = "layers"
    pages: tuple[LayerPage, ...]


Part = Table | Picture | Side | Words | Facts | Tiles | Cards | LayerPages


@dataclass(frozen=True)
class Section:
    """A section of the page, listed in its navigation.

    Attributes:
        place: Its id.
        title: Its heading.
        lead: A sentence on what it shows; may be empty.
        parts: Its parts; a section without any does not appear.
    """

    place: str
    title: str
    lead: str
    parts: tuple[Part, ...]
