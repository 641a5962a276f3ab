"""The demo of pruning: a cut in the middle of training, next to a random one of the same size."""

from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from lightning_neurons.callbacks import NeuronPruningCallback
from lightning_neurons.demo import say_where_to_look, train_digits

RECOVERY = 3
"""Epochs after the cut."""

SEEDS = 3
"""Runs for each way of choosing: a single random choice may be lucky."""


def demo_pruning(share: float, seed: int = 0, epochs: int = 5, output_dir: Path = Path("neurons_demo")) -> Table:
    """Train on handwritten digits, cut while training goes on, train on, and compare with a random cut.

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
    for heading in ("neurons chosen by", "MACs left", "dense", "cut", "recovered"):
        table.add_column(heading, justify="right")
    for criterion in ("random", "fisher"):
        rows = []
        for run in range(SEEDS):
            callback = NeuronPruningCallback(
                criterion, target_macs=share, start_epoch=epochs, compensation="mean", monitor="val_acc"
            )
            trainer = train_digits(seed + run, epochs + RECOVERY, output_dir, [callback])
            made, cost = callback.rounds.done[0], callback.plan.cost
            assert cost is not None, "a round has been made"
            recovered = float(trainer.callback_metrics["val_acc"])
            rows.append((cost.macs_after / cost.macs, made.before or 0.0, made.cut or 0.0, recovered))
            folder = Path(str(trainer.log_dir))
            callback.plan.save(folder / "plan.json")
        table.add_row(criterion, *(f"{fmean(column):.1%}" for column in zip(*rows, strict=True)))
    console.print(table)
    console.print(f"wrote what has been removed and why to {folder}/plan.json", highlight=False, soft_wrap=True)
    say_where_to_look(console, output_dir)
    return table
