"""Products that are no layer's: what they make is cut with what it is added to, and what they sum over is not."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import PruningError, describe_structure, prune
from tests.models import seeded
from tests.tables import for_each

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class LowRank(nn.Module):
    """A frozen layer with what has been learned beside it, as two narrow factors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.fc2.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        return self.head(torch.relu(self.fc2(x) + x @ self.down @ self.up))


class OneHead(nn.Module):
    """Attention by hand, or by PyTorch's function."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "function":
            return self.out(F.scaled_dot_product_attention(q, k, v))
        if self.how == "product":
            return self.out((q @ k.mT / math.sqrt(6)).softmax(-1) @ v)
        return self.out(torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v))


def test_what_is_added_to_a_layer_by_a_product_is_cut_with_it_and_what_a_product_reads_is_not():
    net = seeded(LowRank, double=True)
    groups = describe_structure(net, X)["groups"]
    assert groups["fc1"]["why_not"] == "its neurons cannot be followed: a function reads them, not a layer (mm)"
    with torch.no_grad():
        hidden = torch.relu(net.fc2(y := torch.relu(net.fc1(X))) + y @ net.down @ net.up)
        hidden[:, [1, 4]] = 0.0
        expected = net.head(hidden)
    prune(net, X, {"fc2": [1, 4]})
    assert (net.fc2.out_features, net.up.shape, net.down.shape) == (4, (2, 4), (8, 2))
    torch.testing.assert_close(net(X), expected)


@for_each("how", ["function", "product", "sums"])
def test_in_attention_values_are_cut_and_queries_and_keys_are_summed_over(how):
    net, x = seeded(lambda: OneHead(how), double=True), X.reshape(1, 5, 4)
    for layer in ("q", "k"):
        with pytest.raises(PruningError, match=rf"^{layer} cannot be cut: .*: a function reads them, not a layer \("):
            prune(net, x, {layer: [0]})
    net.out.weight.data[:, [0, 3]] = 0.0
    expected = net(x)
    assert prune(net, x, {"v": [0, 3]}).plan.neurons == {"v": (0, 3)}
    torch.testing.assert_close(net(x), expected)
