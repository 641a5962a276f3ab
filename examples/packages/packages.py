"""Trainings of other people's packages, small enough for a minute each: synthetic data, two or three epochs.

Each function takes callbacks and further arguments of the Trainer, trains, and says how its package saves and loads.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L  # noqa: N812
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Run(NamedTuple):
    """What a training leaves.

    Attributes:
        trainer: The Trainer.
        module: Its module.
        model: What the package saves and loads: the module, or what stands around its network.
        reload: Saves the model into a folder in the way of the package, and returns one that it has loaded from there.
        outputs: What such a model says of some of its data.
    """

    trainer: Any
    module: Any
    model: Any
    reload: Callable[[str], Any]
    outputs: Callable[[Any], Any]


def _trainer(callbacks: Sequence[Any], **more: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}
    return L.Trainer(
        callbacks=list(callbacks), default_root_dir=tempfile.mkdtemp(), enable_checkpointing=False, **quiet | more
    )


def forecasting(callbacks: Sequence[Any], **more: Any) -> Run:
    """pytorch-forecasting: a temporal fusion transformer on sine waves."""
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    rng, rows = np.random.default_rng(0), 60
    series = [
        pd.DataFrame({
            "time": range(rows),
            "value": np.sin(np.arange(rows) / 5 + phase) + 0.1 * rng.standard_normal(rows),
            "series": str(phase),
        })
        for phase in range(8)
    ]
    frame = pd.concat(series, ignore_index=True)
    data = TimeSeriesDataSet(
        frame, time_idx="time", target="value", group_ids=["series"], max_encoder_length=12, max_prediction_length=4,
        time_varying_unknown_reals=["value"], time_varying_known_reals=["time"], static_categoricals=["series"],
    )  # fmt: skip
    module = TemporalFusionTransformer.from_dataset(data, hidden_size=8, attention_head_size=2, log_interval=-1)
    trainer = _trainer(callbacks, limit_train_batches=4, limit_val_batches=4, gradient_clip_val=0.1, **more)
    loaders = [data.to_dataloader(train=flag, batch_size=32, num_workers=0) for flag in (True, False)]
    trainer.fit(module, *loaders)

    def reload(folder: str) -> Any:
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        return TemporalFusionTransformer.load_from_checkpoint(f"{folder}/last.ckpt", weights_only=False)

    inputs, _ = next(iter(loaders[1]))
    return Run(trainer, module, module, reload, lambda model: model(inputs).prediction)


def single_cell(callbacks: Sequence[Any], **more: Any) -> Run:
    """scvi-tools: a variational autoencoder of synthetic counts, trained by the package's own ``train``."""
    import anndata
    import scvi

    scvi.settings.verbosity, scvi.settings.seed = 40, 0
    counts = np.random.default_rng(0).negative_binomial(5, 0.3, (192, 40)).astype(np.float32)
    data = anndata.AnnData(counts)
    data.obs["batch"] = ["one", "other"] * 96
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    model = scvi.model.SCVI(data, n_hidden=24, n_latent=4)
    kept: list[Any] = []

    class Keep(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            kept.extend((trainer, pl_module))

    model.train(
        max_epochs=3, train_size=0.7, batch_size=32, check_val_every_n_epoch=1, accelerator="cpu",
        callbacks=[Keep(), *callbacks], enable_progress_bar=False, default_root_dir=tempfile.mkdtemp(), **more,
    )  # fmt: skip

    def reload(folder: str) -> Any:
        model.save(f"{folder}/model")
        return scvi.model.SCVI.load(f"{folder}/model", data, accelerator="cpu")

    def outputs(model: Any) -> Any:
        found = model.get_latent_representation(), model.get_normalized_expression(return_numpy=True)
        return torch.cat([torch.as_tensor(part) for part in found], 1)

    return Run(*kept, model, reload, outputs)


def chemistry(callbacks: Sequence[Any], **more: Any) -> Run:
    """chemprop: a message-passing network on the number of carbon atoms of small molecules."""
    from chemprop import data, models
    from chemprop import nn as parts

    smiles = ["C" * n + end for n in range(1, 17) for end in ("O", "N", "C(=O)O", "Cl", "c1ccccc1")]
    points = [data.MoleculeDatapoint.from_smi(s, [float(s.upper().count("C"))]) for s in smiles]
    order = np.random.default_rng(0).permutation(len(points))
    train, val = (data.MoleculeDataset([points[i] for i in part]) for part in (order[:60], order[60:]))
    val.normalize_targets(train.normalize_targets())
    module = models.MPNN(parts.BondMessagePassing(d_h=24), parts.MeanAggregation(), parts.RegressionFFN(24, 24))
    trainer = _trainer(callbacks, **more)
    validation = data.build_dataloader(val, batch_size=8, num_workers=0, shuffle=False)
    trainer.fit(module, data.build_dataloader(train, batch_size=16, num_workers=0, seed=0), validation)

    def reload(folder: str) -> Any:
        models.save_model(f"{folder}/model.pt", module)
        return models.load_model(f"{folder}/model.pt")

    graph, *descriptors, _, _, _, _ = next(iter(validation))
    return Run(trainer, module, module, reload, lambda model: model(graph, *descriptors))


class _Views(Dataset[Any]):
    """Two noisy views of the same random image."""

    def __init__(self, size: int) -> None:
        self.images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(size))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(index)) * 0.1
        return self.images[index] + noise[0], self.images[index] + noise[1]


class _Byol(L.LightningModule):
    """BYOL as in the documentation of lightly: the target networks follow by exponential averages."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.backbone = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.projection = BYOLProjectionHead(16, 32, 8)
        self.prediction = BYOLPredictionHead(8, 32, 8)
        import copy

        self.backbone_momentum, self.projection_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.projection)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_momentum)
        self.criterion = NegativeCosineSimilarity()

    def _loss(self, batch: Any) -> Tensor:
        def online(x: Tensor) -> Tensor:
            return self.prediction(self.projection(self.backbone(x)))

        def target(x: Tensor) -> Tensor:
            return self.projection_momentum(self.backbone_momentum(x)).detach()

        one, two = batch
        loss: Tensor = (self.criterion(online(one), target(two)) + self.criterion(online(two), target(one))) / 2
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection, self.projection_momentum, m=0.9)
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def self_supervised(callbacks: Sequence[Any], **more: Any) -> Run:
    """lightly: BYOL."""
    trainer, module = _trainer(callbacks, **more), _Byol()
    validation = DataLoader(_Views(32), 16)
    trainer.fit(module, DataLoader(_Views(48), 16, generator=torch.Generator().manual_seed(0)), validation)

    def reload(folder: str) -> Any:
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        return _Byol.load_from_checkpoint(f"{folder}/last.ckpt")

    def outputs(model: Any) -> Tensor:
        one, two = next(iter(validation))
        online = model.prediction(model.projection(model.backbone(one)))
        return torch.cat([online, model.projection_momentum(model.backbone_momentum(two))])

    return Run(trainer, module, module, reload, outputs)


class _Fields(Dataset[Any]):
    """Images whose mask is where one channel is bright, as torchgeo's data sets hand them out."""

    def __init__(self, size: int) -> None:
        self.images = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "mask": (self.images[index, 0] > 0.5).long()}


def segmentation(callbacks: Sequence[Any], **more: Any) -> Run:
    """torchgeo: its semantic segmentation task, a U-Net on a ResNet-18."""
    from torchgeo.trainers import SemanticSegmentationTask

    module = SemanticSegmentationTask(
        model="unet", backbone="resnet18", weights=None, in_channels=3, num_classes=2, task="multiclass", loss="ce"
    )
    trainer = _trainer(callbacks, logger=False, **more)
    validation = DataLoader(_Fields(8), 4)
    trainer.fit(module, DataLoader(_Fields(16), 4, generator=torch.Generator().manual_seed(0)), validation)

    def reload(folder: str) -> Any:
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        return SemanticSegmentationTask.load_from_checkpoint(f"{folder}/last.ckpt")

    return Run(trainer, module, module, reload, lambda model: model(next(iter(validation))["image"]))


PACKAGES: dict[str, Callable[..., Run]] = {
    "pytorch-forecasting": forecasting,
    "scvi-tools": single_cell,
    "chemprop": chemistry,
    "lightly": self_supervised,
    "torchgeo": segmentation,
}
