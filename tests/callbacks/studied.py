"""What the tests of callbacks that make studies share: neurons switched off by plain hooks, and data to look at."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L  # noqa: N812
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_neurons.results.class_report import ClassReport
from tests.callbacks.modules import Net, Plain, Steps, dataset

# What is 0 here stays 0 in the ReLU behind it.
SITES = {"net.conv1": "net.norm1", "net.conv2": "net.norm2", "net.fc1": "net.fc1"}
HIDDEN = {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8}


@contextmanager
def silenced(module: nn.Module, neurons: Mapping[str, Sequence[int]]) -> Iterator[nn.Module]:
    """Meanwhile, in evaluation mode, some channels or features of ``Net`` are 0."""
    handles, was_training = [], module.training
    for layer, indices in neurons.items():

        def hook(one: nn.Module, inputs: Any, output: Tensor, chosen: Sequence[int] = tuple(indices)) -> Tensor:
            output = output.clone()
            for i in chosen:
                output[:, i] = 0
            return output

        handles.append(module.get_submodule(SITES[layer]).register_forward_hook(hook))
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for handle in handles:
            handle.remove()
        module.train(was_training)


def loss_without(module: nn.Module, batch: tuple[Tensor, Tensor], neurons: Mapping[str, Sequence[int]]) -> float:
    with silenced(module, neurons):
        return float(nn.functional.cross_entropy(module.net(batch[0]).double(), batch[1]))


def accuracy_without(module: nn.Module, batch: tuple[Tensor, Tensor], neurons: Mapping[str, Sequence[int]]) -> float:
    with silenced(module, neurons):
        return float((module.net(batch[0]).argmax(1) == batch[1]).double().mean())


def deltas(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """By layer, what the loss changes by without each neuron, one forward for each."""
    base = loss_without(module, batch, {})
    return {
        layer: torch.tensor([loss_without(module, batch, {layer: [i]}) - base for i in range(count)])
        for layer, count in HIDDEN.items()
    }


def samples(count: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    """All that ``loader(count, seed=seed)`` gives, as one batch."""
    return dataset(count, seed).tensors  # type: ignore[return-value]


def half(batch: tuple[Tensor, Tensor], start: int) -> tuple[Tensor, Tensor]:
    return batch[0][start::2], batch[1][start::2]


def joined(by_layer: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([by_layer[layer].double() for layer in HIDDEN])


def assert_same(found: ClassReport, expected: ClassReport) -> None:
    assert (found.classes, found.class_counts) == (expected.classes, expected.class_counts)
    for layer, values in expected.importance.items():
        assert torch.allclose(found.importance[layer], values, atol=1e-6, equal_nan=True), layer
        assert torch.allclose(found.entropy[layer], expected.entropy[layer], atol=1e-5, equal_nan=True), layer
        assert torch.equal(found.members[layer], expected.members[layer]), layer
        assert torch.allclose(found.selectivity[layer], expected.selectivity[layer], atol=1e-6, equal_nan=True), layer
    assert found.importance.keys() == expected.importance.keys()
    for ours, theirs in zip(found.accuracies, expected.accuracies, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], abs=1e-9, nan_ok=True)


class NoForward(Plain):
    forward = L.LightningModule.forward

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class TwoNetworks(NoForward):
    def __init__(self) -> None:
        super().__init__()
        self.other = Net()

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + torch.nn.functional.cross_entropy(self.other(batch[0]), batch[1])


class OldNoForward(Steps, pytorch_lightning.LightningModule):
    forward = pytorch_lightning.LightningModule.forward

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def sorted_by_class(*kinds: int) -> DataLoader:
    """Validation data as folders of pictures give it: one class after the other."""
    data = dataset(48, seed=1)
    rows = [i for k in kinds for i, y in enumerate(data.tensors[1].tolist()) if y == k]
    return DataLoader(Subset(data, rows), 4)
