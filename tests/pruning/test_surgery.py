"""The cut itself: which numbers stay, in which objects."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_neurons.layers.width_handlers import Role
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each

GONE = (1, 4)
SPREAD = (4, 5, 6, 7, 16, 17, 18, 19)  # channels 1 and 4, four pixels each
SIZES = {
    "out_channels", "in_channels", "groups", "out_features", "in_features", "num_features", "normalized_shape",
    "num_embeddings", "embedding_dim", "num_parameters",
}  # fmt: skip


@dataclass
class Case:
    """A module of six neurons, or one that reads six; two of them go."""

    make: Callable[[], nn.Module]
    role: Role
    axes: Mapping[str, int]
    says: Mapping[str, object]
    shape: tuple[int, ...] = (2, 6, 5, 5)
    gone: tuple[int, ...] = GONE

    def rest(self, tensor: Tensor, leaf: str) -> Tensor:
        return without(tensor, self.axes[leaf], self.gone) if leaf in self.axes else tensor


W0, W1, WB = {"weight": 0}, {"weight": 1}, {"weight": 0, "bias": 0}
STATISTICS = {"running_mean": 0, "running_var": 0}
EVERYWHERE = {"in_channels": 4, "out_channels": 4, "groups": 4}
CASES = {
    "conv makes": Case(lambda: nn.Conv2d(3, 6, 3), "makes", WB, {"out_channels": 4}, (2, 3, 5, 5)),
    "conv reads": Case(lambda: nn.Conv2d(6, 3, 3), "reads", W1, {"in_channels": 4}),
    "conv without bias": Case(lambda: nn.Conv1d(3, 6, 3, bias=False), "makes", W0, {"out_channels": 4}, (2, 3, 5)),
    "conv in space": Case(lambda: nn.Conv3d(6, 3, 2), "reads", W1, {"in_channels": 4}, (2, 6, 3, 3, 3)),
    "linear makes": Case(lambda: nn.Linear(3, 6), "makes", WB, {"out_features": 4}, (2, 3)),
    "linear reads": Case(lambda: nn.Linear(6, 3), "reads", W1, {"in_features": 4}, (2, 6)),
    "linear after flatten": Case(lambda: nn.Linear(24, 3), "reads", W1, {"in_features": 16}, (2, 24), SPREAD),
    "transposed conv makes": Case(
        lambda: nn.ConvTranspose2d(3, 6, 2, 2), "makes", {"weight": 1, "bias": 0}, {"out_channels": 4}, (2, 3, 5, 5)
    ),
    "transposed conv reads": Case(lambda: nn.ConvTranspose2d(6, 3, 2), "reads", W0, {"in_channels": 4}),
    "depthwise conv": Case(lambda: nn.Conv2d(6, 6, 3, groups=6), "passes", WB, EVERYWHERE),
    "batch norm": Case(lambda: nn.BatchNorm2d(6), "passes", WB | STATISTICS, {"num_features": 4}),
    "batch norm, no scale": Case(
        lambda: nn.BatchNorm2d(6, affine=False), "passes", STATISTICS, {"num_features": 4}
    ),
    "batch norm, no statistics": Case(
        lambda: nn.BatchNorm2d(6, track_running_stats=False), "passes", WB, {"num_features": 4}
    ),
    "instance norm": Case(
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), "passes", WB | STATISTICS,
        {"num_features": 4},
    ),
    "instance norm, no tensors": Case(lambda: nn.InstanceNorm2d(6), "passes", {}, {"num_features": 4}),
    "layer norm": Case(
        lambda: nn.LayerNorm(6), "passes", {"weight": -1, "bias": -1}, {"normalized_shape": (4,)}, (2, 3, 6)
    ),
    "slopes": Case(lambda: nn.PReLU(6), "passes", W0, {"num_parameters": 4}),
    "one slope for all": Case(nn.PReLU, "passes", {}, {"num_parameters": 1}),
    "embedding": Case(lambda: nn.Embedding(9, 6), "makes", W1, {"embedding_dim": 4}, ()),
}  # fmt: skip
with_each_case = for_each("case", CASES.values())


def without(tensor: Tensor, axis: int, gone) -> Tensor:
    return tensor.index_select(axis, torch.tensor([i for i in range(tensor.shape[axis]) if i not in set(gone)]))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}


def filled(net: nn.Module) -> nn.Module:
    """Random values everywhere, gradients included."""
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    for parameter in net.parameters():
        parameter.grad = torch.rand_like(parameter)
    return net


@with_each_case
def test_tensors_and_gradients_are_what_an_index_would_have_selected(case):
    net = filled(nn.Sequential(nn.Identity(), case.make()))
    was = {name: tensor.detach().clone() for name, tensor in tensors(net[1]).items()}
    gradient = {name: p.grad.clone() for name, p in net[1].named_parameters()}
    objects = dict(net[1].named_parameters())
    optimizer = torch.optim.SGD([*net.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    cut(net, [TensorCut("1", case.role, case.gone)], optimizers=[optimizer])
    for name, tensor in tensors(net[1]).items():
        assert torch.equal(tensor, case.rest(was[name], name))
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "nothing of the old memory is held"
        if name in objects:
            assert tensor is objects[name]
            assert id(tensor) in held
            assert torch.equal(tensor.grad, case.rest(gradient[name], name))


@with_each_case
def test_a_module_says_what_its_tensors_are(case):
    net, fresh = nn.Sequential(case.make()), case.make()
    cut(net, [TensorCut("0", case.role, case.gone)])
    sizes = {name: value for name, value in vars(fresh).items() if name in SIZES}
    assert {name: getattr(net[0], name) for name in sizes} == sizes | dict(case.says)


@for_each("name", [name for name in CASES if name != "layer norm"])  # which mixes neurons
def test_the_smaller_module_computes_the_same_for_what_stays(name):
    case, axis = CASES[name], 2 if name == "embedding" else 1
    net = filled(nn.Sequential(case.make())).eval()
    x = torch.randn(case.shape) if case.shape else torch.tensor([[1, 2], [8, 0]])
    if case.role == "reads":
        x[:, list(case.gone)] = 0
    expected = net(x).detach()
    cut(net, [TensorCut("0", case.role, case.gone)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = net(x if case.role == "makes" else without(x, 1, case.gone)).detach()
    assert [str(w.message) for w in told] == []
    torch.testing.assert_close(got, expected if case.role == "reads" else without(expected, axis, case.gone))


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(5, 6))
        self.inner = nn.Module()
        self.inner.scales = nn.ParameterList([torch.randn(6), torch.randn(6, 1, 1)])


@for_each("path, axis", [("place", 1), ("place", 0), ("inner.scales.0", 0), ("inner.scales.1", 0)])
def test_a_bare_parameter_is_cut_on_the_axis_that_is_named(path, axis):
    net = filled(Places())
    parameter = net.get_parameter(path)
    was, gradient = parameter.detach().clone(), parameter.grad.clone()
    others = {name: p for name, p in net.named_parameters() if name != path}
    copies = {name: p.detach().clone() for name, p in others.items()}
    cut(net, [TensorCut(path, "holds", GONE, axis)])
    assert net.get_parameter(path) is parameter
    assert torch.equal(parameter, without(was, axis, GONE))
    assert torch.equal(parameter.grad, without(gradient, axis, GONE))
    assert all(net.get_parameter(name) is p and torch.equal(p, copies[name]) for name, p in others.items())


def test_both_axes_of_one_weight_are_cut_at_once():
    net = filled(nn.Sequential(nn.Conv2d(6, 5, 3)))
    was = net[0].weight.detach().clone()
    cut(net, [TensorCut("0", "reads", GONE), TensorCut("0", "makes", (0, 3)), TensorCut("0", "makes", (2,))])
    assert torch.equal(net[0].weight, without(without(was, 1, GONE), 0, (0, 2, 3)))
    assert (net[0].in_channels, net[0].out_channels) == (4, 2)


@for_each("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_values_of_every_type_keep_it(dtype):
    layer = nn.Linear(3, 6, dtype=dtype)
    was = layer.weight.detach().clone()
    cut(layer, [TensorCut("", "makes", GONE)])
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.weight, without(was, 0, GONE))


def test_what_is_frozen_stays_frozen_and_what_has_no_gradient_has_none():
    net = nn.Sequential(nn.Linear(3, 6), nn.PReLU(6))
    net[0].weight.requires_grad_(False)
    cut(net, [TensorCut("0", "makes", GONE), TensorCut("1", "passes", GONE)])
    assert [p.requires_grad for p in net.parameters()] == [False, True, True]
    assert all(p.grad is None and p.is_leaf for p in net.parameters())


def test_hooks_and_what_users_have_attached_survive():
    net, seen = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)), []
    net[0].weight.mine, net[0].note = {"decay": 0.1}, "first"
    net[0].register_forward_hook(lambda m, i, out: seen.append(("forward", out.shape)))
    net[0].register_full_backward_hook(lambda m, i, out: seen.append(("backward", out[0].shape)))
    net[0].weight.register_hook(lambda g: seen.append(("gradient", g.shape)))
    net[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.grad.shape)))
    held = net(torch.randn(2, 3, requires_grad=True))  # and with it the graph of the old shapes
    held.sum().backward()
    del seen[:]
    net.zero_grad()
    cut(net, [TensorCut("0", "makes", GONE), TensorCut("1", "reads", GONE)])
    net(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert (net[0].weight.mine, net[0].note) == ({"decay": 0.1}, "first")
    assert dict(seen) == {"forward": (2, 4), "backward": (2, 4), "gradient": (4, 3), "accumulated": (4, 3)}
    assert (len(seen), held.shape) == (4, (2, 2))


CUTS = [TensorCut("conv1", "makes", GONE), TensorCut("bn1", "passes", GONE), TensorCut("conv2", "reads", GONE)]


def test_a_copy_is_cut_by_the_same_indices_and_keeps_its_own_values():
    net, average = filled(seeded(ConvNet)), seeded(ConvNet, seed=7)
    was = {name: t.clone() for name, t in average.state_dict().items()}
    objects = list(average.parameters())
    cut(net, CUTS, copies=[average])
    for name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.running_mean", "bn1.running_var"):
        was[name] = without(was[name], 0, GONE)
    was["conv2.weight"] = without(was["conv2.weight"], 1, GONE)
    was["bn1.bias"] = without(was["bn1.bias"], 0, GONE)
    assert all(torch.equal(was[name], t) for name, t in average.state_dict().items())
    assert all(a is b for a, b in zip(objects, average.parameters(), strict=True))
    assert average.conv1.out_channels == average.bn1.num_features == average.conv2.in_channels == 4
    assert not torch.equal(net.conv1.weight, average.conv1.weight)


def test_a_model_in_channels_last_computes_what_it_did_in_the_usual_order():
    net, (x, _) = seeded(ConvNet), pictures()
    cut(usual := copy.deepcopy(net), CUTS)
    net.to(memory_format=torch.channels_last)
    net(x).sum().backward()
    cut(net, CUTS)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), usual(x))
    net(x.to(memory_format=torch.channels_last)).sum().backward()


def test_a_cut_in_inference_mode_leaves_a_model_that_can_be_trained():
    net, (x, _) = seeded(ConvNet), pictures()
    with torch.inference_mode():
        cut(net, CUTS)
    assert not any(t.is_inference() for t in (*net.parameters(), *net.buffers()))
    net.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_sparse_gradients_are_cut_too():
    layer = nn.Embedding(9, 6, sparse=True)
    (layer(torch.tensor([3, 5])) * torch.arange(6.0)).sum().backward()
    dense = layer.weight.grad.to_dense()
    cut(layer, [TensorCut("", "makes", GONE)])
    assert layer.weight.grad.is_sparse
    assert torch.equal(layer.weight.grad.to_dense(), without(dense, 1, GONE))
