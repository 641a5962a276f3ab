"""A wrong cut is noticed before it is made, whatever the weights hide, and the copy it is tried on stays as it was."""

import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import PruningError
from lightning_neurons.dependency.torch_pruning_adapter import Group
from lightning_neurons.pruning.structure.example import Example, scramble, twin_of
from lightning_neurons.pruning.structure.preflight import Preflight, silenced
from lightning_neurons.pruning.structure.structure import Structure, discover
from lightning_neurons.pruning.surgery.surgery import TensorCut, cuts_of
from tests.models import pictures, seeded
from tests.pruning.nets import NETS, LeNet, net_and_inputs


@pytest.fixture(autouse=True)
def _without_clock(monkeypatch):
    """To keep the time limit, a clock is read at every call: with checks of shapes that takes ten times as long."""
    monkeypatch.setattr(sys, "setprofile", lambda check: None)


@cache
def structure_of(name: str) -> Structure:
    net, x = net_and_inputs(name)
    return discover(net, Example(x))


def rolled(group: Group, role: str) -> Group:
    """The group with the places of its parts of one role, wherever there are any, moved on by one unit."""
    parts = [
        replace(p, indices=(*p.indices[1:], p.indices[0])) if p.role == role and p.path != group.root else p
        for p in group.parts
    ]
    return replace(group, parts=tuple(parts))


def without(group: Group, role: str) -> Group:
    """The group without its last part of one role."""
    last = [part for part in group.parts if part.role == role and part.path != group.root][-1]
    return replace(group, parts=tuple(part for part in group.parts if part != last))


def first_units(groups: list[Group]) -> dict[str, list[int]]:
    return {group.root: [0] for group in groups}


WRONG = [
    pytest.param(name, change, role, id=f"{name}, {change.__name__} {role}")
    for name, roles in {
        "LeNet": ("reads",),
        "ResNet B": ("reads", "passes", "makes"),
        "DenseNet": ("reads", "passes"),
        "MobileNetV3": ("reads", "passes", "makes"),
        "decoder": ("reads", "passes"),
        "tokens": ("reads", "makes", "holds"),
    }.items()
    for role in roles
    for change in (rolled, without)
]


@pytest.mark.parametrize(("name", "change", "role"), WRONG)
def test_exactly_the_group_with_wrong_places_fails_among_all_others(name, change, role):
    structure = structure_of(name)
    groups = list(structure.offered.values())
    assert structure.preflight.failing(groups, first_units(groups)) == {}
    for index, group in enumerate(groups):
        if not any(part.role == role and part.path != group.root for part in group.parts):
            continue
        tampered = [*groups[:index], change(group, role), *groups[index + 1 :]]
        failing = structure.preflight.failing(tampered, first_units(groups))
        assert list(failing) == [group.root]
        assert "output" in failing[group.root] or "fails" in failing[group.root]


def test_several_wrong_groups_are_all_found():
    structure = structure_of("MobileNetV3")
    wrong = {root for index, root in enumerate(structure.offered) if index % 3 == 0}
    groups = [rolled(g, "reads") if g.root in wrong else g for g in structure.offered.values()]
    assert set(structure.preflight.failing(groups, first_units(groups))) == wrong


def silence_all(net: nn.Module) -> None:
    """Weights of zero."""
    for parameter in net.parameters():
        parameter.data.zero_()


def close_norms(net: nn.Module) -> None:
    """Norm layers that make nothing of anything, as many begin."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.zero_()


def kill(net: nn.Module) -> None:
    """Neurons that never fire."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.fill_(-1e4)


def level(net: nn.Module) -> None:
    """Neurons that are all the same, so that none can be taken for another."""
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(0.1)


@pytest.mark.parametrize("role", ["reads", "passes"])
@pytest.mark.parametrize("hide", [silence_all, close_norms, kill, level])
def test_a_wrong_group_is_found_also_where_the_weights_would_hide_it(hide, role):
    net, x = net_and_inputs("VGG")
    hide(net)
    structure = discover(net, Example(x))
    groups = list(structure.offered.values())
    tampered = [rolled(groups[0], role), *groups[1:]]
    assert Preflight(twin_of(net), Example(x)).failing(tampered, first_units(groups)) == {}, "else nothing is hidden"
    assert list(structure.preflight.failing(tampered, first_units(groups))) == [groups[0].root]


@pytest.mark.parametrize("name", NETS)
def test_the_copy_is_bitwise_what_it_was_whether_something_fails_or_not(name):
    structure = structure_of(name)
    twin, groups = structure.preflight.twin, list(structure.offered.values())
    before = {n: (id(t), t.clone()) for n, t in [*twin.named_parameters(), *twin.named_buffers()]}
    sizes, hooks = repr(twin), [len(m._forward_hooks) for m in twin.modules()]
    wrong = [rolled(group, "reads") for group in groups]
    broken = [without(group, "reads") for group in groups]
    for tried in (groups, wrong, broken):
        assert bool(structure.preflight.failing(tried, first_units(groups))) == (tried is not groups)
    assert repr(twin) == sizes
    assert [len(m._forward_hooks) for m in twin.modules()] == hooks
    for n, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        assert id(tensor) == before[n][0]
        assert torch.equal(tensor, before[n][1])


@pytest.mark.parametrize("name", ["ResNet B", "MobileNetV3", "tokens"])
def test_silence_is_zero_weights_of_readers_and_is_lifted_also_after_an_error(name):
    structure = structure_of(name)
    twin, groups = structure.preflight.twin, list(structure.offered.values())
    before = {n: t.clone() for n, t in twin.state_dict().items()}
    cuts = cuts_of(groups, first_units(groups))

    def look_and_fail() -> None:
        with silenced(twin, cuts):
            reads = [one for one in cuts if one.role == "reads"]
            silent = {f"{one.path}.weight" for one in reads} | {one.path for one in cuts if one.role == "holds"}
            assert {n for n, t in twin.state_dict().items() if not torch.equal(t, before[n])} == silent
            for one in reads:
                assert not twin.get_parameter(f"{one.path}.weight")[:, list(one.places)].any()
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert all(torch.equal(t, before[n]) for n, t in twin.state_dict().items())


def test_silence_of_one_neuron_twice_is_lifted():
    net = seeded(LeNet)
    before = net.fc2.weight.clone()
    with silenced(net, [TensorCut("fc2", "reads", (0, 2)), TensorCut("fc2", "reads", (1, 2))]):
        assert net.fc2.weight.abs().sum(0).eq(0).tolist() == [True] * 3 + [False] * 4
    assert torch.equal(net.fc2.weight, before)


class Exclusive(LeNet):
    """Either of two layers may get narrower, and not both."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fc1.out_features < 7 and self.fc2.out_features < 6:
            raise RuntimeError("one of them only")
        return super().forward(x)


def test_groups_that_fail_only_together_all_fail():
    structure = discover(seeded(Exclusive), Example(pictures(2)[0]))
    pair = [structure.groups[root] for root in ("fc1", "fc2")]
    for group in pair:
        assert structure.preflight.failing([group], {group.root: [1]}) == {}
    failing = structure.preflight.failing(pair, {"fc1": [1], "fc2": [2]})
    assert list(failing) == ["fc1", "fc2"]
    assert all("together with others" in reason and "one of them only" in reason for reason in failing.values())


class Single(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Infinite(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


class Diverging(LeNet):
    """Finite with its own weights, which are small, and with no others."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out / (self.fc1.weight.abs().max() < 0.5)


@pytest.mark.parametrize(("make", "dtype"), [(LeNet, torch.float64), (Single, torch.float32)])
def test_it_computes_as_exactly_as_the_model_can(make, dtype):
    structure = discover(seeded(make), Example(pictures(2)[0]))
    assert structure.preflight.twin.fc1.weight.dtype == dtype
    assert list(structure.offered) == ["conv1", "conv2", "fc1", "fc2"]
    group = structure.groups["conv2"]
    assert list(structure.preflight.failing([rolled(group, "reads")], {"conv2": [0]})) == ["conv2"]


def test_a_model_whose_output_is_not_finite_is_refused():
    with pytest.raises(PruningError, match="not finite"):
        discover(seeded(Infinite), Example(pictures(2)[0]))


def test_a_model_that_is_finite_with_its_own_weights_only_is_tried_with_these():
    net = seeded(Diverging)
    structure = discover(net, Example(pictures(2)[0]))
    assert torch.equal(structure.preflight.twin.fc2.weight, net.fc2.weight.double())
    assert list(structure.offered) == ["conv1", "conv2", "fc1", "fc2"]


@pytest.mark.parametrize("name", NETS)
def test_a_scrambled_copy_has_no_weight_that_could_hide_anything(name):
    net, x = net_and_inputs(name)
    twin = twin_of(net)
    scramble(twin)
    for n, parameter in twin.named_parameters():
        assert parameter.unique().numel() == parameter.numel(), n
        assert parameter.ndim > 1 or (parameter.abs() >= 0.5).all()
    assert twin(x).isfinite().all()
    again = twin_of(net)
    scramble(again)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in twin.state_dict().items())


class Centred(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)
        return made - made.mean(0)


@pytest.mark.parametrize("net", [nn.Sequential, Centred])
def test_one_sample_is_tried_alone_only_where_its_outputs_do_not_depend_on_the_others(net):
    seen: list[int] = []
    twin = seeded(lambda: net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    twin.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    preflight = Preflight(twin, Example(torch.randn(3, 4)))
    cuts = [TensorCut("0", "makes", (1, 4)), TensorCut("2", "reads", (1, 4))]
    with preflight.on_one_sample(), preflight.on_one_sample():
        seen.clear()
        assert preflight.difference(cuts) is None
        assert preflight.difference(cuts[:1]) is not None, "the last layer is not cut with it"
    assert {*seen} == ({1} if net is nn.Sequential else {3})
    assert preflight.difference(cuts) is None
    assert seen[-1] == 3, "as before"
