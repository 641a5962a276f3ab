"""Two processes are taught as by hand, and never hold different weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.distilled import EPOCHS
from tests.callbacks.pruned import assert_equal
from tests.callbacks.two_processes_distill import CASES

ROOT = Path(__file__).parents[2]
BATCHES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, as far as they came."""
    folder = tmp_path_factory.mktemp("distillation")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_RANK", "NODE_RANK"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    script = [sys.executable, str(ROOT / "tests" / "callbacks" / "two_processes_distill.py"), str(folder)]
    done = subprocess.run(script, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)
    (folder / "output").write_text(done.stdout[-1500:] + done.stderr[-3000:])
    return folder


def found(folder: Path, case: str) -> list[dict[str, Any]]:
    """What each process found."""
    paths = [folder / f"{case}.{rank}.pt" for rank in (0, 1)]
    assert all(path.exists() for path in paths), (folder / "output").read_text()
    results = [torch.load(path, weights_only=True) for path in paths]
    for result in results:
        assert "error" not in result, result["error"]
    return results


def test_it_is_the_loss_added_by_hand(folder):
    for case in CASES:
        for one in found(folder, case):
            assert_equal(one["callback"]["state"], one["by hand"]["state"])
            taught, alone = one["callback"]["state"]["net.fc2.weight"], one["alone"]["state"]["net.fc2.weight"]
            assert (taught - alone).abs().max() > 1e-3, case


def test_after_every_batch_both_processes_hold_the_same(folder):
    for case in CASES:
        for one in found(folder, case):
            for way in ("callback", "by hand", "alone"):
                assert one[way]["same"] == [True] * (EPOCHS * BATCHES), (case, way)
                assert one[way]["wrapped"] == [True], case
                assert one[way]["hooks"] == 0, case


def test_both_processes_end_with_the_same(folder):
    for case in CASES:
        first, second = found(folder, case)
        # Each process has running statistics of its own.
        norms = {name for name in first["callback"]["state"] if "running" in name}
        states = [{n: t for n, t in one["callback"]["state"].items() if n not in norms} for one in (first, second)]
        assert_equal(*states)


def test_resuming_on_two_processes_ends_as_if_nothing_had_happened(folder):
    for one in found(folder, "resume"):
        assert one["saved"]
        state = {name: tensor for name, tensor in one["callback"]["state"].items() if "running" not in name}
        assert_equal(state, {name: one["by hand"]["state"][name] for name in state})
