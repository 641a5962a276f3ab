"""Half of a transformer's multiply-accumulate operations go in a fit: heads and hidden units, or hidden units alone.

    python examples/prune_a_transformer.py [--text FILE]

It is a small GELU transformer that learns to continue the text of Python's own manual, or of a file, by one character.
A head is one unit: its queries, keys, values and columns of the output projection go together, and the number of heads
follows.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, ClassVar

import lightning as L  # noqa: N812
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_neurons import NeuronPruningCallback

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from transformer import Transformer, cut_out, loss_of

DENSE_EPOCHS, RECOVERY_EPOCHS = 2, 1
LINES = 256


class Characters(L.LightningModule):
    """Predicts the next character at every position."""

    ways: ClassVar = {"heads and hidden units": [], "hidden units alone": ["*qkv", "*proj"]}

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.net = Transformer(characters)

    def training_step(self, codes: Tensor, batch_idx: int) -> Tensor:
        """Return the cross entropy of the next character."""
        return loss_of(self.net, codes)

    def validation_step(self, codes: Tensor, batch_idx: int) -> None:
        """Log the cross entropy of the next character."""
        self.log("val_loss", loss_of(self.net, codes))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with decoupled weight decay."""
        return torch.optim.AdamW(self.parameters(), 2e-3)


def characters_of(text: str) -> tuple[L.LightningModule, list[DataLoader[Any]]]:
    """Return a network for a text, and pieces to train and to validate on."""
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    end = int(0.9 * len(codes))
    pieces: list[Dataset[Any]] = [cut_out(codes[:end], 1600), cut_out(codes[end:], LINES)]  # type: ignore[list-item]
    return Characters(len(alphabet)), [DataLoader(part, 32) for part in pieces]


def trainer_of(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """Return a Trainer that writes nothing."""
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    """Train, cut copies in two ways to the same MACs, and train these on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    L.seed_everything(0, verbose=False)
    if arguments.text is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    else:
        text = arguments.text.read_text()
    module, loaders = characters_of("".join(character for character in text if character.isascii()))
    trainer_of(DENSE_EPOCHS).fit(module, *loaders)
    rows = []
    for way, ignore in type(module).ways.items():
        pruning = NeuronPruningCallback("reconstruction", target_macs=0.5, ignore=ignore, monitor="val_loss")
        smaller, trainer = copy.deepcopy(module), trainer_of(1 + RECOVERY_EPOCHS, pruning)
        trainer.fit(smaller, *loaders)
        (made,) = pruning.rounds.done
        rows.append((way, made.before, made.cut, float(trainer.callback_metrics["val_loss"])))
    print(f"\n{'loss with half of all MACs':28s} {'dense':>7s} {'cut':>7s} {'recovered':>10s}")
    for way, dense, cut, recovered in rows:
        print(f"{way:28s} {dense:7.4f} {cut:7.4f} {recovered:10.4f}")


if __name__ == "__main__":
    main()
