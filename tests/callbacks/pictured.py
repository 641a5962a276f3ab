"""What the tests of callbacks that make pictures share: what lies in a folder of pictures, and a logger of images."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_neurons import ActivationMaximizationCallback
from tests.callbacks.modules import MemoryLogger, Plain, dataset

SHUFFLED = "ignore:.*sampler has shuffling enabled"


class ImageLogger(MemoryLogger):
    """Keeps images as well."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, int | None, list[Any]]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images.append((key, step, images))


class Dying(Plain):
    """After epoch 0, neuron 2 of conv1 dies."""

    def __init__(self) -> None:
        super().__init__(lr=1e-3)
        self.net.norm1.bias.data.fill_(1.0)

    def on_train_epoch_end(self) -> None:
        self.net.norm1.bias.data[2] = -100.0 if self.current_epoch else 1.0


class Mapped(Plain):
    """Its batches are dicts."""

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])


def mapped(samples: int = 24, seed: int = 1) -> DataLoader:
    """What ``loader`` gives, as dicts."""
    return DataLoader([{"image": x, "label": y} for x, y in dataset(samples, seed)], 8)


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))


def maximizer(targets: Any = None, **kwargs: Any) -> ActivationMaximizationCallback:
    """With few steps."""
    return ActivationMaximizationCallback(targets, **({"steps": 3} | kwargs))


def files(folder: Path | str) -> set[str]:
    """What a run has written, without the files of loggers."""
    found = {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}
    return {name for name in found if "tfevents" not in name and name != "hparams.yaml"}


def listed(folder: Path | str, name: str) -> list[dict[str, Any]]:
    return json.loads((Path(folder) / "pictures" / f"{name}.json").read_text())


def is_picture(folder: Path | str, name: str) -> bool:
    content = (Path(folder) / "pictures" / name).read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 2000


def shown_in(folder: Path | str) -> dict[str, list[int]]:
    """Steps of the images in TensorBoard's files, by tag."""
    found = EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    return {tag: [event.step for event in found.Images(tag)] for tag in found.Tags()["images"]}


def same_pictures(a: Any, b: Any) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def place_of(row: Tensor, data: Tensor) -> list[int]:
    """Where a sample lies in the data."""
    return [i for i, one in enumerate(data) if torch.equal(one, row)]
