"""The networks that the benchmarks run: a CIFAR ResNet-20 and a tiny one."""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Block(nn.Module):
    """A residual block with a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.more, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and the shortcut."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(y + skip)


class ResNet20(nn.Module):
    """ResNet-20 for pictures of 32 x 32 pixels; 688 inner and 10 output neurons in 20 layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 16, 32, 32, 32, 64, 64, 64)
        ends = zip((16, *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in ends))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, 32, 32)`` to logits."""
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class Vgg11(nn.Module):
    """VGG-11 with BatchNorm for pictures of 32 x 32 pixels (Simonyan and Zisserman 2015), with random weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(pairwise((3, 64, 128, 256, 256, 512, 512, 512, 512))):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            if place in {0, 1, 3, 5}:
                layers.append(nn.MaxPool2d(2))
        self.features, self.fc = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, 32, 32)`` to logits."""
        return self.fc(self.features(x).flatten(1))


def resnet20_and_pictures(samples: int, data: Path | None, split: str = "test") -> tuple[nn.Module, Tensor, Tensor]:
    """A ResNet-20 in evaluation mode with pictures and labels: real ones from ``data``, else random ones."""
    if data is not None:
        sys.path.insert(0, str(data))
        import lnn_data
        from cifar_resnet import cifar_resnet

        pictures, labels = lnn_data.load_cifar10(split, samples)
        more = -(-samples // len(pictures))
        x = lnn_data.to_tensor(pictures).repeat(more, 1, 1, 1)[:samples]
        y = torch.from_numpy(labels).repeat(more)[:samples]
        return cifar_resnet(20, str(data / "cifar_resnet20.safetensors")).eval(), x, y
    torch.manual_seed(0)
    net = ResNet20()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval(), torch.randn(samples, 3, 32, 32), torch.randint(0, 10, (samples,))


def tiny_net() -> nn.Module:
    """Six layers that hardly compute anything: what remains is overhead."""
    widths = (8, 8, 8, 8, 8, 8, 4)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()
