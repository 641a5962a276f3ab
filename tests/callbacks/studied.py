"""What the tests of callbacks that make studies share: neurons switched off by plain hooks, and data to look at."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.callbacks.modules import dataset

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
