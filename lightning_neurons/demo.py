"""Demo on handwritten digits: a small network, the callback, and its report."""

import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L  # noqa: N812 (as its own documentation does)
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons.callbacks import NeuronSensitivityCallback

_TRAINING_PICTURES = 1400


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc1, self.fc2 = nn.Linear(32 * 4, 64), nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute logits ``(batch, 10)`` of images ``(batch, 1, 8, 8)``."""
        x = nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(pictures))), 2)
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
        """Log cross entropy and accuracy."""
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
    pictures = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[:_TRAINING_PICTURES], order[_TRAINING_PICTURES:]
    train, val = (TensorDataset(pictures[part], labels[part]) for part in parts)
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
    """Train the module of the demo, always in the same way for the same seed."""
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
