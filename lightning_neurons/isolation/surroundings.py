"""Effects of the user's code outside of the model: output, files, the environment, an object that gives it data."""

import builtins
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_neurons.isolation.contents import Content, Entries, Items, Members

_FEW = 1000
"""Limit for the length of a list that is kept: a longer one holds data, nothing that a step collects."""


@contextmanager
def silent() -> Iterator[None]:
    """Drop what this thread prints or logs, as the first run has done so already; other threads are heard."""
    out, err, handle = sys.stdout, sys.stderr, logging.Logger.handle
    me = threading.get_ident()

    def handle_others(logger: logging.Logger, record: logging.LogRecord) -> None:
        if threading.get_ident() != me:
            handle(logger, record)

    others = [_Others(stream, me) for stream in (out, err)]
    sys.stdout, sys.stderr = others
    logging.Logger.handle = handle_others  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        logging.Logger.handle = handle  # type: ignore[method-assign]
        for stream in others:  # references to them may remain
            stream.unheard = None


@contextmanager
def writing_nothing() -> Iterator[None]:
    """Drop what this thread writes to files that it opens or saves meanwhile; other threads write as usual."""
    real, save, me = builtins.open, torch.save, threading.get_ident()

    def open_other(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != me or not {*mode} & {*"wax+"}:
            return real(file, mode, *args, **kwargs)
        return io.BytesIO() if "b" in mode else io.StringIO()

    def save_other(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != me:
            save(*args, **kwargs)

    builtins.open = io.open = open_other
    torch.save = save_other
    try:
        yield
    finally:
        builtins.open = io.open = real
        torch.save = save


class _Others:
    """A stream that drops what one thread writes.

    Attributes:
        unheard: Identifier of that thread; None if no thread is dropped.
    """

    def __init__(self, stream: Any, unheard: int | None) -> None:
        self._stream, self.unheard = stream, unheard

    def write(self, text: str) -> int:
        """Write a text, unless it comes from the thread that is not to be heard.

        Returns:
            The number of characters written; of a text that is dropped, its length, as a stream that took it would
            return.
        """
        return len(text) if threading.get_ident() == self.unheard else self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several pieces of text."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def kept_environment() -> Iterator[None]:
    """Keep the environment variables and put them back."""
    kept = dict(os.environ)
    try:
        yield
    finally:
        if os.environ != kept:
            for name in os.environ.keys() - kept.keys():
                del os.environ[name]
            os.environ.update(kept)


@contextmanager
def kept_attributes(thing: Any) -> Iterator[None]:
    """Keep the attributes of an object, and the contents of short lists, dicts and sets among them; put them back."""
    attributes = getattr(thing, "__dict__", {})
    kept = [Entries(attributes), *(_of(value) for value in attributes.values() if type(value) in _OF)]
    try:
        yield
    finally:
        for content in kept:
            if content is not None:
                content.put_back()


_OF: dict[type, Callable[[Any], Content]] = {dict: Entries, set: Members, list: lambda thing: Items(thing, list)}


def _of(value: Any) -> Content | None:
    return _OF[type(value)](value) if len(value) <= _FEW else None
