"""Images inside the page, as ``data:`` addresses."""

import base64
import io
from pathlib import Path
from typing import Any

from lightning_neurons.report.figures.drawing import new_figure
from lightning_neurons.report.html.parts import Picture
from lightning_neurons.report.logging.images import as_pixels

_PIXELS_PER_INCH = 96
"""Pixels of the page per inch of a figure: a figure's point is then a point of the page."""

_SHARPNESS = 1.5
"""Pixels of an image for one of the page, as most screens have more than one."""

LARGEST = 8 << 20
"""Most bytes of an image file: all of it goes into the page, and a third more."""

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


def media_type(start: bytes) -> str | None:
    """Return the media type of an image, by its first 16 bytes; None for anything else.

    Example:
        >>> media_type(b"GIF89a"), media_type(b"<script>")
        ('image/gif', None)
    """
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES.items() if start.startswith(signature)), None)


def embedded_file(path: Path, alt: str, title: str = "", caption: str = "") -> Picture:
    """Return an image file as a part of the page."""
    data = path.read_bytes()
    return Picture(_uri(data, media_type(data[:16]) or "image/png"), alt, title, caption)


def new_axes(width: float, height: float) -> Any:
    """Return the axes of an empty figure of this size in inches."""
    figure = new_figure(width, height)
    figure.set_layout_engine("tight", pad=0.5)  # faster than the other one, which is for several axes
    return figure.subplots()


def embedded_figure(figure: Any, alt: str, title: str = "") -> Picture:
    """Return a matplotlib figure as a part of the page.

    Args:
        figure: The figure.
        alt: A description in words.
        title: Shown above; may be empty.

    Returns:
        The figure as PNG in a ``data:`` address, with its description and title.
    """
    from PIL import Image  # comes with matplotlib

    width, height = (round(inches * _PIXELS_PER_INCH) for inches in figure.get_size_inches())
    figure.set_dpi(_PIXELS_PER_INCH * _SHARPNESS)
    packed = io.BytesIO()
    # A palette takes a third of the bytes; the other ways to find one take ten times as long.
    Image.fromarray(as_pixels(figure)).quantize(method=Image.Quantize.FASTOCTREE).save(packed, format="png")
    return Picture(_uri(packed.getvalue(), "image/png"), alt, title, "", width, height)


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
