"""TensorBoard with the pictures of a run, looked at in a browser. Collected where a browser is installed."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_neurons import ActivationMaximizationCallback, NeuronSensitivityCallback, SaliencyCallback
from lightning_neurons.demo import DigitsModule, digits
from lightning_neurons.report.logging.tags import LAYOUT
from tests.callbacks.modules import trainer_of
from tests.report.browser import Page, visit
from tests.report.served import fetch, serving

TAGS = ("figures/importance", "saliency", "maximization", "cards/most_important/1", "cards/least_important/1")

# Sizes of all images that are loaded, also in shadow roots.
_SIZES = """JSON.stringify((function collect(node) {
  const inside = [...(node.shadowRoot ? [node.shadowRoot] : []), ...(node.childNodes || [])];
  const own = node.nodeName === "IMG" && node.complete ? [[node.naturalWidth, node.naturalHeight]] : [];
  return own.concat(...inside.map(collect));
})(document.body))"""


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard that shows a short run on digits."""
    folder = tmp_path_factory.mktemp("pictures")
    callbacks = [SaliencyCallback(max_samples=4), ActivationMaximizationCallback(steps=8, cards=1, max_samples=32),
                 NeuronSensitivityCallback(max_figures=2, max_samples=64)]  # fmt: skip
    L.seed_everything(0, verbose=False)
    train, val = digits()
    logger = TensorBoardLogger(folder / "runs", name=None)
    trainer_of(callbacks, logger=logger, max_epochs=2, limit_val_batches=2).fit(DigitsModule(), train, val)
    with serving(folder, "runs", "images") as address:
        yield address


def test_every_picture_is_served(tensorboard: str) -> None:
    (found,) = fetch(f"{tensorboard}/data/plugin/images/tags").values()
    assert {*found} >= {*TAGS, "figures/importance_by_layer"}
    assert len([tag for tag in found if tag.startswith("figures/")]) == 2


@pytest.mark.parametrize("group", ["figures", "saliency", "cards"])
def test_pictures_are_really_shown(tensorboard: str, tmp_path: Path, group: str) -> None:
    words = [tag for tag in TAGS if tag.startswith(group)]

    async def steps(page: Page) -> tuple[str, list[list[int]]]:
        await page.watch()
        await page.call("Page.navigate", url=f"{tensorboard}/#images&tagFilter={group}")
        text, _ = await page.text_with(words)
        sizes, end = [], time.monotonic() + 40
        while time.monotonic() < end and len(sizes) < len(words):
            sizes = [size for size in json.loads(await page.evaluate(_SIZES)) if min(size) > 0]
            await asyncio.sleep(0.3)
        await page.picture(tmp_path / f"{group}.png")
        return text, sizes

    text, sizes = visit(steps, tmp_path / "browser")
    assert [word for word in words if word not in text] == []
    assert len(sizes) >= len(words)
    assert all(min(size) > 100 for size in sizes)


def test_the_page_of_charts_has_their_titles_and_draws_curves(tensorboard: str, tmp_path: Path) -> None:
    words = ["dead", "dormant", "effective number of important neurons", *LAYOUT]

    async def steps(page: Page) -> tuple[str, int]:
        await page.call("Page.navigate", url=f"{tensorboard}/#custom_scalars")
        found = await page.text_with(words)
        await page.picture(tmp_path / "charts.png")
        return found

    text, _ = visit(steps, tmp_path / "browser")
    assert [word for word in words if word not in text] == []
