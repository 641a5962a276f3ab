"""A small character-level GELU transformer: the hidden units of its MLPs go, with and without compensation.

    python examples/benchmarks/transformer.py --data FOLDER [--steps 400]

It is trained here, on tinyshakespeare; the loss is that of text that was not trained on, in nats per character.
"""

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_neurons import PruningBudget, prune

WIDTH, HEADS, LAYERS, LENGTH = 96, 4, 3, 64


class Block(nn.Module):
    """Attention and an MLP, each behind a norm layer and around a residual stream (pre-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, position, width)`` to the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character at every position."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """``(batch, position)`` to logits ``(batch, position, character)``."""
        x = self.embedding(codes) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of the next character."""
    codes = batch if isinstance(batch, Tensor) else batch[0]
    return F.cross_entropy(model(codes[:, :LENGTH]).flatten(0, 1), codes[:, 1:].flatten())


def cut_out(text: Tensor, count: int) -> Tensor:
    """Pieces of one character more than the model reads, ``(count, LENGTH + 1)``."""
    starts = torch.randint(0, len(text) - LENGTH - 1, (count,))
    return torch.stack([text[i : i + LENGTH + 1] for i in starts.tolist()])


def main() -> None:
    """Train, cut, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.path.insert(0, str(arguments.data))
    import lnn_data

    codes, characters = lnn_data.load_shakespeare()
    text = torch.as_tensor(codes, dtype=torch.long)
    seen, unseen = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    model = Transformer(len(characters))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, arguments.steps)
    for _ in range(arguments.steps):
        loss = loss_of(model, cut_out(seen, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    test, calibration = cut_out(unseen, 512).split(64), cut_out(seen, 256).split(64)

    def measured(some: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(loss_of(some, part)) for part in test) / len(test)

    print(f"dense: loss {measured(model):.4f}, guessing {math.log(len(characters)):.4f}")
    inputs = [part[:, :LENGTH] for part in calibration]
    for share in (0.25, 0.5):
        for criterion in ("random", "weight_l2", "reconstruction"):
            row = []
            for how in ("none", "mean", "least_squares"):
                cut = copy.deepcopy(model)
                budget = PruningBudget(criterion, amount=share, ignore=["*qkv", "*proj", "head", "*fc2"])
                prune(cut, inputs[0][:2], budget, inputs, compensation=how)
                row.append(f"{how} {measured(cut):.4f}")
            print(f"{share:.0%} of the hidden units, {criterion}: {', '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
