"""The state of optimizers after a cut, training without dead neurons, and optimizers that are refused."""

import copy
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import ArgumentError, PruningError
from lightning_neurons.pruning.surgery.optimizers import checked_optimizers
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each


def spread(channels: Iterable[int], positions: int) -> tuple[int, ...]:
    return tuple(c * positions + i for c in channels for i in range(positions))


C1, C2, F1 = (1, 4), (0, 3), (2, 5)
PIXELS = spread(C2, 16)
CUTS = [
    TensorCut("conv1", "makes", C1),
    TensorCut("bn1", "passes", C1),
    TensorCut("conv2", "reads", C1),
    TensorCut("conv2", "makes", C2),
    TensorCut("bn2", "passes", C2),
    TensorCut("fc1", "reads", PIXELS),
    TensorCut("fc1", "makes", F1),
    TensorCut("fc2", "reads", F1),
]
GOES = {  # of each parameter, what goes from its axes
    "conv1.weight": {0: C1}, "conv1.bias": {0: C1}, "bn1.weight": {0: C1}, "bn1.bias": {0: C1},
    "conv2.weight": {0: C2, 1: C1}, "conv2.bias": {0: C2}, "bn2.weight": {0: C2}, "bn2.bias": {0: C2},
    "fc1.weight": {0: F1, 1: PIXELS}, "fc1.bias": {0: F1}, "fc2.weight": {1: F1}, "fc2.bias": {},
}  # fmt: skip

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
with_each_optimizer = for_each("name", OPTIMIZERS)


def expected(value: object, parameter: Tensor, goes: dict[int, tuple[int, ...]]) -> object:
    """Single numbers stay; where a state is summed over an axis (Adafactor), nothing goes from that axis."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    for axis, gone in goes.items():
        if value.shape[axis] == parameter.shape[axis]:
            value = value.index_select(axis, torch.tensor([i for i in range(value.shape[axis]) if i not in gone]))
    return value


def train(net: nn.Module, optimizers: Iterable[torch.optim.Optimizer], seeds: Iterable[int]) -> None:
    double = next(net.parameters()).dtype == torch.float64
    for seed in seeds:
        x, y = pictures(8, seed=seed, double=double)
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


@with_each_optimizer
def test_state_is_what_an_index_would_have_selected_and_other_state_is_not_touched(name):
    net = seeded(ConvNet).train()
    parameters = dict(net.named_parameters())
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, [optimizer], range(2))
    was = {n: dict(optimizer.state[p]) for n, p in parameters.items()}
    values = {n: copy.deepcopy(state) for n, state in was.items()}
    shapes = {n: torch.empty(p.shape) for n, p in parameters.items()}
    cut(net, CUTS, optimizers=[optimizer])
    assert set(optimizer.state) <= set(parameters.values())
    for n, p in parameters.items():
        state = optimizer.state[p]
        assert list(state) == list(was[n])
        for key, value in state.items():
            wanted = expected(values[n][key], shapes[n], GOES[n])
            assert torch.equal(value, wanted) if isinstance(value, Tensor) else value == wanted
            if not GOES[n] or key == "step":
                assert value is was[n][key]
    train(net, [optimizer], range(2, 4))


def test_two_optimizers_over_different_parameters_are_both_cut():
    net = seeded(ConvNet).train()
    first = torch.optim.SGD([*net.conv1.parameters(), *net.bn1.parameters()], lr=0.05, momentum=0.9)
    rest = [p for n, p in net.named_parameters() if not n.startswith(("conv1", "bn1"))]
    second = torch.optim.Adam(rest, lr=0.01)
    train(net, [first, second], range(2))
    second.state[net.conv2.weight]["step"] = step = torch.full((1,), 2.0)  # some keep it with an axis
    buffer = first.state[net.conv1.weight]["momentum_buffer"].clone()
    average = second.state[net.conv2.weight]["exp_avg"].clone()
    cut(net, CUTS, optimizers=[first, second])
    assert torch.equal(first.state[net.conv1.weight]["momentum_buffer"], expected(buffer, buffer, {0: C1}))
    assert torch.equal(second.state[net.conv2.weight]["exp_avg"], expected(average, average, {0: C2, 1: C1}))
    assert second.state[net.conv2.weight]["step"] is step
    assert (len(first.state), len(second.state)) == (4, 8)
    train(net, [first, second], range(2, 4))


def test_the_same_optimizer_scheduler_and_clipping_serve_before_and_after_cuts():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for gone in ((1, 4), (0,)):
        cut(net, [TensorCut("0", "makes", gone), TensorCut("2", "reads", gone)], optimizers=[optimizer])
        was = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        net(torch.rand(4, 3)).square().sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        assert not any(torch.equal(a, b) for a, b in zip(was[2:], parameters[2:], strict=True))
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert [tuple(p.shape) for p in parameters] == [(3, 3), (3,), (2, 3), (2,)]


class FlatMomentum(torch.optim.Optimizer):
    """Keeps its momentum of a parameter as one vector."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            vector = self.state[p].setdefault("vector", torch.zeros(p.numel()))
            vector.mul_(0.9).add_(p.grad.flatten())
            p.sub_(0.01 * vector.view_as(p))


def test_state_in_a_form_of_its_own_starts_afresh_with_a_warning():
    net = seeded(ConvNet).train()
    optimizer = FlatMomentum(net.parameters())
    train(net, [optimizer], range(2))
    kept = optimizer.state[net.fc2.bias]["vector"]
    cuts = [TensorCut("conv1", "makes", C1), TensorCut("bn1", "passes", C1), TensorCut("conv2", "reads", C1)]
    with pytest.warns(UserWarning, match="FlatMomentum keeps 'vector' .* starts afresh") as told:
        cut(net, cuts, optimizers=[optimizer])
    assert len(told) == 2, "of conv1 and conv2; a vector is the right form for biases and scales"
    assert dict(optimizer.state[net.conv1.weight]) == dict(optimizer.state[net.conv2.weight]) == {}
    assert optimizer.state[net.conv1.bias]["vector"].shape == (4,)
    assert optimizer.state[net.fc2.bias]["vector"] is kept
    train(net, [optimizer], range(2, 4))


class Kronecker(torch.optim.Optimizer):
    """Keeps a square matrix for the first axis of each parameter (Shampoo), in an object of its own or not."""

    def __init__(self, params, wrap) -> None:
        super().__init__(params, {})
        self.wrap = wrap

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            rows = p.grad.flatten(1) if p.ndim > 1 else p.grad[:, None]
            kept = self.state[p].setdefault("left", self.wrap(torch.eye(len(p))))
            left = getattr(kept, "matrix", kept)
            left.add_(rows @ rows.T)
            p.sub_(0.01 * (left @ rows).view_as(p))


class Boxed:
    def __init__(self, matrix) -> None:
        self.matrix = matrix


@pytest.mark.filterwarnings("ignore:Kronecker keeps 'left'")
@pytest.mark.parametrize("wrap", [lambda matrix: matrix, Boxed], ids=["a tensor", "an object"])
def test_a_matrix_for_an_axis_starts_afresh_also_where_it_has_the_shape_of_the_parameter(wrap):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = Kronecker(net.parameters(), wrap)
    x, gone = torch.randn(4, 8), (1, 4, 6)
    for step in range(3):
        if step == 2:
            cut(net, [TensorCut("0", "makes", gone), TensorCut("2", "reads", gone)], optimizers=[optimizer])
            cut_parameters = [net[0].weight, net[0].bias, net[2].weight]
            assert [dict(optimizer.state[p]) for p in cut_parameters] == [{}] * 3
            assert "left" in optimizer.state[net[4].weight]
        net.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


class Holding(torch.optim.Optimizer):
    """Lets others step that it holds, and moves slowly behind them (Lookahead)."""

    def __init__(self, *held: torch.optim.Optimizer) -> None:
        super().__init__([group for one in held for group in one.param_groups], {})
        self.held = held

    @torch.no_grad()
    def step(self):
        for one in self.held:
            one.step()
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p].setdefault("slow", p.detach().clone()).lerp_(p, 0.5))


def two_of(net: nn.Module) -> list[torch.optim.Optimizer]:
    first = torch.optim.SGD([*net.conv1.parameters(), *net.bn1.parameters()], lr=0.05, momentum=0.9)
    return [first, torch.optim.Adam([p for n, p in net.named_parameters() if not n.startswith(("conv1", "bn1"))])]


def test_optimizers_that_another_one_holds_are_cut_with_it():
    net = seeded(ConvNet).train()
    held = two_of(net)
    holding = Holding(*held)
    assert checked_optimizers(holding, net) == [holding, *held]
    train(net, [holding], range(2))
    shapes = {name: torch.empty(p.shape) for name, p in net.named_parameters()}
    states = [(name, one.state[p]) for one in (holding, *held) for name, p in net.named_parameters() if p in one.state]
    values = copy.deepcopy([dict(state) for _, state in states])
    cut(net, CUTS, optimizers=[holding])
    assert len(states) == 2 * len(shapes)
    for (name, state), before in zip(states, values, strict=True):
        for key, value in before.items():
            assert torch.equal(state[key], expected(value, shapes[name], GOES[name]))
    train(net, [holding], range(2, 4))


class Aside(torch.optim.SGD):
    """Keeps slow weights in a list of its own."""

    def __init__(self, params) -> None:
        super().__init__(list(params), lr=0.1, momentum=0.9)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


@for_each("wrap", [lambda one: one, Holding])
def test_tensors_that_an_optimizer_keeps_outside_its_state_are_refused_by_name_and_nothing_is_cut(wrap):
    net = seeded(ConvNet)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PruningError, match="Aside keeps tensors in 'slow'"):
        cut(net, CUTS, optimizers=[wrap(Aside(net.parameters()))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Wide(nn.Module):
    """No biases before the norm layers: their gradients would be rounding errors, which Adam makes large."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


def apart(name: str, width: int, dead1: Iterable[int], dead2: Iterable[int], double: bool) -> float:
    """How far the weights of a model without its dead neurons come from those of the uncut model."""
    dead1, dead2 = tuple(dead1), tuple(dead2)
    cuts = [TensorCut("conv1", "makes", dead1), TensorCut("bn1", "passes", dead1), TensorCut("conv2", "reads", dead1)]
    cuts += [
        TensorCut("conv2", "makes", dead2),
        TensorCut("bn2", "passes", dead2),
        TensorCut("fc", "reads", spread(dead2, 4)),
    ]
    net = seeded(Wide, width, double=double).train()
    with torch.no_grad():
        for conv, norm, dead in ((net.conv1, net.bn1, dead1), (net.conv2, net.bn2, dead2)):
            for tensor in (conv.weight, norm.weight, norm.bias):
                tensor[list(dead)] = 0
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, [optimizer], range(3))
    whole = copy.deepcopy(net)
    other = OPTIMIZERS[name](whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cut(net, cuts, optimizers=[optimizer])
    train(net, [optimizer], range(3, 7))
    train(whole, [other], range(3, 7))
    cut(whole, cuts)
    pairs = zip(net.state_dict().values(), whole.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


# Adafactor looks at the mean over a whole parameter, so that its steps depend on what is dead.
invariant = for_each("name", [name for name in OPTIMIZERS if name != "Adafactor"])


def rounding() -> float:
    """How far gradients without dead neurons, left out by hand, are from those with them: a matter of PyTorch alone."""
    alive1, alive2 = [*range(16), *range(32, 48)], list(range(16, 48))
    whole, small = seeded(Wide, 48).train(), Wide(32).train()
    for conv, norm, dead in ((whole.conv1, whole.bn1, slice(16, 32)), (whole.conv2, whole.bn2, slice(16))):
        for tensor in (conv.weight, norm.weight, norm.bias):
            tensor.data[dead] = 0

    def left(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is left of each tensor without the dead neurons."""
        found = {}
        for name, tensor in tensors.items():
            kept = alive1 if name.startswith(("conv1", "bn1")) else alive2
            found[name] = tensor if tensor.ndim == 0 or name.startswith("fc") else tensor[kept]
        found["conv2.weight"] = found["conv2.weight"][:, alive1]
        found["fc.weight"] = found["fc.weight"].unflatten(1, (48, 4))[:, alive2].flatten(1)
        return found

    small.load_state_dict(left(whole.state_dict()))
    x, y = pictures(8)
    for net in (whole, small):
        F.cross_entropy(net(x), y).backward()
    expected = left({name: p.grad for name, p in whole.named_parameters()})
    return max(float((p.grad - expected[name]).abs().max()) for name, p in small.named_parameters())


@invariant
def test_training_without_dead_neurons_is_bitwise_that_with_them_where_sums_keep_their_order(name):
    # Some processors sum up in another order when there are fewer channels; then nothing is bitwise.
    assert apart(name, 48, range(16, 32), range(16), double=False) <= (0.0 if rounding() == 0 else 1e-5)


@invariant
def test_training_without_dead_neurons_is_that_with_them_wherever_they_lie(name):
    assert apart(name, 12, (1, 4, 5), (0, 7), double=True) < 1e-10


def adam_of(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(parameters))


class Sharded(torch.optim.SGD):
    def consolidate_state_dict(self, to: int = 0) -> None: ...


@for_each("make, said", [
        (lambda net: torch.optim.LBFGS(net.parameters()), "'LBFGS' is not allowed: expected .*flat history"),
        (lambda net: Sharded(net.parameters()), "'Sharded' is not allowed: expected .*whole in each process"),
        (lambda net: 0.1, "'float' is not allowed: expected a torch.optim.Optimizer"),
        (lambda net: "adam", "'str' is not allowed"),
        (lambda net: [adam_of(net.parameters()), None], "'NoneType' is not allowed"),
        (lambda net: torch.optim.Adam, "'type' is not allowed"),
        (lambda net: adam_of(ConvNet().parameters()), "'Adam' is not allowed: expected one that holds .* this model"),
        (lambda net: [adam_of(net.parameters()), adam_of(ConvNet().parameters())], "'Adam' is not allowed"),
    ])  # fmt: skip
def test_an_optimizer_that_cannot_go_on_is_refused_by_name(make, said):
    net = ConvNet()
    with pytest.raises(ArgumentError, match=f"optimizer={said}"):
        checked_optimizers(make(net), net)


def test_none_one_several_and_wrapped_optimizers_are_taken_as_they_are():
    net = ConvNet()
    one, two = adam_of(net.conv1.parameters()), adam_of(net.fc2.parameters())
    wrapped = type("Wrapped", (), {"optimizer": one})()
    assert checked_optimizers(None, net) == []
    for given in (one, [one], (one,), iter([one]), wrapped, [wrapped]):
        assert checked_optimizers(given, net) == [one]
    assert checked_optimizers([one, two], net) == [one, two]
    assert checked_optimizers(adam_of(ConvNet().parameters())) != []
