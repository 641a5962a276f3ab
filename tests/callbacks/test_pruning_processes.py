"""Two processes cut the same at the same time, and never hold different weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_neurons import NeuronPruningCallback
from tests.callbacks.modules import Plain, trainer_of
from tests.callbacks.two_processes_pruning import CASES, EPOCHS, run

ROOT = Path(__file__).parents[2]
ROUNDS = {name: 1 if name == "patient" else 2 for name in CASES}
BATCHES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, as far as they came."""
    folder = tmp_path_factory.mktemp("pruning")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_RANK", "NODE_RANK"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "tests" / "callbacks" / "two_processes_pruning.py"), str(folder)]
    done = subprocess.run(script, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)
    (folder / "output").write_text(done.stdout[-1500:] + done.stderr[-3000:])
    return folder


def found(folder: Path, case: str) -> list[dict[str, Any]]:
    """What each process found."""
    paths = [folder / f"{case}.{rank}.json" for rank in (0, 1)]
    assert all(path.exists() for path in paths), (folder / "output").read_text()
    return [json.loads(path.read_text()) for path in paths]


def test_after_every_batch_both_processes_hold_the_same(folder):
    for case in CASES:
        for one in found(folder, case):
            assert one["same"] == [True] * (EPOCHS * BATCHES), case


def test_both_processes_cut_the_same_at_the_beginning_of_an_epoch(folder):
    for case in CASES:
        first, second = found(folder, case)
        assert first["plan"] == second["plan"], case
        assert first["rounds"] == second["rounds"], case
        assert first["widths"] == second["widths"], case
        assert len(first["rounds"]) == ROUNDS[case], case
        changes = [i for i in range(1, EPOCHS * BATCHES) if first["widths"][i] != first["widths"][i - 1]]
        epochs = [epoch for _, epoch, _, _ in first["rounds"]]
        assert changes == [BATCHES * epoch for epoch in epochs], case
        accumulated = CASES[case].trainer.get("accumulate_grad_batches", 1)
        steps = -(-BATCHES // accumulated)
        assert [step for _, _, step, _ in first["rounds"]] == [steps * epoch for epoch in epochs], case


def test_what_runs_is_wrapped_again_after_each_cut_and_at_no_other_time(folder):
    for case in CASES:
        for one in found(folder, case):
            assert one["wrappers"] == [True] * (ROUNDS[case] + 1), case


@pytest.mark.parametrize("case", ["l2", "fisher"])
def test_two_processes_make_the_plan_of_one(folder, case):
    torch.set_num_threads(1)
    one = run(CASES[case], 1)
    assert one["wrappers"] == [False]
    assert sum(count for *_, count in one["rounds"]) > 5
    for two in found(folder, case):
        assert two["plan"] == one["plan"]
        assert two["widths"] == one["widths"]
        assert two["rounds"] == one["rounds"]


def test_two_processes_measure_the_metric_after_the_cut_as_one_does(folder):
    one = run(CASES["fisher"], 1)
    first, second = found(folder, "fisher")
    cuts = [[cut for _, cut, _ in result["metrics"]] for result in (one, first, second)]
    assert cuts[1] == cuts[2]
    assert cuts[1] == pytest.approx(cuts[0], rel=1e-6)


def test_the_metric_after_the_cut_is_known_and_the_same_in_both_processes(folder):
    for case in ("averaged", "uneven", "fisher"):
        first, second = found(folder, case)
        assert [cut for _, cut, _ in first["metrics"]] == [cut for _, cut, _ in second["metrics"]], case
        assert all(value is not None for values in [*first["metrics"], *second["metrics"]] for value in values), case


def test_resuming_on_two_processes_ends_as_if_nothing_had_happened(folder):
    for one in found(folder, "resume"):
        assert {epoch: pending for epoch, (pending, _, _) in one.items()} == {"0": True, "1": True, "2": False}
        assert [values[1:] for values in one.values()] == [[True, True]] * 3


MISTAKES = {"pattern": "nothing matches 'net.nothing*'", "uncopyable": "only in Plain cannot be copied"}


def test_what_cannot_be_pruned_is_told_by_both_processes_and_neither_waits(folder):
    for case in MISTAKES:
        for one in found(folder, case):
            assert "MisconfigurationException" in one["types"], case
            assert MISTAKES[case] in one["message"], case


def test_what_fails_while_training_goes_on_costs_a_round_in_both_processes(folder):
    for one in found(folder, "uncopyable, found late"):
        assert one["same"] == [True] * (EPOCHS * BATCHES)
        assert one["rounds"] == []


def test_a_process_without_validation_data_follows_the_other(folder):
    first, second = found(folder, "nothing")
    assert first["same"] == second["same"] == [True] * (EPOCHS * BATCHES)
    assert first["plan"] == second["plan"]
    assert len(first["rounds"]) == 2


def test_strategies_that_leave_the_pruned_model_in_another_process_are_refused():
    for strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
        callback = NeuronPruningCallback("weight_l2", amount=0.4)
        trainer = trainer_of([callback], strategy=strategy, devices=2)
        with pytest.raises(MisconfigurationException, match=r'by spawn or fork: .*Use strategy="ddp"'):
            callback.setup(trainer, Plain(), "fit")
