"""Choice of neurons for cards, the cards' contents, and their output to loggers and files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from lightning_neurons.feature_visualization.result import MaximizedActivation
from lightning_neurons.report.figures.images import maximized_images, neuron_card
from lightning_neurons.report.logging.images import keep_cards, keep_picture, show_figure
from lightning_neurons.results.neuron_card import NeuronCard
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.typed import plain
from lightning_neurons.results.whole_file import Place

_TOP_PICTURES = 6


class Chosen(NamedTuple):
    """A neuron, and the reason why it is shown."""

    layer: str
    neuron: int
    why: str


def chosen_neurons(report: NeuronReport, died: Mapping[str, Sequence[int]], each: int) -> list[Chosen]:
    """Choose the most important, the least important and the newly dead neurons, ``each`` of a kind, none twice.

    Args:
        report: A measurement.
        died: By layer, neurons that have died since the one before.
        each: Number of neurons of a kind.

    Returns:
        The neurons, each with the reason why it is shown.
    """
    ranking = [row for row in report.ranking() if not math.isnan(row.score)] if report.scores else []
    kinds = {
        "most important": [(row.layer, row.neuron) for row in ranking],
        "least important": [(row.layer, row.neuron) for row in reversed(ranking)],
        "newly dead": [(layer, neuron) for layer, neurons in died.items() for neuron in neurons],
    }
    chosen: list[Chosen] = []
    for why, neurons in kinds.items():
        new = [pair for pair in neurons if pair not in {(c.layer, c.neuron) for c in chosen}]
        chosen += [Chosen(layer, neuron, why) for layer, neuron in new[:each]]
    return chosen


def neuron_cards(
    maximized: MaximizedActivation,
    chosen: Sequence[Chosen],
    report: NeuronReport | None,
    inputs: Float[Tensor, "image ..."],
) -> tuple[NeuronCard, ...]:
    """Make a card for each neuron.

    Args:
        maximized: Maximised images; the last rows are those of the neurons.
        chosen: The neurons.
        report: A measurement of them; None if there is none.
        inputs: The images that were compared with, as the model takes them.

    Returns:
        The cards, in the order of ``chosen``.
    """
    first = len(maximized.targets) - len(chosen)
    return tuple(_card(maximized, first + place, choice, report, inputs) for place, choice in enumerate(chosen))


def _card(
    maximized: MaximizedActivation, row: int, choice: Chosen, report: NeuronReport | None, inputs: Tensor
) -> NeuronCard:
    activations = maximized.data_activations[row]
    top = activations.argsort(descending=True, stable=True)[:_TOP_PICTURES]
    numbers = {} if report is None else _numbers(report, choice)
    numbers |= {
        "activation reached": float(maximized.activations[row]),
        "largest on the data": float(maximized.data_maximum[row]),
        "99th percentile on the data": float(maximized.data_p99[row]),
    }
    pictures = maximized.range.shown(maximized.range.pictures(inputs[top].float())).clamp(0, 1)
    return NeuronCard(maximized.targets[row], choice.why, numbers, pictures, activations[top], maximized.shown[row])


def _numbers(report: NeuronReport, choice: Chosen) -> dict[str, float]:
    numbers: dict[str, float] = {}
    if choice.layer in report.deadness:
        numbers["deadness"] = float(report.deadness[choice.layer][choice.neuron])
    for name, by_layer in report.scores.items():
        if name in (report.main_criterion, "fisher") and choice.layer in by_layer:
            numbers[name] = float(by_layer[choice.layer][choice.neuron])
    return numbers


def show_maximized(
    loggers: Sequence[Any],
    folder: Place | None,
    maximized: MaximizedActivation,
    count: int,
    step: int,
    name: str,
    apart: str = "",
) -> None:
    """Show the images of the first ``count`` rows in loggers, and keep them in the folder of a run.

    Args:
        loggers: Lightning loggers.
        folder: The folder of the run, or None.
        maximized: The images.
        count: Number of rows to show.
        step: The step to log at.
        name: The name of the figure.
        apart: The suffix of the name in loggers, which other runs may share.
    """
    reached = zip(maximized.targets, maximized.activations.tolist(), maximized.data_maximum.tolist(), strict=True)
    titles = [f"{target}\n{value:.3g} (data: {most:.3g})" for target, value, most in reached][:count]
    figure = maximized_images(maximized.shown[:count], titles)
    show_figure(loggers, name + apart, figure, step)
    if folder is not None:
        caption = "What was made to excite each target, the activation that it reaches, and the largest on the data"
        keep_picture(folder, name, figure, "Activation maximisation", caption)


def show_cards(
    loggers: Sequence[Any],
    folder: Place | None,
    cards: Sequence[NeuronCard],
    step: int,
    group: str,
    apart: str = "",
) -> None:
    """Show cards in loggers, and keep them in the folder of a run; see ``show_maximized``."""
    drawn, places = [], dict[str, int]()
    for card in cards:
        places[card.why] = place = places.get(card.why, 0) + 1
        figure = neuron_card(card)
        show_figure(loggers, f"{group}{apart}/{card.why.replace(' ', '_')}/{place}", figure, step)
        said = {"name": card.name, "why": card.why, "numbers": plain(dict(card.numbers))}
        drawn.append((figure, said))
    if folder is not None:
        keep_cards(folder, drawn, group)
