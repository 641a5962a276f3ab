#!/usr/bin/env bash
# ModelCheckpoint(monitor=..., save_top_k=1, save_last=True): last.ckpt is not the last epoch, but the last best one.
#
# lightning 2.6.6 (torch 2.13.0). last.ckpt is written whenever a top-k checkpoint is, and a checkpoint is only written
# in an epoch whose metric is among the best k. Where the metric gets worse, last.ckpt stays at an earlier epoch, and a
# run that is resumed from ckpt_path="last" goes back to it without a word.
#
# Seen: val_loss 0.0, 1.0, 2.0, 3.0 in epochs 0 to 3; last.ckpt holds epoch 0.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lightning==2.6.6 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY' 2>/dev/null
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


loader = DataLoader(torch.ones(4, 2), batch_size=2)
saving = ModelCheckpoint("checkpoints", monitor="val_loss", save_top_k=1, save_last=True)
trainer = L.Trainer(
    max_epochs=4, callbacks=[saving], logger=False, accelerator="cpu",
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
)
trainer.fit(Module(), loader, loader)
epoch = torch.load("checkpoints/last.ckpt", weights_only=False)["epoch"]
print(L.__version__, "trained to epoch", trainer.current_epoch - 1, "and last.ckpt holds epoch", epoch)
assert (trainer.current_epoch - 1, epoch) == (3, 0), "lightning behaves otherwise now"
PY
echo "as described"
