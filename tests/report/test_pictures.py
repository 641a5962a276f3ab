"""The pictures and the table show the numbers of the report, no others."""

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from lightning_neurons import ActivationStatisticsCallback, NeuronReport, NeuronSensitivityCallback, measure
from lightning_neurons.metrics import histogram
from lightning_neurons.report.console.tables import print_report
from lightning_neurons.report.logging.loggers import log_magnitudes
from lightning_neurons.report.numbers import layer_rows
from tests.callbacks.modules import LAYERS, Plain, fit, loader


@pytest.fixture(scope="module")
def report() -> NeuronReport:
    torch.manual_seed(0)
    module = Plain()
    module.net.norm1.bias.data = torch.tensor([-100.0, 1.0, -100.0, 1.0])
    return measure(module, loader(48), loss_fn=Plain.loss)


def shown(report: NeuronReport, history: Any = None) -> str:
    console = Console(record=True, width=120, file=io.StringIO())
    print_report(report, history, console)
    return console.export_text()


def cells(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if re.match(rf"│ {re.escape(name)} ", line))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_console_table_shows_the_numbers_of_the_report(report):
    text = shown(report)
    for layer in LAYERS:
        ranked = [n.neuron for n in report.ranking(layer=layer)]
        scores = report.importance()[layer].sort(descending=True).values
        top = -(-len(scores) // 10)
        assert cells(text, layer) == [
            layer, str(len(scores)), str(int(report.dead(layer).sum())), str(int(report.dormant(layer).sum())),
            " ".join(map(str, ranked[:3])), " ".join(map(str, ranked[::-1][:3])),
            f"{float(scores[:top].sum() / scores.sum()):.0%}",
        ]  # fmt: skip
    assert cells(text, "net.conv1")[2] == "2", "two neurons were switched off"


def test_the_last_line_of_the_table_is_the_sum_of_all(report):
    total = cells(shown(report), "all layers")
    neurons, dead, dormant = (sum(int(cells(shown(report), layer)[i]) for layer in LAYERS) for i in (1, 2, 3))
    assert total[1:4] == [str(neurons), str(dead), str(dormant)]


def test_the_console_says_what_the_numbers_rest_on(report):
    text = " ".join(shown(report).split())
    assert "measured on 48 samples" in text
    assert "fired in none of 48 samples, so in fewer than 6.25% of all (95 % confidence)" in text


def test_the_console_says_what_has_changed(capsys):
    callback = NeuronSensitivityCallback()
    fit(Plain(), [callback], max_epochs=2)
    entry = callback.history.entries[-1]
    died, revived = (sum(map(len, found.values())) for found in (entry.died, entry.revived))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Since the measurement before: {died} died, {revived} revived" in printed
    assert f"rank stability {entry.mean_stability:.2f}" in printed
    assert "Neurons after epoch 1" in printed


def test_a_table_without_sensitivity_has_no_invented_numbers():
    torch.manual_seed(0)
    text = shown(measure(Plain(), loader(16), criteria=["near_zero"]))
    assert cells(text, "net.conv1")[4:] == ["", "", ""]
    assert cells(text, "net.conv1")[3] == "-", "dormancy was not measured"


def test_a_table_without_deadness_has_no_invented_numbers(report):
    torch.manual_seed(0)
    text = shown(measure(Plain(), loader(16), criteria=["rms"]))
    assert cells(text, "net.conv1")[2:4] == ["-", "-"]


def test_names_that_look_like_markup_are_printed_as_they_are():
    net = torch.nn.ModuleDict({"[bold]": torch.nn.Linear(36, 3)})
    loss = lambda m, b: torch.nn.functional.cross_entropy(m["[bold]"](b[0].flatten(1)), b[1])
    text = shown(measure(net, loader(16), loss_fn=loss))
    assert "[bold]" in text


def counts_of(values: torch.Tensor) -> torch.Tensor:
    """Histogram of values, as measured."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    net[0].weight.data.fill_(1.0)
    return measure(net, [values[:, None]], criteria=["near_zero"]).counts["0"].histogram


def test_bars_of_magnitudes_add_up_to_all_values():
    values = torch.cat([torch.randn(500).exp(), torch.zeros(37), torch.tensor([1e-12, 1e12])])
    picture = log_magnitudes(counts_of(values))
    assert sum(picture["bucket_counts"]) == picture["num"] == len(values)
    assert len(picture["bucket_counts"]) == len(picture["bucket_limits"])
    assert picture["bucket_limits"] == sorted(picture["bucket_limits"])


@pytest.mark.parametrize("magnitude", [1e-4, 0.03, 1.0, 1.7, 250.0])
def test_each_magnitude_is_drawn_where_its_logarithm_is(magnitude):
    picture = log_magnitudes(counts_of(torch.full((5,), -magnitude)))
    (count,), (upper,) = picture["bucket_counts"], picture["bucket_limits"]
    log = torch.tensor(magnitude).log10().item()
    assert count == 5
    assert log - 0.01 <= upper <= log + 0.11
    assert picture["min"] == pytest.approx(log, abs=0.01)
    assert picture["max"] == pytest.approx(log, abs=0.01)
    assert picture["sum"] == pytest.approx(5 * log, abs=0.05)
    assert picture["sum_squares"] == pytest.approx(5 * log**2, abs=0.1 + abs(log) * 0.1)


def test_zeros_alone_are_drawn_in_the_lowest_bar():
    picture = log_magnitudes(counts_of(torch.zeros(9)))
    assert picture["bucket_counts"] == [9]
    assert picture["min"] == pytest.approx(torch.tensor(histogram.LOWEST).log10().item(), abs=0.01)


def test_rows_are_in_the_order_of_the_model_and_count_dead_dormant_and_constant(report):
    rows = layer_rows(report, shown=2)
    assert [row.layer for row in rows] == list(LAYERS)
    assert (rows[0].dead, rows[0].dormant, rows[0].constant) == (2, 2, 2)
    assert all(len(row.most) == len(row.least) == 2 for row in rows)


def test_statistics_alone_are_shown_with_the_ends_of_their_ranking(capsys):
    callback = ActivationStatisticsCallback(criteria=["rms", "near_zero"])
    fit(Plain(), [callback])
    printed = capsys.readouterr().out
    assert "importance: rms" in printed
    assert str(callback.report.ranking(layer="net.fc2")[0].neuron) in cells(printed, "net.fc2")[4]
