"""Which criterion agrees with measured ablations: held-out |change of loss| per neuron on a trained ResNet-20.

    python examples/benchmarks/oracle_agreement.py --data FOLDER [--pictures 4000] [--keep FILE]

Criteria are measured on the first half of the pictures, as is the first oracle; the second oracle on the other half.
Rank correlations within layers (mean over layers) and over all layers; the ceiling is that of the two oracles.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from ablation_speed import loss
from nets import resnet20_and_pictures

from lightning_neurons import CRITERIA, ablate, agreement, measure
from lightning_neurons.results.ablation_report import AblationReport

Scores = dict[str, Tensor]


def per_layer(first: Scores, second: Scores) -> float:
    """Mean Spearman correlation within layers."""
    found = [agreement(first[n], second[n]).spearman for n in second if n in first]
    known = [value for value in found if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def overall(first: Scores, second: Scores) -> float:
    """Spearman correlation over all neurons."""
    layers = [n for n in second if n in first]
    return agreement(torch.cat([first[n] for n in layers]), torch.cat([second[n] for n in layers])).spearman


def oracles(
    model: torch.nn.Module,
    halves: list[list[tuple[Tensor, Tensor]]],
    layers: list[str],
    keep: Path | None,
    budget: float | None,
) -> list[Scores]:
    """|Change of loss| on each half; read from files where they have been measured before.

    With a budget, samples are drawn in proportion to their size; a confidence near 1 keeps all neurons in the race.
    """
    found = []
    for index, half in enumerate(halves):
        path = None if keep is None else keep.with_suffix(f".{index}.json")
        if path is not None and path.exists():
            report = AblationReport.load(path)
        else:
            report = ablate(model, half, loss, neurons=layers, exact=False, budget=budget, confidence=1 - 1e-12)
            if path is not None:
                report.save(path)
        found.append({name: deltas.abs() for name, deltas in report.delta_loss.items()})
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--budget", type=float, help="estimate changes from this share of all runs")
    parser.add_argument("--keep", type=Path, help="where the ablations are kept, or read from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, x, y = resnet20_and_pictures(arguments.pictures, arguments.data, arguments.split)
    middle = len(x) // 2
    halves = [
        list(zip(x[rows].split(500), y[rows].split(500), strict=True)) for rows in (slice(middle), slice(middle, None))
    ]
    layers = [name for name in dict(model.named_modules()) if "conv" in name]
    here, held_out = oracles(model, halves, layers, arguments.keep, arguments.budget)
    report = measure(model, halves[0], loss_fn=loss, criteria=list(CRITERIA), layers=layers)
    ceiling = per_layer(here, held_out), overall(here, held_out)
    print(f"{'criterion':18s} {'per layer':>9s} {'of ceiling':>10s} {'all layers':>10s} {'of ceiling':>10s}")
    print(f"{'(ceiling)':18s} {ceiling[0]:9.2f} {'':10s} {ceiling[1]:10.2f}")
    rows = []
    for name in CRITERIA:
        scores = report.scores.get(name) or {n: 1 - d for n, d in report.deadness_by.get(name, {}).items()}
        scores = {n: s for n, s in scores.items() if n in held_out}
        if scores:
            for form, values in ((name, scores), (f"|{name}|", {n: s.abs() for n, s in scores.items()})):
                if form == name or any((s < 0).any() for s in scores.values()):
                    rows.append((form, per_layer(values, held_out), overall(values, held_out)))
    for name, within, whole in sorted(rows, key=lambda row: -row[1] if not math.isnan(row[1]) else 1):
        print(f"{name:18s} {within:9.2f} {within / ceiling[0]:10.0%} {whole:10.2f} {whole / ceiling[1]:10.0%}")


if __name__ == "__main__":
    main()
