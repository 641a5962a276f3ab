"""What readers read and put out, compared with torch and with loops; and how close they come on nets of all kinds."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import prune
from lightning_neurons.pruning.compensation import ridge as least_squares
from lightning_neurons.pruning.compensation.moments import OutputMean, applied
from lightning_neurons.pruning.compensation.unfold import channels, has_patches, patches
from tests.models import pictures, seeded
from tests.pruning.nets import NETS, net_and_inputs
from tests.tables import for_each

WINDOWS = [
    {"kernel_size": 3},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "dilation": 3, "padding": 2},
    {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": 2},
]
with_windows = for_each("window", WINDOWS)
MODES = ["zeros", "reflect", "replicate", "circular"]


@with_windows
@for_each("mode", MODES)
def test_patches_of_pictures_are_those_of_torch(window, mode):
    conv, x = nn.Conv2d(4, 3, **window, padding_mode=mode).double(), torch.randn(2, 4, 7, 9).double()
    size = window.get("padding", 0)
    padded = F.pad(x, (size,) * 4, mode="constant" if mode == "zeros" else mode)
    options = {name: value for name, value in window.items() if name != "padding"}
    expected = F.unfold(padded, **options).transpose(0, 1).flatten(1)
    assert torch.equal(patches(conv, x), expected)
    out = conv.weight.flatten(1) @ patches(conv, x) + conv.bias[:, None]
    torch.testing.assert_close(out, channels(conv, conv(x)))


def test_patches_of_rectangles_and_same_padding():
    conv, x = nn.Conv2d(2, 3, (2, 5), padding="same", dilation=(2, 1)).double(), torch.randn(2, 2, 6, 5).double()
    torch.testing.assert_close(
        conv.weight.flatten(1) @ patches(conv, x), channels(conv, conv(x) - conv.bias[:, None, None])
    )


@with_windows
@for_each("kind", [nn.Conv1d, nn.Conv3d])
def test_patches_of_sequences_and_volumes_are_those_of_a_loop(kind, window):
    conv, axes = kind(3, 2, **window).double(), 1 if kind is nn.Conv1d else 3
    x = torch.randn(2, 3, *(6, 7, 6)[:axes]).double()
    (size, step), far = (conv.kernel_size[0], conv.stride[0]), conv.dilation[0]
    padded = F.pad(x, (conv.padding[0],) * (2 * axes))
    starts = [range(0, length - far * (size - 1), step) for length in padded.shape[2:]]
    rows = []
    for channel, taps in itertools.product(range(3), itertools.product(range(size), repeat=axes)):
        row = [
            padded[(sample, channel, *(s + far * t for s, t in zip(start, taps, strict=True)))]
            for sample in range(2)
            for start in itertools.product(*starts)
        ]
        rows.append(torch.stack(row))
    assert torch.equal(patches(conv, x), torch.stack(rows))


def test_what_has_patches():
    assert has_patches(nn.Conv1d(2, 2, 3))
    assert not has_patches(nn.Linear(2, 2))
    assert not has_patches(nn.ConvTranspose2d(2, 2, 3))


LAYERS = {
    "conv, zero padding": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "conv, reflected": lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="reflect"),
    "conv, no bias": lambda: nn.Conv2d(3, 5, 2, dilation=2, bias=False),
    "depthwise": lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1),
    "linear": lambda: nn.Linear(8, 5),
}


@for_each("name", LAYERS)
def test_the_mean_output_is_exact_for_all_sizes_of_pictures_together(name):
    layer = seeded(LAYERS[name], double=True)
    mean, weight = OutputMean(layer), torch.randn_like(layer.weight)
    seen = [torch.randn(count, 3, size, 8).double() + 1 for count, size in ((2, 8), (3, 6), (1, 8), (4, 5))]
    outputs, by_size = [], {}
    with torch.no_grad():
        layer.weight.copy_(weight)
        for x in seen:
            mean.add(x)
            bare = layer(x)
            if layer.bias is not None:
                bare = bare - (layer.bias if name == "linear" else layer.bias[:, None, None])
            torch.testing.assert_close(applied(layer, weight, x), bare)
            outputs.append(channels(layer, bare))
            rows = x.reshape(-1, 8) if name == "linear" else x
            by_size.setdefault(rows.shape[1:], []).append(rows)
    total, count = mean.total(weight)
    stacked = torch.cat(outputs, 1)
    assert int(count) == stacked.shape[1]
    torch.testing.assert_close(total, stacked.sum(1))
    assert mean.largest == pytest.approx(max(float(torch.cat(rows).mean(0).abs().max()) for rows in by_size.values()))


class Two(nn.Module):
    """One tensor that two layers read, one of them twice in a forward; both are added."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.twice, self.stem = twice, nn.Linear(6, 9)
        self.left, self.right, self.head = nn.Linear(9, 9), nn.Linear(9, 7), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        left = self.left(x).tanh()
        left = self.left(left + x) if self.twice else left
        return self.head(torch.cat([left, self.right(x).tanh()], -1))


def chain(*layers):
    return lambda: nn.Sequential(*[make() for make in layers])


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


KINDS = {
    "two readers": (lambda: Two(twice=False), {"stem": (1, 4, 5)}, (40, 6)),
    "twice in a forward": (lambda: Two(twice=True), {"stem": (1, 4)}, (40, 6)),
    "tokens": (chain(lambda: nn.Linear(6, 8), nn.GELU, lambda: nn.Linear(8, 4)), {"0": (1, 2, 5)}, (9, 7, 6)),
    "pictures": (chain(conv(3, 8, 3, padding=1), nn.ReLU, conv(8, 4, 3, padding=1)), {"0": (1, 4)}, (12, 3, 8, 8)),
    "strided": (chain(conv(3, 8, 3), nn.ReLU, conv(8, 4, 3, 2, 1, 2)), {"0": (1, 4)}, (12, 3, 9, 9)),
    "depthwise": (
        chain(conv(3, 8, 3), nn.ReLU, conv(8, 8, 3, groups=8), nn.ReLU, conv(8, 4, 1)), {"0": (1, 6)}, (12, 3, 8, 8)
    ),
    "flattened": (
        chain(conv(3, 6, 3), nn.ReLU, lambda: nn.MaxPool2d(3), nn.Flatten, lambda: nn.Linear(24, 4)),
        {"0": (2, 5)},
        (90, 3, 8, 8),
    ),
    "norm behind": (
        chain(conv(3, 8, 3), nn.ReLU, conv(8, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), nn.ReLU, conv(6, 3, 1)),
        {"0": (1, 4)},
        (12, 3, 8, 8),
    ),
    "transposed": (chain(conv(3, 8, 3), nn.ReLU, lambda: nn.ConvTranspose2d(8, 4, 3)), {"0": (1, 4)}, (9, 3, 8, 8)),
    "sequence": (
        chain(lambda: nn.Conv1d(3, 8, 3), nn.ReLU, lambda: nn.Conv1d(8, 4, 3, 2, 1)), {"0": (1, 4)}, (12, 3, 30)
    ),
    "without bias": (
        chain(lambda: nn.Linear(6, 8), nn.ReLU, lambda: nn.Linear(8, 4, bias=False)), {"0": (1, 2)}, (50, 6)
    ),
}  # fmt: skip


def errors(net: nn.Module, plan, x: Tensor, *ways: str) -> tuple[list[float], dict[str, tuple[str, ...]]]:
    """The mean square by which outputs on the calibration data change, and what was noted."""
    found, notes = [], {}
    with torch.no_grad():
        expected = net(x)
        for how in ways:
            twin = copy.deepcopy(net)
            notes[how] = prune(twin, x[:2], plan, [x[:5], x[5:]], compensation=how).notes
            found.append(float((twin(x) - expected).square().mean()))
    return found, notes


@pytest.mark.parametrize("name", KINDS)
def test_readers_of_every_kind_come_closer_by_least_squares_than_by_means(name, monkeypatch):
    monkeypatch.setattr(least_squares, "RIDGES", (1e-3,))  # so few samples may well ask for means alone
    make, plan, shape = KINDS[name]
    net, x = seeded(make, double=True), torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
    (patch, channel, mean, none), notes = errors(
        net, plan, x, "patch_least_squares", "least_squares", "mean", "none"
    )  # fmt: skip
    assert 0 < patch <= channel * (1 + 1e-3)
    assert channel < mean <= none * (1 + 1e-9)
    fell_back = [n for n in notes["patch_least_squares"] if "is no plain convolution: its channels" in n]
    assert [n.split()[0] for n in fell_back] == (["2"] if name == "transposed" else [])
    if name in ("transposed", "two readers", "tokens", "flattened"):
        assert patch == pytest.approx(channel, rel=1e-9)
    unsaid = [n for n in notes["least_squares"] if "has no bias, and no norm layer" in n]
    assert [n.split()[0] for n in unsaid] == (["2"] if name == "without bias" else [])


@for_each("kernel, stride", [(2, 2), (3, 2), (4, 2)])
def test_transposed_convolutions_with_phases_come_closer_as_a_rule(kernel, stride):
    """One bias cannot follow a constant that differs by phase, so there is no guarantee in each single case."""
    ratios, x = [], torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    for seed in range(7):
        make = chain(conv(3, 8, 3), nn.ReLU, lambda: nn.ConvTranspose2d(8, 4, kernel, stride))
        (channel, mean), _ = errors(seeded(make, seed=seed, double=True), {"0": (1, 4)}, x, "least_squares", "mean")
        ratios.append(channel / mean)
    assert sorted(ratios)[3] < 0.95
    assert max(ratios) < 1.3


@for_each("name", ["LeNet", "ResNet A", "ResNet B", "DenseNet", "MobileNetV2", "decoder", "joined"])
def test_whole_nets_come_closer_by_least_squares_than_by_means(name):
    net, _ = net_and_inputs(name)
    root = {"LeNet": "conv1", "DenseNet": "stem", "MobileNetV2": "features.2.block.0.0", "joined": "a"}
    layer = root.get(name, "conv" if name == "decoder" else "layer1.0.conv1")
    x, _ = pictures(24, double=True)
    (channel, mean, none), _ = errors(net, {layer: [0, 2]}, x, "least_squares", "mean", "none")
    assert channel <= mean * (1 + 1e-9) < none * 1.05


def test_a_residual_group_is_compensated_in_all_its_readers():
    net, x = seeded(NETS["ResNet B"], double=True), pictures(24, double=True)[0]
    before = copy.deepcopy(net.state_dict())
    (channel, mean, none), _ = errors(net, {"conv1": [1]}, x, "least_squares", "mean", "none")
    assert channel < min(mean, none)
    prune(net, x[:2], {"conv1": [1]}, [x])
    readers = ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"]
    for path in readers:
        assert not torch.allclose(net.state_dict()[f"{path}.weight"], before[f"{path}.weight"][:, [0, 2, 3]])
    untouched = ["layer2.1.conv1.weight", "linear.weight", "layer2.0.conv2.weight"]
    assert all(torch.equal(net.state_dict()[n], before[n]) for n in untouched)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(60, 6), (12, 5, 6)], ids=["samples", "tokens"])
def test_a_linear_reader_is_given_the_solution_of_numpy(bias, shape, monkeypatch):
    monkeypatch.setattr(least_squares, "RIDGES", (1e-3,))
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2)
    net, x = seeded(nn.Sequential, *layers, double=True), torch.randn(shape).double()
    with torch.no_grad():
        z = net[:2](x).reshape(-1, 8)
        y, left = z @ net[2].weight.T, z[:, [0, 2, 3, 5, 6, 7]]
        old = net[2].weight[:, [0, 2, 3, 5, 6, 7]]
        at, to = (left.mean(0), y.mean(0)) if bias else (0 * left[0], 0 * y[0])
        ridge = (1e-3 * (left - at).square().mean() * len(z)).sqrt() * torch.eye(6).double()
        rows, targets = torch.cat([left - at, ridge]), torch.cat([y - to, ridge @ old.T])
        expected = torch.linalg.lstsq(rows, targets).solution.T
        offset = None if not bias else net[2].bias + to - expected @ at
    prune(net, x[:2], {"0": [1, 4]}, [x[:4], x[4:]], compensation="least_squares")
    torch.testing.assert_close(net[2].weight.data, expected, rtol=1e-7, atol=1e-9)
    assert (net[2].bias is None) != bias
    if bias:
        torch.testing.assert_close(net[2].bias.data, offset, rtol=1e-7, atol=1e-9)
