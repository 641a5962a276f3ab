"""What readers are given for what they lose: compared with loops, and exact for neurons that never change."""

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import prune
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.pruning.compensation.means import InputMeans, fold_means
from lightning_neurons.pruning.compensation.weight_shifts import consumers_of
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each

GONE = (1, 4)


class Routes(nn.Module):
    """Reads pictures, tokens, a layer twice in one forward, and inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tokens = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.twice, self.named = nn.Linear(5, 5), nn.Linear(5, 2)
        self.up, self.idle = nn.ConvTranspose2d(4, 2, 2), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.up(x)
        x = self.tokens(x.flatten(2).transpose(1, 2))
        x = self.twice(self.twice(x))
        return self.named(input=x.sum(1))


def naive(rows: list[Tensor]) -> Tensor:
    """Features last; one number after the other."""
    rows = [r.detach().double().reshape(-1, r.shape[-1]) for r in rows]
    width = rows[0].shape[1]
    return torch.tensor([
        sum(float(v) for r in rows for v in r[:, i]) / sum(len(r) for r in rows) for i in range(width)
    ])


def test_means_are_those_of_every_single_value_read():
    net = seeded(Routes)
    read: dict[str, list[Tensor]] = {name: [] for name in ("conv", "tokens", "twice", "named", "up")}
    found = InputMeans(net, [*read, "idle"])
    for seed, count in ((1, 2), (2, 3)):  # batches of different sizes weigh by their samples
        x, _ = pictures(count, seed=seed)
        found.observe(lambda x=x: net(x))
        hidden = net.conv(x)
        tokens = hidden.flatten(2).transpose(1, 2)
        once = net.twice(net.tokens(tokens))
        read["conv"].append(x.movedim(1, -1))
        read["up"].append(hidden.movedim(1, -1))
        read["tokens"].append(tokens)
        read["twice"] += [net.tokens(tokens), once]
        read["named"].append(net.twice(once).sum(1))
    means = found.means()
    assert set(means) == {*read, "idle"}
    for name, rows in read.items():
        torch.testing.assert_close(means[name].double(), naive(rows).double(), rtol=1e-6, atol=1e-7)
    assert torch.equal(means["idle"], torch.zeros(7, dtype=means["idle"].dtype))
    assert not any(module._forward_pre_hooks for module in net.modules())


@for_each("module, shape", [(nn.Linear(5, 2), (5,)), (nn.Conv1d(5, 2, 1), (5, 7)), (nn.Conv2d(5, 2, 1), (5, 5, 7))])
def test_means_of_a_single_sample_without_batch_axis_are_by_channel(module, shape):
    x = torch.randn(shape)
    found = InputMeans(module, [""])
    found.observe(lambda: module(x))
    torch.testing.assert_close(found.means()[""].float(), x.reshape(5, -1).mean(1))


def test_means_are_summed_over_processes_by_whoever_can():
    net = nn.Linear(3, 2)
    found = InputMeans(net, [""])
    found.observe(lambda: net(torch.tensor([[1.0, 2.0, 3.0]])))
    other = iter([torch.tensor([3.0, 0.0, 9.0]), torch.tensor(2.0)])  # what another has summed, and over how many
    torch.testing.assert_close(found.means(lambda t: t + next(other))[""].float(), torch.tensor([4 / 3, 2 / 3, 4.0]))


def test_hooks_are_gone_after_an_error_and_nothing_needs_a_gradient():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 2))
    found = InputMeans(net, ["0"])
    with pytest.raises(RuntimeError):
        found.observe(lambda: net(torch.ones(1, 3, requires_grad=True)))
    assert not net[0]._forward_pre_hooks
    assert not found.means()["0"].requires_grad


def constant(layer: nn.Module, *, axis: int = 0) -> None:
    """Two of its neurons, whatever comes, are 0.7 and -0.3 before the activation function."""
    with torch.no_grad():
        layer.weight.index_fill_(axis, torch.tensor(GONE), 0.0)
        layer.bias[list(GONE)] = torch.tensor([0.7, -0.3])


READERS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)),
    "linear, tanh": lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)),
    "strided conv": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 4, 2, 2)),
    "conv, norm before": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)),
    "depthwise between": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 2, groups=6), nn.Conv2d(6, 4, 2)
    ),
    "no bias, norm behind": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ),
    "bias and norm behind": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    ),
    "linear, no bias, norm behind": lambda: nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)
    ),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)),
    "one by one, up": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 1)),
}


@for_each("training", [False, True])
@for_each("name", READERS)
def test_neurons_that_never_change_go_without_changing_the_output(name, training):
    net = seeded(READERS[name])
    constant(net[0])
    x = torch.randn(5, 3) if "linear" in name else pictures()[0]
    expected = net(x).detach()
    report = prune(net.train(training), x, {"0": GONE}, batches=[x[:2], x[2:]], compensation="mean")
    assert net.training == training
    torch.testing.assert_close(net.eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert net[0].weight.shape[0] == 4
    assert not [note for note in report.notes if "not compensated" in note]


def test_a_reader_that_loses_neurons_itself_is_compensated_too():
    net = seeded(READERS["no bias, norm behind"])
    constant(net[0])
    with torch.no_grad():
        net[2].weight[2] = 0
        net[3].running_mean[2], net[3].bias[2] = 0, 0.4
    expected, x = net(pictures()[0]).detach(), pictures()[0]
    prune(net, x, {"0": GONE, "2": [2]}, batches=[x], compensation="mean")
    assert net[2].weight.shape == (3, 4, 3, 3)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.left, self.right = nn.Conv2d(6, 4, 3, bias=False), nn.Conv2d(6, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.head(self.norm(self.left(x)).relu() + self.norm(self.right(x)).relu())


def test_readers_that_share_a_norm_are_not_compensated_and_named_in_notes():
    net, (x, _) = seeded(SharedNorm), pictures()
    was = net.norm.running_mean.clone()
    report = prune(net, x, {"conv": GONE}, batches=[x], compensation="mean")
    assert {note.split()[0] for note in report.notes if "not compensated" in note} == {"left", "right"}
    assert torch.equal(net.norm.running_mean, was)


def test_the_running_mean_of_the_norm_behind_moves_by_what_is_lost_and_nothing_else_does():
    net = seeded(READERS["no bias, norm behind"])
    constant(net[0])
    was = {name: t.clone() for name, t in net.state_dict().items()}
    prune(net, pictures()[0], {"0": GONE}, batches=[pictures()[0]], compensation="mean")
    lost = 0.7 * was["2.weight"][:, 1].sum((1, 2))  # the other one is negative, and so zero after the rectifier
    torch.testing.assert_close(net[3].running_mean, was["3.running_mean"] - lost)
    same = ("3.weight", "3.bias", "3.running_var", "5.weight", "5.bias")
    assert all(torch.equal(net.state_dict()[name], was[name]) for name in same)


def test_a_reader_with_neither_bias_nor_norm_is_named_in_a_note_and_left_alone():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    was, x = net[2].weight.detach().clone(), torch.randn(5, 3)
    report = prune(net, x, {"0": GONE}, batches=[x], compensation="mean")
    (note,) = [note for note in report.notes if "not compensated" in note]
    assert note.startswith("2 is not compensated: it has no bias")
    assert torch.equal(net[2].weight, was[:, [0, 2, 3, 5]])


@for_each("stride, kernel, dilation", [(1, 3, 1), (2, 2, 1), (2, 4, 1), (3, 2, 1), (2, 3, 2)])
def test_a_transposed_convolution_is_given_the_mean_over_all_phases(stride, kernel, dilation):
    net = seeded(nn.ConvTranspose2d, 6, 4, kernel, stride, dilation=dilation, double=True)
    lone = torch.zeros(1, 6, 12, 12).double()
    lone[:, list(GONE)] = torch.tensor([0.7, -0.3]).double()[:, None, None]
    mean = lone.mean((0, 2, 3))
    repair = fold_means(model := nn.Sequential(net), [TensorCut("0", "reads", GONE)], {"0": mean}, {})
    inside = (net(lone) - net.bias[:, None, None])[:, :, 4 * stride : 8 * stride, 4 * stride : 8 * stride]
    torch.testing.assert_close(repair.shifts["0.bias"], inside.mean((0, 2, 3)).detach())
    assert repair.notes == ()
    assert model[0].weight.shape[0] == 6, "it changes nothing itself"


def test_readers_are_those_of_what_goes_and_only_they_are_given_something():
    net = seeded(ConvNet)
    cuts = [TensorCut("conv1", "makes", GONE), TensorCut("bn1", "passes", GONE), TensorCut("conv2", "reads", GONE)]
    means = {"conv2": torch.arange(6.0).double()}
    assert consumers_of(cuts, modules_by_name(net)) == {"conv2": GONE}
    repair = fold_means(net, cuts, means, {"conv1": "bn1", "conv2": "bn2"})
    assert set(repair.shifts) == {"conv2.bias"}
    expected = net.conv2.weight[:, 1].sum((1, 2)) * 1 + net.conv2.weight[:, 4].sum((1, 2)) * 4
    torch.testing.assert_close(repair.shifts["conv2.bias"].float(), expected.detach())


def test_a_mean_is_exact_on_average_for_neurons_that_do_change():
    net, x = seeded(READERS["linear"]), torch.randn(50, 3)
    expected = net(x).detach()
    prune(net, x[:1], {"0": GONE}, batches=[x[:20], x[20:]], compensation="mean")
    got = net(x).detach()
    assert float((got - expected).abs().max()) > 1e-3
    torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-5, atol=1e-6)


def test_shifts_are_added_before_the_cut_in_the_type_of_what_they_are_added_to():
    net, stays = seeded(ConvNet), [0, 2, 3, 5]
    was = {name: t.clone() for name, t in net.state_dict().items()}
    cuts = [TensorCut("conv1", "makes", GONE), TensorCut("bn1", "passes", GONE), TensorCut("conv2", "reads", GONE)]
    shifts = {"conv1.bias": torch.arange(6.0).double(), "bn2.running_mean": torch.ones(5), "fc2.bias": torch.ones(4)}
    cut(net, cuts, shifts=shifts)
    assert torch.equal(net.conv1.bias, (was["conv1.bias"] + torch.arange(6.0))[stays])
    assert torch.equal(net.bn2.running_mean, was["bn2.running_mean"] + 1)
    assert torch.equal(net.fc2.bias, was["fc2.bias"] + 1)
