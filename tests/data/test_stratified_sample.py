"""The bounded sample: never too many, all if they fit, spread over stream and classes, honestly described."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_neurons.data.stratified_sample import StratifiedSample
from tests.tables import for_each


def stream(classes: Tensor, batch_size: int, width: int = 2):
    """Batches whose inputs carry their place in the stream."""
    x = torch.arange(len(classes), dtype=torch.float32)[:, None].expand(-1, width)
    return list(zip(x.split(batch_size), classes.split(batch_size), strict=True))


def picked(sample: StratifiedSample, batches, *, targets: bool = True) -> list[int]:
    """The places of all samples that are handed out, in order."""
    ready = [part for batch in batches for part in sample.add(batch, batch[1] if targets else None)]
    places = [int(place) for one in [*ready, *sample.rest()] for place in one.batch[0][:, 0]]
    assert sample.rest() == []
    assert len(places) == sample.picked
    return places


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=80),
    st.integers(1, 17),
    st.integers(1, 100),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_never_more_than_asked_for_never_twice_and_all_if_they_fit(classes, size, most, least, known, targets):
    total = len(classes) if known else None
    sample = StratifiedSample(most, total, least=least)
    places = picked(sample, stream(torch.tensor(classes), size), targets=targets)
    assert places == sorted(set(places))
    assert len(places) == min(most, len(classes))
    assert sample.seen == len(classes)


def test_classes_are_picked_in_proportion_and_rare_ones_too():
    torch.manual_seed(5)
    classes = torch.cat([torch.zeros(600), torch.ones(300), torch.full((97,), 2), torch.full((3,), 3)]).long()
    classes = classes[torch.randperm(1000)]
    places = picked(StratifiedSample(100, 1000), stream(classes, 50))
    counts = torch.bincount(classes[places], minlength=4)
    assert counts.sum() == 100
    assert counts[3] >= 1
    assert (counts - torch.tensor([60, 30, 9.7, 0.3])).abs().max() <= 2


@for_each("size", [10, 64])
def test_a_stream_sorted_by_class_gives_every_class_its_share(size):
    classes = torch.arange(10).repeat_interleave(100)
    counts = torch.bincount(classes[picked(StratifiedSample(50, 1000), stream(classes, size))], minlength=10)
    assert counts.sum() == 50
    assert (counts - 5).abs().max() <= 1


def test_picks_come_from_the_whole_stream_also_without_targets():
    places = picked(StratifiedSample(20, 1000), stream(torch.zeros(1000).long(), 25), targets=False)
    assert len(places) == 20
    assert all(any(50 * k <= place < 50 * (k + 1) for place in places) for k in range(20))


def test_the_sample_is_deterministic_and_draws_no_random_numbers():
    classes = torch.randint(0, 7, (300,))
    before = torch.get_rng_state()
    first = picked(StratifiedSample(40, 300), stream(classes, 32))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert picked(StratifiedSample(40, 300), stream(classes, 32)) == first


@for_each("targets", [False, True])
def test_of_a_stream_of_unknown_length_the_first_samples_are_taken(targets):
    sample = StratifiedSample(19, None)
    assert picked(sample, stream(torch.arange(64) % 3, 8), targets=targets) == list(range(19))
    assert sample.describe() == "sensitivity on the first 19 samples (the length of the data is unknown)"


def test_picks_are_collected_and_handed_out_in_batches_of_a_useful_size():
    sample = StratifiedSample(64, 640, least=16)
    sizes = [len(part.batch[0]) for batch in stream(torch.arange(640) % 4, 10) for part in sample.add(batch, batch[1])]
    assert sizes == [16, 16, 16, 16]


def test_batches_of_different_token_lengths_are_never_joined():
    sample, lengths = StratifiedSample(100, 24, least=8), []
    for width in (5, 5, 3, 7, 7, 7):
        batch = torch.zeros(4, width), torch.arange(4)
        lengths += [part.batch[0].shape for part in sample.add(batch, batch[1])]
    lengths += [part.batch[0].shape for part in sample.rest()]
    assert [tuple(shape) for shape in lengths] == [(8, 5), (4, 3), (8, 7), (4, 7)]


def test_class_numbers_may_be_large():
    classes = torch.tensor([10**9, 5, 2**40, 5] * 25)
    counts = dict(zip(*(t.tolist() for t in classes[picked(StratifiedSample(20, 100), stream(classes, 10))].unique(
        return_counts=True)), strict=True))  # fmt: skip
    assert sum(counts.values()) == 20
    assert set(counts) == {5, 10**9, 2**40}


@for_each(
    "most, targets, words",
    [
        (100, True, "sensitivity on all 60 samples"),
        (60, False, "sensitivity on all 60 samples"),
        (12, False, "sensitivity on 12 of 60 samples, spread over the data"),
        (12, True, "sensitivity on 12 of 60 samples, spread over the data, stratified over 3 classes"),
    ],
)
def test_the_description_says_what_was_used(most, targets, words):
    sample = StratifiedSample(most, 60)
    picked(sample, stream(torch.arange(60) % 3, 16), targets=targets)
    assert sample.describe() == words
