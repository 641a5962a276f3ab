"""A copy of a model is whole: what its hooks hold, and what a step has left; what cannot be copied is named."""

import csv
import functools
import multiprocessing
import queue
import sqlite3
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_neurons import MeasurementError, PruningError, describe_structure, prune
from lightning_neurons.isolation.copying import copy_of, what_fails
from tests.models import Single, seeded
from tests.tables import for_each


class Hooked(nn.Module):
    """A hook keeps a feature where the forward reads it: in a dict, by one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.h, self.g, kept = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2), {}
        self.kept, last, me = kept, None, weakref.ref(self)

        def put(store, module, inputs, output) -> None:
            store["a"] = output

        def note(module, inputs, output) -> None:
            nonlocal last
            last = output

        def hand_on(module, inputs) -> None:
            put(kept, module, inputs, last)

        if way == "two functions":
            self.h.register_forward_pre_hook(hand_on)
        hooks = {
            "two functions": note,
            "weak reference": lambda module, inputs, output: put(me().kept, module, inputs, output),
            "closure": lambda module, inputs, output: put(kept, module, inputs, output),
            "default": lambda module, inputs, output, store=kept: put(store, module, inputs, output),
            "partial": functools.partial(put, kept),
            "self": lambda module, inputs, output: put(self.kept, module, inputs, output),
            "method": self.keep,
        }
        self.a.register_forward_hook(hooks[way])

    def keep(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.kept["a"] = output

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.relu(self.a(x))) + self.g(torch.relu(self.kept["a"]))


WAYS = ["closure", "default", "partial", "self", "method", "two functions", "weak reference"]


@for_each("way", WAYS)
def test_a_hook_of_a_copy_writes_into_the_copy(way):
    net, x = seeded(Hooked, way), torch.ones(3, 4)
    twin = copy_of(net)
    with torch.no_grad():
        twin.a.weight.mul_(2)
        out = twin(x)
    assert net.kept == {}
    assert torch.equal(twin.kept["a"], twin.a(x))
    assert torch.equal(out, twin.h(torch.relu(twin.a(x))) + twin.g(torch.relu(twin.a(x))))


@for_each("way", WAYS)
def test_a_layer_whose_feature_a_hook_hands_on_is_cut_exactly_and_nothing_is_left_in_the_model(way):
    net, x = seeded(Hooked, way, double=True), torch.ones(3, 4).double()
    describe_structure(net, x)
    assert net.kept == {}
    silent = copy_of(net)
    prune(net, x, {"a": [0, 5]})
    with torch.no_grad():
        silent.h.weight[:, [0, 5]], silent.g.weight[:, [0, 5]] = 0, 0
        assert net.a.out_features == 6
        assert torch.allclose(net(x), silent(x), rtol=0, atol=1e-12)


STORE = {}


class Stored(nn.Module):
    """A hook keeps a feature in a name of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.a.register_forward_hook(lambda module, inputs, output: STORE.update(a=output))

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.b(torch.relu(STORE["a"]))


def test_nothing_is_left_in_what_copies_share_with_the_model():
    net, x = seeded(Stored), torch.ones(3, 4)
    groups = describe_structure(net, x)["groups"]
    assert groups["a"]["readers"] == ["b"]
    assert STORE == {}
    prune(net, x, {"a": [2]})
    assert STORE == {}


class Keeping(nn.Module):
    """Values with graphs lie in containers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.outputs, self.last, self.by_name, losses = [], deque(maxlen=2), {"deep": {"losses": []}}, []
        self.log_loss = lambda loss: losses.append(loss)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.outputs.append((out.sum(), {"x": out}))
        self.last.append(out)
        self.by_name["deep"]["losses"].append(out)
        self.log_loss(out)
        return out


def test_values_with_graphs_in_containers_do_not_stop_a_copy():
    net, x = seeded(Keeping), torch.ones(3, 4)
    net(x)
    twin = copy_of(net)
    assert torch.equal(twin.outputs[0][0], net.outputs[0][0])
    assert not twin.outputs[0][0].requires_grad
    assert twin.outputs[0][1]["x"] is twin.last[0] is twin.by_name["deep"]["losses"][0]
    assert net.outputs[0][0].grad_fn is not None
    assert len(prune(net, x, 0.5).plan.neurons["net.0"]) == 4
    assert len(net.outputs) == 1


@for_each("path", ["", "net", "net.0"])
def test_a_module_that_cannot_be_copied_is_named(path):
    net = seeded(Keeping)
    net.get_submodule(path).only = Single(1, 1)
    only = f"{path}.only".lstrip(".")
    assert what_fails(net) == only
    with pytest.raises(PruningError, match=rf"^{only} in Keeping cannot be copied \(TypeError: there is only one\)"):
        prune(net, torch.ones(1, 4), 0.5)
    with pytest.raises(PruningError, match=r"^Single cannot be copied \(TypeError: there is only one\)"):
        prune(Single(4, 4), torch.ones(1, 4), 0.5)


class Memory:
    """The user's own, with a lock in a slot and values beside it."""

    __slots__ = ("lock", "values")

    def __init__(self) -> None:
        self.lock, self.values = threading.Lock(), [1]


UNCOPYABLE = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "queue": queue.Queue,
    "simple queue": queue.SimpleQueue,
    "thread": lambda: threading.Thread(target=print),
    "pool": lambda: ThreadPoolExecutor(1),
    "connection": lambda: sqlite3.connect(":memory:"),
    "lock of processes": multiprocessing.Lock,
    "module": lambda: functools,
    "view of a dict": lambda: {1: 2}.keys(),
}


@for_each("kind", UNCOPYABLE)
def test_what_cannot_be_copied_is_shared_wherever_it_is(kind):
    net, x, made = seeded(Keeping), torch.ones(3, 4), [UNCOPYABLE[kind]() for _ in range(3)]
    net.busy, net.net[0].busy, held = made[0], {"deep": [made[1]]}, [made[2]]
    net.net.register_forward_hook(lambda module, inputs, output: held.append(output.detach()))
    net(x)
    twin = copy_of(net)
    assert twin.busy is made[0]
    assert twin.net[0].busy["deep"] is not net.net[0].busy["deep"]
    assert twin.net[0].busy["deep"][0] is made[1]
    twin(x)
    assert len(held) == 2
    assert twin.net[0].weight is not net.net[0].weight
    prune(net, x, 0.5)
    assert net.net[0].out_features == 4


def test_what_is_beside_a_lock_is_copied():
    net = seeded(Keeping)
    net.memory = Memory()
    twin = copy_of(net)
    twin.memory.values.append(2)
    assert net.memory.values == [1]
    assert twin.memory.lock is net.memory.lock


def test_a_copy_draws_from_no_iterator_and_writes_to_no_file(tmp_path):
    net, numbers = seeded(Keeping), (i for i in range(9))
    net.numbers, net.batches = numbers, iter(DataLoader(range(4)))
    with open(tmp_path / "text", "w") as text, open(tmp_path / "bytes", "wb") as binary:
        net.text, net.binary, net.rows, net.table = text, binary, csv.writer(text), csv.DictWriter(text, ["x"])
        twin = copy_of(net)
        for drawn in (twin.numbers, twin.batches):
            with pytest.raises(
                MeasurementError, match=r"^a \w+ is an iterator that can neither be copied nor put back"
            ):
                next(drawn)
        twin.text.write("copy")
        twin.binary.write(b"copy")
        twin.rows.writerow(["copy"])
        twin.table.writeheader()
        net.text.write("model")
    assert [next(numbers), int(next(net.batches))] == [0, 0]
    assert ((tmp_path / "text").read_text(), (tmp_path / "bytes").read_bytes()) == ("model", b"")
    with open(tmp_path / "text") as net.text:
        assert copy_of(net).text is net.text


WIDTHS = {}


class ByIdentity(nn.Module):
    """It looks its width up by the module itself, which a copy is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        WIDTHS[id(self.a)] = 8

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h.view(-1, WIDTHS.get(id(self.a), h.shape[1])))


def test_a_cut_with_which_the_model_itself_fails_is_taken_back():
    net, x = seeded(ByIdentity), torch.ones(3, 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(x).sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    moments = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
    with pytest.raises(PruningError, match=r"although its copy did not \(RuntimeError: shape.*everything is as it was"):
        prune(net, x, {"a": [0, 5]}, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    after = [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
    assert all(torch.equal(new, old) for new, old in zip(after, moments, strict=True))
    assert (net.a.out_features, net.b.in_features) == (8, 8)


def test_a_hook_on_a_gradient_is_copied_although_its_parameter_has_been_frozen_since():
    net, doubled = nn.Linear(2, 1, bias=False), Mock(side_effect=lambda gradient: 2 * gradient)
    net.weight.register_hook(lambda gradient: doubled(gradient))
    twin = copy_of(net.requires_grad_(False))
    assert not twin.weight.requires_grad
    twin.requires_grad_(True)(torch.ones(1, 2)).sum().backward()
    assert torch.equal(twin.weight.grad, torch.full((1, 2), 2.0))
