"""Networks for perturbation studies, and the loop that people write by hand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.models import CharTransformer, ConvNet, Recurrent, ResidualNet, cross_entropy, pictures, seeded
from tests.pruning.nets import MobileNet, ResNet


def classic(model: nn.Module, batch: Any, loss_fn: Any = cross_entropy, delta: float = 0.1) -> list[tuple[str, float]]:
    """Shift each weight, measure, restore; the highest loss first.

    Without torch's fused path of encoders, which rounds otherwise, and is off wherever calls are watched.
    """
    found, fused = [], torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight" in name:
                kept = parameter.clone()
                parameter.add_(delta)
                found.append((name, loss_fn(model, batch).item()))
                parameter.copy_(kept)
    torch.backends.mha.set_fastpath_enabled(fused)
    return sorted(found, key=lambda row: row[1], reverse=True)


def incoming(module: nn.Module) -> list[Any]:
    """For each neuron, the index of its weights, as the formulas of the documentation of torch have it."""
    if not isinstance(module, nn.ConvTranspose2d):
        return [(i,) for i in range(len(module.weight))]
    outputs, inputs = module.out_channels // module.groups, module.in_channels // module.groups
    return [
        (slice((i // outputs) * inputs, (i // outputs + 1) * inputs), i % outputs) for i in range(module.out_channels)
    ]


def neuron_loop(model: nn.Module, batch: Any, loss_fn: Any, change: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The loss after a change of the weights of each neuron of each layer."""
    found = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                for neuron, index in enumerate(incoming(module)):
                    kept = module.weight.clone()
                    module.weight[index] = change(module.weight[index])
                    found[f"{name}.weight[{neuron}]"] = loss_fn(model, batch).item()
                    module.weight.copy_(kept)
    return found


class Upwards(nn.Module):
    """Transposed, grouped and depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, groups=1)
        self.deep = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.plain = nn.ConvTranspose2d(6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.deep(F.relu(self.first(x))))
        return self.plain(torch.tanh(self.up(x))).mean((2, 3))


class Tied(CharTransformer):
    """The head reads with the weights of the embedding."""

    def __init__(self) -> None:
        super().__init__(9)
        self.head.weight = self.embed.weight


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(24, 5, num_layers=2, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.transpose(1, 2).flatten(2))[0][:, -1])


class Encoder(nn.Module):
    """Modules of torch itself, which take a fused path in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.mean(1)).mean(1))


class Normed(nn.Module):
    """A convolution whose weight is made of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu_().mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": ConvNet,
    "ResNet": lambda: ResNet(projection=True),
    "residual in place": lambda: ResidualNet(inplace=True),
    "mobile": lambda: MobileNet(squeeze=3, act=nn.Hardswish),
    "recurrent": Recurrent,
    "upwards": Upwards,
    "LSTM": Lstm,
    "encoder of torch": Encoder,
    "weight norm": Normed,
    "GELU transformer": lambda: CharTransformer(9),
    "tied weights": Tied,
}


def next_code(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def data_for(name: str, count: int = 6, seed: int = 1) -> tuple[nn.Module, Any, Any]:
    """A network, a batch and its loss function."""
    net = seeded(NETS[name])
    if not isinstance(net, CharTransformer):
        return net, pictures(count, seed=seed), cross_entropy
    codes = torch.randint(0, 9, (count, 8), generator=torch.Generator().manual_seed(seed))
    return net, (codes[:, :-1], codes[:, 1:]), next_code
