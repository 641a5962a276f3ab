"""Most of the multiply-accumulate operations go in the middle of training, and the accuracy stays.

    python examples/prune_and_finetune.py

What goes is chosen by what the layers behind cannot make up for, and what reads it is solved again; then the network as
it was teaches the smaller one, and should the accuracy still be lower than was asked for, the cut is taken back. The
same is done with the smallest weights, and with neurons chosen at random, the control that every criterion has to beat.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L  # noqa: N812
import torch

from lightning_neurons import NeuronPruningCallback, load_pruned
from lightning_neurons.demo import DigitsModule, digits

DENSE_EPOCHS, RECOVERY_EPOCHS = 5, 3

PLAIN: dict[str, Any] = {"compensation": "none"}
KEEPING: dict[str, Any] = {"recovery": "distill", "recovery_epochs": RECOVERY_EPOCHS, "max_drop": 0.02}
WAYS = {"random": PLAIN, "weight_l2": PLAIN, "reconstruction": KEEPING}


def train(criterion: str, seed: int, folder: Path) -> tuple[NeuronPruningCallback, L.Trainer, str]:
    """Train, cut, and train on; returns the checkpoint of the smaller network as well."""
    L.seed_everything(seed, verbose=False)
    pruning = NeuronPruningCallback(
        criterion, target_macs=0.3, start_epoch=DENSE_EPOCHS, monitor="val_acc", **WAYS[criterion]
    )
    trainer = L.Trainer(
        max_epochs=DENSE_EPOCHS + RECOVERY_EPOCHS,
        accelerator="cpu",
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsModule(), *digits())
    path = folder / f"{criterion}-{seed}.ckpt"
    trainer.save_checkpoint(path)  # what fit has left: a cut that did not recover has been taken back by then
    return pruning, trainer, str(path)


def main() -> None:
    """Compare three ways over three seeds, and load the smaller network without a Trainer."""
    means, path = {}, ""
    for criterion in WAYS:
        rows = []
        for seed in range(3):
            pruning, trainer, path = train(criterion, seed, Path("checkpoints"))
            made = (*pruning.rounds.done, *pruning.rounds.undone)[0]
            rows.append((made.before, made.cut, float(trainer.callback_metrics["val_acc"])))
        means[criterion] = [fmean(column) for column in zip(*rows, strict=True)]
    print(f"\n{'validation accuracy':20s} {'dense':>7s} {'cut':>7s} {'recovered':>10s}")
    for criterion, (dense, cut, recovered) in means.items():
        print(f"{criterion:20s} {dense:7.1%} {cut:7.1%} {recovered:10.1%}")
    module = load_pruned(DigitsModule, path).eval()
    with torch.no_grad():
        logits = module.net(next(iter(digits()[1]))[0])
    print(f"\nloaded from {path}: {module.net.conv2}, logits {tuple(logits.shape)}")


if __name__ == "__main__":
    main()
