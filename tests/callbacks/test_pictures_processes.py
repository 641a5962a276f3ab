"""Two processes make pictures of the data of both, end with the same, and the first alone writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.modules import dataset
from tests.callbacks.pictured import place_of
from tests.callbacks.test_studies_processes import flat
from tests.callbacks.two_processes_pictures import CASES

ROOT = Path(__file__).parents[2]
WRITTEN = {
    "saliency": {"pictures/saliency.png", "pictures/pictures.json"},
    "maximization": {
        "pictures/maximization.png", "pictures/pictures.json", "pictures/cards.json", "neurons.json", "history.json",
        "report.html", *(f"pictures/cards-{n}.png" for n in range(4)),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one and two processes wrote, as far as they came."""
    found = {}
    script = str(ROOT / "tests" / "callbacks" / "two_processes_pictures.py")
    for processes in (1, 2):
        found[processes] = folder = tmp_path_factory.mktemp(f"pictures{processes}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_RANK", "NODE_RANK"))}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
        done = subprocess.run(
            [sys.executable, script, str(folder), str(processes)], env=environment, cwd=folder, capture_output=True,
            text=True, timeout=240, check=False,
        )  # fmt: skip
        (folder / "output").write_text(done.stdout[-1500:] + done.stderr[-3000:])
    return found


def of(folders: dict[int, Path], processes: int, case: str, rank: int = 0) -> dict[str, Any]:
    path = folders[processes] / f"{case}.{rank}.json"
    assert path.exists(), (folders[processes] / "output").read_text()
    return json.loads(path.read_text())


def test_both_processes_end_with_the_same_pictures(folders):
    for case in CASES:
        first, second = (of(folders, 2, case, rank)["found"] for rank in (0, 1))
        assert first == second, case
        assert first, case


def test_the_first_process_alone_writes(folders):
    for case in WRITTEN:
        for processes in (1, 2):
            found = of(folders, processes, case)
            assert {*found["written"]} == WRITTEN[case], case
            assert found["events"] == 1, case


def rows_of(found: dict[str, Any]) -> list[int]:
    """Which samples of the data were shown; labels belong to them."""
    data, labels = dataset(24, seed=1).tensors
    rows = [place_of(torch.tensor(one).float(), data) for one in found["inputs"]]
    assert all(len(row) == 1 for row in rows)
    assert [labels[row].item() for row in rows] == found["targets"]
    return [row for (row,) in rows]


def test_pictures_of_both_processes_are_shown(folders):
    for case, count in (("saliency", 8), ("saliency, odd", 5)):
        found = of(folders, 2, case)["found"]
        rows = rows_of(found)
        assert len({*rows}) == count, case
        labels = dataset(24, seed=1).tensors[1]
        halves = [row % 2 for row in rows] if case == "saliency" else [int(labels[row]) == 2 for row in rows]
        assert 0 < sum(halves) < count, case


def test_one_that_saw_nothing_shows_what_the_other_saw(folders):
    one, two = (of(folders, processes, "saliency, one saw nothing")["found"] for processes in (1, 2))
    assert len(rows_of(two)) == 3, "half of them in each process"
    assert len(rows_of(one)) == 6


def test_maximization_compares_with_the_data_of_both(folders):
    for case, rows in (("maximization", 7), ("maximization, validate", 2)):
        one, two = (of(folders, processes, case)["found"] for processes in (1, 2))
        assert [len(row) for row in two["data"]] == [24] * rows
        assert two["targets"] == one["targets"]
        for ours, theirs in zip(two["data"], one["data"], strict=True):
            assert sorted(ours) == pytest.approx(sorted(theirs), abs=1e-6)
        assert len(two["images"]) == rows


def test_cards_are_those_of_one_process(folders):
    one, two = (of(folders, processes, "maximization")["found"]["cards"] for processes in (1, 2))
    assert [(card["name"], card["why"]) for card in two] == [(card["name"], card["why"]) for card in one]
    for ours, theirs in zip(two, one, strict=True):
        reached = "activation reached"
        measured = [{k: v for k, v in card["numbers"].items() if k != reached} for card in (ours, theirs)]
        assert measured[0] == pytest.approx(measured[1], abs=1e-6)
        assert ours["numbers"][reached] == pytest.approx(theirs["numbers"][reached], abs=0.05)
        assert ours["activations"] == pytest.approx(theirs["activations"], abs=1e-6)
        for place, activation in enumerate(theirs["activations"]):
            if activation > 0:  # where it is silent, any sample will do
                assert flat(ours["pictures"][place]) == pytest.approx(flat(theirs["pictures"][place]), abs=1e-6)


def test_a_failure_in_the_first_process_costs_both_one_epoch(folders):
    first, second = (of(folders, 2, "fails", rank) for rank in (0, 1))
    assert first["found"] == second["found"]
    assert len(first["found"]["maps"]) == 8, "epoch 1 was measured"
    assert any("epoch 0 was not measured" in message and "not here" in message for message in first["told"])
