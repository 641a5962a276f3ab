"""The model is left as it was, whatever is asked of it and however it ends."""

import copy
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import find_neurons, measure
from tests.models import NETS, ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each


def hooks_of(model: nn.Module) -> dict[str, int]:
    """How many entries every dictionary of hooks has, the global ones included."""
    found = {
        f"{path}.{name}": len(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hook" in name and isinstance(value, dict)
    }
    everywhere = vars(torch.nn.modules.module)
    return found | {n: len(v) for n, v in everywhere.items() if n.startswith("_global") and isinstance(v, dict)}


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that must not change, in a form that ``==`` compares."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "hooks": hooks_of(model),
        "modes": {path: module.training for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grad": {name: None if t.grad is None else t.grad.tolist() for name, t in tensors.items()},
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": str(np.random.get_state()),
        "function modes": torch._C._len_torch_function_stack(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "grad hooks": {name: len(tensor._backward_hooks or ()) for name, tensor in tensors.items()},
    }


def everything(net: nn.Module, x: Tensor, y: Tensor) -> None:
    find_neurons(net, x)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    measure(net, batches)
    criteria = ["near_zero", "gradient", "second_order_ggn", "norm_scale", "outgoing_l2"]
    measure(net, batches, loss_fn=cross_entropy, criteria=criteria, per_class=True)
    measure(net, batches, loss_fn=cross_entropy, inputs="fgsm", eps=0.1)


@for_each("name", NETS)
def test_finding_and_measuring_leave_no_trace(name):
    net = seeded(NETS[name])
    net.train()
    for number, module in enumerate(net.children()):
        module.train(number % 2 == 0)
    next(net.parameters()).requires_grad_(False)
    last = list(net.parameters())[-1]
    last.grad = torch.full_like(last, 3.0)
    before = state_of(net)
    everything(net, *pictures())
    assert state_of(net) == before


def test_hooks_of_the_user_stay_and_still_fire():
    net, (x, y) = seeded(ConvNet), pictures()
    seen: list[str] = []
    net.conv1.register_forward_pre_hook(lambda module, inputs: seen.append("pre"))
    net.conv1.register_forward_hook(lambda module, inputs, output: seen.append("post"))
    before = state_of(net)
    everything(net, x, y)
    assert state_of(net) == before
    seen.clear()
    net(x)
    assert seen == ["pre", "post"]


def test_the_model_pickles_deepcopies_and_trains_as_before():
    net, (x, y) = seeded(ConvNet), pictures()
    untouched = copy.deepcopy(net)
    everything(net, x, y)
    for twin in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), net):
        cross_entropy(twin, (x, y)).backward()
    cross_entropy(untouched, (x, y)).backward()
    for one, other in zip(net.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


WITHOUT_TYPE_CHECKS = """
import random, torch
from lightning_neurons import ablate, find_neurons, measure
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
net.register_forward_hook(lambda *_: (random.random(), None)[1])
x, y = torch.randn(5, 3), torch.arange(5) % 2
before = random.getstate()
loss_fn = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])
find_neurons(net, x)
measure(net, [(x, y)], loss_fn=loss_fn)
ablate(net, [(x, y)], loss_fn)
ablate(net, [(x, y)], loss_fn, budget=1.0)
assert random.getstate() == before
print("the same")
"""


def test_the_random_state_of_python_stays(pytestconfig):
    """In a process of its own: the type checks of these tests draw random numbers themselves."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TYPE_CHECKS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "the same"), done.stderr


class Raising(nn.Module):
    """Raises in the middle of the forward, from a given call on, after it has changed all that a forward can."""

    def __init__(self, fail_from: int) -> None:
        super().__init__()
        self.conv, self.bn, self.drop, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(1))
        self.outputs: list[Tensor] = []
        self.calls, self.fail_from = 0, fail_from

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.calls += 1
        x = self.bn(self.conv(x)).relu_()
        self.outputs.append(x)
        self.bn.train()
        np.random.rand(), random.random(), torch.rand(1)
        if self.calls >= self.fail_from:
            raise ZeroDivisionError("on purpose")
        return self.fc(self.drop(x).mean((2, 3)))


@for_each("fail_from", [1, 2, 3, 4])
@for_each("backward", [False, True])
def test_an_exception_in_the_forward_passes_through_and_leaves_no_trace(fail_from, backward):
    net, (x, y) = Raising(fail_from).train(), pictures()
    before = state_of(net)
    batches = [(x, y)] * 4
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        measure(net, batches, loss_fn=cross_entropy if backward else None)
    assert state_of(net) == before
    assert (net.calls, net.outputs) == (0, [])


def test_an_exception_while_neurons_are_looked_for_leaves_no_trace():
    net = Raising(1).train()
    before = state_of(net)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        find_neurons(net, pictures()[0])
    assert state_of(net) == before


@for_each("mode", [torch.no_grad, torch.inference_mode])
def test_measuring_works_inside_a_mode_without_gradients_and_leaves_the_mode_on(mode):
    net, batch = seeded(ConvNet), pictures()
    expected = measure(net, [batch], loss_fn=cross_entropy).scores["taylor"]
    with mode():
        before = state_of(net)
        inside = measure(net, [tuple(t.clone() for t in batch)], loss_fn=cross_entropy).scores["taylor"]
        assert state_of(net) == before
    assert all(torch.equal(inside[name], score) for name, score in expected.items())
