"""Figures in loggers, and in a folder of the run."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_neurons.report.figures.drawing import any_letters, save_figure
from lightning_neurons.results.whole_file import Place, inside, read_text, remove, write_whole

FOLDER = "pictures"
PICTURES, CARDS = "pictures.json", "cards.json"


def can_show(loggers: Sequence[Any]) -> bool:
    """Return True if any of the loggers takes figures or images."""
    return any(hasattr(logger, "log_image") or hasattr(_experiment(logger), "add_figure") for logger in loggers)


def show_figure(loggers: Sequence[Any], tag: str, figure: Any, step: int) -> None:
    """Write a figure to every logger that takes figures (TensorBoard) or images (Lightning's own ``log_image``)."""
    for logger in loggers:
        if hasattr(_experiment(logger), "add_figure"):
            with any_letters():
                _experiment(logger).add_figure(tag, figure, step, close=False)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[as_pixels(figure)], step=step)


def as_pixels(figure: Any) -> Any:
    """Render a figure.

    Returns:
        An array ``(height, width, 3)`` of bytes: red, green and blue.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional, and slow to import

    canvas: Any = FigureCanvasAgg(figure)
    with any_letters():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def keep_picture(directory: Place, name: str, figure: Any, title: str, caption: str) -> None:
    """Write a figure into the folder of images, in place of one of the same name, and into its list."""
    save_figure(figure, inside(directory, FOLDER, f"{name}.png"))
    entry = {"file": f"{name}.png", "title": title, "caption": caption}
    listed = inside(directory, FOLDER, PICTURES)
    others = [old for old in _listed(listed) if old.get("file") != entry["file"]]
    write_whole(listed, json.dumps([*others, entry], indent=1))


def keep_cards(directory: Place, cards: Sequence[tuple[Any, Mapping[str, Any]]], group: str) -> None:
    """Write cards into the folder of images, in place of all of this group that were there.

    Args:
        directory: The folder of the run.
        cards: Figures, each with a dict of ``name``, ``why`` and ``numbers``.
        group: The first part of file names.
    """
    listed, of_group = inside(directory, FOLDER, CARDS), re.compile(rf"{re.escape(group)}-\d+\.png")
    before = _listed(listed)
    entries = [old for old in before if not of_group.fullmatch(str(old.get("file")))]
    for stale in (old["file"] for old in before if old not in entries):
        remove(inside(directory, FOLDER, stale))
    for place, (figure, said) in enumerate(cards):
        save_figure(figure, inside(directory, FOLDER, f"{group}-{place}.png"))
        entries.append({"file": f"{group}-{place}.png", **said})
    write_whole(listed, json.dumps(entries, indent=1))


def _listed(path: Place) -> list[dict[str, Any]]:
    try:
        document = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return []
    return [entry for entry in document if isinstance(entry, dict)] if isinstance(document, list) else []


def _experiment(logger: Any) -> Any:
    return getattr(logger, "experiment", None)
