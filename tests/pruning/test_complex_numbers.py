"""Models that compute with complex numbers on the way are tried and cut as any other."""

import torch
from torch import Tensor, nn

from lightning_neurons import describe_structure, prune
from tests.models import seeded
from tests.tables import for_each

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Filtered(nn.Module):
    """Filters each channel by a learned spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 2)
        self.spectrum = nn.Parameter(torch.randn(3, 8, dtype=torch.complex64))

    def spectral(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.embed(x), dim=1) * self.spectrum, n=5, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.spectral(x))).mean(1))


class Complex(nn.Module):
    """Has complex weights, and an output of complex numbers or of their sizes."""

    def __init__(self, *, sizes: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.first, self.second = (nn.Linear(a, b, dtype=torch.complex64) for a, b in ((6, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(torch.tanh(self.first(torch.complex(x, x.flip(-1)))))
        return out.abs() if self.sizes else out


def test_a_spectrum_is_cut_with_the_channels_that_it_filters():
    net = seeded(Filtered)
    net.fc.weight.data[:, [2, 5]] = 0.0
    expected = net(X)
    prune(net, X, {"embed": [2, 5]})
    assert (net.embed.out_features, net.spectrum.shape, net.fc.in_features) == (6, (3, 6), 6)
    torch.testing.assert_close(net(X), expected)


@for_each("sizes", [False, True])
def test_complex_layers_are_cut_and_what_is_complex_in_the_output_counts(sizes):
    net = seeded(lambda: Complex(sizes=sizes))
    net.second.weight.data[:, [0, 7]] = 0.0
    expected = net(X)
    groups = describe_structure(net, X)["groups"]
    assert {root: group["why_not"] for root, group in groups.items()} == {
        "first": None,
        "second": "its neurons are the model's output",
    }
    prune(net, X, {"first": [0, 7]})
    assert net.first.out_features == 6
    torch.testing.assert_close(net(X), expected)


class Rolled(Complex):
    """Something that is complex in its output depends on the number of neurons."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(torch.complex(x, x)))
        return self.second(hidden * hidden.shape[-1])


def test_a_difference_of_complex_outputs_is_one():
    why = describe_structure(seeded(lambda: Rolled(sizes=False)), X)["groups"]["first"]["why_not"]
    assert why.startswith("the output differs from that with silenced neurons")
