"""Pages are looked at where a browser is installed; folders of runs for them."""

from pathlib import Path

import pytest

from lightning_neurons import NeuronReport
from lightning_neurons.report.html import page
from tests.report.browser import BROWSER
from tests.report.runs import two_reports

collect_ignore = [] if BROWSER else ["test_browser.py", "test_browser_pictures.py", "test_html_browser.py"]


@pytest.fixture(scope="module")
def reports() -> list[NeuronReport]:
    return two_reports()


@pytest.fixture
def bare(tmp_path: Path, reports: list[NeuronReport]) -> Path:
    """The folder of a run with nothing but a report."""
    reports[1].save(tmp_path / "version_0" / "neurons.json")
    return tmp_path / "version_0"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "can_draw", lambda: False)
