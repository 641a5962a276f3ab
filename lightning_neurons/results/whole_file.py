"""Files that are there whole or not at all, and JSON documents of a format of ours."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_neurons.errors import ArgumentError


def write_whole(path: Path, text: str) -> None:
    """Write to a file beside ``path`` first, so that a reader never finds half a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def reading_document(path: Path, form: str, version: int, writer: str) -> Iterator[dict[str, Any]]:
    """Read a JSON document; what goes wrong with its contents, here or inside, is said of the file.

    Args:
        path: The file.
        form: What its ``format`` has to be.
        version: The newest version that can be read.
        writer: What has written it, for errors.

    Raises:
        ArgumentError: If it is no such document, or of a newer version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != form or found.pop("version") > version:
            raise ValueError("format")
        yield found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        allowed = f"a JSON file that {writer} wrote, whole, of version {version} or older"
        raise ArgumentError.of("path", str(path), allowed) from error
