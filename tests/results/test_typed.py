"""Values of a document are what annotations say, or an error names their place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lightning_neurons.results.typed import typed
from tests.tables import for_each


@dataclass
class Part:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass
class Whole:
    parts: list[Part]
    kind: Literal["a", "b"]
    score: float | None = None
    more: Mapping[str, Any] | None = None


def test_a_document_becomes_what_it_was_made_from():
    document = {
        "parts": [{"name": "x", "sizes": [1, 2]}, {"name": "y"}],
        "kind": "b",
        "score": 1,
        "more": {"n": [None]},
    }
    expected = Whole([Part("x", (1, 2)), Part("y")], "b", 1.0, {"n": [None]})
    assert typed(Whole, document, "it") == expected
    assert typed(tuple[str, int], ["x", 3], "it") == ("x", 3)
    assert typed(int | str, "x", "it") == "x"


WRONG = [
    (Whole, {"kind": "a"}, "it has 'no parts'"),
    (Whole, {"parts": [], "kind": "a", "other": 1}, "it has 'other'"),
    (Whole, {"parts": [], "kind": "c"}, "it.kind has to be Literal"),
    (Whole, {"parts": [{"name": 1}], "kind": "a"}, "it.parts.name has to be str, and is a int"),
    (Whole, [], "it has to be Whole, and is a list"),
    (int, True, "it has to be int, and is a bool"),
    (int, 2**63, "it has to be int"),
    (int, 1.0, "it has to be int, and is a float"),
    (float, "1", "a number is expected, and not a str"),
    (tuple[int, ...], "12", "it has to be tuple, and is a str"),
    (tuple[int, int], [1], "it has to be tuple"),
    (Mapping[str, int], [["a", 1]], "it has to be .*Mapping.*, and is a list"),
    (Mapping[str, int], {"a": "b"}, "it.a has to be int"),
    (int | None, "x", "it has to be int"),
]


@for_each("kind, value, message", WRONG)
def test_what_is_something_else_is_refused_by_its_place(kind, value, message):
    with pytest.raises(ValueError, match=message):
        typed(kind, value, "it")
