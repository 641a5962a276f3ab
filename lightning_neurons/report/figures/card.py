"""Card of a neuron, as a figure."""

from typing import Any

from lightning_neurons.report.figures.drawing import new_figure, shortened
from lightning_neurons.report.figures.images import picture
from lightning_neurons.results.neuron_card import NeuronCard

_TOP_PICTURES = 8


def neuron_card(card: NeuronCard) -> Any:
    """Draw the card of a neuron: the image made to excite it, the samples that excite it most, and its numbers."""
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
