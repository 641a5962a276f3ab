"""How exact sums and counts are, and how much memory they take."""

import pytest
import torch

from lightning_neurons.criteria import CRITERIA
from tests.criteria.streams import ACTIVITY, LAYER, open_metric, stream, traits, view_of
from tests.tables import for_each

STATES = ("totals", "maxima", "samples", "values", "nonfinite", "histogram")


def test_memory_does_not_depend_on_the_number_of_samples():
    metric = open_metric(ACTIVITY, traits(3), 3)
    before = {name: getattr(metric, name).shape for name in STATES}
    for _ in range(50):
        metric.update(LAYER, view_of(torch.randn(8, 3, 6)))
        metric.finish_batch()
    assert {name: getattr(metric, name).shape for name in STATES} == before
    assert metric.samples[0, 0].tolist() == [400] * 3
    assert metric.values[0].tolist() == [2400] * 3


def test_sums_are_double_and_counts_whole_whatever_is_asked():
    metric = open_metric(ACTIVITY, traits(2), 2).half().float()
    metric.update(LAYER, view_of(torch.randn(4, 2, 3)))
    metric.finish_batch()
    assert {name: getattr(metric, name).dtype for name in STATES} == {
        "totals": torch.float64, "maxima": torch.float64, "samples": torch.int64, "values": torch.int64,
        "nonfinite": torch.int64, "histogram": torch.int64,
    }  # fmt: skip


def test_sums_and_counts_go_on_beyond_what_single_precision_can_count():
    metric = open_metric(["mean", "active_share", "near_zero"], traits(1), 1)
    metric.update(LAYER, view_of(torch.ones(1, 1, 1)))
    metric.finish_batch()
    seen = 2**24
    for state in (metric.totals, metric.samples, metric.values, metric.histogram):
        state.mul_(seen)
    metric.update(LAYER, view_of(torch.zeros(1, 1, 1)))
    scores = metric.compute()
    assert metric.samples[0, 0].item() == metric.values[0].item() == metric.histogram.sum().item() == seen + 1
    assert scores["mean"][LAYER].item() == scores["active_share"][LAYER].item() == seen / (seen + 1)
    assert scores["near_zero"][LAYER].item() == 1 / (seen + 1)


@for_each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_give_the_scores_of_their_values(dtype):
    activations, gradients = torch.randn(16, 3, 5).to(dtype), torch.randn(16, 3, 5).to(dtype)
    names = [name for name, c in CRITERIA.items() if c.statistics and "sampled_gradient" not in c.needs]
    layer = traits(3)
    found, exact = (stream(names, activations.to(d), gradients.to(d), layer=layer) for d in (dtype, torch.float64))
    for name in names:
        torch.testing.assert_close(found[name], exact[name], rtol=2e-5, atol=1e-6)


def test_half_precision_sums_do_not_overflow():
    scores = stream(["mean", "rms"], torch.full((4, 1, 4096), 300.0, dtype=torch.float16))
    assert scores["mean"].item() == 300
    assert scores["rms"].item() == pytest.approx(300, rel=1e-4)
