"""The HTML report in a browser. Collected where one is installed."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_neurons import NeuronReport
from lightning_neurons.report.html.page import write_html
from tests.callbacks.modules import LAYERS
from tests.report.browser import Page, visit
from tests.report.runs import EVIL, fill, fill_with_evil

FIRST = "document.querySelector('#layers table')"
NAMES = f"[...{FIRST}.tBodies[0].rows].map(row => row.cells[0].textContent.trim())"
DEAD = f"{FIRST}.tHead.rows[0].cells[2]"
DEAD_COLUMN = f"[...{FIRST}.tBodies[0].rows].map(row => Number(row.cells[2].dataset.number))"
LOADED = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
COLOURS = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, reports: list[NeuronReport]) -> str:
    """Address of the page of a run with everything."""
    folder = tmp_path_factory.mktemp("run")
    fill(folder, reports)
    return write_html(folder).resolve().as_uri()


def on_page(url: str, tmp_path: Path, steps: Callable[[Page], Any], **options: Any) -> Any:
    """What ``steps`` finds; no errors may have come up until then."""

    async def all_steps(page: Page) -> Any:
        await page.watch()
        await page.open(url, **options)
        found = await steps(page)
        assert await page.evaluate("1 + 1") == 2, "and what was said so far has been heard"
        assert page.troubles == []
        return found

    return visit(all_steps, tmp_path / "browser")


def test_rows_and_pictures_are_there(url, reports, tmp_path):
    async def steps(page: Page) -> None:
        assert await page.evaluate(NAMES) == list(LAYERS)
        places = "[...document.querySelectorAll('#rankings table')].map(table => table.tBodies[0].rows.length)"
        assert await page.evaluate(places) == [min(20, len(reports[1].ranking()))] * 2
        loaded = await page.evaluate(LOADED)
        assert len(loaded) == 27
        assert all(loaded)

    on_page(url, tmp_path, steps)


def test_a_click_sorts_turns_round_and_restores(url, reports, tmp_path):
    dead = [int(reports[1].dead(layer).sum()) for layer in LAYERS]

    async def steps(page: Page) -> None:
        assert await page.evaluate(f"{DEAD}.getAttribute('aria-sort')") == "none"
        for order, expected in (("descending", sorted(dead)[::-1]), ("ascending", sorted(dead)), ("none", dead)):
            place = await page.evaluate(
                f"{DEAD}.scrollIntoView({{block: 'center', behavior: 'instant'}}); "
                f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                f"({DEAD}.querySelector('button').getBoundingClientRect())"
            )
            for kind in ("mousePressed", "mouseReleased"):
                at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
                await page.call("Input.dispatchMouseEvent", type=kind, **at)
            assert await page.evaluate(f"{DEAD}.getAttribute('aria-sort')") == order
            assert await page.evaluate(DEAD_COLUMN) == expected

    on_page(url, tmp_path, steps)


def test_tables_are_sorted_and_filtered_by_keyboard(url, tmp_path):
    async def steps(page: Page) -> None:
        await page.evaluate(f"{FIRST}.tHead.rows[0].cells[0].querySelector('button').focus()")
        await page.press("Enter", 13, "\r")
        await page.press(" ", 32, " ")
        assert await page.evaluate(f"{FIRST}.tHead.rows[0].cells[0].getAttribute('aria-sort')") == "descending"
        assert await page.evaluate(NAMES) == sorted(LAYERS)[::-1]
        await page.evaluate("document.querySelector('#filter').focus()")
        for letter in "CONV":
            await page.press(letter, ord(letter), letter)
        shown = f"[...{FIRST}.tBodies[0].rows].filter(row => row.offsetHeight).length"
        assert await page.evaluate(shown) == 2
        assert await page.evaluate("document.querySelector('[role=status]').textContent") == "2 of 4"

    on_page(url, tmp_path, steps)


def test_a_link_unfolds_the_page_of_a_layer(url, tmp_path):
    folded = "document.querySelectorAll('details:not([open])').length"

    async def steps(page: Page) -> None:
        assert await page.evaluate(folded) == 4
        await page.evaluate(f"{FIRST}.querySelector('a').click()")
        await asyncio.sleep(0.3)  # what follows a link comes later
        assert await page.evaluate("document.querySelector('#layer-0').closest('details').open") is True
        assert await page.evaluate(folded) == 3
        await page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert await page.evaluate(folded) == 0
        await page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert await page.evaluate(folded) == 3

    on_page(url, tmp_path, steps)


def test_dark_colours_follow_the_system_and_the_button(url, tmp_path):
    async def steps(page: Page) -> list[list[str]]:
        found = [await page.evaluate(COLOURS)]
        await page.evaluate("document.querySelector('#theme').click()")
        return [*found, await page.evaluate(COLOURS)]

    light, then_dark = on_page(url, tmp_path / "light", steps)
    dark, then_light = on_page(url, tmp_path / "dark", steps, dark=True)
    assert light == then_light
    assert dark == then_dark
    assert {*light}.isdisjoint(dark)


@pytest.mark.parametrize("width", [320, 400, 800, 1400])
def test_the_page_is_never_wider_than_the_window(url, tmp_path, width):
    async def steps(page: Page) -> None:
        await page.evaluate("document.querySelectorAll('details').forEach(page => { page.open = true; })")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        over = "[...document.images].filter(i => i.getBoundingClientRect().right > innerWidth).length"
        assert await page.evaluate(over) == 0

    on_page(url, tmp_path, steps, width=width, height=850)


def test_names_that_look_like_scripts_are_text_and_do_nothing(tmp_path):
    fill_with_evil(tmp_path / "run")

    async def steps(page: Page) -> None:
        assert await page.evaluate(NAMES) == [EVIL]
        assert await page.evaluate("document.scripts.length") == 1
        assert all(await page.evaluate(LOADED))

    on_page(write_html(tmp_path / "run").resolve().as_uri(), tmp_path, steps)


def test_no_other_script_can_run(url, tmp_path):
    add = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"

    async def steps(page: Page) -> tuple[Any, list[str]]:
        await page.evaluate(f"(() => {{ {add} }})()")
        found = await page.evaluate("window.ran === undefined")
        said, page.troubles = page.troubles, []
        return found, said

    stopped, said = on_page(url, tmp_path, steps)
    assert stopped is True
    assert "Content Security Policy" in " ".join(said)
