"""Demo on handwritten digits: a small network with the callback and its report, or cut in the middle of training."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L  # noqa: N812 (as its own documentation does)
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons.callbacks import NeuronPruningCallback, NeuronSensitivityCallback

_TRAINING_IMAGES = 1400


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc1, self.fc2 = nn.Linear(32 * 4, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images of digits.

        Returns:
            Logits ``(batch, 10)`` of images ``(batch, 1, 8, 8)``.
        """
        x = nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(images))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        logits: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return logits


class DigitsModule(L.LightningModule):
    """An ordinary LightningModule, with no code for the callback."""

    def __init__(self, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = DigitsNet()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Log cross entropy and accuracy.

        Returns:
            The mean cross entropy of the batch, in nats.
        """
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log_dict({"val_loss": loss, "val_acc": (logits.argmax(1) == batch[1]).float().mean()}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with its defaults."""
        return torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"])


def digits(batch_size: int = 64) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return dataloaders of scikit-learn's bundled 1,797 handwritten digits: for training and validation."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[:_TRAINING_IMAGES], order[_TRAINING_IMAGES:]
    train, val = (TensorDataset(images[part], labels[part]) for part in parts)
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, batch_size)


def demo(seed: int = 0, epochs: int = 5, output_dir: Path = Path("neurons_demo")) -> NeuronSensitivityCallback:
    """Train on handwritten digits for a few epochs and show which neurons are dead and which matter.

    Args:
        seed: Same seed, same numbers.
        epochs: Number of epochs to train.
        output_dir: Where the TensorBoard run, neurons.json and report.html go.

    Returns:
        The callback, with its report and history.
    """
    console = Console()
    callback = NeuronSensitivityCallback(html=True)
    trainer = train_digits(seed, epochs, output_dir, [callback])
    console.print(f"\nvalidation accuracy: {float(trainer.callback_metrics['val_acc']):.1%}", highlight=False)
    console.print(
        f"wrote {trainer.log_dir}/neurons.json and a TensorBoard run beside it", highlight=False, soft_wrap=True
    )
    say_where_to_look(console, output_dir)
    return callback


def train_digits(seed: int, epochs: int, output_dir: Path, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Train the module of the demo, always in the same way for the same seed.

    Returns:
        The trainer after ``fit``, with the trained module and the callbacks.
    """
    L.seed_everything(seed, verbose=False)
    train, val = digits()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(output_dir, name=None),
        callbacks=[*callbacks, TQDMProgressBar(leave=True)],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5,
        deterministic=True,
    )
    trainer.fit(DigitsModule(), train, val)
    return trainer


def say_where_to_look(console: Console, output_dir: Path) -> None:
    """Print the command that shows a folder in TensorBoard."""
    viewer = f"{sys.executable} -m tensorboard.main --logdir {output_dir}"  # works without an activated environment
    console.print(f"look at it: {viewer}", highlight=False, soft_wrap=True)


RECOVERY = 3
"""Epochs after the cut."""

SEEDS = 3
"""Runs for each way of choosing: a single random choice may be lucky."""

WAYS: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random", "compensation": "none"},
    "weight_l2": {"criterion": "weight_l2", "compensation": "none"},
    "reconstruction, compensated, distilled, guarded": {
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
