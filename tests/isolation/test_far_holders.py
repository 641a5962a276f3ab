"""What other things than modules and containers hold comes back as well."""

import contextvars
import functools
import queue
import threading
import weakref

import torch
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchmetrics import SumMetric

from lightning_neurons.isolation.isolation import isolated
from tests.tables import for_each

ONE, TEN = torch.ones(2), torch.full((2,), 10.0)
CURRENT: "contextvars.ContextVar[SumMetric]" = contextvars.ContextVar("current")
COUNT: "contextvars.ContextVar[int]" = contextvars.ContextVar("count", default=0)
LOCAL = threading.local()
ALIVE = SumMetric()


@functools.lru_cache
def meter(name):
    return SumMetric()


class Steps(nn.Module):
    """Every step adds to something, and ``look`` says what it has come to."""

    def step(self, value):
        raise NotImplementedError

    def look(self):
        raise NotImplementedError


class WeakValues(Steps):
    def __init__(self):
        super().__init__()
        self.names = weakref.WeakValueDictionary(sum=ALIVE)

    def step(self, value):
        self.names["sum"].update(value)

    def look(self):
        return float(ALIVE.compute())


class WeakOne(Steps):
    def __init__(self):
        super().__init__()
        self.one = weakref.ref(ALIVE)

    def step(self, value):
        self.one().update(value)

    def look(self):
        return float(ALIVE.compute())


class Variable(Steps):
    def __init__(self):
        super().__init__()
        CURRENT.set(SumMetric())

    def step(self, value):
        CURRENT.get().update(value)
        COUNT.set(COUNT.get() + 1)

    def look(self):
        return float(CURRENT.get().compute()), COUNT.get()


class Cached(Steps):
    def step(self, value):
        meter("loss").update(value)

    def look(self):
        return float(meter("loss").compute())


class Threads(Steps):
    def __init__(self):
        super().__init__()
        LOCAL.seen = []

    def step(self, value):
        LOCAL.seen.append(float(value.sum()))
        LOCAL.last = value

    def look(self):
        return list(LOCAL.seen), LOCAL.last.tolist()


class Queued(Steps):
    def __init__(self):
        super().__init__()
        self.queue = queue.Queue()

    def step(self, value):
        self.queue.put(value)

    def look(self):
        return self.queue.qsize(), self.queue.unfinished_tasks


class MethodsOfAList(Steps):
    def __init__(self):
        super().__init__()
        seen = []
        self.step, self.size = seen.append, seen.__len__

    def look(self):
        return self.size()


class Imports(Steps):
    def step(self, value):
        from tests.isolation import test_far_holders as here

        here.ALIVE.update(value)

    def look(self):
        return float(ALIVE.compute())


class Taught(Steps):
    """An object of an installed package that is taught."""

    def __init__(self):
        super().__init__()
        self.scaler = StandardScaler()

    def step(self, value):
        self.scaler.partial_fit(value.reshape(-1, 1).numpy())

    def look(self):
        return self.scaler.mean_.tolist(), int(self.scaler.n_samples_seen_)


KINDS = (WeakValues, WeakOne, Variable, Cached, Threads, Queued, MethodsOfAList, Imports, Taught)


@for_each("kind", KINDS)
def test_what_a_run_adds_is_taken_back(kind):
    module = kind()
    module.step(ONE)
    before = module.look()
    with isolated(module):
        module.step(TEN)
        assert module.look() != before
    assert module.look() == before


def test_results_that_only_the_run_has_kept_are_dropped():
    meter.cache_clear()
    with isolated(module := Cached()):
        module.step(TEN)
    module.step(ONE)
    assert module.look() == 2


def test_metrics_of_an_installed_package_that_are_no_torchmetrics(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "dice_package"
    package.mkdir(parents=True)
    source = "class Dice:\n    def __init__(self): self.reset()\n    def reset(self): self.rows, self.n = [], 0\n"
    (package / "__init__.py").write_text(f"{source}    def __call__(self, row): self.rows.append(row); self.n += 1\n")
    monkeypatch.syspath_prepend(package.parent)
    from dice_package import Dice

    module = nn.Module()
    module.dice = Dice()
    module.dice(1)
    with isolated(module):
        module.dice(2)
        module.dice.reset()
    assert (module.dice.rows, module.dice.n) == ([1], 1)


@for_each("kind", [torch.optim.Adam, torch.optim.SGD])
def test_an_optimizer_that_the_model_does_not_hold_goes_on_as_if_it_had_not_stepped(kind):
    def trained(again):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = kind(module.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

        def step(size):
            optimizer.zero_grad()
            module(torch.full((4, 3), size)).square().sum().backward()
            optimizer.step()

        step(1.0)
        if again:
            with isolated(module):
                step(5.0)
                step(7.0)
        step(1.0)
        return module.weight.detach().clone()

    assert torch.equal(trained(again=True), trained(again=False))
