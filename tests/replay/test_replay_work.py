"""What a replay really computes, and models that it has to cope with."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_neurons import ablate
from tests.models import cross_entropy, pictures, seeded
from tests.replay.replayed import Counting
from tests.replay.test_replay import NETS, opened


class Inputs(TorchFunctionMode):
    """The number of channels that each convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            self.channels.append((args[0] if args else kwargs["input"]).shape[1])
        return func(*args, **(kwargs or {}))


class Executed(TorchDispatchMode):
    """What is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.matrices = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += func is torch.ops.aten.convolution.default
        self.matrices += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("exact", "channels"), [(True, {4, 5}), (False, {1, 5})])
def test_a_shortcut_reads_the_changed_channel_alone(exact, channels):
    net, batch = seeded(NETS["residual, functional"]), pictures(5)
    with opened(net, batch, exact=exact) as (_, here):
        here.without([{"conv1": [0]}])
        with Inputs() as seen:
            here.without([{"conv1": [1]}])
    assert {c for c in seen.channels if c != 3} == channels


@pytest.mark.parametrize(("layer", "convolutions"), [("conv1", 2), ("conv2", 1), ("conv3", 0), ("fc", 0)])
def test_only_what_comes_behind_the_neuron_is_computed(layer, convolutions):
    net, batch = seeded(NETS["residual, in place"]), pictures(5)
    with opened(net, batch) as (_, here):
        here.without([{layer: [0]}])
        with Executed() as seen:
            here.without([{layer: [1]}])
    assert (seen.convolutions, seen.matrices) == (convolutions, int(layer != "fc"))


def test_a_dead_neuron_is_not_run_at_all():
    net, batch = seeded(nn.Sequential, nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, 4)), pictures(5)
    net[1].bias.data[1] = -1e6
    with opened(net, batch) as (_, here):
        here.without([{"1": [0]}])
        with Executed() as seen:
            found = here.without([{"1": [1]}]).losses
        assert torch.equal(found, here.outcome.losses)
    assert seen.matrices == 0


class Holding(nn.Module):
    """Has a class, and other things that are no values, among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.act, self.fc = dict, torch.relu, nn.Linear(192, 4)

    def forward(self, x):
        return self.act(self.fc(x.flatten(1)))


class Idle(nn.Module):
    """Has a layer that no forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.fc = nn.Linear(3, 3), nn.Linear(192, 4)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Attending(nn.Module):
    """The weights of a layer inside of the attention are read by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        x = x[:, 0]
        return self.fc(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("make", [Holding, Idle, Attending])
def test_layers_beside_what_cannot_be_followed_are_measured(make):
    net, batch = seeded(make), pictures(5)
    report = ablate(net, [batch], cross_entropy)
    base = cross_entropy(net, batch).item()
    assert report.loss == pytest.approx(base, abs=1e-6)
    for i in range(4):

        def silence(module, inputs, output, i=i):
            return (torch.relu(output) if make is Holding else output).index_fill(1, torch.tensor([i]), 0)

        handle = net.fc.register_forward_hook(silence)
        expected = cross_entropy(net, batch).item() - base
        handle.remove()
        assert report.delta_loss["fc"][i].item() == pytest.approx(expected, abs=1e-6)


def test_looking_for_the_layers_does_not_count_as_a_call():
    batch = pictures(5)
    expected = cross_entropy(seeded(Counting), batch).item()
    assert ablate(seeded(Counting), [batch], cross_entropy).loss == pytest.approx(expected, abs=1e-6)
