"""A small network that has learnt the digits, and pictures of them; trained once per process."""

import copy
from functools import cache

import torch
from torch import Tensor, nn

from lightning_neurons.demo import DigitsNet, digits


@cache
def _learnt() -> tuple[DigitsNet, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, (training, validation) = DigitsNet(), digits()
    x, y = training.dataset.tensors
    optimizer, generator = torch.optim.AdamW(net.parameters(), 2e-3), torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(5):
            for part in torch.randperm(len(x), generator=generator).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[part]), y[part]).backward()
                optimizer.step()
    optimizer.zero_grad()
    net.eval()
    return net, *validation.dataset.tensors


def trained_digits() -> DigitsNet:
    """A copy of one's own, in evaluation mode."""
    return copy.deepcopy(_learnt()[0])


def digit_pictures() -> tuple[Tensor, Tensor]:
    """Validation pictures ``(397, 1, 8, 8)`` in [0, 1], and their classes."""
    _, x, y = _learnt()
    return x.clone(), y.clone()
