"""The first thing that somebody runs: the demo, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest

from lightning_neurons import NeuronReport, PruningPlan
from lightning_neurons.cli import main

ROOT = Path(__file__).parents[1]


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command wrote, and in one further process the same seed again and another."""
    folder = tmp_path_factory.mktemp("demo")
    first = python(folder, "-m", "lightning_neurons", "demo", "--epochs=2", "--output_dir=first", "--seed=1")
    further = f"""from lightning_neurons.cli import main
for name, seed in {(("again", 1), ("other", 2))}:
    main(["demo", "--epochs=2", f"--output_dir={{name}}", f"--seed={{seed}}"])"""
    more = python(folder, "-c", further)
    assert more.returncode == 0, more.stderr[-2000:]
    return {name: (folder / name, first) for name in ("first", "again", "other")}


def _document(runs: dict[str, Any], name: str) -> dict[str, Any]:
    return json.loads((runs[name][0] / "version_0" / "neurons.json").read_text())


def test_the_demo_succeeds_and_prints_the_table_and_where_to_look(runs):
    _, done = runs["first"]
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("Neurons after epoch 1", "net.conv1", "net.fc2", "all layers", "most important", "least important"):
        assert words in done.stdout
    for words in (
        "top 10 % hold",
        "dormant",
        "validation accuracy",
        "neurons.json",
        "-m tensorboard.main --logdir first",
    ):
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_the_demo_learns(runs):
    line = next(line for line in runs["first"][1].stdout.splitlines() if "validation accuracy" in line)
    assert float(line.split()[-1].strip("%")) > 80


def test_the_demo_writes_what_it_says(runs):
    folder, _ = runs["first"]
    assert list((folder / "version_0").glob("events.out.tfevents.*"))
    report = NeuronReport.load(folder / "version_0" / "neurons.json")
    assert report.epoch == 1
    assert [layer.name for layer in report.layers] == ["net.conv1", "net.conv2", "net.fc1", "net.fc2"]
    assert len(_document(runs, "first")["neurons"]) == 16 + 32 + 64 + 10


def test_the_same_seed_gives_the_same_numbers_bit_by_bit(runs):
    assert _document(runs, "first") == _document(runs, "again")


def test_another_seed_gives_other_numbers(runs):
    first, other = (_document(runs, name)["scores"]["gradient"]["net.conv1"] for name in ("first", "other"))
    assert first != other


def test_an_option_or_value_that_makes_no_sense_is_a_clean_error_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(L.Trainer, "fit", lambda *args, **kwargs: pytest.fail("training has begun"))
    options = [("--epoch_count", "2"), ("--epochs", "many"), ("--epochs", "0"), ("--epochs", "-1")]
    for option, value in [*options, *(("--prune", share) for share in ("0", "1", "1.5", "half"))]:
        with pytest.raises(SystemExit) as ended:
            main(["demo", option, value])
        printed = capsys.readouterr().err
        assert ended.value.code == 2
        assert option.strip("-") in printed, (option, value)
        assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == [], "nothing has been started"


def test_help_names_the_subcommand_and_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    options = capsys.readouterr().out
    assert all(f"--{name}" in options for name in ("seed", "epochs", "output_dir"))
    assert "Same seed, same numbers" in options


def test_the_demo_of_pruning_compares_with_chance_and_saves_its_plan(tmp_path):
    one_seed = """from lightning_neurons import demo
from lightning_neurons.cli import main
demo.SEEDS = 1
main(["demo", "--epochs=1", "--prune=0.5", "--output_dir=out"])"""
    done = python(tmp_path, "-c", one_seed)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in (
        "neurons chosen by",
        "random",
        "weight_l2",
        "reconstruction",
        "dense",
        "cut",
        "recovered",
        "tensorboard.main --logdir out",
    ):
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    plan = PruningPlan.load(tmp_path / "out" / "version_1" / "plan.json")
    assert plan.cost is not None
    assert plan.cost.macs_after <= 0.5 * plan.cost.macs
    assert all(plan.reasons[layer][neuron] for layer, neurons in plan.neurons.items() for neuron in neurons)
