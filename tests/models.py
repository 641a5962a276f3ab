"""Small seeded networks that the tests share, and the twins of their forwards written by hand."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)
Activations = dict[str, list[Tensor]]


def seeded(make: Callable[..., Net], *args: Any, seed: int = 0, double: bool = False, **kwargs: Any) -> Net:
    """A network in evaluation mode whose weights, norm layers and statistics depend on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make(*args, **kwargs)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
    return (net.double() if double else net).eval()


def pictures(
    count: int = 6, *, size: int = 8, channels: int = 3, classes: int = 4, seed: int = 1, double: bool = False
):
    """Random pictures and labels, every class at least once where there are enough."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, generator=generator)
    return (x.double() if double else x), torch.arange(count) % classes


def cross_entropy(model: Any, batch: Any) -> Tensor:
    """The loss function most tests use: a mean over the batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


class ConvNet(nn.Module):
    """conv > norm > relu, pooled; conv > norm > relu; flattened; linear > relu > dropout; linear."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2, self.act = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(5 * (size // 2) ** 2, 7), nn.Linear(7, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = self.act(self.bn2(self.conv2(x)))
        return self.fc2(self.drop(F.relu(self.fc1(x.flatten(1)))))

    def by_hand(self, x: Tensor) -> tuple[Activations, Tensor]:
        a1 = self.bn1(self.conv1(x)).clamp_min(0)
        a2 = self.bn2(self.conv2(F.max_pool2d(a1, 2))).clamp_min(0)
        a3 = self.fc1(a2.flatten(1)).clamp_min(0)
        logits = self.fc2(a3)
        return {"conv1": [a1], "conv2": [a2], "fc1": [a3], "fc2": [logits]}, logits


class ResidualNet(nn.Module):
    """A stem and one residual block, the sum and the activation functions in place or not."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv3, self.bn3 = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=self.inplace)
        out = F.relu(self.bn2(self.conv2(x)), inplace=self.inplace)
        out = self.bn3(self.conv3(out))
        if self.inplace:
            out += x
        else:
            out = out + x
        return self.fc(F.relu(out, inplace=self.inplace).mean((2, 3)))

    def by_hand(self, x: Tensor) -> tuple[Activations, Tensor]:
        a1 = self.bn1(self.conv1(x)).clamp_min(0)
        a2 = self.bn2(self.conv2(a1)).clamp_min(0)
        a3 = self.bn3(self.conv3(a2))
        logits = self.fc((a3 + a1).clamp_min(0).mean((2, 3)))
        return {"conv1": [a1], "conv2": [a2], "conv3": [a3], "fc": [logits]}, logits


class ReluStatement(nn.Module):
    """An in-place activation whose result is not used: the model goes on with the tensor itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x.relu_()
        x = self.conv2(x)
        F.relu(x, inplace=True)
        return self.fc(x.mean((2, 3)))

    def by_hand(self, x: Tensor) -> tuple[Activations, Tensor]:
        a1 = self.conv1(x).clamp_min(0)
        a2 = self.conv2(a1).clamp_min(0)
        logits = self.fc(a2.mean((2, 3)))
        return {"conv1": [a1], "conv2": [a2], "fc": [logits]}, logits


class ReadThenRectified(nn.Module):
    """Two readers of one value, the second of which overwrites it: the chain ends before the overwriting."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        linear = x.sum((2, 3))
        return self.fc(linear + x.relu_().sum((2, 3)))

    def by_hand(self, x: Tensor) -> tuple[Activations, Tensor]:
        a1 = self.conv1(x)
        logits = self.fc(a1.sum((2, 3)) + a1.clamp_min(0).sum((2, 3)))
        return {"conv1": [a1], "fc": [logits]}, logits


class Recurrent(nn.Module):
    """One linear layer that runs three times, with a shared activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell, self.end, self.act = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.start(x.mean((2, 3))))
        for _ in range(3):
            x = self.act(self.cell(x))
        return self.end(x)

    def by_hand(self, x: Tensor) -> tuple[Activations, Tensor]:
        start = torch.tanh(self.start(x.mean((2, 3))))
        calls = [start]
        for _ in range(3):
            calls.append(torch.tanh(self.cell(calls[-1])))
        logits = self.end(calls[-1])
        return {"start": [start], "cell": calls[1:], "end": [logits]}, logits


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": ConvNet,
    "residual": lambda: ResidualNet(inplace=False),
    "residual in place": lambda: ResidualNet(inplace=True),
    "relu as a statement": ReluStatement,
    "read, then rectified in place": ReadThenRectified,
    "recurrent": Recurrent,
}
"""Networks with a twin ``by_hand``, all of 3-channel pictures of 8 x 8 pixels, four classes."""


class CharTransformer(nn.Module):
    """A pre-norm transformer of characters with GELU, attention written out."""

    def __init__(self, vocabulary: int, *, width: int = 8, hidden: int = 12, length: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.1)
        self.blocks = nn.ModuleList(TransformerBlock(width, hidden) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed(codes) + self.place[: codes.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TransformerBlock(nn.Module):
    """Attention with two heads, then fc1 > gelu > fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Single(nn.Linear):
    """Does not let itself be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is only one")
