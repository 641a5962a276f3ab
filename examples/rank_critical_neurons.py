"""Which weights and neurons is a ResNet-20 least able to do without? Two rankings: by perturbation, and by ablation.

    python examples/rank_critical_neurons.py [--weights FILE --data FILE] [--delta 0.1] [--samples 64]

Without arguments, a ResNet-20 is trained on scikit-learn's digits for a few seconds. ``--weights`` is a state dict of a
CIFAR ResNet-20 (.safetensors, .pt), with pictures in ``--data``: an .npz file with ``x`` (number, height, width, 3),
whole numbers up to 255, and labels ``y``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_neurons import ablate, perturb
from lightning_neurons.demo import digits

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Block(nn.Module):
    """A residual block whose shortcut has no parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.more = (1 if inputs == outputs else 2), outputs - inputs
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and the shortcut."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(skip, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)))


class ResNet20(nn.Module):
    """ResNet-20 for small pictures, with the parameter names that published weights have."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to logits."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def trained_on_digits(samples: int, epochs: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of our own, and validation pictures."""
    torch.manual_seed(0)
    train, val = digits()
    model = ResNet20(channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in train:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    x, y = (torch.cat(column) for column in zip(*val, strict=True))
    return model.eval(), x[:samples], y[:samples]


def loaded(weights: Path, data: Path | None, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with given weights, and pictures from a file."""
    if not weights.is_file():
        raise SystemExit(f"--weights {weights}: there is no such file")
    try:
        file = np.load(data or "")
        pictures, labels = file["x"][:samples], file["y"][:samples]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"--data {data}: expected an .npz file with pictures x and labels y ({error})") from error
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(weights)
    else:
        state = torch.load(weights, weights_only=True)
    model = ResNet20()
    model.load_state_dict(state)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return model.eval(), x, torch.from_numpy(labels).long()


def main() -> None:
    """Rank parameters, neurons by their weights, and neurons by what happens without them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.samples < 2 or arguments.delta == 0 or (arguments.data is not None and arguments.weights is None):
        parser.error("expected --samples of at least 2, a --delta other than 0, and --data only beside --weights")
    if arguments.weights is None:
        model, x, y = trained_on_digits(arguments.samples)
    else:
        model, x, y = loaded(arguments.weights, arguments.data, arguments.samples)
    batch = x, y
    report = perturb(model, [batch], loss, delta=arguments.delta)
    print(f"loss {report.loss:.4f}; with {arguments.delta} added to all weights of")
    for row in report.ranking()[:5]:
        print(f"  {row.name:28s} {row.loss:10.4f}")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    neurons = perturb(model, [batch], loss, delta=arguments.delta, level="neuron", parameters=layers[-2:])
    print("with it added to the weights of one neuron of the last two convolutions:")
    for row in neurons.ranking()[:5]:
        print(f"  {row.name:28s} {row.loss:10.4f}")
    ablation = ablate(model, [batch], loss, neurons=layers, replacement="mean")
    print("critical neurons: change of the loss when a neuron is always at its mean")
    for neuron in ablation.ranking()[:5]:
        print(f"  {neuron.layer:24s} {neuron.neuron:3d} {neuron.delta_loss:+10.4f} +- {neuron.standard_error:.4f}")


if __name__ == "__main__":
    main()
