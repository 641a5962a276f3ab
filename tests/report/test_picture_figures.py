"""Pictures show the pictures that they are given."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_neurons.errors import ArgumentError
from lightning_neurons.report.figures import images as picture_figures
from lightning_neurons.report.figures.data import tiled
from lightning_neurons.report.figures.drawing import new_figure
from lightning_neurons.report.figures.images import neuron_card
from lightning_neurons.results.neuron_card import NeuronCard
from tests.tables import for_each

HOSTILE = ["_$x_$", "<script>", "y" * 200]
SHAPES = {
    "grey": (1, 8, 8), "plain": (8, 8), "colours": (3, 8, 9), "many channels": (7, 8, 9), "volume": (1, 5, 8, 9),
    "line": (40,), "signal": (3, 60), "one value": (1,), "large": (3, 224, 224), "one pixel": (1, 1, 1),
}  # fmt: skip


def digits(count=4) -> torch.Tensor:
    return torch.tensor(load_digits().images[:count], dtype=torch.float32).unsqueeze(1) / 16


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def card(pictures=10, maximized=True, **numbers: float) -> NeuronCard:
    made = digits(1)[0] if maximized else None
    return NeuronCard("net.conv2 7", "most important", numbers, digits(pictures), torch.arange(pictures, 0, -1.0), made)


def every_picture_figure():
    images = digits()
    return [
        picture_figures.saliency_rows(images, noise(4, 1, 8, 8), ["a", "b", "c", "d"]),
        picture_figures.saliency_rows(None, noise(2, 9), ["a", "b"]),
        picture_figures.activation_overlay(images[0], noise(2, 8, 8).relu(), ["before", "after"]),
        picture_figures.filters_before_after(noise(5, 3, 3, 3), noise(4, 3, 3, 3)),
        picture_figures.maximized_images(images, ["a", "b", "c", "d"]),
        neuron_card(card(deadness=0.5)),
    ]


def shown(axes) -> torch.Tensor:
    return torch.as_tensor(np.ma.filled(axes.images[0].get_array(), np.nan)).double()


def axes_of():
    return new_figure(3, 3).subplots()


@for_each("bad", [None, math.nan, math.inf])
@for_each("name", SHAPES)
def test_samples_of_any_form_and_their_attributions_are_drawn(name, bad):
    values = noise(*SHAPES[name])
    if bad is not None:
        values.flatten()[0] = bad
    for draw in (
        picture_figures.picture,
        picture_figures.attribution,
        lambda v, axes: picture_figures.attribution(v, axes, absolute=True),
    ):
        axes = axes_of()
        assert draw(values, axes) is axes
        axes.figure.draw_without_rendering()
    for absolute in (False, True):
        picture_figures.saliency_rows([values], [values], ["a"], absolute=absolute).draw_without_rendering()


def test_pictures_are_the_values():
    grey, colours = digits(1)[0], noise(3, 5, 6).sigmoid()
    assert torch.equal(shown(picture_figures.picture(grey, axes_of())), grey[0].double())
    assert torch.equal(shown(picture_figures.picture(grey[0], axes_of())), grey[0].double())
    assert torch.allclose(shown(picture_figures.picture(colours, axes_of())), colours.movedim(0, -1).double())
    five = noise(5, 5, 6).sigmoid()
    assert torch.allclose(shown(picture_figures.picture(five, axes_of())), five.mean(0).double())
    volume = noise(1, 7, 5, 6).sigmoid()
    assert torch.equal(shown(picture_figures.picture(volume, axes_of())), volume[0, 3].double())
    scaled = picture_figures.picture(4 * grey - 2, axes_of(), value_range=(-2, 2))
    assert torch.allclose(shown(scaled), grey[0].double())


def test_signals_are_lines():
    signal = noise(3, 60)
    lines = picture_figures.picture(signal, axes_of()).lines
    assert [line.get_ydata().tolist() for line in lines] == signal.tolist()


def test_an_attribution_is_summed_over_channels_with_zero_in_the_middle():
    values = noise(3, 8, 9)
    image = picture_figures.attribution(values, axes_of()).images[0]
    assert torch.allclose(torch.as_tensor(image.get_array().data), values.sum(0))
    low, high = image.get_clim()
    assert low == -high
    assert (values.sum(0).abs() <= high).float().mean() >= 0.95
    magnitudes = picture_figures.attribution(values, axes_of(), absolute=True).images[0]
    assert torch.allclose(torch.as_tensor(magnitudes.get_array().data), values.sum(0).abs())
    assert magnitudes.get_clim() == (0, high)


def test_tokens_are_bars_in_colours_by_sign():
    values = torch.tensor([1.0, -2.0, 0.5])
    bars = picture_figures.attribution(values, axes_of()).patches
    assert [bar.get_height() for bar in bars] == values.tolist()
    assert bars[0].get_facecolor() == bars[2].get_facecolor() != bars[1].get_facecolor()


def test_an_attribution_of_nothing_is_the_colour_of_zero():
    image = picture_figures.attribution(torch.zeros(1, 8, 8), axes_of()).images[0]
    assert image.get_clim() == (-1, 1)


def test_rows_have_the_picture_the_attribution_and_both():
    images, maps = digits(2), noise(2, 1, 4, 4)
    figure = picture_figures.saliency_rows(images, maps, HOSTILE[:2])
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    assert figure.axes[3].get_title(loc="left") == "<script>"
    both = figure.axes[5].images
    assert torch.allclose(torch.as_tensor(both[0].get_array().data), 0.4 + 0.6 * images[1, 0]), "light"
    assert torch.equal(torch.as_tensor(both[1].get_array().data), maps[1, 0])
    assert both[1].get_extent() == [-0.5, 7.5, 7.5, -0.5], "a smaller map is stretched"
    assert len(picture_figures.saliency_rows(noise(2, 50), noise(2, 50), ["a", "b"]).axes) == 4
    assert len(picture_figures.saliency_rows(None, noise(2, 9), ["a", "b"]).axes) == 2


def test_maps_share_one_scale():
    maps = [torch.full((8, 8), 2.0), torch.rand(8, 8)]
    figure = picture_figures.activation_overlay(digits(1)[0], maps, HOSTILE[:2])
    figure.draw_without_rendering()
    assert [axes.images[1].get_clim() for axes in figure.axes[1:3]] == [(0, 2), (0, 2)]
    assert figure.axes[-1].get_ylabel() == "activation"
    picture_figures.activation_overlay(digits(1)[0], [torch.zeros(8, 8)], ["dead"]).draw_without_rendering()


def test_where_a_neuron_is_active_in_a_signal_is_drawn():
    signal, maps = noise(3, 60), noise(2, 60).relu()
    figure = picture_figures.activation_overlay(signal, maps, ["a", "b"])
    figure.draw_without_rendering()
    active = [axes for axes in figure.axes if axes.collections]
    assert [axes.get_ylim() for axes in active] == [(0, pytest.approx(float(maps.max())))] * 2
    assert all(line.get_ydata().tolist() == signal[0].tolist() for line in [axes.lines[0] for axes in figure.axes[:3]])
    assert figure.axes[-1].get_ylabel() == "activation"


@for_each("titles", [[], ["a"], ["a", "b", "c"]])
def test_a_wrong_number_of_titles_is_refused(titles):
    with pytest.raises(ArgumentError, match=r"titles=\[.*one title and one image for each of the 2 maps"):
        picture_figures.saliency_rows(digits(2), noise(2, 1, 8, 8), titles)
    with pytest.raises(ArgumentError, match=r"titles=\[.*one title for each of the 2 maps"):
        picture_figures.activation_overlay(digits(1)[0], noise(2, 8, 8).relu(), titles)


@for_each("filters", [1, 5, 16, 200])
def test_filters_lie_row_by_row(filters):
    weight = noise(filters, 2, 3, 4)
    grid, columns = tiled(weight), math.ceil(math.sqrt(filters))
    for place in range(filters):
        row, column = divmod(place, columns)
        assert torch.equal(grid[4 * row : 4 * row + 3, 5 * column : 5 * column + 4], weight[place].mean(0))
    assert int(grid.isfinite().sum()) == filters * 12


@for_each("before, after", [((5, 3, 3, 3), (2, 2, 3, 3)), ((6, 4), (3, 2)), ((4, 1, 5), (4, 1, 5)),
                                           ((4, 2, 3, 3, 3), (1, 1, 3, 3, 3)), ((2, 1, 1, 1), (0, 1, 1, 1)),
                                           ((2, 3), (0, 3)), ((2048, 2, 3, 3), (1, 2, 3, 3))])  # fmt: skip
def test_filters_before_and_after_share_one_scale_around_zero(before, after):
    figure = picture_figures.filters_before_after(3 * noise(*before), noise(*after))
    figure.draw_without_rendering()
    first, second = (axes.images[0].get_clim() for axes in figure.axes[:2])
    assert first == second
    assert first[0] == -first[1]
    word = "filters" if len(before) > 2 else "neurons"
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        f"before: {before[0]} {word}",
        f"after: {after[0]} {word}",
    ]
    pair = new_figure(6, 3).subplots(1, 2)
    assert picture_figures.filters_before_after(noise(*before), noise(*after), pair) is pair[0].figure


@for_each("count", [0, 1, 6, 8])
def test_maximized_pictures_have_their_titles(count):
    titles = [f"conv {i}" for i in range(count)]
    figure = picture_figures.maximized_images(digits(count), titles)
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes if axes.images] == titles


@for_each("pictures", [0, 1, 3, 10])
@for_each("maximized", [True, False])
@for_each("numbers", [{}, {"deadness": 0.25, "$n$": math.nan}])
def test_a_card_has_what_is_known_of_the_neuron(pictures, maximized, numbers):
    figure = neuron_card(card(pictures, maximized, **numbers))
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "net.conv2 7: most important"
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == min(pictures, 8) + maximized
    assert maximized == any(axes.get_title() == "made to excite it" for axes in drawn)
    values = [axes.get_xlabel() for axes in drawn if axes.get_xlabel()]
    assert values == [f"{pictures - i}" for i in range(min(pictures, 8))]
    cells = [cell.get_text().get_text() for axes in figure.axes for t in axes.tables for cell in t.get_celld().values()]
    assert cells == (["deadness", "0.25", r"\$n\$", "nan"] if numbers else [])


@for_each("name", HOSTILE)
def test_names_on_a_card_are_shown_as_they_are(name):
    made = NeuronCard(name, name, {name: 1.0}, digits(2), torch.ones(2), digits(1)[0])
    neuron_card(made).draw_without_rendering()
    picture_figures.maximized_images(digits(1), [name]).draw_without_rendering()
