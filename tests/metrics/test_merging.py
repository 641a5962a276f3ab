"""Sums of several processes: as one process would have them."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing

from lightning_neurons.criteria import CRITERIA
from lightning_neurons.metrics.streaming import StreamingCriteria
from tests.criteria.streams import BOUNDS, LAYER, LayerTraits, open_metric, view_of
from tests.tables import for_each

NEURONS = 3
SCORED = [name for name, c in CRITERIA.items() if c.statistics]
STATES = ("totals", "maxima", "samples", "values", "nonfinite", "histogram")


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Activations, gradients and classes; one value is not finite, the last classes come late."""
    generator = torch.Generator().manual_seed(1)
    activations, gradients = (torch.randn(12, NEURONS, 4, generator=generator) for _ in range(2))
    activations[3, 1, 2] = torch.nan
    return activations, gradients, torch.tensor([0, 1, 0, 1, 0, 0, 1, 0, 2, 4, 2, 4])


def metric_of(rows: Sequence[int], per_class: bool = False, size: int = 5) -> StreamingCriteria:
    """A metric that saw some samples, in batches of ``size``, with the last one still waiting."""
    layer = LayerTraits(LAYER, "relu", rectified=True, bounds=BOUNDS)
    metric = open_metric(SCORED, layer, NEURONS, per_class=per_class, sync_on_compute=False)
    for part in torch.tensor(list(rows), dtype=torch.int64).split(size) if len(rows) else ():
        activations, gradients, targets = (t[part] for t in data())
        metric.finish_batch()
        classes = targets if per_class else None
        metric.update(LAYER, view_of(activations), targets=classes)
        for need in ("gradient", "sampled_gradient"):
            metric.update(LAYER, view_of(activations, gradients), need, classes)
    return metric


def assert_same_states(merged: StreamingCriteria, whole: StreamingCriteria) -> None:
    merged.finish_batch()
    whole.finish_batch()
    for name in STATES:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    found, expected = merged.compute(), whole.compute()
    for name in SCORED:
        torch.testing.assert_close(found[name][LAYER], expected[name][LAYER], rtol=1e-9, atol=1e-12)


PARTS = {
    "unequal batches": (range(9), range(9, 12)),
    "one saw nothing": (range(12), []),
    "the other saw nothing": ([], range(12)),
    "fewer classes first": (range(8), range(8, 12)),
    "fewer classes second": (range(8, 12), range(8)),
}


@for_each("per_class", [False, True])
@for_each("parts", PARTS.values())
def test_two_metrics_merge_to_one(parts, per_class):
    first, second = (metric_of(rows, per_class) for rows in parts)
    first.merge_state(second)
    assert_same_states(first, metric_of([*parts[0], *parts[1]], per_class))


@for_each("parts", PARTS.values())
def test_torchmetrics_syncs_two_metrics_to_one_and_back(parts):
    first, second = (metric_of(rows) for rows in parts)
    for metric in (first, second):
        metric.finish_batch()
    own = {name: getattr(first, name).clone() for name in STATES}
    theirs = iter([getattr(second, name) for name in STATES])
    gather = lambda state, group=None: [state, next(theirs)]
    first.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    synced = {name: getattr(first, name).clone() for name in STATES}
    whole = metric_of([*parts[0], *parts[1]])
    whole.finish_batch()
    for name in STATES:
        torch.testing.assert_close(synced[name], getattr(whole, name), rtol=1e-12, atol=1e-12)
    first.unsync()
    assert all(torch.equal(getattr(first, name), own[name]) for name in STATES)


def test_results_follow_a_merge():
    first, whole = metric_of([0, 1, 2, 4]), metric_of(range(8))
    first.compute()
    first.merge_state(metric_of([3, 5, 6, 7]))
    found, expected = first.compute(), whole.compute()
    for name in SCORED:
        torch.testing.assert_close(found[name][LAYER], expected[name][LAYER], rtol=1e-9, atol=1e-12)


def test_a_metric_that_knows_no_layer_learns_it_from_the_other():
    stranger = StreamingCriteria({LAYER: NEURONS}, [CRITERIA["mean"]], sync_on_compute=False)
    other = open_metric(["mean"], LayerTraits(LAYER), NEURONS)
    other.update(LAYER, view_of(torch.ones(2, NEURONS, 1)))
    stranger.merge_state(other)
    assert stranger.compute()["mean"][LAYER].tolist() == [1] * NEURONS


def test_merging_commutes():
    first, second = metric_of([0, 1, 2, 3]), metric_of([4, 5, 6])
    other_way, other = metric_of([4, 5, 6]), metric_of([0, 1, 2, 3])
    for metric in (first, second, other_way, other):
        metric.finish_batch()
    first.merge_state(second)
    other_way.merge_state(other)
    assert all(torch.equal(getattr(first, name), getattr(other_way, name)) for name in STATES)


def on_one_rank(rank: int, folder: str) -> None:
    """Sync every split of the data with the other rank, and save what this one then has."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", world_size=2, rank=rank, timeout=datetime.timedelta(seconds=60)
    )
    found = {}
    for name, parts in PARTS.items():
        for per_class in (False, True):
            metric = metric_of(parts[rank], per_class)
            metric.sync()
            found[name, per_class] = {state: getattr(metric, state).clone() for state in STATES}
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_sums_of_one(tmp_path: Path):
    multiprocessing.spawn(on_one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for (name, per_class), states in ranks[0].items():
        whole = metric_of([*PARTS[name][0], *PARTS[name][1]], per_class)
        whole.finish_batch()
        for state in STATES:
            torch.testing.assert_close(states[state], getattr(whole, state), rtol=1e-12, atol=1e-12)
            assert torch.equal(states[state], ranks[1][name, per_class][state])
