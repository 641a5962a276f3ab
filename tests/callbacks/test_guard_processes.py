"""Two processes take the same cuts back at the same time, and never hold different weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.two_processes_guard import BATCHES, CASES, EPOCHS, run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been", "ignore:.*taken back")

BACK = ([18, 12, 18, 18, 18, 18], [], [[1, 1, 6]])
KEPT = ([18, 12, 12, 12, 12, 12], [[1, 1, 6]], [])
STORIES = dict.fromkeys(CASES, BACK) | {
    "halve": ([18, 12, 18, 15, 15, 15], [[1, 3, 3]], [[1, 1, 6]]),
    "at the end": ([18, 12, 12, 12, 12, 12], [[1, 1, 6]], []),
    "second falls": KEPT,
    "second is NaN": KEPT,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, as far as they came."""
    folder = tmp_path_factory.mktemp("guard")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_RANK", "NODE_RANK"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    script = [sys.executable, str(ROOT / "tests" / "callbacks" / "two_processes_guard.py"), str(folder)]
    done = subprocess.run(script, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)
    (folder / "output").write_text(done.stdout[-1500:] + done.stderr[-3000:])
    return folder


def found(folder: Path, case: str) -> list[dict[str, Any]]:
    """What each process found."""
    paths = [folder / f"{case}.{rank}.json" for rank in (0, 1)]
    assert all(path.exists() for path in paths), (folder / "output").read_text()
    return [json.loads(path.read_text()) for path in paths]


def test_both_processes_cut_and_take_back_the_same_at_the_same_time(folder):
    for case in CASES:
        for one in found(folder, case):
            assert (one["hidden"], one["made"], one["undone"]) == STORIES[case], case


def test_after_every_batch_and_at_the_end_both_processes_hold_the_same(folder):
    for case in CASES:
        first, second = found(folder, case)
        assert first["same"] == second["same"] == [True] * (EPOCHS * BATCHES + 1), case
        assert first["weights"] == second["weights"], case


def test_right_after_a_roll_back_buffers_agree_as_well(folder):
    for case in (name for name in CASES if STORIES[name] is not KEPT):
        for one in found(folder, case):
            assert one["after"][2], case


def test_what_runs_is_wrapped_again_after_each_cut_and_each_roll_back_and_at_no_other_time(folder):
    for case in CASES:
        changes = [a != b for a, b in zip(STORIES[case][0], STORIES[case][0][1:-1], strict=False)]
        for one in found(folder, case):
            assert one["wrapped"] == [True] * (1 + sum(changes)), case


def test_both_processes_hold_the_metric_of_the_first(folder):
    for case in CASES:
        first, second = found(folder, case)
        assert first["baseline"] == second["baseline"] == (18 / 32 if case in EXACT else 0.75), case
        assert first["step"] == second["step"] == (0.5 if case == "halve" else 1.0), case


EXACT = ("plain", "static", "accumulated", "averaged", "halve")


def test_what_is_solved_for_is_the_same_in_both_processes(folder):
    for case in ("solved", "solved, uneven", "second saw nothing"):
        first, second = found(folder, case)
        assert first["shifts"] == second["shifts"], case
        assert any(value != 0 for shift in first["shifts"]["1"].values() for value in shift), case


@pytest.mark.parametrize("case", ["solved", "solved, uneven"])
def test_what_two_processes_solve_for_is_what_one_does_on_all_the_data(folder, case):
    torch.set_num_threads(1)
    one, (two, _) = run(CASES[case], 1), found(folder, case)
    alone, shared = one["shifts"][1], two["shifts"]["1"]
    assert alone.keys() == shared.keys()
    for name, values in alone.items():
        assert shared[name] == pytest.approx(values, rel=1e-6, abs=1e-6), name
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-6, abs=1e-6)
    assert two["hidden"] == one["hidden"]
