"""What holds for every criterion, whatever the values are."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA, LayerTraits
from tests.criteria.streams import ACTIVITY, BOUNDS, GRADIENTS, LAYER, laws, stream, traits
from tests.tables import for_each

seeds = st.integers(0, 10_000)

DEGREES = {
    "mean": 1, "rms": 1, "max": 1, "variance": 2, "active_share": 0, "dormant_score": 0, "near_zero": 0, "apoz": 0,
    "dormant": 0, "constant": 0, "gradient": 0, "taylor": 1, "taylor_fo": 2, "fisher": 2,
}  # fmt: skip
"""By which power of a factor on the activations a score grows, if gradients stay as they are."""


def random_tensors(seed: int, samples: int = 8, neurons: int = 4, space: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    activations, *gradients = (torch.randn(samples, neurons, space, dtype=torch.float64) for _ in range(3))
    return [activations.relu(), *gradients]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def splits(draw, samples: int = 12) -> list[int]:
    """Sizes of batches that make up ``samples``."""
    cuts = sorted(draw(st.sets(st.integers(1, samples - 1))))
    return [b - a for a, b in zip([0, *cuts], [*cuts, samples], strict=True)]


@laws
@given(seeds, splits())
def test_any_cut_into_batches_gives_the_scores_of_one_batch(seed, sizes):
    tensors, layer = random_tensors(seed, samples=12), traits(4)
    assert_same(stream(CRITERIA, *tensors, sizes=sizes, layer=layer), stream(CRITERIA, *tensors, layer=layer))


@laws
@given(seeds, st.permutations(range(12)))
def test_the_order_of_samples_does_not_matter(seed, places):
    tensors, layer = random_tensors(seed, samples=12), traits(4)
    shuffled = [t[list(places)] for t in tensors]
    assert_same(stream(CRITERIA, *shuffled, sizes=[5, 7], layer=layer), stream(CRITERIA, *tensors, layer=layer))


@laws
@given(seeds, st.permutations(range(4)))
def test_permuting_neurons_permutes_scores(seed, places):
    tensors, layer = random_tensors(seed), traits(4)
    assert layer.incoming is not None
    assert layer.outgoing is not None
    assert layer.norm_scale is not None
    places = list(places)
    moved = LayerTraits(
        LAYER, rectified=True, bounds=BOUNDS, incoming=layer.incoming[places], outgoing=layer.outgoing[places],
        norm_scale=layer.norm_scale[places],
    )  # fmt: skip
    expected = {name: scores[places] for name, scores in stream(CRITERIA, *tensors, layer=layer).items()}
    assert_same(stream(CRITERIA, *(t[:, places] for t in tensors), layer=moved), expected)


@laws
@given(seeds, st.integers(1, 5))
def test_seeing_everything_again_changes_nothing(seed, times):
    tensors, layer = random_tensors(seed), traits(4)
    again = [t.repeat(times, 1, 1) for t in tensors]
    assert_same(stream(CRITERIA, *again, layer=layer), stream(CRITERIA, *tensors, layer=layer))


@laws
@given(seeds, st.sampled_from([2.0**-6, 0.37, 3.0, 100.0]))
def test_scores_scale_with_the_activations_as_their_units_say(seed, factor):
    activations, gradients, _ = random_tensors(seed)
    before, after = (stream(DEGREES, a, gradients) for a in (activations, activations * factor))
    expected = {name: before[name] * factor**degree for name, degree in DEGREES.items()}
    assert_same(after, expected)


@laws
@given(seeds, st.sampled_from([-1.0, 2.0**-6, 3.0]))
def test_scores_scale_with_the_loss_as_their_units_say(seed, factor):
    activations, gradients, _ = random_tensors(seed)
    degrees = {"gradient": 0, "taylor": 1, "taylor_fo": 2, "fisher": 2}
    before, after = (stream(degrees, activations, g) for g in (gradients, gradients * factor))
    assert_same(after, {name: before[name] * abs(factor) ** degree for name, degree in degrees.items()})


@laws
@given(seeds)
def test_deadness_lies_between_0_and_1(seed):
    scores = stream(CRITERIA, *random_tensors(seed))
    for name in (n for n, c in CRITERIA.items() if c.kind == "deadness"):
        assert ((scores[name] >= 0) & (scores[name] <= 1)).all(), name


@for_each("name", CRITERIA)
def test_a_silent_layer_without_gradients_gives_numbers(name):
    silent = torch.zeros(4, 3, 2)
    assert not stream([name], silent, silent, silent, layer=traits(3))[name].isnan().any()


@for_each("name", ACTIVITY + GRADIENTS)
def test_one_dead_neuron_spoils_no_score(name):
    tensors = random_tensors(0)
    for tensor in tensors:
        tensor[:, 1] = 0
    assert stream([name], *tensors)[name].isfinite().all()


@for_each("normed", [False, True])
def test_a_linear_layer_equals_a_1x1_convolution(normed):
    """The whole way through ``measure``: same weights, same images."""
    linear, conv = nn.Linear(6, 5), nn.Conv2d(6, 5, 1)
    conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    head = nn.Linear(5, 3)
    after = nn.Tanh() if normed else nn.ReLU()
    vectors = nn.Sequential(linear, after, head)
    pictures = nn.Sequential(conv, after, nn.Flatten(), head)
    inputs, targets = torch.randn(16, 6), torch.randint(3, (16,))
    names = sorted(CRITERIA.keys() - {"norm_scale", "apoz" if normed else "saturated"})

    def scores(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])
        report = measure(model, [(x, targets)], loss_fn=loss, criteria=names)
        return {name: by_layer["0"] for name, by_layer in {**report.scores, **report.deadness_by}.items()}

    flat, spatial = scores(vectors, inputs), scores(pictures, inputs[:, :, None, None])
    assert flat.keys() == spatial.keys() == set(names)
    for name in names:
        torch.testing.assert_close(flat[name], spatial[name], rtol=1e-5, atol=1e-7)
