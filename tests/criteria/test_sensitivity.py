"""Gradient criteria against losses whose answer is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA
from tests import reference
from tests.criteria.streams import laws, stream
from tests.tables import for_each


def gradients_of(loss, activations: Tensor) -> Tensor:
    """By autograd, of the loss summed over samples."""
    leaf = activations.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@laws
@given(st.integers(0, 1000))
def test_gradient_scores_sum_to_1(seed):
    torch.manual_seed(seed)
    scores = stream(["gradient"], torch.randn(5, 4, 3), torch.randn(5, 4, 3))["gradient"]
    assert scores.sum().item() == pytest.approx(1)


def test_gradient_averages_over_images_what_it_sums_over_space():
    gradients = torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]]])  # squares: (5, 1), (0, 4)
    assert stream(["gradient"], torch.ones(2, 2, 2), gradients)["gradient"].tolist() == [0.5, 0.5]


def test_gradient_of_a_layer_without_gradients_is_zero():
    assert stream(["gradient"], torch.ones(2, 3, 2), torch.zeros(2, 3, 2))["gradient"].tolist() == [0, 0, 0]


def test_a_dead_relu_has_a_gradient_at_its_output_but_no_gate_gradient():
    activations = torch.randn(20, 3, 1).relu()
    activations[:, 0] = 0
    targets = torch.randint(3, (20,))
    gradients = gradients_of(lambda a: nn.functional.cross_entropy(a.flatten(1), targets, reduction="sum"), activations)
    scores = stream(["gradient", "taylor", "taylor_fo", "fisher", "second_order"], activations, gradients)
    assert scores.pop("gradient")[0] > 0
    assert all(values[0] == 0 for values in scores.values())


def test_minus_the_gate_gradient_is_the_exact_change_of_a_linear_loss():
    activations, slope = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    loss = lambda a: (a * slope).sum()
    gradients = gradients_of(loss, activations)
    scores = stream(["taylor_fo", "second_order", "fisher"], activations, gradients)
    for neuron in range(3):
        without = activations.clone()
        without[:, neuron] = 0
        change = (loss(without) - loss(activations)).item() / 6
        assert (scores["second_order"] - scores["fisher"])[neuron].item() == pytest.approx(change)
        assert scores["taylor_fo"][neuron].item() == pytest.approx(change**2)


@for_each("at_optimum", [False, True])
def test_a_squared_error_changes_by_the_slope_and_half_the_curvature(at_optimum):
    """``L = (w h - y)^2 / 2``: zeroing h changes the mean loss by ``-E[u] + w^2 E[h^2] / 2`` exactly."""
    h, y = torch.randn(500, 1, 1, dtype=torch.float64), torch.randn(500, 1, 1, dtype=torch.float64)
    w = ((h * y).sum() / h.square().sum()).item() if at_optimum else 0.7
    loss = lambda a: (w * a - y).square().sum() / 2
    gradients = gradients_of(loss, h)
    torch.testing.assert_close(gradients, w * (w * h - y))
    scores = stream(["gradient", "taylor_fo", "fisher", "second_order", "rms"], h, gradients)
    minus_slope = (scores["second_order"] - scores["fisher"]).item()
    change = ((loss(torch.zeros_like(h)) - loss(h)) / 500).item()
    assert change == pytest.approx(minus_slope + w * w * scores["rms"].item() ** 2 / 2, abs=1e-12)
    if at_optimum:
        assert scores["taylor_fo"].item() < 1e-25
        assert change == pytest.approx(w * w * scores["rms"].item() ** 2 / 2)
        assert scores["fisher"].item() > 1e-4


def test_labels_drawn_from_the_prediction_make_the_square_term_the_gauss_newton_one():
    """All labels in proportion to their probability, instead of drawing them: the mean over ``y ~ p`` is exact."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    drawn = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    activations, readers = torch.rand(3, 1, dtype=torch.float64) + 0.5, torch.randn(4, 3, dtype=torch.float64)
    residuals = p - nn.functional.one_hot(drawn, 4)  # d cross entropy / d logits
    torch.testing.assert_close(residuals.T @ residuals / 8, p.diag() - p.outer(p))
    sampled = (residuals @ readers)[:, :, None]
    scores = stream(
        ["second_order_ggn"], activations.expand(8, 3, 1), torch.zeros(8, 3, 1, dtype=torch.float64), sampled
    )["second_order_ggn"]
    curvature = (readers.T @ (p.diag() - p.outer(p)) @ readers).diag() * activations[:, 0] ** 2
    torch.testing.assert_close(scores, curvature / 2)


def test_sampled_labels_approach_the_gauss_newton_curvature_of_a_model():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
    inputs = torch.randn(4000, 4)
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    targets = torch.randint(4, (4000,))
    names = ["second_order_ggn", "second_order", "fisher"]
    scores = measure(net, [(inputs, targets)], loss_fn=loss, criteria=names).scores
    square = scores["second_order_ggn"]["0"] - scores["second_order"]["0"] + scores["fisher"]["0"]
    hidden, readers = net[:2](inputs).detach().double(), net[2].weight.detach().double()
    p = net(inputs).softmax(1).detach().double()
    exact = torch.stack([
        hidden[:, i].square() * ((p * readers[:, i] ** 2).sum(1) - (p * readers[:, i]).sum(1) ** 2) for i in range(3)
    ]).mean(1) / 2  # fmt: skip
    torch.testing.assert_close(square, exact, rtol=0.1, atol=0)


def test_the_gradient_of_the_output_layer_is_the_prediction_minus_the_label():
    net, inputs, targets = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    scores = measure(net, [(inputs, targets)], loss_fn=loss, criteria=["gradient"]).scores["gradient"]["0"]
    errors = (net(inputs).softmax(1) - nn.functional.one_hot(targets, 3)).detach()
    assert errors.sum(1).abs().max() < 1e-12
    torch.testing.assert_close(scores, errors.square().mean(0) / errors.square().mean(0).sum())


@for_each("name, square", [("taylor", False), ("taylor_fo", True), ("fisher", True)])
def test_a_mean_instead_of_a_sum_would_divide_scores_by_the_batch_size(name, square):
    activations, gradients = torch.randn(8, 2, 3), torch.randn(8, 2, 3)
    summed, averaged = (stream([name], activations, g)[name] for g in (gradients, gradients / 8))
    torch.testing.assert_close(averaged, summed / (64 if square else 8))


def test_one_loss_per_sample_its_sum_and_its_mean_give_the_same_scores():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs, targets = torch.randn(10, 5), torch.randint(3, (10,))
    criteria = [name for name, c in CRITERIA.items() if c.needs == {"gradient"}]

    def scores(reduction, sizes):
        loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)
        batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
        return measure(net, batches, loss_fn=loss, loss_reduction=reduction, criteria=criteria).scores

    expected = scores("none", [10])
    for reduction, sizes in (("sum", [10]), ("mean", [10]), ("mean", [3, 6, 1]), ("sum", [1] * 10)):
        for name, by_layer in scores(reduction, sizes).items():
            for layer, values in by_layer.items():
                torch.testing.assert_close(values, expected[name][layer], rtol=1e-4, atol=1e-8)


def test_a_model_gives_the_scores_of_one_image_at_a_time():
    """Gradients of each image alone by autograd, then the naive twins."""
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    inputs, targets = torch.randn(7, 1, 3, 3, dtype=torch.float64), torch.randint(2, (7,))
    activations, gradients = [], []
    for image, target in zip(inputs, targets, strict=True):
        hidden = net[:2](image[None]).detach().requires_grad_()
        loss = nn.functional.cross_entropy(net[2:](hidden), target[None])
        activations.append(hidden.detach().flatten(2)[0].tolist())
        gradients.append(torch.autograd.grad(loss, hidden)[0].flatten(2)[0].tolist())
    case = reference.Case(activations, gradients, [])
    names = [name for name, c in CRITERIA.items() if c.statistics and "sampled_gradient" not in c.needs]
    loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    batches = list(zip(inputs.split([4, 3]), targets.split([4, 3]), strict=True))
    report = measure(net, batches, loss_fn=loss_fn, criteria=[n for n in names if n != "saturated"])
    for name, by_layer in {**report.scores, **report.deadness_by}.items():
        assert by_layer["0"].tolist() == pytest.approx(reference.TWINS[name](case), rel=1e-9, abs=1e-12), name
