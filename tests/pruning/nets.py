"""Small networks of the kinds that people prune."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.models import pictures, seeded


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = None):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(20, 7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [conv_norm(a, b, act=lambda: nn.ReLU(inplace=True)) for a, b in ((3, 4), (4, 6), (6, 5))]
        self.features = nn.Sequential(*blocks[0], nn.MaxPool2d(2), *blocks[1], *blocks[2], nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Padded(nn.Module):
    """A shortcut without parameters: every second pixel, and channels of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.shortcut = nn.ReLU(), nn.Identity()
        if stride > 1:
            self.shortcut = conv_norm(inputs, outputs, 1, stride) if projection else Padded()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, *, projection: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Residual(4, 4, 1, projection), Residual(4, 4, 1, projection))
        self.layer2 = nn.Sequential(Residual(4, 8, 2, projection), Residual(8, 8, 1, projection))
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseNet(nn.Module):
    """Each layer reads all that came before it, through a norm layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1)
        self.norm3, self.conv3 = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        x = F.avg_pool2d(self.conv3(F.relu(self.norm3(x))), 4)
        return self.head(x.flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.pool, self.fc1, self.fc2 = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, narrow, 1),
            nn.Conv2d(narrow, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))


class Inverted(nn.Module):
    def __init__(self, inputs: int, wide: int, outputs: int, stride: int, squeeze: int, act: Any) -> None:
        super().__init__()
        expand = [conv_norm(inputs, wide, 1, act=act)] if wide != inputs else []
        excite = [SqueezeExcite(wide, squeeze)] if squeeze else []
        deep = conv_norm(wide, wide, 3, stride, wide, act)
        self.block = nn.Sequential(*expand, deep, *excite, conv_norm(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNet(nn.Module):
    """Version 2, or version 3 with squeeze-and-excitation."""

    def __init__(self, *, squeeze: int, act: Any) -> None:
        super().__init__()
        rows = [(4, 4, 4, 1, 0), (4, 9, 6, 2, squeeze), (6, 12, 6, 1, squeeze)]
        blocks = [Inverted(*row, act) for row in rows]
        self.features = nn.Sequential(conv_norm(3, 4, act=act), *blocks, conv_norm(6, 10, 1, act=act))
        self.classifier = nn.Sequential(nn.Linear(10, 7), act(), nn.Dropout(0.2), nn.Linear(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Decoder(nn.Module):
    """Transposed convolution, norm by instance, slopes by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, 2, 1), nn.InstanceNorm2d(5, affine=True, track_running_stats=True)
        self.prelu, self.up = nn.PReLU(5), nn.ConvTranspose2d(5, 6, 2, 2)
        self.bn, self.out = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.elu(self.bn(self.up(self.prelu(self.norm(self.conv(x)))))))


class Place(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Tokens(nn.Module):
    """A residual stream that an embedding and learned positions begin, without norm layers or as a transformer."""

    def __init__(self, *, attend: bool) -> None:
        super().__init__()
        self.attend, self.embed, self.place = attend, nn.Embedding(11, 6), Place()
        if attend:
            self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
            self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.fc1, self.fc2, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 11)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.place(self.embed(codes))
        if not self.attend:
            return self.head(x + self.fc2(F.gelu(self.fc1(x))))
        y = self.norms[0](x)
        x = x + self.out((self.q(y) @ self.k(y).mT * 0.4).softmax(-1) @ self.v(y))
        return self.head(self.norms[2](x + self.fc2(F.gelu(self.fc1(self.norms[1](x))))))


class Joined(nn.Module):
    """Two branches side by side, and a third one that is added to both; it may be the first in the order."""

    def __init__(self, *, wide_first: bool = False) -> None:
        super().__init__()
        widths = {"both": 9, "a": 4, "b": 5} if wide_first else {"a": 4, "b": 5, "both": 9}
        for name, width in widths.items():
            self.add_module(name, nn.Conv2d(3, width, 3))
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.cat([self.a(x), self.b(x)], 1) + self.both(x)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "LeNet": LeNet,
    "VGG": Vgg,
    "ResNet A": lambda: ResNet(projection=False),
    "ResNet B": lambda: ResNet(projection=True),
    "DenseNet": DenseNet,
    "MobileNetV2": lambda: MobileNet(squeeze=0, act=nn.ReLU6),
    "MobileNetV3": lambda: MobileNet(squeeze=3, act=nn.Hardswish),
    "decoder": Decoder,
    "joined": Joined,
    "MLP": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 4)
    ),
    "tokens": lambda: Tokens(attend=False),
    "transformer": lambda: Tokens(attend=True),
}
"""Networks of 3-channel pictures of 8 x 8 pixels, or of five codes of 0 to 10."""


def codes() -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2))


def net_and_inputs(name: str) -> tuple[nn.Module, Tensor]:
    """A network in float64 and a batch for it."""
    net = seeded(NETS[name], double=True)
    return net, codes() if hasattr(net, "embed") else pictures(3, double=True)[0]
