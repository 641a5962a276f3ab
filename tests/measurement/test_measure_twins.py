"""``measure`` against loops: one picture at a time, plain autograd, float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import Criterion, LayerView, Statistic, measure
from tests.models import NETS, ConvNet, Recurrent, cross_entropy, pictures, seeded
from tests.tables import for_each

CRITERIA = ["gradient", "taylor", "taylor_fo", "fisher", "second_order"]


def naive(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """All sensitivity criteria: a loop over pictures, layers and calls."""
    squares: dict[str, list[Tensor]] = {}
    gates: dict[str, list[Tensor]] = {}
    for n in range(len(x)):
        by_hand, logits = net.by_hand(x[n : n + 1])
        loss = F.cross_entropy(logits, y[n : n + 1])
        for layer, calls in by_hand.items():
            square, gate = 0, 0
            for value in calls:
                (g,) = torch.autograd.grad(loss, [value], retain_graph=True)
                square = square + (g**2)[0].flatten(1).sum(1) if g.ndim > 2 else square + (g**2)[0]
                gate = gate + (value * g)[0].flatten(1).sum(1) if g.ndim > 2 else gate + (value * g)[0]
            squares.setdefault(layer, []).append(square)
            gates.setdefault(layer, []).append(gate)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in CRITERIA}
    for layer in gates:
        square, u = torch.stack(squares[layer]).mean(0), torch.stack(gates[layer]).detach()
        found["gradient"][layer] = square / square.sum()
        found["taylor"][layer] = u.abs().mean(0)
        found["taylor_fo"][layer] = u.mean(0) ** 2
        found["fisher"][layer] = (u**2).mean(0) / 2
        found["second_order"][layer] = (u**2).mean(0) / 2 - u.mean(0)
    return found


def assert_same_scores(one, other, *, atol: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name, by_layer in other.items():
        assert one[name].keys() == by_layer.keys()
        for layer, score in by_layer.items():
            torch.testing.assert_close(one[name][layer].double(), score.double(), rtol=1e-9, atol=atol)


@for_each("name", NETS)
def test_every_sensitivity_score_equals_a_loop_over_single_pictures(name):
    net = seeded(NETS[name], double=True)
    x, y = pictures(7, double=True)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    report = measure(net, batches, loss_fn=cross_entropy, criteria=CRITERIA)
    assert_same_scores(report.scores, naive(net, x, y))
    assert all(counts.gradient_samples.tolist() == [7] * len(counts.samples) for counts in report.counts.values())
    for scores in report.scores["gradient"].values():
        assert scores.sum().item() == pytest.approx(1)


@for_each("size", [1, 2, 7, 16])
def test_the_batch_size_changes_no_score(size):
    net = seeded(ConvNet, double=True)
    x, y = pictures(16, double=True)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    whole = measure(net, [(x, y)], loss_fn=cross_entropy)
    parts = measure(net, batches, loss_fn=cross_entropy)
    assert_same_scores(parts.scores, whole.scores)
    assert_same_scores(parts.deadness_by, whole.deadness_by)


@for_each(
    "reduction, loss_fn",
    [
        ("sum", lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum")),
        ("none", lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")),
        ("mean", lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")),
        ("sum", lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").unsqueeze(1)),
    ],
)
def test_the_reduction_of_the_loss_changes_no_score(reduction, loss_fn):
    net = seeded(ConvNet, double=True)
    x, y = pictures(7, double=True)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    expected = measure(net, batches, loss_fn=cross_entropy, criteria=CRITERIA)
    found = measure(net, batches, loss_fn=loss_fn, loss_reduction=reduction, criteria=CRITERIA)
    assert_same_scores(found.scores, expected.scores)


def test_permuting_the_neurons_permutes_the_scores():
    net, order = seeded(ConvNet, double=True), torch.tensor([3, 0, 5, 1, 4, 2])
    batch = pictures(8, double=True)
    before = measure(net, [batch], loss_fn=cross_entropy)
    with torch.no_grad():
        for tensor in (
            net.conv1.weight,
            net.conv1.bias,
            *net.bn1.parameters(),
            net.bn1.running_mean,
            net.bn1.running_var,
        ):
            tensor.copy_(tensor[order].clone())
        net.conv2.weight.copy_(net.conv2.weight[:, order].clone())
    after = measure(net, [batch], loss_fn=cross_entropy)
    for of_before, of_after in ((before.scores, after.scores), (before.deadness_by, after.deadness_by)):
        assert of_before
        for name, by_layer in of_before.items():
            assert of_after[name].keys() == by_layer.keys()
            for layer, scores in by_layer.items():
                expected = scores[order] if layer == "conv1" else scores
                torch.testing.assert_close(of_after[name][layer], expected, rtol=1e-9, atol=1e-12)


def test_a_linear_layer_scores_as_the_same_weights_in_a_convolution_of_one_pixel():
    linear = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), double=True)
    conv = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Flatten()).double()
    for mine, theirs in ((conv[0], linear[0]), (conv[2], linear[2])):
        mine.weight.data, mine.bias.data = theirs.weight.data[:, :, None, None], theirs.bias.data
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 4
    names = [
        *CRITERIA,
        "mean",
        "rms",
        "max",
        "variance",
        "near_zero",
        "apoz",
        "weight_l1",
        "outgoing_l2",
        "second_order_ggn",
    ]
    one = measure(linear, [(x, y)], loss_fn=cross_entropy, criteria=names)
    other = measure(conv, [(x[:, :, None, None], y)], loss_fn=cross_entropy, criteria=names)
    assert_same_scores(other.scores, one.scores)
    assert_same_scores(other.deadness_by, one.deadness_by)


def test_the_gate_gradients_of_several_calls_add_up_within_a_sample():
    """A factor on the neuron acts in every call: u is the derivative by that factor."""
    net = seeded(Recurrent, double=True)
    x, y = pictures(5, double=True)
    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    expected = []
    for n in range(5):
        state = torch.tanh(net.start(x[n : n + 1].mean((2, 3))))
        for _ in range(3):
            state = torch.tanh(net.cell(state)) * gate
        expected.append(torch.autograd.grad(F.cross_entropy(net.end(state), y[n : n + 1]), [gate])[0])
    found = measure(net, [(x, y)], loss_fn=cross_entropy, criteria=["taylor"]).scores["taylor"]["cell"]
    torch.testing.assert_close(found.double(), torch.stack(expected).abs().mean(0), rtol=1e-9, atol=1e-12)


class Windows(nn.Module):
    """Windows are folded into the batch for the layer, as in a Swin transformer: (batch, window, token, feature)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc1(x.flatten(0, 1))).unflatten(0, (len(x), -1))
        return self.fc2(hidden.mean((1, 2)))


@for_each("size", [1, 2, 3, 4])
def test_windows_folded_into_the_batch_count_as_positions_whatever_the_batch_size(size):
    net = seeded(Windows, double=True)
    x, y = torch.randn(12, 2, 4, 3, dtype=torch.float64), torch.arange(12) % 4
    whole = measure(net, [(x, y)], loss_fn=cross_entropy, criteria=CRITERIA)
    parts = measure(net, list(zip(x.split(size), y.split(size), strict=True)), loss_fn=cross_entropy, criteria=CRITERIA)
    assert_same_scores(parts.scores, whole.scores)


def test_the_square_term_on_sampled_labels_is_unbiased_for_the_gauss_newton_matrix():
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), double=True)
    with torch.no_grad():
        net[2].weight.mul_(3)  # predictions far from uniform
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    hidden = net[1](net[0](x)).detach().requires_grad_()
    log_p = net[2](hidden).log_softmax(1)
    square, slope = 0, 0
    for label in range(3):
        (g,) = torch.autograd.grad(-log_p[:, label].sum(), [hidden], retain_graph=True)
        square = square + log_p[:, label, None].detach().exp() * (hidden * g).detach() ** 2
    (g,) = torch.autograd.grad(F.nll_loss(log_p, y, reduction="sum"), [hidden])
    slope = (hidden * g).detach().mean(0)
    exact = square.mean(0) / 2 - slope
    repeats, rounds = 4000, 5
    batches = [(x.repeat(repeats, 1), y.repeat(repeats))] * rounds
    found = measure(net, batches, loss_fn=cross_entropy, criteria=["second_order_ggn", "second_order"])
    torch.testing.assert_close(found.scores["second_order_ggn"]["0"], exact, rtol=0.02, atol=0)
    true_labels = (found.scores["second_order"]["0"] - exact).abs()
    assert (true_labels > 0.05 * exact.abs()).any(), "the two curvatures differ here, so the comparison says something"


def test_a_criterion_of_ones_own_is_measured_like_any_other():
    def peak(view: LayerView) -> Tensor:
        return view.activation.amax(-1) * view.gradient.amax(-1)

    statistic = Statistic("peak", peak, "gradient", torch.abs)
    own = Criterion("peak", (statistic,), lambda summary: summary.per_sample(statistic))
    net = seeded(ConvNet, double=True)
    x, y = pictures(5, double=True)
    by_hand, logits = net.by_hand(x)
    (g,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), by_hand["conv2"])
    expected = (by_hand["conv2"][0].flatten(2).amax(-1) * g.flatten(2).amax(-1)).abs().mean(0)
    report = measure(net, [(x, y)], loss_fn=cross_entropy, criteria=[own, "taylor"], layers=["conv2"])
    torch.testing.assert_close(report.scores["peak"]["conv2"].double(), expected.detach(), rtol=1e-9, atol=1e-12)
    assert list(report.scores) == ["peak", "taylor"]
