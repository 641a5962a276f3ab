"""Each example runs as a reader would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "quickstart": "the three neurons that matter most: [RankedNeuron(",
    "own_criterion": "fires_in",
    "agreement_of_criteria": "second_order_ggn",
    "prune_and_finetune": "recovered",
    "prune_a_transformer": "heads and hidden units",
    "look_inside": "3 above the data's 99th percentile",
    "class_subnetwork": "MACs 128,640 -> ",
    "rank_critical_neurons": "critical neurons: change of the loss",
}


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the project in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_says_what_it_promises(path: Path, tmp_path: Path):
    out = run(tmp_path, path)
    assert out.returncode == 0, out.stderr
    assert SAYS[path.stem] in out.stdout


def test_every_example_is_known_here():
    assert {path.stem for path in EXAMPLES} == set(SAYS)


def test_the_benchmark_measures_every_case_on_a_small_scale(tmp_path: Path):
    script = ROOT / "examples" / "benchmarks" / "cost_of_observing.py"
    out = run(tmp_path, script, "--samples", "8", "--repeats", "1", "--only-ratios")
    assert out.returncode == 0, out.stderr
    for case in ("plain forward", "statistics riding on it", "sensitivity pass", "forward + backward to parameters"):
        assert case in out.stdout


def test_the_benchmark_of_cuts_compares_with_torch_pruning_on_a_small_scale(tmp_path: Path):
    script = ROOT / "examples" / "benchmarks" / "cutting.py"
    out = run(tmp_path, script, "--pictures", "4", "--repeats", "1")
    assert out.returncode == 0, out.stderr
    assert "logits differ by 0.0e+00 of the largest" in out.stdout
    assert "cut with AdamW state" in out.stdout


def test_the_benchmark_of_looking_compares_with_captum_on_a_small_scale(tmp_path: Path):
    script = ROOT / "examples" / "benchmarks" / "looking.py"
    out = run(tmp_path, script, "--pictures", "4", "--repeats", "1", "--steps", "2", "--no-figures")
    assert out.returncode == 0, out.stderr
    for case in ("captum Saliency", "captum NoiseTunnel", "maximisation of 8 neurons", "peak memory"):
        assert case in out.stdout


def test_the_benchmark_of_continued_training_shows_what_no_longer_moves(tmp_path: Path):
    script = ROOT / "examples" / "benchmarks" / "continued_training.py"
    out = run(tmp_path, script, "--steps", "3", "--batch", "4")
    assert out.returncode == 0, out.stderr
    moved = [int(line.rpartition("; ")[2].split()[0]) for line in out.stdout.splitlines() if "tensors moved" in line]
    assert len(moved) == 3
    assert moved[0] == moved[1] > moved[2]


def test_the_benchmark_of_architectures_checks_cuts_of_its_own_networks(tmp_path: Path):
    script = ROOT / "examples" / "benchmarks" / "zoo.py"
    out = run(tmp_path, script, "--only", "transformer", "resnet20", "--json", "rows.json")
    assert out.returncode == 0, out.stderr
    assert out.stdout.endswith("2 of 2 reach half their MACs\n")
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows.values():
        assert row["ours"]["difference"] < 1e-8
        assert row["ours"]["costs right"]
        assert [row["ours"][step] for step in ("forward", "training", "export")] == ["works"] * 3
    # Where channels are padded, halves of groups do not fit together: the reference must tell.
    assert rows["resnet20"]["torch_pruning"]["difference"] > 1e-2


def test_a_network_that_hangs_is_a_row_of_the_benchmark_of_architectures(tmp_path: Path):
    script = ROOT / "examples" / "benchmarks" / "zoo.py"
    (tmp_path / "builders.py").write_text("import time\nZ = {'endless': lambda: time.sleep(1000)}\n")
    out = run(tmp_path, script, "--zoo", tmp_path, "--limit", "1")
    assert out.returncode == 0, out.stderr
    assert "endless | killed after 1 s | - | - |" in out.stdout
    assert out.stdout.endswith("0 of 1 reach half their MACs\n")
