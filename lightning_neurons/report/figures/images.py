"""Figures of images: samples, saliency maps, activation maps, filters, images that excite neurons, cards of neurons."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.errors import ArgumentError
from lightning_neurons.report.figures.data import as_channels, finite, is_signal, summed_channels, tiled
from lightning_neurons.report.figures.drawing import MAGNITUDES, PALETTE, SIGNED, new_figure, shortened
from lightning_neurons.results.neuron_card import NeuronCard

_SMALL = 64
"""Images up to this size are drawn pixel by pixel."""

_COLUMNS = 6


def picture(image: Float[Tensor, "*shape"], axes: Any, *, value_range: tuple[float, float] | None = None) -> Any:
    """Draw one sample: as an image, or as lines if it is a signal.

    Args:
        image: ``(height, width)`` or ``(channel, height, width)``: three channels are colours, the mean of any other
            number is grey. Of ``(channel, depth, height, width)`` the middle slice. ``(length,)`` and
            ``(channel, length)`` are signals: few rows (at most 16), four times as many columns.
        axes: Where to draw.
        value_range: The values of black and white; None for [0, 1]. Signals are drawn as they are.

    Returns:
        The axes.
    """
    values = finite(image)
    if is_signal(values):
        for place, line in enumerate(values.reshape(-1, values.shape[-1])):
            axes.plot(line.numpy(), color=PALETTE[place % len(PALETTE)], linewidth=1)
        axes.set_xlabel("position", fontsize=8)
        axes.tick_params(labelsize=7)
        return axes
    low, high = value_range or (0.0, 1.0)
    flat = ((as_channels(values) - low) / max(high - low, 1e-12)).clamp(0, 1)
    _show(axes, flat.movedim(0, -1) if len(flat) == 3 else flat.mean(0), cmap="gray", vmin=0, vmax=1)
    return axes


def attribution(values: Float[Tensor, "*shape"], axes: Any, *, absolute: bool = False) -> Any:
    """Draw an attribution: how much each place of a sample adds (orange) or subtracts (purple), summed over channels.

    Args:
        values: As ``picture`` takes them; or ``(token,)``, drawn as bars.
        axes: Where to draw.
        absolute: Show magnitudes without signs.

    Returns:
        The axes.
    """
    summed = summed_channels(values)
    summed = summed.abs() if absolute else summed
    limit = _limit(summed)
    if summed.ndim == 2:
        _show(axes, summed, **_colors(limit, absolute))
        return axes
    places, heights = range(len(summed)), summed.numpy()
    colors = [PALETTE[1] if value >= 0 else PALETTE[4] for value in summed.tolist()]
    axes.bar(places, heights, 0.9 if len(summed) <= _SMALL else 1.0, color=colors)
    axes.axhline(0, color="k", linewidth=0.8)
    axes.set_xlabel("position", fontsize=8)
    axes.set_ylabel("attribution", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return axes


def saliency_rows(
    images: Sequence[Tensor] | Tensor | None,
    maps: Sequence[Tensor] | Tensor,
    titles: Sequence[str],
    *,
    absolute: bool = False,
) -> Any:
    """Draw one row per sample: the image, its attribution, and both together; each attribution has its own scale.

    Args:
        images: Samples as ``picture`` takes them; None for tokens, of which only the attribution is shown. Signals
            have no third column.
        maps: As ``attribution`` takes them, one for each sample.
        titles: One for each sample.
        absolute: Show magnitudes without signs.

    Returns:
        The figure.

    Raises:
        ArgumentError: If there is not one title and one image for each map.
    """
    if not len(maps) or len(maps) != len(titles) or (images is not None and len(images) != len(maps)):
        raise ArgumentError.of("titles", list(titles), f"one title and one image for each of the {len(maps)} maps")
    signals = images is None or is_signal(images[0])
    columns = 1 if images is None else 2 if signals else 3
    width, height = (6.5, 1.7) if signals else (7.0, 2.4)
    figure = new_figure(width, height * len(maps) + 0.4)
    for row, line in enumerate(figure.subplots(len(maps), columns, squeeze=False)):
        if images is not None:
            picture(images[row], line[0])
        attribution(maps[row], line[min(1, columns - 1)], absolute=absolute)
        line[0].set_title(shortened(titles[row], 90 // columns), fontsize=9, loc="left")
        if columns == 3 and images is not None:
            _overlay(line[2], images[row], summed_channels(maps[row]), absolute=absolute)
        for axes, heading in zip(line[1:] if row == 0 else (), ("attribution", "both"), strict=False):
            axes.set_title(heading, fontsize=9)
    meaning = "the brighter, the more it matters" if absolute else "orange speaks for it, purple against it"
    figure.supxlabel(f"{meaning}; each row has its own scale", fontsize=8)
    return figure


def activation_overlay(image: Tensor, maps: Sequence[Tensor] | Tensor, titles: Sequence[str]) -> Any:
    """Draw an image and, beside it, the activation maps of neurons over it, all on the same scale.

    Args:
        image: As ``picture`` takes it.
        maps: ``(height, width)`` each, not negative, of the size of the image; ``(length,)`` for a signal.
        titles: One for each map.

    Returns:
        The figure.

    Raises:
        ArgumentError: If there is no map, or not one title for each.
    """
    if not len(maps) or len(maps) != len(titles):
        raise ArgumentError.of("titles", list(titles), f"one title for each of the {len(maps)} maps, at least one")
    figure = new_figure(2.6 * (len(maps) + 1) + 0.8, 3.0)
    first, *others = figure.subplots(1, len(maps) + 1, squeeze=False)[0]
    picture(image, first)
    first.set_title("image", fontsize=9)
    together = torch.cat([finite(m).flatten() for m in maps])
    highest = max(float(together.max()), 1e-12)
    if is_signal(image):
        for axes, values, title in zip(others, maps, titles, strict=True):
            picture(image, axes)
            axes.set_title(shortened(title, 34), fontsize=9)
            active = axes.twinx()
            active.fill_between(range(values.shape[-1]), finite(values).flatten().numpy(), color=PALETTE[1], alpha=0.4)
            active.set_ylim(0, highest)
        others[-1].figure.axes[-1].set_ylabel("activation")
        return figure
    for axes, values, title in zip(others, maps, titles, strict=True):
        shown = _overlay(axes, image, finite(values), absolute=True, limit=highest)
        axes.set_title(shortened(title, 34), fontsize=9)
    figure.colorbar(shown, ax=others, label="activation", shrink=0.8)
    return figure


def filters_before_after(before: Tensor, after: Tensor, axes: Sequence[Any] | None = None) -> Any:
    """Draw a layer's weights before and after, as small images (means over inputs) or a matrix; one scale for both.

    Args:
        before: Weights ``(out, in, height, width)``, or ``(out, in)`` of a linear layer.
        after: The weights later; may have fewer neurons and inputs.
        axes: Two axes; None makes a figure.

    Returns:
        The figure.
    """
    pair = new_figure(8.5, 4.2).subplots(1, 2) if axes is None else axes
    weights = [finite(w) for w in (before, after)]
    grids = [tiled(w) for w in weights]
    limit = max((float(t.nan_to_num().abs().max()) for t in grids if t.numel()), default=0) or 1.0
    for panel, shown, weight, title in zip(pair, grids, weights, ("before", "after"), strict=True):
        drawn = panel.imshow(shown.numpy(), aspect="equal" if weight.ndim > 2 else "auto", **_colors(limit, False))
        panel.set_title(f"{title}: {len(weight)} {'filters' if weight.ndim > 2 else 'neurons'}", fontsize=10)
        if weight.ndim > 2:
            panel.set_xlabel(f"mean over {weight.shape[1]} inputs; first filter top left", fontsize=8)
            panel.set_facecolor("0.8")  # gaps, as white is a weight of zero
            panel.set_xticks([])
            panel.set_yticks([])
        else:
            panel.set_xlabel("input", fontsize=8)
            panel.set_ylabel("neuron", fontsize=8)
    pair[0].figure.colorbar(drawn, ax=list(pair), label="weight", shrink=0.8)
    return pair[0].figure


def maximized_images(images: Sequence[Tensor] | Tensor, titles: Sequence[str]) -> Any:
    """Draw images in [0, 1] side by side, each with a title of one line or several.

    Returns:
        The figure.
    """
    columns = max(min(len(images), _COLUMNS), 1)
    rows = max(-(-len(images) // columns), 1)
    figure = new_figure(max(1.8 * columns, 3), 2.1 * rows)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, image, title in zip(places, images, titles, strict=False):
        picture(image, axes)
        axes.set_title("\n".join(shortened(line, 24) for line in title.splitlines()), fontsize=8)
    for axes in places[len(images) :]:
        axes.axis("off")
    return figure


def _show(axes: Any, values: Tensor, **style: Any) -> Any:
    interpolation = "nearest" if max(values.shape[:2]) <= _SMALL else "antialiased"
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(values.numpy(), interpolation=interpolation, **style)


def _colors(limit: float, absolute: bool) -> dict[str, Any]:
    return {"cmap": MAGNITUDES if absolute else SIGNED, "vmin": 0 if absolute else -limit, "vmax": limit}


def _limit(values: Tensor) -> float:
    """Return the 99th percentile of magnitudes (their maximum if 0): one bright pixel does not darken all others."""
    magnitudes = values.abs().flatten().sort().values
    return float(magnitudes[int(0.99 * (len(magnitudes) - 1))]) or float(magnitudes[-1]) or 1.0


def _overlay(axes: Any, image: Tensor, values: Tensor, *, absolute: bool, limit: float | None = None) -> Any:
    """Draw a map over a grey image, the stronger the less transparent; it is stretched to the image's size.

    Returns:
        The artist of the map, from which a colour bar can be made.
    """
    grey = as_channels(finite(image)).mean(0)[None]
    # Dark purple could not be seen on black.
    picture(grey if absolute else 0.4 + 0.6 * grey, axes, value_range=(0, 1))
    limit = _limit(values) if limit is None else limit
    strength = (values.abs() / limit).clamp(0, 1)
    height, width = image.shape[-2:]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    return _show(axes, values, alpha=(0.15 + 0.7 * strength).numpy(), extent=extent, **_colors(limit, absolute))


_TOP_PICTURES = 8


def neuron_card(card: NeuronCard) -> Any:
    """Draw the card of a neuron: the image made to excite it, the samples that excite it most, and its numbers.

    Returns:
        A matplotlib figure with the parts, of these three, that the card has.
    """
    shown = min(len(card.pictures), _TOP_PICTURES)
    columns = min(max(shown, 1), _TOP_PICTURES // 2)
    widths = [2.6 * (card.maximized is not None), 1.45 * columns * (shown > 0), 2.6 * bool(card.numbers)]
    figure = new_figure(max(sum(widths), 4.0) + 0.2, 3.4)
    figure.suptitle(f"{shortened(card.name, 48)}: {shortened(card.why, 32)}", fontsize=11)
    used = [width for width in widths if width]
    parts = iter(figure.subfigures(1, len(used), width_ratios=used, squeeze=False)[0] if used else ())
    if card.maximized is not None:
        axes = next(parts).subplots()
        picture(card.maximized, axes)
        axes.set_title("made to excite it", fontsize=9)
    if shown:
        part = next(parts)
        part.suptitle("samples that excite it most, and its activation", fontsize=9)
        places = part.subplots(-(-shown // columns), columns, squeeze=False).flatten()
        for place, axes in enumerate(places):
            if place < shown:
                picture(card.pictures[place], axes)
                axes.set_xlabel(f"{float(card.activations[place]):.3g}", fontsize=8)
            else:
                axes.axis("off")
    if card.numbers:
        _table(next(parts).subplots(), card)
    return figure


def _table(axes: Any, card: NeuronCard) -> None:
    axes.axis("off")
    cells = [[shortened(str(name), 34), f"{value:.4g}"] for name, value in card.numbers.items()]
    table = axes.table(cells, loc="center", cellLoc="left", edges="horizontal", colWidths=[0.74, 0.26])
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.2)
