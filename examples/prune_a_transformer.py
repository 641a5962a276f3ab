"""Half of a transformer's multiply-accumulate operations go in a fit: heads and hidden units, or hidden units alone.

    python examples/prune_a_transformer.py [--text FILE] [--bert FOLDER]

By default it is a small GELU transformer that learns to continue the text of Python's own manual by one character. A
head is one unit: its queries, keys, values and columns of the output projection go together, and the number of heads
follows. With ``--bert``, it is a trained BERT in a folder of Hugging Face, with its tokenizer, which is cut at once and
brought back to the embeddings that it had of the lines of the text.
"""

import argparse
import copy
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
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


class Sentences(L.LightningModule):
    """Embeds lines of text; the loss is the distance to the embeddings of the network as it was."""

    ways: ClassVar = {"heads and hidden units": [], "hidden units alone": ["*attention*"]}

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed lines by the mean over their tokens.

        Returns:
            ``(line, width)``, each of length 1.
        """
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return one minus the mean cosine to the embeddings before the cut."""
        return 1 - (self(batch["input_ids"], batch["attention_mask"]) * batch["embedding"]).sum(1).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log one minus the mean cosine to the embeddings before the cut."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with decoupled weight decay."""
        return torch.optim.AdamW(self.parameters(), 1e-4)


def characters_of(text: str) -> tuple[L.LightningModule, list[DataLoader[Any]]]:
    """Return a network for a text, and pieces to train and to validate on."""
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    end = int(0.9 * len(codes))
    pieces: list[Dataset[Any]] = [cut_out(codes[:end], 1600), cut_out(codes[end:], LINES)]  # type: ignore[list-item]
    return Characters(len(alphabet)), [DataLoader(part, 32) for part in pieces]


def sentences_of(text: str, folder: Path) -> tuple[L.LightningModule, list[DataLoader[Any]]]:
    """Return a BERT, and lines of a text to recover and to validate on, with their embeddings."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, module = AutoTokenizer.from_pretrained(folder), Sentences(AutoModel.from_pretrained(folder))
    lines = [line for line in text.split("\n") if len(line) > 25]
    random.Random(0).shuffle(lines)
    samples = []
    for begin in range(0, min(len(lines), 8 * LINES), 64):
        some = lines[begin : begin + 64]
        tokens = tokenizer(some, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
        batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            batch["embedding"] = module.eval()(**batch)
        samples += [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(some))]
    parts: list[Any] = [samples[LINES:], samples[:LINES]]
    return module.train(), [DataLoader(part, 64) for part in parts]


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
    parser.add_argument("--bert", type=Path)
    arguments = parser.parse_args()
    L.seed_everything(0, verbose=False)
    if arguments.text is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    else:
        text = arguments.text.read_text()
    load = characters_of if arguments.bert is None else partial(sentences_of, folder=arguments.bert)
    module, loaders = load("".join(character for character in text if character.isascii()))
    if arguments.bert is None:
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
