"""Whatever code can reach from a model comes back: the same objects, in the same order, with the same contents."""

import functools
import io
import itertools
import random
import sys
import time
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric

from lightning_neurons.errors import MeasurementError
from lightning_neurons.isolation import reachable as reach_module
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.isolation.model_state import ModelState
from tests.tables import for_each

COUNTS = {"global": 0}
CALLS = 0
SHARED = SumMetric()


def helper(value):
    COUNTS["global"] += 1
    SHARED.update(value)


class Slotted:
    __slots__ = ("items", "late", "size")

    def __init__(self):
        self.items, self.size = [], 0


@dataclass(frozen=True)
class Frozen:
    seen: list = field(default_factory=list)


class Log(list):
    """A list of one's own, with an attribute."""

    def append(self, item):
        self.last = item
        super().append(item)


def counting():
    seen, count = [], 0

    def count_up():
        nonlocal count
        count += 1
        seen.append(count)
        count_up.calls = getattr(count_up, "calls", 0) + 1
        return count

    return count_up


Pair = namedtuple("Pair", "first second")


class Base(nn.Module):
    of_base: ClassVar[list] = []
    total = 0


class Holder(Base):
    """One attribute for each way of holding something that changes."""

    of_class: ClassVar[dict] = {"val": []}
    metric_of_class = SumMetric()

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.nested = [[[[[0]]]]]
        self.long = [[i] for i in range(3000)]
        self.tensors = {"a": [torch.zeros(2)]}
        self.ordered = OrderedDict(a=1, b=2)
        self.window, self.votes, self.groups = deque([1, 2], maxlen=2), Counter("ab"), defaultdict(list)
        self.slotted, self.frozen, self.space = Slotted(), Frozen(), SimpleNamespace(n=0)
        self.log, self.pair = Log([1]), Pair([], np.zeros(2))
        self.bytes, self.array, self.objects = bytearray(b"ab"), array("d", [1.0]), np.array([[], None], dtype=object)
        self.generators = (random.Random(0), np.random.default_rng(0), np.random.RandomState(0), torch.Generator())
        self.numbers, self.cycle, self.rest = itertools.count(), itertools.cycle("abc"), iter([1, 2, 3])
        self.count_up, self.partial = counting(), functools.partial(self.note, [])
        self.text = io.StringIO("old")
        self.optimizer = torch.optim.Adam(self.layer.parameters())
        self.metric, self.plain = SumMetric(), {"sum": SumMetric()}
        self.me = [self]

    def note(self, where):
        where.append(1)

    def use_globals(self):
        global CALLS
        CALLS += 1
        helper(3.0)

    def step_optimizer(self):
        self.layer(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()


def metrics_of(module):
    return module.metric, module.plain["sum"], SHARED, Holder.metric_of_class


CHANGES = {
    "a list, five deep": lambda m: m.nested[0][0][0][0].append(1),
    "a list in a long list": lambda m: m.long[2500].append(1),
    "a tensor in a list in a dict": lambda m: m.tensors["a"][0].add_(1),
    "a tensor behind .data": lambda m: m.tensors["a"][0].data.add_(1),
    "the order of a dict": lambda m: (m.ordered.move_to_end("a"), m.space.__dict__.update(z=1)),
    "a new entry of a defaultdict": lambda m: m.groups["new"].append(1),
    "a full deque": lambda m: m.window.append(3),
    "a counter": lambda m: m.votes.update("abc"),
    "an object with slots": lambda m: (m.slotted.items.append(1), setattr(m.slotted, "late", 2)),
    "a frozen dataclass": lambda m: m.frozen.seen.append(1),
    "a namespace": lambda m: setattr(m.space, "n", 1),
    "a list of one's own": lambda m: m.log.append(5),
    "a named tuple": lambda m: (m.pair.first.append(1), m.pair.second.__iadd__(1)),
    "bytes and arrays": lambda m: (m.bytes.extend(b"c"), m.array.append(2.0)),
    "an array of objects": lambda m: (m.objects[0].append(1), m.objects.put(1, 5)),
    "generators": lambda m: ([g.random() for g in m.generators[:2]], m.generators[2].rand()),
    "a generator of torch": lambda m: torch.rand(1, generator=m.generators[3]),
    "iterators": lambda m: (next(m.numbers), next(m.cycle), next(m.rest)),
    "a closure": lambda m: m.count_up(),
    "an argument of a partial": lambda m: m.partial(),
    "a stream": lambda m: m.text.write("new"),
    "the body of the class": lambda m: (m.of_class["val"].append(1), setattr(type(m), "total", 5)),
    "the body of its base": lambda m: (m.of_base.append(1), setattr(Base, "new", 1)),
    "a metric of the class": lambda m: m.metric_of_class.update(3.0),
    "globals": lambda m: m.use_globals(),
    "an optimizer": lambda m: m.step_optimizer(),
    "submodules": lambda m: (setattr(m, "late", nn.Linear(1, 1)), m.__delattr__("norm")),
    "a hook": lambda m: m.layer.register_forward_hook(lambda *_: None),
    "modes and statistics": lambda m: (m.train(), m.norm(torch.randn(5, 3)), m.eval()),
    "metrics": lambda m: (m.metric.update(1.0), m.plain["sum"].update(1.0)),
    "weights in place": lambda m: m.layer.weight.requires_grad_(False).mul_(2),
    "weights behind .data": lambda m: m.layer.weight.data.lerp_(torch.ones(3, 3), 0.5),
    "weights exchanged": lambda m: setattr(m.layer.weight, "data", torch.ones(2, 2)),
    "weights in numpy": lambda m: m.layer.weight.detach().numpy().__imul__(2),
    "a list of weights": lambda m: torch._foreach_mul_([p.data for p in m.layer.parameters()], 2.0),
    "a state that is loaded": lambda m: m.layer.load_state_dict(nn.Linear(3, 3).state_dict()),
    "a gradient": lambda m: m.layer(torch.ones(1, 3)).sum().backward(),
}  # fmt: skip


def seen(m):
    """All that ``CHANGES`` change, as text and identities; written out, as a reference."""
    kept = vars(m)
    return repr([
        list(kept), list(m._modules), m.layer._forward_hooks, [x.training for x in m.modules()],
        m.nested, m.long, m.tensors, list(m.ordered.items()), m.groups, m.window, list(m.votes.items()),
        m.slotted.items, m.slotted.size, hasattr(m.slotted, "late"), m.frozen, list(vars(m.space).items()),
        list(m.log), vars(m.log), m.pair, m.bytes, m.array, m.objects,
        m.generators[0].getstate(), m.generators[1].bit_generator.state, m.generators[2].get_state(),
        m.generators[3].get_state().sum(), m.numbers, m.rest.__length_hint__(),
        [c.cell_contents for c in m.count_up.__closure__ if not callable(c.cell_contents)], vars(m.count_up),
        m.partial.args, m.text.getvalue(), m.text.tell(), Holder.of_class, Holder.total, Base.of_base,
        hasattr(Base, "new"), COUNTS, CALLS, len(m.optimizer.state), [metric.compute() for metric in metrics_of(m)],
        [(n, id(p), p.shape, p.tolist(), p.requires_grad, p.grad) for n, p in m.named_parameters()],
        [(n, id(b), b.tolist()) for n, b in m.named_buffers()], [id(x) for x in kept.values()],
    ])  # fmt: skip


@pytest.fixture(scope="module")
def holder():
    module = Holder()
    for metric in metrics_of(module):
        metric.update(1.0)
    return module


@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support:DeprecationWarning")
@for_each("change", CHANGES)
def test_what_code_can_reach_comes_back(change, holder):
    before = seen(holder)
    with isolated(holder):
        state = ModelState(holder)
        assert not state.has_changed()
        CHANGES[change](holder)
        assert state.has_changed() or change == "iterators"
    assert seen(holder) == before
    assert next(holder.cycle) == "a"
    holder.cycle = itertools.cycle("abc")


def test_values_of_inference_mode_are_normal_ones_meanwhile():
    module = nn.LSTM(2, 2)
    with torch.inference_mode():
        module.hidden = (torch.zeros(1, 2), torch.zeros(1, 2))
        module.kept = {"list": [torch.ones(2)]}
    first, kept = module.hidden, module.kept["list"][0]
    with isolated(module):
        assert not any(t.is_inference() for t in (*module.hidden, *module.kept["list"]))
        module.kept["list"][0].add_(1)
        module(torch.zeros(3, 2, requires_grad=True), module.hidden)[0].sum().backward()
    assert module.hidden is first
    assert module.kept["list"][0] is kept
    assert kept.tolist() == [1, 1]


def test_what_cannot_be_put_back_is_said_once(tmp_path):
    module = nn.Module()
    module.file = (tmp_path / "log").open("w")

    def advance():
        with isolated(module):
            module.file.write("line")

    with pytest.warns(UserWarning, match="cannot be put back") as said:
        advance()
    advance()  # warnings are errors
    module.file.close()
    assert [str(w.message).split()[0] for w in said] == ["Module.file"]


class Endless:
    """Begins anew where the data ends."""

    def __init__(self, data):
        self.data, self.running = data, iter(data)

    def __next__(self):
        try:
            return next(self.running)
        except StopIteration:
            self.running = iter(self.data)
            return next(self.running)


@for_each(
    "draws",
    [
        lambda data: functools.partial(next, iter(data)),
        lambda data: iter(data).__next__,
        lambda data: (batch for batch in data).__next__,
        lambda data: Endless(data).__next__,
        lambda data: Endless(zip(data, data, strict=True)).__next__,
        lambda data: Endless(CombinedLoader([data], "max_size_cycle")).__next__,
    ],
)
def test_an_iterator_that_cannot_be_copied_is_not_drawn_from(draws):
    data = DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True)

    def drawn(between):
        torch.manual_seed(0)
        module = nn.Module()
        module.draw = draws(data)
        first = str(module.draw())
        between(module)
        return first, str(module.draw()), torch.rand(1)

    def draw_in_isolation(module):
        with pytest.raises(MeasurementError, match=r"draw.* is an iterator"), isolated(module):
            module.draw()

    assert drawn(draw_in_isolation) == drawn(lambda module: None)


def test_weights_that_are_too_many_to_copy_are_refused_where_they_move(monkeypatch):
    monkeypatch.setattr(reach_module, "_COPIED_BYTES", 100)
    module = nn.Linear(10, 10)
    with isolated(module):
        module(torch.ones(10))
    with pytest.raises(MeasurementError, match="weight in place"), isolated(module):
        module.weight.data.mul_(2)


def test_a_model_of_a_thousand_modules_is_isolated_in_a_fraction_of_a_second():
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    model = nn.Sequential(*[block() for _ in range(300)])
    start = time.process_time()
    with isolated(model):
        pass
    assert time.process_time() - start < 1  # a twentieth of that, on a machine with nothing else to do


def test_numpy_and_torch_are_not_walked_into():
    module = nn.Linear(2, 2)
    module.tools = (np, torch, sys, torch.nn.functional.relu, torch.utils.data.TensorDataset(torch.zeros(3)))
    assert len(reach_module.Reach([module]).contents) < 20
