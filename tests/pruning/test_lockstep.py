"""Forwards that stop before each reader: what they bring, and what they leave behind."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import PruningError, prune
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.compensate import compensation_named
from lightning_neurons.pruning.compensation.synchronized_forwards import Lockstep, calls_of
from lightning_neurons.pruning.compensation.weight_shifts import Wiring
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from lightning_neurons.pruning.surgery.surgery import TensorCut, cuts_of
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each

STOPS = ["conv1", "conv2", "fc1", "fc2"]
BATCHES = [pictures(count, seed=count)[0] for count in (2, 3, 1)]


def run(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def hooks_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]


def read_by(model: nn.Module, paths: list[str], batch: Tensor) -> dict[str, Tensor]:
    """What layers read in a plain forward."""
    found, hooks = {}, []
    for path in paths:
        keep = lambda module, args, path=path: found.setdefault(path, args[0].detach().clone())
        hooks.append(model.get_submodule(path).register_forward_pre_hook(keep))
    model(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_walks_stop_before_each_reader_with_what_a_plain_forward_gives_it():
    net, passed = seeded(ConvNet), set()
    expected = [read_by(net, STOPS, batch) for batch in BATCHES]
    with Lockstep(net, STOPS, run, BATCHES) as walks:
        for path in STOPS:
            for index in range(3):
                torch.testing.assert_close(walks.walk_to(path, passed, index), expected[index][path])
                assert walks.walks[index].at == path
            passed.add(path)
        assert [walks.walk_to("fc2", passed, index) for index in range(3)] == [None] * 3
    assert hooks_of(net) == []


def test_who_waits_for_a_later_turn_stays_where_it_is():
    net, batch = seeded(ConvNet), BATCHES[0]
    expected = read_by(net, STOPS, batch)
    with Lockstep(net, ["conv2", "fc2"], run, [batch]) as walks:
        torch.testing.assert_close(walks.walk_to("conv2", set(), 0), expected["conv2"])
        assert walks.walk_to("fc2", set(), 0) is None, "nobody has said that the first may be passed"
        assert walks.walks[0].at == "conv2"
        torch.testing.assert_close(walks.walk_to("fc2", {"conv2"}, 0), expected["fc2"])


def test_weights_that_change_at_a_stop_count_from_there_on():
    net, batch, passed = seeded(ConvNet), BATCHES[1], set()
    changed = copy.deepcopy(net)
    with torch.no_grad():
        changed.conv2.weight.mul_(-2)
    with Lockstep(net, STOPS, run, [batch]) as walks:
        for path in STOPS:
            read = walks.walk_to(path, passed, 0)
            torch.testing.assert_close(read, read_by(changed, STOPS, batch)[path])
            passed.add(path)
            if path == "conv2":
                with torch.no_grad():
                    net.conv2.weight.mul_(-2)


def test_a_walk_that_is_given_up_before_it_began_or_in_the_middle_leaves_nothing():
    net = seeded(ConvNet)
    with Lockstep(net, STOPS, run, BATCHES) as walks:
        walks.walk_to("conv1", set(), 0)
        walks.walk_to("fc1", {"conv1", "conv2"}, 1)
        assert len(hooks_of(net)) == 4
    assert hooks_of(net) == []
    net(BATCHES[0])  # and nobody waits


class Failing(ConvNet):
    """Fails in the middle of a forward on pictures of one number."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x)).relu()
        if len(x) == 3:
            raise KeyError("three pictures")
        x = self.bn2(self.conv2(nn.functional.max_pool2d(first, 2))).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


def test_what_a_model_raises_is_raised_where_it_is_waited_for():
    net = seeded(Failing)
    with Lockstep(net, STOPS, run, BATCHES) as walks:
        assert all(walks.walk_to("conv1", set(), index) is not None for index in range(3))
        assert walks.walk_to("conv2", {"conv1"}, 0) is not None
        with pytest.raises(KeyError, match="three pictures"):
            walks.walk_to("conv2", {"conv1"}, 1)
        assert walks.walk_to("conv2", {"conv1"}, 2) is not None, "the others go on"
    assert hooks_of(net) == []


def test_what_the_caller_raises_in_between_ends_all_walks():
    net = seeded(ConvNet)
    with pytest.raises(ValueError, match="mine"), Lockstep(net, STOPS, run, BATCHES) as walks:  # noqa: PT012
        walks.walk_to("conv2", {"conv1"}, 1)
        raise ValueError("mine")
    assert hooks_of(net) == []


@for_each("how", ["least_squares", "mean"])
def test_an_error_on_one_batch_is_that_of_prune_and_leaves_no_trace(how):
    net, x = seeded(Failing).train(), pictures(2)[0]
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    with pytest.raises(PruningError, match=r"fails on batch 1 .*three pictures"):
        prune(net, x, {"conv1": [1], "fc1": [2]}, BATCHES, compensation=how)
    assert hooks_of(net) == []
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Catching(nn.Module):
    """Goes on after its layers fail, in one of the ways in which people write that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.one, self.two, self.three = how, nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).tanh()
        if self.how == "except Exception":
            try:
                x = self.two(x)
            except Exception:  # noqa: BLE001
                x = x * 0
        elif self.how == "except BaseException":
            try:
                x = self.two(x)
            except BaseException:  # noqa: BLE001
                x = x * 0
        elif self.how == "finally":
            try:
                x = self.two(x)
            finally:
                x = self.three(x)
            return x
        else:
            with contextlib.suppress(BaseException):
                x = self.two(x)
        return self.three(x)


WAYS = ["except Exception", "except BaseException", "finally", "suppressed"]


@for_each("how", WAYS)
def test_models_that_catch_errors_are_walked_through(how):
    net, x = seeded(Catching, how), torch.randn(6, 4)
    expected, passed = read_by(net, ["one", "two", "three"], x), set()
    with Lockstep(net, ["one", "two", "three"], run, [x]) as walks:
        for path in ("one", "two", "three"):
            torch.testing.assert_close(walks.walk_to(path, passed, 0), expected[path])
            passed.add(path)
        assert walks.walk_to("three", passed, 0) is None, "it has come to its end"


@for_each("how", WAYS)
def test_models_that_catch_errors_let_walks_end_early(how):
    net, x = seeded(Catching, how), torch.randn(6, 4)
    walks = Lockstep(net, ["one", "two", "three"], run, [x])
    walks.__enter__()
    walks.walk_to("two", {"one"}, 0)
    ending = threading.Thread(target=walks.__exit__, args=(None, None, None), daemon=True)
    ending.start()
    ending.join(2)
    stuck = ending.is_alive()
    while ending.is_alive():  # let the walk go on by hand, so that nothing is left for other tests
        walks.walks[0]._turn.release()
        ending.join(0.1)
    assert not stuck, "the walk was still waiting after it had been given up"
    assert hooks_of(net) == []


def test_a_model_that_catches_errors_can_be_cut():
    net, x = seeded(Catching, "except Exception"), torch.randn(8, 4)
    report = prune(net, x, {"one": [1], "two": [0, 3]}, [x[:4], x[4:]])
    assert report.widths == {"one": 4, "two": 3, "three": 2}
    assert net(x).shape == (8, 2)


@for_each("how", ["least_squares", "patch_least_squares", "mean"])
@for_each("training", [False, True])
def test_compensation_only_looks(how, training):
    net, (x, y) = seeded(ConvNet), pictures(12)
    structure = discover(net, Example(x[:2]))
    cuts = cuts_of(structure.groups.values(), {"conv1": [0, 3], "conv2": [2], "fc1": [1, 4, 5]})
    net.train(training)
    net.bn1.eval()
    net.conv2.requires_grad_(False)
    cross_entropy(net, (x, y)).backward()
    net.zero_grad()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    identities = {name: (id(t), t.requires_grad) for name, t in (*net.named_parameters(), *net.named_buffers())}
    modes = {name: m.training for name, m in net.named_modules()}
    repair = compensation_named(how)(net, cuts, Calibration([x[:5], x[5:]], run, cross_entropy), structure.wiring)
    assert repair.shifts
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    tensors = (*net.named_parameters(), *net.named_buffers())
    assert {name: (id(t), t.requires_grad) for name, t in tensors} == identities
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert hooks_of(net) == []


def test_calls_are_counted_in_the_order_in_which_layers_first_run():
    net = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    forward = lambda model: model["c"](model["a"](model["c"](torch.ones(1, 3))))
    assert list(calls_of(net, ["a", "b", "c"], forward).items()) == [("c", 2), ("a", 1)]
    assert hooks_of(net) == []


def test_nothing_to_cut_is_nothing_to_repair():
    least_squares, calibration = compensation_named("least_squares"), Calibration(BATCHES, run, cross_entropy)
    repair = least_squares(seeded(ConvNet), list[TensorCut](), calibration, Wiring({}, {}))
    assert (dict(repair.shifts), repair.notes) == ({}, ())
