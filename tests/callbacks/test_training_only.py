"""What only training runs may read neurons too: then a layer stays whole, with the reason, and the others are cut."""

import copy
import re
import warnings
from unittest.mock import Mock

import lightning as L  # noqa: N812
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_neurons.callbacks.pruning.training_trial import TrainingTrial
from tests.callbacks.modules import Manual, Net, Plain, fit, loader
from tests.callbacks.pruned import assert_equal, pruner, weights, widths

WHOLE = {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3}
CUT = {"net.conv1": 3, "net.conv2": 4, "net.fc1": 5, "net.fc2": 3}


class Deep(Plain):
    """Its step has a second part of the loss, which is made of what the layers make."""

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.net
        first = torch.relu(net.norm1(net.conv1(x)))
        second = torch.relu(net.norm2(net.conv2(first))).mean((2, 3))
        return first, second, torch.relu(net.fc1(second))

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + self.extra(batch)


class Auxiliary(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def extra(self, batch):
        return nn.functional.cross_entropy(self.head(self.features(batch[0])[0].mean((2, 3))), batch[1])


class Laid(Deep):
    """Three out of eight are gone: eight features of sixteen samples become ten rows of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Mock()

    def extra(self, batch):
        rows = self.features(batch[0])[2].view(-1, 8)
        self.rows(len(rows))
        return rows.var(0).sum()


class Slight(Deep):
    """A part of the loss with a small weight compares neighbours."""

    def extra(self, batch):
        third = self.features(batch[0])[2]
        return 1e-3 * (third[:, 1:] - third[:, :-1]).square().sum(1).mean()


class Chosen(Deep):
    def extra(self, batch):
        return self.features(batch[0])[1][:, [0, 3]].square().sum()


class Drawn(Deep):
    """Some features are chosen by drawn numbers."""

    def extra(self, batch):
        second = self.features(batch[0])[1]
        mask = torch.zeros(second.shape[1])
        mask[torch.randperm(second.shape[1])[:2]] = 1
        return (second * mask).square().sum()


class Alternating(Deep):
    """Every second step has another head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 0:
            return self.loss(batch)
        return nn.functional.cross_entropy(self.head(self.features(batch[0])[1]), batch[1])


class Averaged(Deep):
    def extra(self, batch):
        return self.features(batch[0])[2].square().mean()


class Hinted(Plain):
    """A hook keeps what a layer makes, and the step compares it with a hint."""

    def __init__(self) -> None:
        super().__init__()
        kept = {}
        self.net.fc1.register_forward_hook(lambda module, inputs, output: kept.update(fc1=output))
        self.kept, self.hint = kept, torch.ones(8)

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + (self.kept["fc1"] - self.hint).square().mean()


class Anchored(Plain):
    """Weights are held to where they were (elastic weight consolidation)."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = {name: p.detach().clone() for name, p in self.net.fc1.named_parameters()}

    def training_step(self, batch, batch_idx):
        held = [(p - self.anchors[name]).square().sum() for name, p in self.net.fc1.named_parameters()]
        return self.loss(batch) + sum(held)


class Masked(Plain):
    """Some weights are not trained: their gradients are set to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 4, 3, 3))

    def on_after_backward(self):
        self.net.conv2.weight.grad.mul_(self.mask)


class Frozen(Plain):
    """One neuron of a layer is not trained, by a hook on the gradient of its weights, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.net.fc1.weight.register_hook(self.without_one)

    def without_one(self, gradient):
        return gradient.index_fill(0, torch.tensor(4), 0.0)


class Sparse(Plain):
    """Weights that a mask, in the closure of a hook on their gradient, leaves out are not trained."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.ones(6, 4, 3, 3)
        self.net.conv2.weight.register_hook(lambda gradient: gradient * mask)


class Averaging(Plain):
    """Averages of weights are moved when a batch is over."""

    def __init__(self) -> None:
        super().__init__()
        self.average = [p.detach().clone() for p in self.net.fc1.parameters()]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for old, new in zip(self.average, self.net.fc1.parameters(), strict=True):
            old.lerp_(new.detach(), 0.1)


class Shadow(L.Callback):
    """Averages of weights that a callback of the user's keeps."""

    def on_train_start(self, trainer, pl_module):
        self.average = {name: p.detach().clone() for name, p in pl_module.net.fc1.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, p in pl_module.net.fc1.named_parameters():
            self.average[name].lerp_(p.detach(), 0.1)


class Shadowed(Plain):
    def configure_callbacks(self):
        return [Shadow()]


FAILS = r"training_step fails without them \(RuntimeError"
BACKWARD, AFTER_BACKWARD, BATCH_END = (
    rf": {hook} fails without them \(RuntimeError" for hook in ("backward", "on_after_backward", "on_train_batch_end")
)
DIFFERS = "gradients of training_step differ"
READERS = {
    "auxiliary head": (Auxiliary, ["net.conv1"], FAILS),
    "every second step": (Alternating, ["net.conv2"], FAILS),
    "view": (Laid, ["net.fc1"], DIFFERS),
    "neighbours, with a small weight": (Slight, ["net.fc1"], DIFFERS),
    "chosen by number": (Chosen, ["net.conv2"], DIFFERS),
    "chosen by drawn numbers": (Drawn, ["net.conv2"], DIFFERS),
    "mean over features": (Averaged, ["net.fc1"], DIFFERS),
    "hint by a hook": (Hinted, ["net.fc1"], FAILS),
    "anchors": (Anchored, ["net.conv2", "net.fc1"], FAILS),
    "mask of gradients": (Masked, ["net.conv1", "net.conv2"], AFTER_BACKWARD),
    "neuron frozen by a hook": (Frozen, ["net.fc1"], DIFFERS),
    "mask by a hook": (Sparse, ["net.conv1", "net.conv2"], BACKWARD),
    "averages": (Averaging, ["net.conv2", "net.fc1"], BATCH_END),
    "averages of a callback": (Shadowed, ["net.conv2", "net.fc1"], BATCH_END),
}


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("name", READERS)
def test_a_layer_that_only_training_reads_by_its_width_stays_whole_and_the_others_are_cut(name):
    make, whole, reason = READERS[name]
    module, callback = seeded(make), pruner("weight_l2", amount=0.33, scope="layer")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [callback], max_epochs=2)
    said = [str(w.message) for w in caught if "cannot cut" in str(w.message) and "graph" not in str(w.message)]
    assert trainer.current_epoch == 2
    assert sorted(s.split("cannot cut ")[1].split(":")[0] for s in said) == whole
    assert all(re.search(reason, s) for s in said)
    left = {name: WHOLE[name] if name in whole else CUT[name] for name in WHOLE}
    assert {name: width for name, width in widths(module).items() if name in WHOLE} == left
    if name == "view":
        assert {call.args for call in module.rows.call_args_list} == {(8,)}


class Dropping(Deep):
    """Dropout, noise and drawn inputs: their random numbers depend on widths."""

    def __init__(self) -> None:
        super().__init__(Net(dropout=0.5))

    def extra(self, batch):
        _, second, third = self.features(batch[0][torch.randperm(len(batch[0]))])
        noisy = self.net.fc1(nn.functional.dropout(second + 0.1 * torch.randn_like(second), 0.2))
        again = checkpoint(self.noisy_head, third, use_reentrant=False)
        drawn = third + torch.normal(0.0, 0.1, third.shape)
        return (
            again.square().mean()
            + self.net.fc2(drawn).square().mean()
            + (noisy.relu() * third).sum(1).mean()
            + 1e-3 * sum(p.norm() for p in self.net.parameters())
        )

    def noisy_head(self, x):
        return self.net.fc2(nn.functional.dropout(x, 0.5) + 0.1 * torch.rand_like(x))


class Keeping(Plain):
    """Its losses are kept until the epoch is over."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        self.losses.append(self.loss(batch))
        return self.losses[-1]

    def on_train_epoch_end(self):
        torch.stack(self.losses).mean()
        self.losses.clear()


class Clipped(Plain):
    """Hooks on the gradients of all parameters keep them in bounds."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.01, momentum=0.9) for layer in (self.net.fc1, self.net.fc2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("make", [Plain, Dropping, Keeping, Clipped, TwoOptimizers])
def test_what_reads_no_width_is_cut_without_a_word_and_the_trial_leaves_no_trace(make, monkeypatch):
    options = {"amount": 0.33, "scope": "layer"}
    tried, plain, trials = seeded(make), seeded(make), Mock(wraps=TrainingTrial.difference)
    monkeypatch.setattr(TrainingTrial, "difference", lambda *args: trials(*args))
    torch.manual_seed(1)
    fit(tried, [pruner("weight_l2", **options)], max_epochs=2)
    assert trials.call_count == 1
    monkeypatch.setattr(TrainingTrial, "can_try", lambda trial: False)
    torch.manual_seed(1)
    fit(plain, [pruner("weight_l2", **options)], max_epochs=2)
    assert widths(tried) == CUT
    assert_equal(weights(tried), weights(plain))


def test_what_training_reads_is_known_after_a_resume(tmp_path):
    callback = pruner("weight_l2", amount=0.33, scope="layer")
    with pytest.warns(UserWarning, match=r"cannot cut net\.fc1: the gradients of training_step differ"):
        fit(seeded(Averaged), [callback], max_epochs=2)
    state, other = copy.deepcopy(callback.state_dict()), pruner("weight_l2", amount=0.33, scope="layer")
    other.load_state_dict(state)
    assert other.state_dict()["left_whole"] == callback.state_dict()["left_whole"] != {}


class Twice(Plain):
    """Its step cannot run on a copy: it looks for itself."""

    def training_step(self, batch, batch_idx):
        assert self is self.trainer.lightning_module
        return super().training_step(batch, batch_idx)


def test_a_step_that_does_not_run_on_a_copy_is_said_and_the_cut_is_made():
    module = seeded(Twice)
    with pytest.warns(UserWarning, match=r"does not run on a copy of the module \(AssertionError"):
        fit(module, [pruner("weight_l2", amount=0.33, scope="layer")], max_epochs=2)
    assert widths(module) == CUT


class Sharp(Plain):
    """What training makes of its outputs turns rounding into other gradients."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.LazyLinear(301), nn.ReLU(), nn.Linear(301, 3)), lr=0.0)
        self(next(iter(loader()))[0])

    def training_step(self, batch, batch_idx):
        return (1e7 * self(batch[0])).sin().mean() * 1e-7


class Coarse(Sharp):
    """Its step goes over to float32, whatever its weights are."""

    def training_step(self, batch, batch_idx):
        hidden, last = self.net[:3](batch[0]).float(), self.net[3]
        outputs = nn.functional.linear(hidden, last.weight.float(), last.bias.float())
        return (3e3 * outputs).sin().mean() * 1e-3


@pytest.mark.parametrize("make", [Sharp, Coarse])
def test_a_difference_of_rounding_alone_keeps_no_layer_whole(make):
    torch.manual_seed(0)
    module, callback = make(), pruner("weight_l2", amount=0.4, scope="layer")
    fit(module, [callback], max_epochs=2)
    assert module.net[1].out_features == 181


class StepsInBackward(Manual):
    """Each parameter of a layer has an optimizer of its own, which steps as soon as its gradient is there."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.net.conv2.parameters():
            optimizer = torch.optim.Adam([parameter])
            parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())


def test_a_layer_whose_parameters_are_stepped_in_backward_stays_whole_with_those_that_it_reads():
    module = seeded(StepsInBackward)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [pruner("weight_l2", amount=0.33, scope="layer")], max_epochs=3)
    said = [str(w.message).partition("cannot cut ")[2] for w in caught]
    hook = "has a hook that runs when its gradient is complete, and what it holds, such as an optimizer of its own, can"
    assert [one for one in said if one] == [
        f"net.conv1: net.conv2.weight {hook}not be cut",
        f"net.conv2: net.conv2.bias {hook}not be cut",
    ]
    assert widths(module) == {**WHOLE, "net.fc1": 5}
