"""Maps of a network that has learnt something change when its weights are lost."""

import copy
import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_neurons import ArgumentError, MeasurementError, randomization_check, saliency
from tests.models import ConvNet, Single, pictures, seeded
from tests.tables import for_each

LAYERS = ["fc2", "fc1", "norm2", "conv2", "norm1", "conv1"]


def state_of(model):
    return {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}


def same_state(model, kept):
    now = state_of(model)
    return now.keys() == kept.keys() and all(now[n][0] == i and torch.equal(now[n][1], t) for n, (i, t) in kept.items())


@for_each("method", ["gradient", "grad_x_input", "smoothgrad", "grad_cam"])
def test_similarity_falls_on_a_trained_network(trained, method):
    net, x, labels = trained
    found = randomization_check(net, x[:24], labels[:24], method=method)
    assert [step.layer for step in found] == LAYERS
    similarities = [step.spearman for step in found]
    assert all(-1 <= s <= 1 for s in similarities)
    if method in {"gradient", "smoothgrad"}:  # a product with the picture keeps the picture
        assert similarities[-1] < 0.5
        assert similarities[-1] < similarities[0] < 0.9


def test_a_map_that_does_not_look_at_the_weights_stays_alike():
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            self.register_buffer("slope", torch.randn(3, 64))

        def forward(self, x: Tensor) -> Tensor:
            return 1e-9 * self.net(x) + x.flatten(1) @ self.slope.T

    (step,) = randomization_check(Shortcut(), torch.rand(4, 1, 8, 8), 1)
    assert step.spearman > 0.999


def test_numbers_are_those_of_layers_reset_by_hand(trained):
    net, x, _ = trained
    x, found = x[:6], randomization_check(net, x[:6], 3, seed=7)
    twin, before = copy.deepcopy(net), saliency(net, x, 3)
    torch.manual_seed(7)
    for step in found:
        twin.get_submodule(step.layer).reset_parameters()
        pairs = zip(before.abs().flatten(1), saliency(twin, x, 3).abs().flatten(1), strict=True)
        expected = [spearmanr(a.numpy(), b.numpy()).statistic for a, b in pairs]
        assert step.spearman == pytest.approx(sum(expected) / len(expected), abs=1e-6)
        assert math.isnan(step.ssim), "8 x 8 is too small for its window"


def test_structural_similarity_is_that_of_magnitudes_between_zero_and_one():
    net, x = seeded(ConvNet, size=16), pictures(3, size=16)[0]
    found = randomization_check(net, x, 1, seed=3, layers=["fc2"])[0]
    twin = copy.deepcopy(net)
    torch.manual_seed(3)
    twin.fc2.reset_parameters()
    maps = [saliency(model, x, 1).abs().sum(1, keepdim=True) for model in (net, twin)]
    maps = [torch.stack([one / one.max() for one in each]) for each in maps]
    assert found.ssim == pytest.approx(float(structural_similarity_index_measure(*maps, data_range=1.0)), abs=1e-5)
    assert -1 <= found.ssim < 0.999


def test_classes_are_those_of_the_trained_network(trained):
    net, x, _ = trained
    predicted = net(x[:8]).argmax(1)
    assert randomization_check(net, x[:8])[0].spearman == randomization_check(net, x[:8], predicted)[0].spearman


def test_the_model_stays_as_it_was(trained):
    net, x, _ = trained
    net.train()
    net.norm1.eval()
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)
    kept, modes, random = state_of(net), [m.training for m in net.modules()], torch.get_rng_state()
    randomization_check(net, x[:4])
    assert same_state(net, kept)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert bool((net.conv1.weight.grad == 1).all())
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_same_seed_gives_the_same_numbers(trained):
    net, x, _ = trained
    first = randomization_check(net, x[:4], seed=1)
    torch.manual_seed(1234)
    again, other = randomization_check(net, x[:4], seed=1), randomization_check(net, x[:4], seed=2)
    assert [s.spearman for s in first] == [s.spearman for s in again] != [s.spearman for s in other]


@for_each("layers", [["conv1"], ("fc1", "conv2"), []])
def test_layers_can_be_chosen(trained, layers):
    net, x, _ = trained
    assert [step.layer for step in randomization_check(net, x[:4], layers=layers)] == list(layers)


class OutOfOrder(nn.Module):
    """Registers its last layer first, and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.spare, self.stem = nn.Linear(5, 3), nn.Linear(2, 2), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)))


def test_layers_are_randomized_from_the_last_to_the_first_to_run():
    with pytest.warns(UserWarning, match="leaves the weights of spare as they are"):
        found = randomization_check(seeded(OutOfOrder), torch.randn(4, 9))
    assert [step.layer for step in found] == ["head", "stem"]


class Scaled(nn.Module):
    """Has weights that nothing draws anew."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net, self.scale = nn.Sequential(*layers), nn.Parameter(torch.full((9,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale)


def test_weights_that_cannot_be_drawn_anew_are_named():
    model = Scaled(nn.Linear(9, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match="leaves the weights of the model itself as they are"):
        found = randomization_check(model, torch.randn(4, 9))
    assert [step.layer for step in found] == ["net.2", "net.1", "net.0"]


@for_each("make", [Scaled, nn.Flatten])
def test_a_model_without_weights_to_draw_is_refused(make):
    with pytest.raises(ArgumentError, match=rf"model='{make.__name__}' .*modules with reset_parameters"):
        randomization_check(make(), torch.randn(4, 9), 1)


def test_in_the_end_weights_are_random_everywhere(trained):
    net, x, _ = trained
    seen = []

    def forward(model, inputs):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return model(inputs)

    randomization_check(net, x[:2], 1, forward=forward)
    assert [name for name, p in net.named_parameters() if torch.equal(p, seen[-1][name])] == []


@for_each("options", [{"samples": 3, "noise": 0.1, "method": "smoothgrad"}, {"smoothing": 1.0},
                                     {"of": "loss"}, {"method": "integrated_gradients", "steps": 3}])  # fmt: skip
def test_options_are_those_of_saliency(trained, options):
    net, x, _ = trained
    found = randomization_check(net, x[:3], 2, layers=["fc2"], **options)
    assert -1 <= found[0].spearman < 0.999


BAD = {
    "unknown method": ({"method": "fake"}, r"method='fake' .*'gradient'"),
    "function as method": ({"method": lambda *args: torch.rand(4, 1, 8, 8)}, r"method=.*'gradient'"),
    "unknown layer": ({"layers": ["conv9"]}, r"layers.*'conv9'"),
    "layer without weights": ({"layers": [""]}, r"layers='' .*reset_parameters"),
    "word as layers": ({"layers": "conv1"}, r"layers='conv1' .*list"),
    "number as layer": ({"layers": [3]}, r"layers=3 .*layers"),
    "number as layers": ({"layers": 3}, r"layers=3 .*layers"),
    "seed": ({"seed": -1}, r"seed=-1 .*at least 0"),
    "class": ({"target": 10}, r"target=10 .*0 to 9"),
    "option of another method": ({"steps": 3}, r"steps=3 .*None with method"),
    "of": ({"of": "fake"}, r"of='fake' .*'logit'"),
}


@for_each("case", BAD)
def test_arguments_out_of_range_are_refused(trained, case):
    net, x, _ = trained
    options, words = BAD[case]
    kept = state_of(net)
    with pytest.raises(ArgumentError, match=words):
        randomization_check(net, x[:4], **options)
    assert same_state(net, kept)


def test_models_that_cannot_be_copied_are_refused():
    net = nn.Sequential(Single(3, 2))
    with pytest.raises(MeasurementError, match=r"Sequential cannot be copied: TypeError: there is only one"):
        randomization_check(net, torch.rand(2, 3))


def test_an_empty_batch_is_refused(trained):
    net, x, _ = trained
    for target in (None, 1):
        with pytest.raises(ArgumentError, match=r"inputs=\(0, 1, 8, 8\)"):
            randomization_check(net, x[:0], target)


def test_a_size_that_the_model_refuses(trained):
    with pytest.raises(MeasurementError, match=r"DigitsNet refuses inputs of shape \(2, 3, 8, 8\)"):
        randomization_check(trained[0], torch.rand(2, 3, 8, 8))


def test_a_class_is_no_model():
    with pytest.raises(ArgumentError, match=r"model=.*instance"):
        randomization_check(ConvNet, pictures(2)[0])
