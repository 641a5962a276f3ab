"""Half of the multiply-accumulate operations go in the middle of training, and training goes on.

    python examples/prune_and_finetune.py

The same is done with neurons chosen at random: the control that every criterion has to beat.
"""

from pathlib import Path
from statistics import fmean

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_neurons import NeuronPruningCallback, load_pruned
from lightning_neurons.demo import DigitsModule, digits

DENSE_EPOCHS, RECOVERY_EPOCHS = 5, 3


def train(criterion: str, seed: int, folder: Path) -> tuple[NeuronPruningCallback, L.Trainer, str]:
    """Train, cut, and train on; returns the checkpoint of the smaller network as well."""
    L.seed_everything(seed, verbose=False)
    pruning = NeuronPruningCallback(
        criterion, target_macs=0.5, start_epoch=DENSE_EPOCHS, compensation="mean", monitor="val_acc"
    )
    checkpoint = ModelCheckpoint(folder, filename=f"{criterion}-{seed}")
    trainer = L.Trainer(
        max_epochs=DENSE_EPOCHS + RECOVERY_EPOCHS,
        accelerator="cpu",
        callbacks=[pruning, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsModule(), *digits())
    return pruning, trainer, checkpoint.best_model_path


def main() -> None:
    """Compare a criterion with chance over three seeds, and load the smaller network without a Trainer."""
    means, path = {}, ""
    for criterion in ("random", "fisher"):
        rows = []
        for seed in range(3):
            pruning, trainer, path = train(criterion, seed, Path("checkpoints"))
            made = pruning.rounds.done[0]
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
