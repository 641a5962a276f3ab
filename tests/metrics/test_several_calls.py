"""Layers that run several times in one forward: their calls belong to the same sample."""

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA
from tests import reference
from tests.criteria.streams import ACTIVITY, LAYER, open_metric, stream, traits, view_of
from tests.tables import for_each

BY_GRADIENT = [name for name, c in CRITERIA.items() if c.needs == {"gradient"}]


def in_calls(names, activations: list[Tensor], gradients: list[Tensor] | None = None, sizes=None) -> dict[str, Tensor]:
    """Scores where each of ``activations`` is one call of the same layer on the same samples."""
    neurons = activations[0].shape[1]
    metric = open_metric(names, traits(neurons), neurons, calls=len(activations))
    for rows in torch.arange(len(activations[0])).split(sizes or len(activations[0])):
        for call, values in enumerate(activations):
            metric.update(LAYER, view_of(values[rows]))
            if gradients is not None:
                metric.update(LAYER, view_of(values[rows], gradients[call][rows]), "gradient")
        metric.finish_batch()
    return {name: by_layer[LAYER] for name, by_layer in metric.compute().items()}


@for_each("sizes", [None, [2, 5, 1]])
@for_each("name", ACTIVITY + BY_GRADIENT)
def test_calls_are_more_positions_of_the_same_samples(name, sizes):
    """So gate gradients add over calls before they are squared."""
    calls, slopes = ([torch.randn(8, 3, 4) for _ in range(2)] for _ in range(2))
    calls = [c.relu() for c in calls]
    found = in_calls([name], calls, slopes, sizes)[name]
    expected = stream([name], torch.cat(calls, -1), torch.cat(slopes, -1))[name]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_calls_of_opposite_effect_cancel():
    ones = torch.ones(4, 1, 1)
    found = in_calls(["fisher", "taylor", "gradient"], [ones, ones], [ones, -ones])
    assert found["fisher"].item() == found["taylor"].item() == 0
    assert found["gradient"].item() == 1


def test_calls_may_have_different_numbers_of_positions():
    calls = [torch.randn(6, 2, 5), torch.randn(6, 2, 3)]
    found = in_calls(ACTIVITY, calls)
    for name in ACTIVITY:
        expected = stream([name], torch.cat(calls, -1))[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@for_each("bad_call", [0, 1])
def test_a_sample_is_left_out_whole_if_one_of_its_calls_is_not_finite(bad_call):
    calls = [torch.randn(6, 2, 1), torch.randn(6, 2, 1)]
    expected = in_calls(ACTIVITY, [c[[0, 1, 3, 4, 5]] for c in calls])
    calls[bad_call][2] = torch.nan
    found = in_calls(ACTIVITY, calls)
    for name in ACTIVITY:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


def test_a_shared_layer_of_a_model_equals_the_twin_one_image_at_a_time():
    net = Twice().double()
    inputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    activations, gradients = [], []
    for image, target in zip(inputs, targets, strict=True):
        first = net.shared(image[None]).tanh()
        second = net.shared(first).tanh()
        loss = nn.functional.cross_entropy(net.head(second), target[None])
        slopes = torch.autograd.grad(loss, [first, second])
        activations.append(torch.stack([first, second], -1)[0].tolist())
        gradients.append(torch.stack(slopes, -1)[0].tolist())
    case = reference.Case(activations, gradients, [])
    loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    names = ["mean", "rms", "max", *BY_GRADIENT]
    report = measure(net, [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])], loss_fn=loss_fn, criteria=names)
    for name in names:
        assert report.scores[name]["shared"].tolist() == pytest.approx(reference.TWINS[name](case), rel=1e-9), name
    assert report.counts["shared"].samples.tolist() == [6] * 3
    assert report.counts["shared"].values.tolist() == [12] * 3
