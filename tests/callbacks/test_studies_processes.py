"""Two processes find in a study what one process finds, and both know it; a failure of one is known to both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.callbacks.two_processes_studies import CASES

ROOT = Path(__file__).parents[2]
SAME_ORDER = ["ablation, one saw nothing", "ablation, uneven"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one and two processes wrote, as far as they came."""
    found, running = {}, []
    script = str(ROOT / "tests" / "callbacks" / "two_processes_studies.py")
    for processes in (1, 2):
        found[processes] = folder = tmp_path_factory.mktemp(f"studies{processes}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_RANK", "NODE_RANK"))}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
        running.append(subprocess.run(
            [sys.executable, script, str(folder), str(processes)], env=environment, cwd=folder, capture_output=True,
            text=True, timeout=240, check=False,
        ))  # fmt: skip
        (folder / "output").write_text(running[-1].stdout[-1500:] + running[-1].stderr[-3000:])
    return found


def of(folders: dict[int, Path], processes: int, case: str, rank: int = 0) -> dict[str, Any]:
    path = folders[processes] / f"{case}.{rank}.json"
    assert path.exists(), (folders[processes] / "output").read_text()
    return json.loads(path.read_text())


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Every number of a nested value, by its place."""
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in flat(one, f"{where}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, one in enumerate(value) for k, v in flat(one, f"{where}.{i}").items()}
    return {where: value}


def test_both_processes_know_the_same(folders):
    for case in CASES:
        first, second = (of(folders, 2, case, rank)["found"] for rank in (0, 1))
        assert first == second, case
        assert first, case


def test_two_processes_measure_what_one_does_on_the_same_samples_in_the_same_order(folders):
    for case in SAME_ORDER:
        one, two = flat(of(folders, 1, case)["found"]), flat(of(folders, 2, case)["found"])
        assert one.keys() == two.keys(), case
        for place, value in one.items():
            assert two[place] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), (case, place)


def test_what_does_not_depend_on_the_order_of_samples_is_the_same_as_in_one_process(folders):
    for case in ("ablation", "ablation, validate"):
        one, two = (of(folders, processes, case)["found"]["report"] for processes in (1, 2))
        assert two["samples"] == one["samples"] == 24, case
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6), case
        for layer, values in one["delta_loss"].items():
            for ours, theirs in zip(two["delta_loss"].get(layer, []), values, strict=True):
                if ours is not None and theirs is not None:
                    assert ours == pytest.approx(theirs, abs=1e-6), case


def test_classes_are_those_of_one_process(folders):
    for case in ("classes", "classes, masking", "classes apart"):
        one, two = (of(folders, processes, case)["found"] for processes in (1, 2))
        assert two["counts"] == one["counts"], case
        assert two["members"] == one["members"], case
        assert flat(two["importance"]) == pytest.approx(flat(one["importance"]), abs=1e-6), case
        ours, theirs = flat(two["accuracies"]), flat(one["accuracies"])
        assert {k: v for k, v in ours.items() if isinstance(v, str)} == {
            k: v for k, v in theirs.items() if isinstance(v, str)
        }
        numbers = {place for place, value in theirs.items() if not isinstance(value, str)}
        assert [ours[place] for place in numbers] == pytest.approx([theirs[place] for place in numbers], abs=1e-6), case


def test_the_first_process_alone_writes(folders):
    for case in CASES:
        first, second = (of(folders, 2, case, rank)["series"] for rank in (0, 1))
        assert first, case
        assert second == [], case


def test_the_predicted_metric_is_over_the_samples_of_both(folders):
    for case, rounds in (("check holds", [1]), ("check refuses", [])):
        for processes, rank in ((1, 0), (2, 0), (2, 1)):
            assert of(folders, processes, case, rank)["found"]["made"] == rounds, case
        one, two = (
            [value for name, _, value in of(folders, processes, case)["series"] if name == "pruning/metric_predicted"]
            for processes in (1, 2)
        )
        assert len(one) == 1, case
        assert two == pytest.approx(one, abs=1e-6), case


def test_a_failure_in_the_first_process_costs_both_one_epoch_and_training_goes_on(folders):
    for rank in (0, 1):
        assert of(folders, 2, "fails", rank)["found"], "epoch 1 was measured"
    first = of(folders, 2, "fails")
    assert any("epoch 0 was not measured" in message and "not here" in message for message in first["told"])
    assert len([1 for name, *_ in first["series"] if name == "ablation/loss"]) == 1
