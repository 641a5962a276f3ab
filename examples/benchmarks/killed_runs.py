"""Runs that are killed at random moments, and resumed: they end as the run that nobody has killed, bit for bit.

    python examples/benchmarks/killed_runs.py [--kills 20] [--seed 0]

A network is trained while it is cut in rounds of a cubic schedule, with a contract about a metric, and with checkpoints
after every step and every epoch. A process with that run is killed by signal 9, and another goes on from the newest
checkpoint that was left. Needs a system that can fork.
"""

import argparse
import logging
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import NeuronPruningCallback

EPOCHS, BATCHES, SIZE = 12, 6, 32


def data(batches: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Three classes that overlap."""
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (batches, SIZE), generator=made)
    return [(torch.randn(SIZE, 8, generator=made) + row[:, None] * torch.linspace(-1, 1, 8), row) for row in labels]


TRAINING, VALIDATION = data(BATCHES, 0), data(4, 1)


class Module(L.LightningModule):
    """Takes its batches by their number: where a loader begins after a resume is the business of others."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = TRAINING[batch_idx]
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, logged."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """An optimizer with a state, and a scheduler."""
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)]


def loader(batches: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    """The batches, in their order."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    return DataLoader(TensorDataset(x, y), SIZE)


def train(folder: Path, out: Path, checkpoint: Path | None = None) -> None:
    """A run from its beginning, or from a checkpoint; what it ends with is written when it ends."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module = Module()
    cutting = NeuronPruningCallback(
        "fisher", amount=0.6, schedule="cubic", start_epoch=4, end_epoch=9, scope="global", compensation="mean",
        monitor="val_loss", max_drop=0.04, on_violation="halve",
    )  # fmt: skip
    saving = [
        ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=True),
        ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1),
    ]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=EPOCHS, callbacks=[cutting, *saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(TRAINING), loader(VALIDATION), ckpt_path=checkpoint)
    rounds = [
        [(one.number, one.epoch, one.step, one.plan.to_dict()) for one in made]
        for made in (cutting.rounds.done, cutting.rounds.undone)
    ]
    content = {
        "model": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "rounds": rounds,
        "contract": (cutting.keeping.progress, cutting.keeping.step, cutting.keeping.stopped),
        "steps": (trainer.global_step, trainer.current_epoch),
    }
    torch.save(content, out.with_suffix(".part"))
    out.with_suffix(".part").rename(out)


def in_a_process(*words: Any, kill_after: float | None = None) -> float:
    """Run in a process of its own, and kill it after so many seconds; how long it ran."""
    process, start = multiprocessing.get_context("fork").Process(target=_quietly, args=words), time.perf_counter()
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    return time.perf_counter() - start


def _quietly(*words: Any) -> None:
    with Path("/dev/null").open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        train(*words)


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """The places at which two results are not the same, bit for bit."""
    if isinstance(expected, Tensor):
        return [] if torch.equal(found, expected) else [where]
    if isinstance(expected, dict | list | tuple):
        names = list(expected) if isinstance(expected, dict) else range(len(expected))
        if len(found) != len(expected):
            return [f"{where}: {len(found)} entries and not {len(expected)}"]
        return [one for name in names for one in differences(found[name], expected[name], f"{where}.{name}")]
    return [] if found == expected else [f"{where}: {found} and not {expected}"]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chance, equal, kills, tries = random.Random(chosen.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary, "whole")
        duration = in_a_process(whole, Path(temporary, "whole.pt"))
        expected = torch.load(Path(temporary, "whole.pt"))
        done, undone = expected["rounds"]
        print(f"not killed: {len(done)} rounds stand, {len(undone)} were taken back, {duration:.1f} s")
        while kills < chosen.kills:
            tries += 1
            folder, out = Path(temporary, str(tries)), Path(temporary, f"{tries}.pt")
            in_a_process(folder, out, kill_after=chance.uniform(0, duration))
            if out.exists():
                continue  # it was faster
            kills, checkpoint = kills + 1, newest(folder)
            in_a_process(folder, out, checkpoint)
            wrong = differences(torch.load(out), expected) if out.exists() else ["it did not end"]
            equal += not wrong
            print(f"killed behind {checkpoint and checkpoint.stem}: {wrong or 'equal'}", flush=True)
        print(f"{equal} of {kills} killed runs end as the one that was not killed")
    return int(equal < kills)


if __name__ == "__main__":
    sys.exit(main())
