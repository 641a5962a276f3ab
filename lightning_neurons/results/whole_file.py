"""Files that are written whole or not at all, local or remote, and JSON documents with format and version.

Addresses with a protocol (``s3://``, ``memory://``) are opened with fsspec, as in Lightning.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from fsspec.core import url_to_fs

from lightning_neurons.errors import ArgumentError

Place = Path | str
"""A local path, or a remote address."""


def place_of(path: str | Path) -> Place:
    """Return a path, or the address as it is if it has a protocol.

    Example:
        >>> place_of("s3://bucket/run"), place_of("file:///tmp/run") == Path("/tmp/run")
        ('s3://bucket/run', True)
    """
    text = os.fspath(path).removeprefix("file://")
    return text if "://" in text else Path(text)


def inside(folder: str | Path, *names: str) -> Place:
    """Join a folder and names.

    Returns:
        A path on a local disk, else a URL.

    Example:
        >>> inside("s3://bucket/run/", "pictures", "a.png")
        's3://bucket/run/pictures/a.png'
    """
    place = place_of(folder)
    return place.joinpath(*names) if isinstance(place, Path) else "/".join((place.rstrip("/"), *names))


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file so that no process ever reads half of it: to another file first, which then replaces it.

    A link stays a link, a file keeps its mode, and what is no plain file (a pipe, a device) is written to as it is.
    """
    place, data = place_of(path), content.encode() if isinstance(content, str) else content
    if isinstance(place, str):
        files, name = url_to_fs(place)
        files.makedirs(name.rpartition("/")[0], exist_ok=True)
        files.pipe_file(name, data)
        return
    target = place.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return
    unfinished = target.with_name(f".{uuid4().hex}")  # of each thread its own, and not longer than names may be
    try:
        if target.exists():
            unfinished.touch(mode=0o600)  # what others may not read, they may not read in between
        unfinished.write_bytes(data)
        if target.exists():
            shutil.copymode(target, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def read_text(path: str | Path) -> str:
    """Read a text file, local or remote.

    Returns:
        Its whole text, decoded as UTF-8.

    Raises:
        OSError: If there is none, or it cannot be read.
    """
    place = place_of(path)
    if isinstance(place, Path):
        return place.read_text(encoding="utf-8")
    files, name = url_to_fs(place)
    return str(files.cat_file(name), "utf-8")


def is_there(path: str | Path) -> bool:
    """Return True if there is such a file or folder."""
    place = place_of(path)
    if isinstance(place, Path):
        return place.exists()
    files, name = url_to_fs(place)
    return bool(files.exists(name))


def remove(path: str | Path) -> None:
    """Remove a file, if it exists."""
    place = place_of(path)
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
    elif is_there(place):
        files, name = url_to_fs(place)
        files.rm_file(name)


@contextmanager
def on_this_machine(folder: str | Path, *subfolders: str) -> Iterator[Path]:
    """Yield a local folder; of a remote one, a copy of its JSON files, and of all files in some subfolders."""
    place = place_of(folder)
    if isinstance(place, Path):
        yield place
        return
    files, name = url_to_fs(place)
    name = name.rstrip("/")
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / (name.rpartition("/")[2] or "run")
        for part in ("", *subfolders):
            (copy / part).mkdir(exist_ok=True)
            source = f"{name}/{part}".rstrip("/")
            for file in files.find(source, maxdepth=1) if files.isdir(source) else []:
                if part or file.endswith(".json"):  # checkpoints lie there as well
                    files.get_file(file, str(copy / part / file.rpartition("/")[2]))
        yield copy


@contextmanager
def reading_document(path: str | Path, form: str, version: int, writer: str) -> Iterator[dict[str, Any]]:
    """Read a JSON document; errors in its contents, here or inside the context, name the file.

    Args:
        path: The file.
        form: What its ``format`` has to be.
        version: The newest version that can be read.
        writer: What has written it, for errors.

    Raises:
        ArgumentError: If it is no such document, or of a newer version.
    """
    allowed = f"a JSON file that {writer} wrote, whole, of version {version} or older"
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ArgumentError.of("path", str(path), allowed) from error
    if not isinstance(document, dict) or document.pop("format", None) != form:
        raise ArgumentError.of("path", str(path), allowed)
    written = document.pop("version", None)
    if type(written) is not int or written < 1:
        raise ArgumentError.of("path", f"{path} (version {written!r})", allowed)
    if written > version:
        raise ArgumentError.of("path", f"{path} of version {written}", f"version {version} or older")
    try:
        yield document
    except Exception as error:
        raise ArgumentError.of("path", f"{path} ({type(error).__name__}: {error})", allowed) from error
