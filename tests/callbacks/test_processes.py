"""Two processes report what one process reports."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_neurons import NeuronReport

ROOT = Path(__file__).parents[2]
CASES = ["fit", "sampler", "statistics", "even", "uneven", "one saw nothing", "classes"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one and two processes wrote."""
    found = {}
    for processes in (1, 2):
        found[processes] = folder = tmp_path_factory.mktemp(f"processes{processes}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_RANK", "NODE_RANK"))}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        script = [sys.executable, str(ROOT / "tests" / "callbacks" / "two_processes.py"), str(folder), str(processes)]
        done = subprocess.run(script, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return found


def rest(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rest.{rank}.json").read_text())


def test_two_processes_give_the_report_of_one(folders):
    for rank, case in product([0, 1], CASES):
        one = NeuronReport.load(folders[1] / f"{case}.0.json")
        two = NeuronReport.load(folders[2] / f"{case}.{rank}.json")
        for field in ("scores", "deadness_by", "per_class"):
            ours, theirs = getattr(two, field), getattr(one, field)
            assert ours.keys() == theirs.keys(), (rank, case)
            for name in ours:
                assert ours[name].keys() == theirs[name].keys(), (rank, case)
                for layer, values in ours[name].items():
                    close = torch.allclose(values, theirs[name][layer], rtol=1e-9, atol=1e-12, equal_nan=True)
                    assert close, (rank, case, field, name, layer)
        assert two.class_counts == one.class_counts, (rank, case)
        assert [vars(layer) for layer in two.layers] == [vars(layer) for layer in one.layers], (rank, case)
        for layer, counts in two.counts.items():
            for field in ("samples", "gradient_samples", "values", "nonfinite", "histogram"):
                assert torch.equal(getattr(counts, field), getattr(one.counts[layer], field)), (
                    rank,
                    case,
                    layer,
                    field,
                )


def test_all_samples_of_both_processes_are_in_the_report(folders):
    for case in CASES:
        counts = NeuronReport.load(folders[2] / f"{case}.1.json").counts["net.conv1"]
        assert counts.samples.tolist() == [24] * 4, case


def test_classes_that_one_process_alone_saw_are_in_both_reports(folders):
    report = NeuronReport.load(folders[2] / "classes.0.json")
    assert len(report.class_counts) == 3
    assert min(report.class_counts) > 0
    assert report.per_class["gradient"]["net.conv1"].isfinite().all()


def test_a_bounded_sample_is_bounded_over_both_processes(folders):
    for rank in (0, 1):
        report = NeuronReport.load(folders[2] / f"small.{rank}.json")
        assert report.counts["net.conv1"].gradient_samples.tolist() == [10] * 4
        assert any(f"process {rank} of 2: sensitivity on 5 of 12" in note for note in report.notes)


def test_the_notes_of_each_process_say_of_which_they_speak(folders):
    for rank in (0, 1):
        notes = {case: " ".join(found) for case, found in rest(folders[2], rank)["notes"].items()}
        assert all(f"process {rank} of 2:" in told for case, told in notes.items() if case != "statistics")


def test_a_failure_on_one_process_is_known_to_both_and_neither_waits(folders):
    for rank in (0, 1):
        assert [epoch for epoch, _ in rest(folders[2], rank)["history"]] == [0, 1]
    assert any("sensitivity was not measured in epoch 0" in message for message in rest(folders[2], 0)["told"])


def test_batches_of_one_process_without_a_loss_are_left_out_and_both_say_so(folders):
    for rank, words in ((0, "batches of another process that have no loss"), (1, "12 samples whose batches have")):
        report = NeuronReport.load(folders[2] / f"missing.{rank}.json")
        assert {int(n) for counts in report.counts.values() for n in counts.gradient_samples} == {12}
        assert any(f"sensitivity leaves out {words}" in note for note in report.notes)
