"""The HTML report: what it shows, and what it must never do."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lightning_neurons import ArgumentError, NeuronReport, measure
from lightning_neurons.report.html.page import write_html
from lightning_neurons.report.numbers import layer_rows
from tests.callbacks.modules import LAYERS, Plain, loader
from tests.report.runs import ALWAYS, EVIL, Read, fill, fill_with_evil


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, reports: list[NeuronReport]) -> str:
    """The page of a run with everything."""
    folder = tmp_path_factory.mktemp("full")
    fill(folder, reports)
    return write_html(folder).read_text(encoding="utf-8")


@pytest.fixture
def found(everything: str) -> Read:
    return Read(everything)


def read(folder: Path) -> Read:
    return Read(write_html(folder).read_text(encoding="utf-8"))


def sections(found: Read) -> list[str]:
    return found.all("section", "id")


def test_a_report_alone_makes_a_page_with_the_sections_that_have_data(bare):
    assert write_html(bare) == bare / "report.html"
    found = read(bare)
    assert sections(found) == ALWAYS
    assert found.all("a", "href")[1 : 1 + len(ALWAYS)] == [f"#{place}" for place in ALWAYS]


def test_everything_in_the_folder_has_its_section(found):
    assert sections(found) == [
        "overview", "layers", "rankings", "deadness", "cards", "pictures", "ablation", "pruning", "classes", "pages",
        "settings",
    ]  # fmt: skip
    assert found.open == [], "all that is opened is closed"
    assert "What excites net.conv2 3 most (most important)" in found.all("img", "alt")
    assert "2 (taken back)" in found.text("th")
    assert "2.13.0" in found.text("dd")


def test_the_page_shows_the_numbers_of_the_report(found, reports):
    tiles = dict(zip(found.text("dt"), found.text("dd")[::2], strict=False))
    assert tiles["neurons"] == "21"
    assert found.text("a")[1 + len(sections(found)) :][:4] == list(LAYERS)
    first = layer_rows(reports[1])[0]
    assert " ".join(map(str, first.most)) in found.text("td")
    assert any("2 never fired" in alt for alt in found.all("img", "alt"))
    assert "2, 0" in found.text("dd"), "two died, none revived"
    assert "fires in fewer than 6.2 % of all samples (95 % confidence)" in found.text("dd")


def test_ids_are_unique_and_every_link_leads_somewhere(found):
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    assert {link.removeprefix("#") for link in found.all("a", "href")} <= {*ids}
    assert {*found.all("section", "aria-labelledby")} <= {*ids}


def test_every_picture_is_inside_and_says_what_it_shows(found):
    pictures = found.all("img", "src")
    assert len(pictures) == 4 * 5 + 2 + 3 + 2, "five of each layer, the lists', and those of the run"
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    alts = found.all("img", "alt")
    assert len(alts) == len(pictures)
    assert all(len(alt) > 10 for alt in alts)
    assert "nan" not in " ".join(alts)


def test_nothing_is_loaded_from_anywhere(everything, found):
    assert [tag for tag, _ in found.elements if tag in {"link", "iframe", "object", "embed", "base", "form"}] == []
    assert found.all("script", "src") == []
    assert re.findall(r"url\(|https?://|@import", everything) == []
    (policy,) = (value for value in found.all("meta", "content") if "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert [attributes for _, attributes in found.elements if {"style", "onclick"} & {*attributes}] == []


def test_headings_go_down_one_by_one_and_tables_name_what_they_hold(found):
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    tags = [tag for tag, _ in found.elements]
    assert tags.count("caption") == tags.count("table") > 0
    assert [a for tag, a in found.elements if tag == "th" and a.get("scope") not in {"row", "col"}] == []


def test_names_of_the_model_are_text_wherever_they_stand(tmp_path):
    fill_with_evil(tmp_path)
    found = read(tmp_path)
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert found.open == []
    assert found.text("h3").count(EVIL) == 2, "the layer and the card"
    assert any(EVIL in alt for alt in found.all("img", "alt"))
    assert {"cards", "pictures", "ablation", "pruning", "notes"} <= {*sections(found)}


def test_without_matplotlib_the_page_has_no_figures_and_says_how_to_get_them(tmp_path, reports, no_figures):
    fill(tmp_path, reports)
    found = read(tmp_path)
    assert len(found.all("img", "src")) == 2, "only those that lie in the folder"
    assert any("pip install 'lightning_neurons[figures]'" in line for line in found.text("p"))
    assert {*ALWAYS, "ablation", "pruning"} <= {*sections(found)}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, scores={}),
        lambda r: replace(r, deadness_by={}),
        lambda r: replace(r, scores={}, deadness_by={}, epoch=None, step=None, settings={}, refused={}),
        lambda r: replace(r, counts={}, scores={}, deadness_by={}, layers=()),
        lambda r: replace(r, scores={"gradient": {n: s * math.nan for n, s in r.scores["gradient"].items()}}),
        lambda r: replace(r, scores={"gradient": {n: s * math.inf for n, s in r.scores["gradient"].items()}}),
    ],
)
def test_what_was_not_measured_is_not_invented(tmp_path, reports, change: Callable[[NeuronReport], NeuronReport]):
    change(reports[1]).save(tmp_path / "neurons.json")
    found = read(tmp_path)
    assert sections(found)[0] == "overview"
    assert [text for _, text in found.texts if re.search(r"\bnan\b", text)] == []


def test_statistics_without_histograms_are_shown(tmp_path):
    torch.manual_seed(0)
    measure(Plain(), loader(16), criteria=["rms"]).save(tmp_path / "neurons.json")
    found = read(tmp_path)
    assert {"layers", "rankings", "pages"} <= {*sections(found)}
    assert len(found.all("img", "src")) == 4 + 1, "bars of each layer, and all layers"


def test_the_page_is_the_same_every_time(tmp_path, everything, reports):
    folder = tmp_path / re.search("<title>Neurons of (.*)</title>", everything)[1]
    fill(folder, reports)
    assert write_html(folder).read_text(encoding="utf-8") == everything


def test_the_page_is_not_large(everything, found):
    assert len(everything) < 100_000 + 16_000 * len(found.all("img", "src"))


def test_another_path_can_be_given_and_one_that_cannot_be_written_is_named(bare, tmp_path, no_figures):
    assert write_html(bare, tmp_path / "new" / "page.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"path='.*file.report\.html' is not allowed"):
        write_html(bare, tmp_path / "file" / "report.html")
    assert not list(bare.glob(".report*")), "nothing half done is left"
