"""Looking into batches of any form, and bringing values into the form that statistics read."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_neurons import MeasurementError
from lightning_neurons.data.batches import batch_size_of, inputs_of, rows_of, targets_of, tensors_of
from lightning_neurons.data.joining import join
from lightning_neurons.layers.sample_axis import samples_first
from tests.tables import for_each

Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Batch:
    image: Tensor
    label: Tensor
    name: list[str]


@dataclass(frozen=True)
class Fixed:
    image: Tensor
    label: Tensor
    name: list[str]


def made(form: str, start: int, stop: int):
    """Samples ``start`` to ``stop`` of the same data in one of several forms."""
    image, label = torch.arange(10.0)[start:stop, None] * torch.ones(3), torch.arange(10)[start:stop]
    name = [f"n{i}" for i in range(start, stop)]
    return {
        "tensor": image,
        "pair": (image, label),
        "list": [image, label],
        "dict": {"image": image, "label": label, "name": name, "source": "disk", "step": 7},
        "dataclass": Batch(image, label, name),
        "frozen dataclass": Fixed(image, label, name),
        "named tuple": Pair(image, label),
        "nested": {"inputs": [{"image": image}, (image * 2, name)], "label": label, "scale": torch.tensor(3.0)},
        "triple": (image, image * 2, label),
        "pair with names": (image, name),
    }[form]


FORMS = [
    "tensor", "pair", "list", "dict", "dataclass", "frozen dataclass", "named tuple", "nested", "triple",
    "pair with names",
]  # fmt: skip


def same(one, other) -> bool:
    """Equal, with equal types, down to the bottom."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return all(map(same, vars(one).values(), vars(other).values())) if hasattr(one, "__dict__") else one == other


@for_each("form", FORMS)
def test_size_rows_and_joining_agree_in_every_form(form):
    whole = made(form, 0, 5)
    assert batch_size_of(whole) == 5
    parts = [rows_of(whole, torch.arange(a, b), 5) for a, b in ((0, 1), (1, 3), (3, 5))]
    assert same(parts[1], made(form, 1, 3))
    assert [batch_size_of(part) for part in parts] == [1, 2, 2]
    assert same(join(parts, [1, 2, 2]), whole)
    assert same(join(parts[:1], [1]), parts[0])


def test_rows_come_in_the_order_asked_for():
    rows = rows_of(made("dict", 0, 4), torch.tensor([3, 0]), 4)
    assert (rows["label"].tolist(), rows["name"], rows["source"], rows["step"]) == ([3, 0], ["n3", "n0"], "disk", 7)


def test_a_list_of_as_many_tensors_as_samples_is_still_a_list_of_quantities():
    x, y = torch.arange(4.0).view(2, 2), torch.arange(2)
    assert same(rows_of([x, y], torch.tensor([1]), 2), [x[1:], y[1:]])


@for_each("form", ["pair", "list", "dict", "dataclass", "frozen dataclass", "named tuple", "nested"])
def test_targets_are_found_where_the_batch_shows_them(form):
    assert targets_of(made(form, 2, 6)).tolist() == [2, 3, 4, 5]


@for_each("key", ["target", "targets", "label", "labels", "y"])
def test_targets_are_found_under_every_usual_name(key):
    assert targets_of({"x": torch.zeros(3, 2), key: torch.arange(3)}).tolist() == [0, 1, 2]


def test_a_target_that_is_no_class_does_not_hide_the_label():
    batch = {"x": torch.zeros(3, 2), "target": torch.zeros(3, 8, 8), "label": torch.arange(3)}
    assert targets_of(batch).tolist() == [0, 1, 2]


@for_each(
    "batch",
    [
        torch.zeros(3, 2),
        (torch.zeros(3, 2), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)),
        (torch.zeros(3, 2), ["a", "b", "c"]),
        {"x": torch.zeros(3, 2)},
        {"x": torch.zeros(3, 2), "label": 3},
        "text",
    ],
)
def test_what_is_no_class_per_sample_is_no_target(batch):
    assert targets_of(batch) is None


def test_inputs_are_the_batch_without_its_targets():
    x, y = torch.zeros(3, 2), torch.arange(3)
    assert inputs_of((x, y)) is x
    assert inputs_of([x, y]) is x
    assert inputs_of(Pair(x, y)) is x
    assert inputs_of(x) is x
    assert list(inputs_of({"a": x, "b": x, "label": y})) == ["a", "b"]
    assert len(inputs_of((x, x, y))) == 3


def test_tensors_are_listed_in_order_down_to_the_bottom():
    assert [tuple(t.shape) for t in tensors_of(made("nested", 0, 2))] == [(2, 3), (2, 3), (2,), ()]


@for_each("batch", [["a", "b"], {}, torch.tensor(3.0), {"step": torch.tensor(1)}, None])
def test_a_batch_without_a_tensor_that_has_samples_is_refused(batch):
    with pytest.raises(MeasurementError, match="found no tensor"):
        batch_size_of(batch)


def test_channels_first_and_features_last_become_batch_neuron_space():
    pictures, tokens, maps = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3), torch.randn(2, 4, 5, 3)
    assert torch.equal(samples_first(pictures, 1, 2), pictures.flatten(2))
    assert torch.equal(samples_first(tokens, -1, 2), tokens.transpose(1, 2))
    assert torch.equal(samples_first(maps, -1, 2), maps.permute(0, 3, 1, 2).flatten(2))
    assert samples_first(torch.randn(2, 3), -1, 2).shape == (2, 3, 1)
    assert samples_first(torch.randn(2, 3), 1).shape == (2, 3, 1)


def test_time_before_batch_is_recognised_by_the_batch_size():
    values = torch.randn(5, 2, 3)
    assert torch.equal(samples_first(values, -1, 2), values.permute(1, 2, 0))


def test_tokens_and_windows_folded_into_the_batch_return_to_their_samples():
    tokens = torch.randn(4, 6, 3)
    assert torch.equal(samples_first(tokens.flatten(0, 1), -1, 4), tokens.transpose(1, 2))
    windows = torch.randn(4, 6, 5, 3)
    found = samples_first(windows.flatten(0, 1), -1, 4)
    assert found.shape == (4, 3, 30)
    torch.testing.assert_close(found.sort(-1).values, windows.permute(0, 3, 1, 2).flatten(2).sort(-1).values)


def test_a_single_sample_without_a_batch_axis_is_one_sample():
    assert samples_first(torch.arange(3.0), -1).tolist() == [[[0.0], [1.0], [2.0]]]


def test_what_fits_no_sample_count_counts_every_entry_of_the_first_axis():
    assert samples_first(torch.zeros(5, 3), -1, 2).shape == (5, 3, 1)


def test_samples_that_are_listed_one_by_one_are_counted_and_picked():
    rows = [(torch.full((3, 4), float(i)), torch.tensor(i)) for i in range(5)]
    assert batch_size_of(rows) == batch_size_of([(image, int(label)) for image, label in rows]) == 5
    assert [int(label) for _, label in rows_of(rows, torch.tensor([4, 1]), 5)] == [4, 1]
    assert [int(label) for _, label in join([rows[:2], rows[4:]], [2, 1])] == [0, 1, 4]
    views = [[torch.zeros(8, 3), torch.zeros(8)], [torch.zeros(8, 3), torch.zeros(8)]]
    assert batch_size_of(views) == 8, "two batches that are read side by side"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_has_as_many_samples_as_what_is_beside_it():
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(5), torch.zeros(1)])
    assert batch_size_of((nested, torch.zeros(3))) == batch_size_of({"x": nested}) == 3


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.zeros(3), torch.tensor(1)), 1),
        ((torch.zeros(3), 1), 1),
        ({"bag": torch.zeros(7, 3), "label": torch.tensor(0.5)}, 1),
        ((X, torch.tensor(0.5)), 4),
        ({"x": X, "temperature": torch.tensor(2.0)}, 4),
        ({"class_weight": torch.ones(3), "x": X, "y": torch.zeros(4)}, 4),
        ([torch.ones(3), X, torch.zeros(4)], 4),
        ({"scale": torch.ones(2), "inputs": {"tokens": X, "names": ["a", "b", "c", "d"]}}, 4),
        ({"value": torch.zeros(4), "tokens": torch.zeros(8, 3), "names": ["a", "b", "c", "d"]}, 4),
        ({"images": torch.zeros(2, 3, 6, 6), "boxes": torch.zeros(5, 4), "scores": torch.zeros(5)}, 2),
        (torch.zeros(3), 3),
        ([torch.zeros(3)], 3),
    ],
    ids=str,
)
def test_one_label_is_of_one_sample_and_weights_of_classes_are_no_samples(batch, expected):
    assert batch_size_of(batch) == expected
