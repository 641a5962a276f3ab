"""The checks of shapes that run in all tests: they look at shapes, and cost nothing elsewhere."""

import jaxtyping
import pytest
import torch

from lightning_neurons.criteria.ranking import order
from lightning_neurons.isolation.tensors import tensors_in


def test_a_tensor_of_another_shape_than_the_signature_has_is_refused():
    assert order(torch.tensor([1.0, 2.0])).tolist() == [1, 0]
    with pytest.raises(jaxtyping.TypeCheckError):
        order(torch.zeros(2, 2))


def test_functions_without_a_shape_are_left_as_they_are():
    assert hasattr(order, "__wrapped__")
    assert not hasattr(tensors_in, "__wrapped__")
