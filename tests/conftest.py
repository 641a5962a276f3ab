"""One thread, fixed seeds, and the paths of optional real data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import shape_checks
import torch

from tests.tables import seed

shape_checks.install("lightning_neurons")

REAL_DATA = Path(os.environ.get("LIGHTNING_NEURONS_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    seed()
    with torch.random.fork_rng():
        yield


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Trainer writes goes away with the test."""
    monkeypatch.chdir(tmp_path)
