"""A cut happens whole or not at all, whatever goes wrong and wherever."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons.pruning.surgery import surgery
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut
from tests.models import pictures
from tests.tables import for_each

GONE, OTHERS = (1, 4), (0, 3)
CUTS = [
    TensorCut("conv", "makes", GONE),
    TensorCut("norm", "passes", GONE),
    TensorCut("deep", "passes", GONE),
    TensorCut("slopes", "passes", GONE),
    TensorCut("scale", "holds", GONE, 0),
    TensorCut("up", "reads", GONE),
    TensorCut("up", "makes", OTHERS),
    TensorCut("head", "reads", OTHERS),
]


class Net(nn.Module):
    """One of each: dense, norm, depthwise, slopes, a parameter of its own, transposed, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.deep, self.slopes = nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.up, self.head = nn.ConvTranspose2d(6, 5, 2, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slopes(self.deep(self.norm(self.conv(x)))) * self.scale
        return self.head(F.relu(self.up(x)).mean((2, 3)))


def optimizers_of(net: Net) -> list[torch.optim.Optimizer]:
    first = [*net.conv.parameters(), *net.norm.parameters()]
    rest = [p for n, p in net.named_parameters() if not n.startswith(("conv", "norm"))]
    return [torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=0.01, amsgrad=True)]


def train(net: nn.Module, optimizers: Iterable[torch.optim.Optimizer], seeds: Iterable[int]) -> None:
    for seed in seeds:
        x, y = pictures(4, seed=seed)
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


class Everything:
    """A model in training, its average and its optimizers; what they hold, and what they hold it in."""

    def __init__(self) -> None:
        self.net = Net().train()
        self.optimizers = optimizers_of(self.net)
        train(self.net, self.optimizers, range(2))
        self.average = copy.deepcopy(self.net)
        self.kept, self.objects = self.values(), self.identities()
        self.alive = [(t, t.data) for t in self.tensors()]  # so that no other object gets its identity
        self.twin = copy.deepcopy(self.net)
        self.twins = optimizers_of(self.twin)
        for one, other in zip(self.optimizers, self.twins, strict=True):
            other.load_state_dict(copy.deepcopy(one.state_dict()))

    def cut(self, cuts: list[TensorCut] | None = None, **options: Any) -> surgery.Operation:
        return cut(
            self.net, CUTS if cuts is None else cuts, optimizers=self.optimizers, copies=[self.average], **options
        )

    def values(self) -> dict[str, Any]:
        """Everything, in copies."""
        found: dict[str, Any] = {}
        for kind, model in (("model", self.net), ("average", self.average)):
            for name, tensor in model.state_dict().items():
                found[f"{kind} {name}"] = tensor.clone()
            for name, parameter in model.named_parameters():
                found[f"{kind} {name} gradient"] = None if parameter.grad is None else parameter.grad.clone()
            for name, module in model.named_modules():
                plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | tuple | str)}
                found[f"{kind} {name} attributes"] = plain
        for name, parameter in self.net.named_parameters():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    found[f"{name} {key}"] = value.clone()
        return found

    def tensors(self) -> list[Tensor]:
        held = [t for m in (self.net, self.average) for t in (*m.parameters(), *m.buffers())]
        states = [t for o in self.optimizers for state in o.state.values() for t in state.values()]
        return [*held, *(p.grad for p in self.net.parameters()), *states]

    def identities(self) -> list[int]:
        """Which objects, and which memory, hold it."""
        states = [id(state) for optimizer in self.optimizers for state in optimizer.state.values()]
        return [id(t) for t in self.tensors()] + [t.data_ptr() for t in self.tensors()] + states

    def check_nothing_changed(self) -> None:
        values = self.values()
        assert list(values) == list(self.kept)
        for name, was in self.kept.items():
            got = values[name]
            if isinstance(was, Tensor):
                assert got.dtype == was.dtype, name
                assert torch.equal(got, was), name
            else:
                assert got == was, name
        assert self.identities() == self.objects

    def check_training_goes_on(self) -> None:
        train(self.net, self.optimizers, range(2, 4))
        train(self.twin, self.twins, range(2, 4))
        for a, b in zip(self.net.state_dict().values(), self.twin.state_dict().values(), strict=True):
            assert torch.equal(a, b)


class Interrupted(BaseException):
    """Not even an Exception, as when someone presses Ctrl-C."""


def failing_at(call: int, function: Callable[..., Any], *, late: bool) -> tuple[Callable[..., Any], list[int]]:
    """The function, whose ``call``-th call fails, before or after it has done its work."""
    calls: list[int] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        fails = calls[-1] == call
        if fails and not late:
            raise Interrupted
        result = function(*args, **kwargs)
        if fails:
            raise Interrupted
        return result

    return wrapped, calls


def count(monkeypatch: pytest.MonkeyPatch, step: str) -> int:
    """How many calls of a step a whole cut takes."""
    wrapped, calls = failing_at(0, getattr(surgery, step), late=False)
    with monkeypatch.context() as patch:
        patch.setattr(surgery, step, wrapped)
        Everything().cut()
    return len(calls)


# Eleven parameters of seven modules are cut, in the model and in its average; the average has no optimizer.
STEPS = {"set_data": 2 * 11, "refit": 2 * 7, "refill": 11}


@pytest.mark.parametrize("step", STEPS)
def test_a_cut_takes_as_many_steps_as_there_are_things_to_change(step, monkeypatch):
    assert count(monkeypatch, step) == STEPS[step]


# The first and the last call of each step, on both sides of it, and one in the middle.
MOMENTS = [
    (step, call, late)
    for step, calls in STEPS.items()
    for call, late in ((1, False), (1, True), (calls // 2 + 1, False), (calls, False), (calls, True))
]


@for_each("step, call, late", MOMENTS)
def test_an_error_at_any_step_leaves_everything_as_it_was(step, call, late, monkeypatch):
    everything = Everything()
    wrapped, calls = failing_at(call, getattr(surgery, step), late=late)
    with monkeypatch.context() as patch:
        patch.setattr(surgery, step, wrapped)
        with pytest.raises(Interrupted):
            everything.cut()
    assert len(calls) >= call
    everything.check_nothing_changed()
    everything.check_training_goes_on()


class Half(dict):
    """State that cannot be written: it is emptied, and then the error comes, once."""

    broken = True

    def update(self, *args: Any, **kwargs: Any) -> None:
        if self.broken:
            self.broken = False
            raise MemoryError
        super().update(*args, **kwargs)


def test_an_error_in_the_middle_of_a_step_is_taken_back_as_well():
    everything = Everything()
    parameter = everything.net.head.weight
    optimizer = everything.optimizers[1]
    optimizer.state[parameter] = Half(optimizer.state[parameter])
    everything.objects = everything.identities()
    with pytest.raises(MemoryError):
        everything.cut()
    everything.check_nothing_changed()
    everything.check_training_goes_on()


BAD = {
    "a place that is not there": ([TensorCut("conv", "makes", (6,))], {}, IndexError),
    "a module that is not there": ([TensorCut("missing", "makes", (1,))], {}, KeyError),
    "a shift of another length": (None, {"shifts": {"conv.bias": torch.ones(5)}}, RuntimeError),
    "a shift of something that is not there": (None, {"shifts": {"conv.missing": torch.ones(6)}}, AttributeError),
    "an axis that is not there": ([TensorCut("scale", "holds", (1,), 7)], {}, Exception),
    "a parameter that is not there": ([TensorCut("missing", "holds", (1,), 0)], {}, AttributeError),
}


@for_each("cuts, options, error", BAD.values())
def test_an_error_while_the_new_tensors_are_computed_changes_nothing(cuts, options, error):
    everything = Everything()
    with pytest.raises(error):
        everything.cut([*CUTS, *(cuts or [])], **options)
    everything.check_nothing_changed()
    everything.check_training_goes_on()


def test_a_copy_of_another_model_stops_the_cut_before_anything_is_changed():
    everything = Everything()
    with pytest.raises(KeyError):
        cut(everything.net, CUTS, optimizers=everything.optimizers, copies=[everything.average, nn.Linear(2, 2)])
    everything.check_nothing_changed()


def test_rolling_back_after_a_cut_restores_everything_and_twice_is_no_more_than_once():
    everything = Everything()
    operation = everything.cut(shifts={"conv.bias": torch.ones(6), "norm.running_mean": torch.ones(6)})
    assert everything.net(pictures()[0]).shape == (6, 4)
    assert everything.net.conv.weight.shape[0] == everything.average.conv.weight.shape[0] == 4
    everything.net.norm.num_batches_tracked -= 1  # of the forward just done
    operation.roll_back()
    everything.check_nothing_changed()
    operation.roll_back()
    everything.check_nothing_changed()
    everything.check_training_goes_on()


def test_two_cuts_are_rolled_back_one_after_the_other():
    everything = Everything()
    first = everything.cut()
    second = everything.cut([TensorCut("up", "makes", (0,)), TensorCut("head", "reads", (0,))])
    second.roll_back()
    assert everything.net.up.out_channels == 3
    first.roll_back()
    everything.check_nothing_changed()
    everything.check_training_goes_on()
