"""Values on their way into JSON and back."""

import json
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_neurons.results.typed import floats, plain
from tests.tables import for_each


def there_and_back(tensor: torch.Tensor) -> torch.Tensor:
    return floats(json.loads(json.dumps(plain(tensor), allow_nan=False)))


@given(arrays.arrays(np.float64, arrays.array_shapes(max_dims=3, max_side=4), elements=st.floats(width=64)))
def test_every_float_comes_back(values):
    tensor = torch.from_numpy(values)
    assert torch.equal(there_and_back(tensor).nan_to_num(nan=0.123), tensor.nan_to_num(nan=0.123))
    assert torch.equal(there_and_back(tensor).isnan(), tensor.isnan())
    assert torch.equal(there_and_back(tensor).isinf(), tensor.isinf())


@for_each("value", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7e308, 0.1])
def test_single_numbers_come_back(value):
    found = there_and_back(torch.tensor(value, dtype=torch.float64)).item()
    assert found == value or (math.isnan(found) and math.isnan(value))
    assert math.copysign(1, found) == math.copysign(1, value) or math.isnan(value)


def test_short_floats_and_whole_numbers_become_double():
    for tensor in (torch.tensor([1.5, -2.0]), torch.tensor([1, 2]), torch.tensor([True, False])):
        assert torch.equal(there_and_back(tensor), tensor.double())
        assert there_and_back(tensor).dtype == torch.float64


def test_nested_values_become_plain():
    value = {1: [(math.nan, torch.tensor([[math.inf]])), "word", None, True], "b": {(1, 2): -math.inf}}
    found = plain(value)
    assert found == {"1": [[None, [["inf"]]], "word", None, True], "b": {"(1, 2)": "-inf"}}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert plain(found) == found


def test_empty_things_stay_empty():
    assert plain(torch.zeros(0)) == plain([]) == plain(()) == []
    assert plain({}) == {}
    assert there_and_back(torch.zeros(0)).shape == (0,)
    assert there_and_back(torch.zeros(2, 0)).shape == (2, 0)


def test_what_is_given_is_not_changed():
    inner = [math.nan, 1.0]
    value = {"a": inner}
    plain(value)
    assert value["a"] is inner
    assert math.isnan(inner[0])
