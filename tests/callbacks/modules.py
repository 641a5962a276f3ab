"""Small LightningModules, their data and a Trainer for the tests of callbacks; everything is seeded."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L  # noqa: N812
import numpy as np
import pytorch_lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

LAYERS = ("net.conv1", "net.conv2", "net.fc1", "net.fc2")


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc1, self.drop, self.fc2 = nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu_(self.norm2(self.conv2(x))).mean((2, 3))
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


class Steps:
    """What both namespaces' modules do."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.net, self.lr = Net() if net is None else net, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("test_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


class Plain(Steps, L.LightningModule):
    """Returns and logs its loss."""


class OldNamespace(Steps, pytorch_lightning.LightningModule):
    """The same for ``pytorch_lightning``."""


class WithMetrics(Plain):
    """Metrics with tensor and list states, logged and never reset, and a list of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.auroc, self.forever = MulticlassAccuracy(3), MulticlassAUROC(3), MulticlassAUROC(3)
        self.outs: list[Tensor] = []
        self.steps_seen = 0

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.outs.append(loss.detach())
        self.steps_seen += 1
        self.accuracy(logits, batch[1])
        self.auroc.update(logits.softmax(-1), batch[1])
        self.forever.update(logits.softmax(-1), batch[1])
        self.log_dict({"val_loss": loss, "accuracy": self.accuracy, "auroc": self.auroc})
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("outs", float(len(self.outs)))
        self.log("outs_mean", torch.stack(self.outs).mean())
        self.outs.clear()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end


class ReturnsNone(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class ReturnsDict(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("val_loss", loss)
        return {"logits": logits, "loss": loss}


class Noisy(Plain):
    """Draws from every generator, with dropout on, and logs what it drew."""

    def __init__(self) -> None:
        super().__init__(Net(dropout=0.5))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net.drop.train()
        loss = self.loss((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))
        self.log_dict({"val_loss": loss, "numpy": np.random.rand(), "python": random.random()})
        return loss


class PartlyFrozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.conv1.requires_grad_(False)
        self.net.norm1.requires_grad_(False)


class Manual(Plain):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss.detach())


class SeveralLoaders(Plain):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss


class LogsDirectly(Plain):
    """Writes to its logger behind Lightning's back."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(loss)}, step=batch_idx)
        self.log("val_loss", loss)
        return loss


class OtherNames(Plain):
    """Lightning passes the index by position; what it is called is the user's choice."""

    def validation_step(self, batch: Any, _: int) -> Tensor:
        return super().validation_step(batch, _)


class Altered(Plain):
    """A validation step of one's own."""

    def __init__(self, step: Callable[[Any, Any, int], Any]) -> None:
        super().__init__()
        self._own = step

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self._own(self, batch, batch_idx)


class MemoryLogger(Logger):
    """Keeps what is logged, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int | None, float]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(name, step, value) for name, value in metrics.items()]


def dataset(samples: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    pictures = torch.randn(samples, 1, 6, 6, generator=generator) + labels[:, None, None, None]
    return TensorDataset(pictures, labels)


def loader(samples: int = 32, batch_size: int = 8, seed: int = 0, **kwargs: Any) -> DataLoader:
    return DataLoader(dataset(samples, seed), batch_size, **kwargs)


def trainer_of(callbacks: Iterable[Any] = (), *, of: Any = L, **kwargs: Any) -> Any:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    return of.Trainer(callbacks=list(callbacks), **(quiet | kwargs))


def fit(
    module: Any, callbacks: Sequence[Any] = (), train: Any = None, val: Any = None, ckpt: Any = None, **kwargs: Any
) -> Any:
    """Train; returns the Trainer."""
    trainer = trainer_of(callbacks, **kwargs)
    train = loader(shuffle=True) if train is None else train
    trainer.fit(module, train, loader(24, seed=1) if val is None else val, ckpt_path=ckpt)
    return trainer
