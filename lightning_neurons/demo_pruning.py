"""Demo of pruning: a cut in the middle of training with compensation and recovery, and plain cuts of the same size."""

from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_neurons.callbacks import NeuronPruningCallback
from lightning_neurons.demo import say_where_to_look, train_digits

RECOVERY = 3
"""Epochs after the cut."""

SEEDS = 3
"""Runs for each way of choosing: a single random choice may be lucky."""

WAYS: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random", "compensation": "none"},
    "weight_l2": {"criterion": "weight_l2", "compensation": "none"},
    "reconstruction, compensated, taught, guarded": {
        "criterion": "reconstruction",
        "recovery": "distill",
        "max_drop": 0.02,
        "recovery_epochs": RECOVERY,
    },
}
"""Arguments of the callback for each way of choosing neurons, and of compensation and recovery."""


def demo_pruning(share: float, seed: int = 0, epochs: int = 5, output_dir: Path = Path("neurons_demo")) -> Table:
    """Train on handwritten digits, cut during training, train on, and compare with plain cuts.

    Args:
        share: The share of multiply-accumulate operations that may stay.
        seed: Of the first of three runs.
        epochs: Epochs before the cut; three more follow it.
        output_dir: Where the TensorBoard runs and plan.json go.

    Returns:
        The table that is printed: accuracies of the dense, the cut and the recovered network.
    """
    console, folder = Console(), output_dir
    table = Table(title="Validation accuracy", caption=f"means of {SEEDS} runs; {RECOVERY} epochs of recovery")
    table.add_column("neurons chosen by")
    for heading in ("MACs left", "dense", "cut", "recovered"):
        table.add_column(heading, justify="right")
    for name, options in WAYS.items():
        rows = []
        for run in range(SEEDS):
            callback = NeuronPruningCallback(target_macs=share, start_epoch=epochs, monitor="val_acc", **options)
            trainer = train_digits(seed + run, epochs + RECOVERY, output_dir, [callback])
            made = (*callback.rounds.done, *callback.rounds.undone)[0]
            cost, recovered = callback.plan.cost, float(trainer.callback_metrics["val_acc"])
            left = 1.0 if cost is None else cost.macs_after / cost.macs
            rows.append((left, made.before or 0.0, made.cut or 0.0, recovered))
            folder = Path(str(trainer.log_dir))
            callback.plan.save(folder / "plan.json")
        table.add_row(name, *(f"{fmean(column):.1%}" for column in zip(*rows, strict=True)))
    console.print(table)
    console.print(f"wrote what has been removed and why to {folder}/plan.json", highlight=False, soft_wrap=True)
    say_where_to_look(console, output_dir)
    return table
