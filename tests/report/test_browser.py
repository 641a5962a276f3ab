"""The demo's TensorBoard, started for real and looked at in a browser. Collected where a browser is installed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import look
from tests.report.served import fetch, serving

LAYERS = ("net.conv1", "net.conv2", "net.fc1", "net.fc2")


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard that shows a run of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    run = [sys.executable, "-m", "lightning_neurons", "demo", "--epochs", "3", "--output_dir", "neurons_demo"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(run, cwd=folder, env=environment, capture_output=True, check=True)
    with serving(folder, "neurons_demo", "text") as address:
        yield address


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures go: LIGHTNING_NEURONS_PICTURES, if somebody wants to keep them."""
    folder = Path(os.environ.get("LIGHTNING_NEURONS_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_tensorboard_serves_histograms_of_every_layer_and_the_text_page(tensorboard: str) -> None:
    (histograms,) = fetch(f"{tensorboard}/data/plugin/histograms/tags").values()
    for layer in LAYERS:
        assert {f"scores/gradient/{layer}", f"deadness/near_zero/{layer}", f"magnitudes/{layer}"} <= set(histograms)
    assert list(fetch(f"{tensorboard}/data/plugin/text/tags").values()) == [["neurons/ranking/text_summary"]]
    (run,) = fetch(f"{tensorboard}/data/runs")
    steps = fetch(f"{tensorboard}/data/plugin/histograms/histograms?run={run}&tag=magnitudes/net.conv1")
    assert len(steps) == 3, "one histogram per epoch"


def test_the_histograms_are_drawn(tensorboard: str, pictures: Path, tmp_path: Path) -> None:
    words = [f"scores/gradient/{layer}" for layer in LAYERS]
    url = f"{tensorboard}/#histograms&tagFilter=scores%2Fgradient"
    text, curves = look(url, words, pictures / "histograms.png", tmp_path / "browser")
    assert [word for word in words if word not in text] == []
    assert curves >= 3 * len(LAYERS), "three epochs of each layer"
    assert (pictures / "histograms.png").stat().st_size > 20_000


def test_the_distribution_of_magnitudes_is_drawn(tensorboard: str, pictures: Path, tmp_path: Path) -> None:
    words = [f"magnitudes/{layer}" for layer in LAYERS]
    url = f"{tensorboard}/#histograms&tagFilter=magnitudes"
    text, curves = look(url, words, pictures / "magnitudes.png", tmp_path / "browser")
    assert [word for word in words if word not in text] == []
    assert curves >= 3 * len(LAYERS)


def test_the_text_page_is_shown(tensorboard: str, pictures: Path, tmp_path: Path) -> None:
    words = ["Layers", *LAYERS, "Ranking of all neurons by taylor", "Deadness by threshold", "samples"]
    text, _ = look(f"{tensorboard}/#text", words, pictures / "text.png", tmp_path / "browser")
    assert [word for word in words if word not in text] == []
    assert "| ---" not in text, "tables are drawn as tables"
    assert (pictures / "text.png").stat().st_size > 20_000
