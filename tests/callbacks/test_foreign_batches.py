"""Batches of other people's packages: copied with their type, counted by what they say, measured as they are."""

import copy
import dataclasses
import weakref
from collections import UserDict, defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from lightning_neurons import NeuronPruningCallback, NeuronSensitivityCallback, measure
from lightning_neurons.callbacks.trainer.runner import KeptBatches
from lightning_neurons.data.batches import batch_size_of, is_divisible, map_tensors, tensors_of
from tests.callbacks.modules import Plain, fit

X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 0])


@dataclasses.dataclass
class WithInitVar:
    rows: dataclasses.InitVar[list]
    x: Tensor = dataclasses.field(init=False)
    y: Tensor = dataclasses.field(init=False)

    def __post_init__(self, rows: list) -> None:
        self.x, self.y = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        self._size = len(rows)

    def __len__(self) -> int:
        return self._size


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor


class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Named(NamedTuple):
    x: Tensor
    y: Tensor


class NoConstructor(MutableMapping):
    """A mapping that cannot be made from a dict."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._values = {"x": x, "y": y}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values = {**self._values, key: value}

    def __delitem__(self, key: str) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Store(NoConstructor):
    """Knows whose it is, by a weak reference."""

    owner: Any = None


class Graphs:
    """As graph packages have them: attributes live in a store, which the copy must own."""

    def __init__(self, x: Tensor, y: Tensor, batch: Tensor) -> None:
        self._store = Store(x, y)
        self._store["edge_index"], self._store["batch"] = torch.zeros(2, 5).long(), batch
        self._store["ptr"] = torch.bincount(batch).cumsum(0).roll(1).index_fill(0, torch.tensor(0), 0)
        self._store.owner = weakref.ref(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._store[name]
        except KeyError as error:
            raise AttributeError(name) from error

    @property
    def num_graphs(self) -> int:
        return len(self._store["y"])

    def __len__(self) -> int:
        return len(self._store)  # as some packages have it: of the list of attributes

    @property
    def num_nodes(self) -> int:
        return len(self._store.owner()._store["x"])

    def __deepcopy__(self, memo: Any) -> "Graphs":
        made = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        made._store.owner = weakref.ref(made)
        return made


def self_containing() -> Slots:
    batch = Slots(X, Y)
    batch.y = {"back": batch, "y": Y}
    return batch


MADE = {
    "InitVar": lambda: WithInitVar(list(zip(X, Y, strict=True))),
    "frozen, slots": lambda: Frozen(X, Y),
    "slots": lambda: Slots(X, Y),
    "named": lambda: Named(X, Y),
    "mapping without constructor": lambda: NoConstructor(X, Y),
    "UserDict": lambda: UserDict(x=X, y=Y),
    "defaultdict": lambda: defaultdict(list, x=X, y=Y),
    "graphs": lambda: Graphs(torch.ones(9, 3), Y, torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])),
    "packed": lambda: pack_sequence([torch.ones(n, 3) for n in (2, 3, 1, 2)], enforce_sorted=False),
    "pictures of several sizes": lambda: ([torch.ones(3, 5 + i, 5) for i in range(4)], Y),
    "detection": lambda: (tuple(torch.ones(3, 8, 8) for _ in range(4)), tuple({"boxes": X[:2]} for _ in range(4))),
    "records": lambda: [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
}


def test_a_copy_has_the_same_type_and_tensors_of_its_own():
    for form in MADE:
        batch = MADE[form]()
        made = map_tensors(batch, torch.clone)
        assert type(made) is type(batch), form
        pairs = list(zip(tensors_of(batch), tensors_of(made), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), form
        assert all(a is not b for a, b in pairs if a.is_floating_point()), form
        assert batch_size_of(batch) == batch_size_of(made) == 4, form
        if isinstance(batch, Mapping) and hasattr(batch, "default_factory"):
            assert made["new"] == [], form


def test_a_copied_graph_owns_its_store_and_is_never_cut():
    batch = MADE["graphs"]()
    made = map_tensors(batch, torch.clone)
    assert made._store is not batch._store
    del batch
    assert made.num_nodes == 9
    assert not is_divisible(made)
    assert not is_divisible((made, Y))
    assert is_divisible((X, Y))


def test_an_object_that_contains_itself_is_copied():
    batch = self_containing()
    made = map_tensors(batch, torch.clone)
    assert made.y["back"] is made
    assert torch.equal(made.x, X)
    assert made.x is not X


class OfGraphs(Plain):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 6), nn.ReLU()))
        self.out = nn.Linear(6, 3)

    def loss(self, batch: Any) -> Tensor:
        nodes = self.net(batch.x)
        pooled = torch.zeros(batch.num_graphs, 6).index_add(0, batch.batch, nodes)
        return nn.functional.cross_entropy(self.out(pooled), batch.y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


def graphs(count: int) -> list[Graphs]:
    """Nodes are sometimes a multiple of the graphs, although graphs differ in size."""
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(count):
        batch = torch.tensor([0, 0, 1, 1, 1, 1, 2, 3])
        made.append(
            Graphs(torch.randn(8, 3, generator=generator), torch.randint(0, 3, (4,), generator=generator), batch)
        )
    return made


def test_graphs_are_counted_as_graphs_and_every_node_is_seen():
    module, callback, data = OfGraphs(), NeuronSensitivityCallback(max_figures=0), graphs(3)
    loader = DataLoader(data, batch_size=None, collate_fn=lambda batch: batch)
    fit(module, [callback], train=loader, val=loader)
    sums, nodes = torch.zeros(6), 0
    for batch in data:
        a = module.net(batch.x)
        a.retain_grad()
        pooled = torch.zeros(4, 6).index_add(0, batch.batch, a)
        (nn.functional.cross_entropy(module.out(pooled), batch.y) * 4).backward()
        sums, nodes = sums + (a * a.grad).abs().sum(0), nodes + 8
    torch.testing.assert_close(callback.report.scores["taylor"]["net.0"].float(), (sums / nodes).detach())
    assert callback.report.counts["net.0"].samples.tolist() == [24] * 6
    assert callback.report.counts["out"].samples.tolist() == [12] * 3
    assert callback.report.notes[0] == "sensitivity on all 12 samples"
    assert any(note.startswith("graphs: every row") for note in callback.report.notes)


@pytest.mark.parametrize("form", ["InitVar", "frozen, slots", "slots", "UserDict", "mapping without constructor"])
def test_training_with_such_batches_is_measured(form):
    class Reads(OfGraphs):
        def loss(self, batch: Any) -> Tensor:
            x, y = (batch["x"], batch["y"]) if isinstance(batch, Mapping) else (batch.x, batch.y)
            return nn.functional.cross_entropy(self.out(self.net(x)), y)

    module, callback = Reads(), NeuronSensitivityCallback(max_figures=0)
    data = DataLoader([MADE[form]() for _ in range(2)], batch_size=None, collate_fn=lambda batch: batch)
    fit(module, [callback], train=data, val=data)
    expected = measure(module, [(X, Y)] * 2, loss_fn=lambda m, b: nn.functional.cross_entropy(m.out(m.net(b[0])), b[1]))
    torch.testing.assert_close(callback.report.scores["taylor"], expected.scores["taylor"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("batch", [None, 3, "text"])
def test_a_batch_that_says_nothing_of_its_samples_costs_sensitivity_alone(batch):
    class Draws(OfGraphs):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.out(self.net(X)), Y)

    callback = NeuronSensitivityCallback(max_figures=0)
    data = DataLoader([batch] * 2, batch_size=None, collate_fn=lambda batch: batch)
    with pytest.warns(UserWarning, match="sensitivity was not measured.*how many samples"):
        trainer_of_draws(Draws(), callback, data)
    assert callback.report.counts["net.0"].samples.tolist() == [8] * 6


def trainer_of_draws(module: Any, callback: Any, data: Any) -> None:
    train = DataLoader([0, 1], batch_size=None)
    fit(module, [callback], train=train, val=data)


class Beside(NamedTuple):
    graph: Any
    more: Tensor | None
    y: Tensor


class Answers(OfGraphs):
    """Its forward takes the first entries of a batch, and its validation step logs nothing but what is right."""

    def forward(self, graph: Any, more: Tensor | None = None) -> Tensor:
        nodes = self.net(graph.x)
        return self.out(torch.zeros(graph.num_graphs, nodes.shape[1]).index_add(0, graph.batch, nodes))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(getattr(batch, "graph", batch)), batch.y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(getattr(batch, "graph", batch)).argmax(1) == batch.y).float().mean(), batch_size=4)


def test_a_network_is_cut_in_the_same_way_whether_targets_stand_in_a_graph_or_beside_it():
    left = []
    for form in (lambda graph: graph, lambda graph: Beside(graph, None, graph.y)):
        torch.manual_seed(0)
        module = Answers()
        callback = NeuronPruningCallback("fisher", amount=0.5, loss_fn=lambda m, batch: m.training_step(batch, 0))
        data = DataLoader([form(graph) for graph in graphs(3)], batch_size=None, collate_fn=lambda batch: batch)
        fit(module, [callback], train=data, val=data, max_epochs=2)
        assert (module.net[0].out_features, module.out.in_features) == (3, 3)
        left.append((callback.plan.neurons, module.state_dict()))
    assert left[0][0] == left[1][0]
    assert all(torch.equal(value, left[1][1][name]) for name, value in left[0][1].items())


def test_of_a_graph_that_is_kept_nothing_is_missing():
    kept = KeptBatches(6)
    for graph in graphs(3):
        kept.add(Beside(graph, None, graph.y))
    found = list(kept.on(torch.device("cpu")))
    assert [(len(one.graph.x), len(one.y)) for one in found] == [(8, 4)] * 2
    assert kept.samples == 8
