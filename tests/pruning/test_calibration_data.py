"""What data and forwards can be like when a cut is calibrated on them."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import PruningError, prune
from lightning_neurons.errors import ArgumentError
from lightning_neurons.pruning.compensation import ridge as least_squares
from lightning_neurons.pruning.compensation.calibration import in_few
from lightning_neurons.pruning.compensation.moments import Moments
from tests.models import seeded
from tests.tables import for_each

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Keeping(nn.Module):
    """Keeps a value on itself between two layers, in one of the ways in which people write that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(20, 3)
        self.how, self.kept, self.list = how, None, []

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.list.append(h)
        self.kept = h
        y = F.relu(self.b(h))
        skip = {"local": lambda: h, "attribute": lambda: self.kept, "list": lambda: self.list.pop()}[self.how]()
        return self.c(torch.cat([y, skip], 1))


@for_each("how", ["attribute", "list"])
@for_each("sizes", [(32, 32), (40, 24)])
def test_what_a_forward_keeps_on_the_module_is_its_own_while_others_run(how, sizes):
    batches = [part * scale for part, scale in zip(X.split(sizes), (1.0, 5.0), strict=True)]
    found = {}
    for one in ("local", how):
        net = seeded(Keeping, one)
        prune(net, X[:2], {"a": [0, 3, 7], "b": [2]}, batches, compensation="least_squares")
        found[one] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert all(torch.equal(tensor, found["local"][name]) for name, tensor in found[how].items())


@for_each("how", ["mean", "least_squares", "patch_least_squares"])
@for_each("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_an_error_that_names_the_reader(how, value):
    net, x = seeded(Mlp), X.clone()
    x[3, 0] = value
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(PruningError, match=r"b reads NaN or infinite values"):
        prune(net, X[:2], {"a": [0, 1]}, [x], compensation=how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_reconstruction_does_not_choose_by_what_is_no_number():
    x = X.clone()
    x[3, 0] = float("nan")
    with pytest.raises(PruningError, match="NaN or infinite"):
        prune(seeded(Mlp), X[:2], {"criterion": "reconstruction", "amount": 0.3}, [x])


class Branching(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.c(F.relu(self.b(h) if float(x.mean()) > 0 else self.other(h)))


@for_each("how", ["none", "mean", "least_squares"])
def test_a_branch_that_the_example_does_not_take_is_found_before_the_cut(how):
    net = seeded(Branching)
    with pytest.raises(PruningError, match=r"fails on batch 1 .*does not run"):
        prune(net, X[:2].abs(), {"a": [0, 1]}, [X + 1, X - 1], compensation=how)
    assert net.a.out_features == 12
    assert net(X - 1).shape == (64, 3)


def test_many_small_batches_are_joined_and_solved_the_same():
    one, many = seeded(Mlp), seeded(Mlp)
    prune(one, X[:2], {"a": [0, 5], "b": [1]}, [X])
    prune(many, X[:2], {"a": [0, 5], "b": [1]}, [X[i : i + 1] for i in range(64)])
    assert len(in_few([X[i : i + 1] for i in range(64)], 32, one)) == 32
    assert torch.allclose(one(X), many(X), atol=1e-5)
    assert torch.equal(torch.cat(in_few([X[i : i + 1] for i in range(64)], 5, one)), X)
    assert [len(batch) for batch in in_few([X[:3], X[:2, :4], X[:1, :4]], 1, torch.relu)] == [3, 3]
    assert len(in_few(X.split(8), 2, lambda batch: one(batch).square().mean())) == 2


def of_one_size(batch: torch.Tensor) -> torch.Tensor:
    assert len(batch) == 8
    return batch


COMPANY = {
    "centred": lambda batch: batch - batch.mean(0),
    "a bag": lambda batch: batch.amax(0),
    "a mean that is no mean of means": lambda batch: batch.mean().square(),
    "nothing that could tell": lambda batch: [],
    "fails": of_one_size,
}


@for_each("run", COMPANY.values())
def test_batches_whose_samples_depend_on_one_another_stay_as_they_came(run):
    batches = list(X.split(8))
    assert all(one is other for one, other in zip(in_few(batches, 2, run), batches, strict=True))


def test_threads_that_cannot_be_started_leave_nothing_behind(monkeypatch):
    start, count = threading.Thread.start, [0]

    def failing(thread: threading.Thread) -> None:
        count[0] += 1
        if count[0] > 5:
            raise RuntimeError("can't start new thread")
        start(thread)

    net, before = seeded(Mlp), threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start"):
        prune(net, X[:2], {"a": [0]}, list(X.split(4)))
    assert threading.active_count() == before
    assert [len(module._forward_pre_hooks) for module in net.modules()] == [0] * 4


def test_forwards_run_in_the_context_of_the_caller():
    net, halves = seeded(Mlp), [part.bfloat16() for part in X.split(16)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune(net, halves[0][:2], {"a": [0, 1]}, halves)
        assert net(halves[0]).dtype == torch.bfloat16
    assert net.b.in_features == 10


class Two(Mlp):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "mask": logits > 0}


def test_outputs_that_are_no_numbers_have_to_be_the_same_for_a_lossless_cut():
    net = seeded(Two)
    with torch.no_grad():
        net.a.weight[4], net.a.bias[4] = 0, -1
    assert prune(net, X[:2], batches=[X], lossless=True).plan.neurons["a"] == (4,)


def test_batches_without_a_sample_are_left_out_or_refused():
    with pytest.raises(ArgumentError, match="batches="):
        prune(seeded(Mlp), X[:2], {"a": [0]}, [X[:0]])
    first, second = seeded(Mlp), seeded(Mlp)
    prune(first, X[:2], {"a": [0]}, [X, X[:0]])
    prune(second, X[:2], {"a": [0]}, [X])
    assert torch.equal(first.b.weight, second.b.weight)


@for_each("loss_fn", ["mse", 3])
def test_a_loss_that_is_no_function_is_refused_at_once(loss_fn):
    with pytest.raises(ArgumentError, match="loss_fn="):
        prune(seeded(Mlp), X[:2], {"a": [0]}, [X], loss_fn=loss_fn)


@for_each("centred", [True, False])
@for_each("count", [8, 40, 4000])
def test_the_ridge_is_the_one_by_which_each_half_predicts_the_other_best(count, centred):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(6, 2 * count, generator=generator).double()
    y = torch.randn(3, 6, generator=generator).double() @ x + 2 * torch.randn(3, 2 * count, generator=generator) + 1
    metric = torch.diag(torch.tensor([1.0, 4.0, 0.5])).double()
    halves, start = (x[:, :count], x[:, count:]), torch.zeros(3, 6).double()
    targets = y[:, :count], y[:, count:]
    moments = []
    for some, wanted in zip(halves, targets, strict=True):
        moments.append(Moments.empty(6, 3))
        moments[-1].add(some, wanted)

    def loss(ridge: float) -> float:
        total = 0.0
        for seen, unseen in ((0, 1), (1, 0)):
            matrix = least_squares.refine(moments[seen], start, ridge=ridge, centred=centred).matrix
            offset = (targets[seen] - matrix @ halves[seen]).mean(1, keepdim=True) if centred else 0
            error = targets[unseen] - matrix @ halves[unseen] - offset
            total += float((error * (metric @ error)).sum(0).mean())
        return total

    found = least_squares.choose_ridge(*moments, start, metric, centred=centred)
    assert found == min(least_squares.RIDGES, key=loss)
