"""Momentum, target and averaged networks in a module are cut with the network that they follow; frozen ones are not."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_neurons.pruning.structure.followers import shifts_with_followers
from tests.callbacks.modules import Net, Plain, fit, loader
from tests.callbacks.pruned import Probe, pruner, remaining, weights, widths

pytestmark = pytest.mark.filterwarnings("ignore:.*it is not in the model's graph")


class Followed(Plain):
    """A mean teacher; ``follow`` moves it."""

    rate = 0.1

    def __init__(self, make=None) -> None:
        super().__init__()
        twin = copy.deepcopy(self.net)
        self.twin = (twin if make is None else make(self.net)).requires_grad_(False)

    def follow(self) -> None:
        with torch.no_grad():
            for old, new in zip(self.twin.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, self.rate)

    def training_step(self, batch, batch_idx):
        self.follow()
        return self.loss(batch) + (self(batch[0]) - self.aim(batch[0])).square().mean()

    def aim(self, x):
        with torch.no_grad():
            return self.twin(x)


class Validated(Followed):
    """The teacher runs in validation as well, so it is in the model's graph."""

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch) + (self(batch[0]) - self.twin(batch[0])).square().mean()
        self.log("val_loss", loss)
        return loss


class Both(Validated):
    def forward(self, x):
        return self.net(x) + self.twin(x)


class AtTheEnd(Followed):
    """Synchronised after each epoch."""

    def follow(self) -> None:
        pass

    def on_train_epoch_end(self) -> None:
        self.twin.load_state_dict(self.net.state_dict())


class AfterBatches(Followed):
    def follow(self) -> None:
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        super().follow()


class Wrapped(Followed):
    """PyTorch's own wrapper for averages, whose parameters the optimizer holds as well."""

    def __init__(self) -> None:
        super().__init__(torch.optim.swa_utils.AveragedModel)
        self.twin.requires_grad_(True)

    def follow(self) -> None:
        self.twin.update_parameters(self.net)


@pytest.mark.parametrize("make", [Followed, Validated, Both, AtTheEnd, AfterBatches, Wrapped])
def test_a_follower_loses_the_same_neurons_at_the_same_time(make):
    torch.manual_seed(0)
    module, callback = make(), pruner("weight_l2", amount=0.33, scope="layer", start_epoch=2)
    before, after = (Probe("on_train_epoch_start", lambda trainer, pl_module: weights(pl_module)) for _ in range(2))
    trainer = fit(module, [before, callback, after], max_epochs=3)
    assert trainer.current_epoch == 3
    path = "twin.module" if make is Wrapped else "twin"
    twin = module.get_submodule(path)
    assert widths(module.net) == widths(twin) == {"conv1": 3, "conv2": 4, "fc1": 5, "fc2": 3}
    gone = {name: callback.plan.neurons[f"{name}"] for name in ("net.conv1", "net.conv2", "net.fc1")}
    assert {name: callback.plan.neurons[name.replace("net", path, 1)] for name in gone} == gone
    for name, old in before.seen[2].items():
        if name.startswith(path):
            expected = remaining(name.replace(path, "net", 1), old, callback.plan)
            assert torch.equal(after.seen[2][name], expected), name


class Frozen(Followed):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) + (self(batch[0]) - self.aim(batch[0])).square().mean()

    follow = None


class Once(Frozen):
    """A copy of the network as it was when training began."""

    def on_train_start(self) -> None:
        self.twin.load_state_dict(self.net.state_dict())


@pytest.mark.parametrize("make", [Frozen, Once])
def test_a_frozen_copy_stays_whole_and_the_network_is_cut(make):
    torch.manual_seed(0)
    module = make()
    fit(module, [pruner("weight_l2", amount=0.33, scope="layer")], max_epochs=2)
    assert widths(module.net) == {"conv1": 3, "conv2": 4, "fc1": 5, "fc2": 3}
    assert widths(module.twin) == widths(Net())


class Target(Followed):
    """A target network that is synchronised after every so many steps."""

    every = 10

    def follow(self) -> None:
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        if self.global_step % self.every == 0:
            self.twin.load_state_dict(self.net.state_dict())


class Far(Target):
    every = 500


@pytest.mark.parametrize(("make", "train"), [(Target, None), (Far, loader(250, batch_size=1))])
def test_a_target_network_is_cut_with_its_network_before_it_has_been_synchronised(make, train):
    torch.manual_seed(0)
    module, callback = make(), pruner("weight_l2", amount=0.33, scope="layer")
    before = Probe("on_train_epoch_start", lambda trainer, pl_module: weights(pl_module))
    trainer = fit(module, [before, callback], train=train, max_epochs=4)
    assert trainer.current_epoch == 4
    assert all(torch.equal(before.seen[1][name], before.seen[0][name]) for name in before.seen[0] if "twin" in name)
    assert widths(module.net) == widths(module.twin) == {"conv1": 3, "conv2": 4, "fc1": 5, "fc2": 3}
    assert {name.replace("twin", "net") for name in callback.plan.neurons if name.startswith("twin")} == {
        name for name in callback.plan.neurons if name.startswith("net")
    }


class Seldom(Followed):
    """A target network that is synchronised once, too far away to be seen when the first cut is decided."""

    def follow(self) -> None:
        if self.global_step == 15:
            self.twin.load_state_dict(self.net.state_dict())


def test_a_copy_that_may_follow_leaves_the_network_whole_until_it_has_moved():
    torch.manual_seed(0)
    module, callback = Seldom(), pruner("weight_l2", amount=0.33, scope="layer", schedule="linear", end_epoch=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [callback], max_epochs=5)
    reason = "cannot cut net.conv1: twin is a copy of net that has not moved yet, so it is not known whether it follows"
    assert any(reason in str(w.message) for w in caught)
    assert [bool(one.plan) for one in callback.rounds.done] == [False, True, True, True]
    assert widths(module.net) == widths(module.twin) == {"conv1": 3, "conv2": 4, "fc1": 5, "fc2": 3}


class Apart(Plain):
    """Two parts of a network are followed by two networks."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU()))
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        self.old_net, self.old_head = copy.deepcopy(self.net), copy.deepcopy(self.head)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for old, new in ((self.old_net, self.net), (self.old_head, self.head)):
                for p, q in zip(old.parameters(), new.parameters(), strict=True):
                    p.lerp_(q, 0.1)
            aim = self.old_head(self.old_net(batch[0]))
        return self.loss(batch) + (self(batch[0]) - aim).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam([*self.net.parameters(), *self.head.parameters()], 1e-2)


def test_what_follows_in_several_parts_is_cut_with_them_and_known_after_a_resume():
    torch.manual_seed(0)
    module, callback = Apart(), pruner("weight_l2", amount=0.5, scope="layer", compensation="least_squares")
    fit(module, [callback], max_epochs=2)
    assert module.net[1].out_features == module.old_net[1].out_features == module.old_head[0].in_features == 4
    assert module.head[0].out_features == module.old_head[0].out_features == 3
    other = pruner("weight_l2", amount=0.5, scope="layer", compensation="least_squares")
    other.load_state_dict(callback.state_dict())
    assert other.state_dict()["followers"] == {"old_net": "net", "old_head": "head"}


def test_a_follower_that_did_not_run_is_corrected_as_what_it_follows():
    shift = torch.ones(2)
    found = shifts_with_followers({"net.1.weight": shift, "tail.bias": shift}, {"ema": "net", "old": "net"}, {"old.1"})
    assert found == {"net.1.weight": shift, "tail.bias": shift, "ema.1.weight": shift}
