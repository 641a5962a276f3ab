"""Networks that say where a neuron's value is final, and whole forwards with it changed there: no code of the package.

``at(layer, value)`` does nothing, unless ``changed`` is active: then it changes one neuron. What runs is the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

CHANGES: list[Callable[[str, Tensor], Tensor]] = []


def at(layer: str, value: Tensor) -> Tensor:
    for change in CHANGES:
        value = change(layer, value)
    return value


@contextmanager
def changed(layer: str, neuron: int, axis: int, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, one neuron has other values in all nets of this file."""

    def change(name: str, value: Tensor) -> Tensor:
        if name != layer:
            return value
        value = value.clone()
        value.select(axis, neuron).copy_(new(value.select(axis, neuron).clone()))
        return value

    CHANGES.append(change)
    try:
        yield
    finally:
        CHANGES.clear()


class Residuals(nn.Module):
    """One block; the activation function is a function, works in place, or is one module that is used three times."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.relu = form, nn.ReLU()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv3, self.bn3, self.fc = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def act(self, x: Tensor) -> Tensor:
        return self.relu(x) if self.form == "shared" else F.relu(x, inplace=self.form == "in place")

    def forward(self, x: Tensor) -> Tensor:
        x = at("conv1", self.act(self.bn1(self.conv1(x))))
        out = at("conv2", self.act(self.bn2(self.conv2(x))))
        out = at("conv3", self.bn3(self.conv3(out)))
        if self.form == "in place":
            out += x
        else:
            out = out + x
        return at("fc", self.fc(self.act(out).mean((2, 3))))


class Mobile(nn.Module):
    """An inverted block: expanded, by channel, squeezed and excited, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.bn1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.bn2 = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.out, self.bn3, self.fc = nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = at("wide", F.hardswish(self.bn1(self.wide(x))))
        x = at("deep", F.hardswish(self.bn2(self.deep(x))))
        gate = at("squeeze", F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        x = x * at("excite", F.hardsigmoid(self.excite(gate)))
        return at("fc", self.fc(at("out", self.bn3(self.out(x))).mean((2, 3))))


class Dense(nn.Module):
    """All that came before, joined; the joined value is rectified by each reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        self.conv3, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, at("conv1", self.conv1(x))], 1)
        x = torch.cat([x, at("conv2", self.conv2(F.relu(x)))], 1)
        return at("fc", self.fc(at("conv3", self.conv3(F.relu(x))).mean((2, 3))))


class Branching(nn.Module):
    """Another layer runs where the pooled activation is large, and where it is small nothing does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.extra, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = at("conv", F.relu(self.conv(x))).mean((2, 3))
        if x[:, 0].mean() > 0.05:
            x = x + at("extra", torch.tanh(self.extra(x)))
        return at("fc", self.fc(x))


class Swapping(nn.Module):
    """Which of two layers runs first depends on the batch; the functions that are called are the same in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.fc = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        order = (1, 0) if x.sum() > 0 else (0, 1)
        for i in order:
            x = at(f"layers.{i}", torch.tanh(self.layers[i](x)))
        return at("fc", self.fc(x))


class WritesOneOfTwo(nn.Module):
    """Which of two values is written into depends on a neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.fc = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        a, b = at("a", self.a(x)), at("b", self.b(x))
        gate = at("gate", torch.sigmoid(self.gate(x)))
        target = a if gate[:, 0].mean() > 0.25 else b
        target += x[:, :1]
        return at("fc", self.fc(a * b))


class PerSample(nn.Module):
    """Runs once for each sample of a batch: its calls depend on the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([at("conv", F.relu(self.conv(one[None]))) for one in x])
        return at("fc", self.fc(x.mean((2, 3))))


class Counting(nn.Module):
    """Counts its calls, in an attribute and in a buffer, and what it gives depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.calls = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        x = at("conv", F.relu(self.conv(x * self.steps)))
        return at("fc", self.fc(x.mean((2, 3)) + self.calls))


class Twice(nn.Module):
    """A layer that runs twice in one forward, the second time on what it gave the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell, self.fc = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = at("start", torch.tanh(self.start(x.mean((2, 3)))))
        for _ in range(2):
            x = at("cell", torch.tanh(self.cell(x)))
        return at("fc", self.fc(x))


class Views(nn.Module):
    """Writes into parts of activations, and into the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = at("conv1", F.relu(self.conv1(x)))
        first = x
        x[:, :2] += 1
        x = at("conv2", self.conv2(x))
        x[:, 1:3].mul_(2)
        first.view(len(first), -1)[:, ::2] = 0
        return at("fc", self.fc(x.mean((2, 3)) + first.mean((2, 3))))


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.lstm, self.fc = nn.Linear(8, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(at("start", F.relu(self.start(x[:, 0]))))
        return at("fc", self.fc(steps[:, -1]))


class TwoOutputs(nn.Module):
    """Returns a mapping, or a pair; one of its parts is an activation that is read on."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv, self.fc, self.form = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> object:
        features = at("conv", F.relu(self.conv(x)))
        logits = at("fc", self.fc(features.mean((2, 3))))
        return {"logits": logits, "features": features} if self.form == "mapping" else (logits, features)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.conv2, self.bn2, self.fc = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = at("conv1", self.drop(F.relu(self.bn1(self.conv1(x)))))
        x = at("conv2", F.relu(self.bn2(self.conv2(x))))
        return at("fc", self.fc(F.dropout(x, 0.3, self.training).mean((2, 3))))
