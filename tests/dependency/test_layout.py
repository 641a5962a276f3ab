"""Where neurons lie behind an operation: what its node in the graph says, beside doing the same to their numbers."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_neurons.dependency.layout import (
    dim_of,
    is_split,
    kept_axes,
    moved,
    moves,
    name_of,
    part_of,
    reduced_axes,
    shape_of,
)
from tests.tables import for_each

SIZE = 2, 6, 3, 4

MOVES = {
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
    "heads": lambda x: x.view(2, 2, 3, 12).transpose(2, 3),
    "shuffled": lambda x: x.view(2, 2, 3, 3, 4).transpose(1, 2).reshape(SIZE),
    "with the batch": lambda x: x.reshape(12, 3, 4),
    "pixels": lambda x: F.pixel_shuffle(x[:, :4], 2),
}


def chain_of(result: Tensor) -> list:
    """The nodes between an input and what one or several calls make of it."""
    chain, node = [], result.grad_fn
    while name_of(node) != "AccumulateGrad":
        chain.append(node)
        node = node.next_functions[0][0]
    return chain[::-1]


@for_each("name", MOVES)
def test_numbers_are_where_the_operation_has_put_the_values(name):
    x = torch.arange(144.0).view(SIZE).requires_grad_()
    result = MOVES[name](x)
    numbers = x.detach().long()
    for node in chain_of(result):
        numbers = moved(node, numbers) if moves(node) else numbers  # else it is a copy
    assert torch.equal(numbers.double(), result.detach().double())


def test_values_that_are_padded_in_come_from_nowhere():
    x = torch.zeros(2, 3, requires_grad=True)
    laid = moved(F.pad(x, (1, 0)).grad_fn, torch.arange(6).view(2, 3))
    assert laid.tolist() == [[-1, 0, 1, 2], [-1, 3, 4, 5]]


SPLITS = {
    "chunk": lambda x: x.chunk(4, 1),
    "split": lambda x: x.split([1, 5], -3),
    "unbind": lambda x: x.unbind(2),
    "tensor_split": lambda x: x.split(2, 3),
}


@for_each("name", SPLITS)
def test_each_part_of_a_split_has_its_own_numbers(name):
    x = torch.arange(144.0).view(SIZE).requires_grad_()
    parts = SPLITS[name](x)
    node = parts[0].grad_fn
    assert is_split(node)
    for number, part in enumerate(parts):
        assert torch.equal(part_of(node, x.detach().long(), number).double(), part.detach().double())


def test_an_axis_is_counted_from_the_front():
    x = torch.zeros(SIZE, requires_grad=True)
    assert dim_of(torch.cat([x, x], -3).grad_fn, 4) == 1
    assert dim_of(torch.stack([x, x], -1).grad_fn, 5) == 4


@for_each(
    "operation, reduced",
    [
        (lambda x: x.mean(1, keepdim=True), (1,)),
        (lambda x: x.sum((-3, 2)), (1, 2)),
        (lambda x: x.amax(1), (1,)),
        (lambda x: x.mean((2, 3)), (2, 3)),
        (lambda x: x.sum(), (0, 1, 2, 3)),
        (F.relu, None),
    ],
)
def test_a_sum_or_a_mean_says_over_which_axes_it_runs(operation, reduced):
    assert reduced_axes(operation(torch.zeros(SIZE, requires_grad=True)).grad_fn, 4) == reduced


def last_of(result: Tensor, name: str) -> object:
    node = result.grad_fn
    while not name_of(node).startswith(name):
        node = node.next_functions[0][0]
    return node


def kept_by_trial(function, operands: list[Tensor], number: int) -> dict[int, int]:
    """The axes that stay, from which results depend on which values of one operand."""
    kept = {}
    for axis, size in enumerate(operands[number].shape):
        touched = []
        for place in range(size):
            changed = [o.clone() for o in operands]
            part = changed[number].select(axis, place)
            part.add_(torch.randn(part.shape, dtype=part.dtype))
            touched.append((function(*changed) - function(*operands)).abs() > 1e-9)
        for there in range(touched[0].ndim):
            if touched[0].shape[there] != size or size == 1:
                continue
            alone = [t.movedim(there, 0).reshape(size, -1).any(1) for t in touched]
            if all(bool(a[i]) and int(a.sum()) == 1 for i, a in enumerate(alone)):
                kept[axis] = there
    return kept


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


PRODUCTS = {
    "Mm": (torch.mm, [(3, 4), (4, 5)]),
    "Addmm": (lambda a, b: torch.addmm(torch.ones(5, dtype=a.dtype), a, b), [(3, 4), (4, 5)]),
    "Mv": (torch.mv, [(3, 4), (4,)]),
    "Bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "Cdist": (torch.cdist, [(2, 3, 4), (2, 5, 4)]),
    "ScaledDotProduct": (attention, [(2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)]),
}


@for_each("name", PRODUCTS)
def test_a_product_keeps_the_axes_over_which_it_does_not_sum(name):
    function, sizes = PRODUCTS[name]
    operands = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    node = last_of(function(*operands), name)
    places = [i for i, (f, _) in enumerate(node.next_functions) if f is not None]
    plain = [o.detach() for o in operands]
    for number, place in enumerate(places[-len(operands) :]):
        assert kept_axes(node, place, sizes[number], shape_of(node)) == kept_by_trial(function, plain, number)


@for_each("groups, kept", [(1, {0: 0}), (2, {0: 0}), (4, None)])
def test_a_convolution_sums_over_channels_unless_each_is_alone(groups, kept):
    x = torch.zeros(2, 4, 5, requires_grad=True)
    node = F.conv1d(x, torch.ones(4, 4 // groups, 3), groups=groups).grad_fn
    assert kept_axes(node, 0, (2, 4, 5), shape_of(node)) == kept
