"""Where neurons lie behind an operation: what its node in the graph says, beside doing the same to their numbers."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_neurons.dependency.layout import behind, contracts, name_of, parts_of, reduces
from tests.tables import for_each

SIZE = 2, 6, 3, 4

OPERATIONS = {
    "relu": F.relu,
    "times a map": lambda x: x * torch.ones(2, 1, 3, 4),
    "pooled": lambda x: F.max_pool2d(x, 2),
    "mean of the map": lambda x: x.mean((2, 3)),
    "flat": lambda x: x.flatten(1),
    "flat map": lambda x: x.flatten(2),
    "last": lambda x: x.permute(0, 2, 3, 1),
    "tokens": lambda x: x.flatten(2).transpose(-1, -2),
    "a part": lambda x: x[:, 1:5:2],
    "a single one": lambda x: x[:, 2:3],
    "one row": lambda x: x.select(2, -1),
    "some": lambda x: x[:, [4, 0]],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 3, 1])),
    "rolled": lambda x: x.roll(-1, 1),
    "turned around": lambda x: x.flip(1),
    "twice": lambda x: x.repeat(1, 2, 1, 1),
    "each twice": lambda x: x.repeat_interleave(2, 1),
    "more axes": lambda x: x[:, :, None],
    "expanded": lambda x: x[None].expand(3, *SIZE),
    "stacked": lambda x: torch.stack([x, x], 1),
}


def numbers_behind(operation) -> Tensor:
    """The number of its neuron at each place behind an operation that only moves or copies values."""
    return operation(torch.arange(1.0, 7.0).view(1, 6, 1, 1).expand(SIZE).contiguous())


def found_behind(operation) -> tuple[int, tuple[int, ...]] | None:
    """The same question, asked of all nodes that one or several calls leave."""
    x = torch.zeros(SIZE, requires_grad=True)
    chain, node = [], operation(x).grad_fn
    while name_of(node) != "AccumulateGrad":
        chain.append(node)
        node = node.next_functions[0][0]
    axis, numbers, size = 1, tuple(range(6)), SIZE
    for node in reversed(chain):
        found = behind(node, size, axis)
        if found is None:
            return None
        axis, table = found
        numbers = numbers if table is None else tuple(numbers[place] for place in table)
        size = tuple(node._input_metadata[0].shape)
    return axis, numbers


@for_each("name", OPERATIONS)
def test_the_neurons_are_where_the_operation_has_put_them(name):
    axis, numbers = found_behind(OPERATIONS[name])
    moved = numbers_behind(OPERATIONS[name])
    sizes = [1] * moved.ndim
    sizes[axis] = -1
    assert torch.equal(moved, (torch.tensor(numbers) + 1.0).view(sizes).expand_as(moved))


def test_neurons_that_are_spread_over_two_axes_are_on_none():
    assert found_behind(lambda x: x.view(2, 3, 2, 3, 4)) is None
    assert found_behind(lambda x: x.view(2, 2, 3, 3, 4).transpose(1, 2)) is None


def test_a_split_says_where_its_parts_begin_on_the_axis_that_it_divides():
    x = torch.zeros(SIZE, requires_grad=True)
    assert parts_of(x.chunk(4, 1)[0].grad_fn, 1) == [0, 2, 4, 6]
    assert parts_of(x.split([1, 5], -3)[1].grad_fn, 1) == [0, 1, 6]
    assert parts_of(x.chunk(2, -1)[0].grad_fn, 1) is None


@for_each(
    "operation, reduced",
    [
        (lambda x: x.mean(1, keepdim=True), True),
        (lambda x: x.sum((-3, 2)), True),
        (lambda x: x.amax(1), True),
        (lambda x: x.mean((2, 3)), False),
        (F.relu, False),
    ],
)
def test_a_sum_or_a_mean_over_the_neurons_is_told_from_one_over_the_map(operation, reduced):
    node = operation(torch.zeros(SIZE, requires_grad=True)).grad_fn
    assert reduces(node, 4, 1) is reduced


@for_each(
    "operation, axis, summed",
    [
        (lambda x: x @ torch.ones(6, 6), 1, True),
        (lambda x: x @ torch.ones(6, 6), 0, False),
        (lambda x: torch.ones(6, 6) @ x, 1, False),
        (lambda x: torch.ones(6, 6) @ x, 0, True),
        (lambda x: torch.addmm(torch.ones(6), x, torch.ones(6, 6)), 1, True),
        (lambda x: x @ torch.ones(6), 1, True),
        (lambda x: torch.cdist(x, torch.ones(6, 6)), 1, True),
        (lambda x: torch.cdist(x, torch.ones(6, 6)), 0, False),
    ],
)
def test_a_product_sums_over_one_axis_of_each_factor(operation, axis, summed):
    node = operation(torch.zeros(6, 6, requires_grad=True)).grad_fn
    number = next(i for i, (function, _) in enumerate(node.next_functions) if function is not None)
    assert contracts(node, number, (6, 6), axis) is summed


@for_each("groups, summed", [(1, True), (2, True), (4, False)])
def test_a_convolution_sums_over_channels_unless_each_is_alone(groups, summed):
    x = torch.zeros(2, 4, 5, requires_grad=True)
    node = F.conv1d(x, torch.ones(4, 4 // groups, 3), groups=groups).grad_fn
    assert contracts(node, 0, (2, 4, 5), 1) is summed
    assert contracts(node, 0, (2, 4, 5), 2) is False
