"""A callback that removes what makes no difference: training goes on as if it had not been there."""

from types import SimpleNamespace
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons import NeuronPruningCallback
from lightning_neurons.pruning.selection import lossless
from tests.callbacks.modules import Net, Plain, loader, trainer_of
from tests.callbacks.pruned import Probe, assert_sound, widths

DEAD = {"net.conv1": (1,), "net.conv2": (0, 3), "net.fc1": (2, 5)}


class Quiet(Plain):
    """Some neurons are dead whatever they read, and stay so: no gradient reaches them, and nothing decays."""

    def __init__(self, constant: float | None = None) -> None:
        super().__init__(Net())
        with torch.no_grad():
            for norm, neurons in ((self.net.norm1, DEAD["net.conv1"]), (self.net.norm2, DEAD["net.conv2"])):
                norm.weight[list(neurons)], norm.bias[list(neurons)] = 0, -1.0
            self.net.fc1.weight[list(DEAD["net.fc1"])], self.net.fc1.bias[list(DEAD["net.fc1"])] = 0, -1.0
            for layer in (self.net.norm1, self.net.norm2, self.net.fc1):  # all others fire
                layer.bias[layer.bias > -1] = 2.0
            if constant is not None:
                self.net.fc1.weight[0], self.net.fc1.bias[0] = 0, constant

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class Still(Quiet):
    """Trains nothing but its last layer, so that what is constant stays so."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.fc2.parameters(), 1e-3)


class Losses(L.Callback):
    """The loss of each training step, bit by bit."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def train(make: Any, callbacks: list[Any], **kwargs: Any) -> tuple[Any, Any, list[float]]:
    torch.manual_seed(3)
    module, losses = make(), Losses()
    trainer = trainer_of([losses, *callbacks], **({"max_epochs": 4, "precision": "64-true"} | kwargs))
    torch.manual_seed(4)
    trainer.fit(module, loader(24, shuffle=True), loader(24, seed=1))
    return trainer, module, losses.seen


def test_dead_neurons_go_and_no_others_and_training_goes_on_as_without():
    callback = NeuronPruningCallback(lossless=True)
    trainer, module, losses = train(Quiet, [callback])
    _, whole, expected = train(Quiet, [])
    assert callback.plan.neurons == DEAD
    assert_sound(trainer, module, callback)
    assert losses == pytest.approx(expected, rel=1e-12, abs=0)
    assert losses[:3] == expected[:3]
    for name, tensor in module.net.fc2.state_dict().items():
        other = whole.net.fc2.state_dict()[name]
        other = other[:, callback.plan.remaining("net.fc1")] if other.ndim == 2 else other
        assert torch.allclose(tensor, other, rtol=1e-10, atol=1e-12)


class OneConvolution(nn.Module):
    """One dead channel, without norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        with torch.no_grad():
            self.conv1.weight[3], self.conv1.bias[3] = 0, -1.0
            self.conv1.bias[:3] = 5.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


def test_the_trajectory_of_a_convolutional_network_is_the_same_up_to_the_order_of_sums():
    callback = NeuronPruningCallback(lossless=True)
    _, module, losses = train(lambda: Plain(OneConvolution()), [callback])
    _, whole, expected = train(lambda: Plain(OneConvolution()), [])
    assert callback.plan.neurons == {"net.conv1": (3,)}
    assert losses[:3] == expected[:3]
    assert losses == pytest.approx(expected, rel=1e-12, abs=0)
    near = {"rtol": 1e-8, "atol": 1e-10}
    assert torch.allclose(module.net.conv1.weight, whole.net.conv1.weight[:3], **near)
    assert torch.allclose(module.net.conv2.weight, whole.net.conv2.weight[:, :3], **near)
    assert torch.allclose(module.net.fc2.weight, whole.net.fc2.weight, **near)


def test_a_constant_moves_into_the_bias_of_what_reads_it():
    callback = NeuronPruningCallback(lossless=True)
    before = Probe("on_train_epoch_end", lambda _, m: {n: t.clone() for n, t in m.net.fc2.state_dict().items()})
    after = Probe("on_train_batch_start", lambda _, m: m.net.fc2.bias.detach().clone())
    _, module, losses = train(lambda: Still(0.7), [before, callback, after], max_epochs=2, limit_train_batches=1)
    assert callback.plan.neurons == DEAD | {"net.fc1": (0, 2, 5)}
    expected = before.seen[0]["bias"] + 0.7 * before.seen[0]["weight"][:, 0]
    assert torch.allclose(after.seen[1], expected, atol=1e-7)
    _, whole, alone = train(lambda: Still(0.7), [], max_epochs=2, limit_train_batches=1)
    assert losses == pytest.approx(alone, rel=1e-6)
    assert module.net.fc2.in_features == whole.net.fc2.in_features - 3


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"ignore": ["net.fc1"]}, {"net.conv1": (1,), "net.conv2": (0, 3)}),
        ({"ignore": ["net.conv*"]}, {"net.fc1": (2, 5)}),
        ({"min_neurons": 4}, {"net.conv2": (0, 3), "net.fc1": (2, 5)}),
        ({"max_amount": 0.3}, DEAD),
        ({"start_epoch": 2}, DEAD),
        ({"patience": 2, "start_epoch": 2, "agreement": "all"}, DEAD),
    ],
)
def test_limits_hold_here_too(options, expected):
    callback = NeuronPruningCallback(lossless=True, **options)
    trainer, module, _ = train(Quiet, [callback])
    limited = {"net.conv2": 1} if "max_amount" in options else {}
    found = callback.plan.neurons
    for name in expected.keys() | found.keys():
        assert set(found[name]) <= set(expected[name])
        assert len(found[name]) == limited.get(name, len(expected[name])), name
    assert [one.epoch for one in callback.rounds.done] == [options.get("start_epoch", 1)]
    assert_sound(trainer, module, callback)


@pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been")
def test_where_nothing_is_constant_nothing_goes_and_it_is_said():
    class Lively(Plain):
        def __init__(self) -> None:
            super().__init__()
            for layer in (self.net.norm1, self.net.norm2, self.net.fc1):
                nn.init.constant_(layer.bias, 2.0)

    callback = NeuronPruningCallback(lossless=True)
    with pytest.warns(UserWarning, match="nothing is cut in round 1"):
        _, module, losses = train(Lively, [callback])
    assert not callback.plan
    assert losses == train(Lively, [])[2]
    assert widths(module) == widths(Lively())


BROKEN = {
    "a fold that goes wrong": (
        "fold_means", lambda *_: SimpleNamespace(shifts={"net.fc2.bias": torch.full((3,), 0.5)}),
    ),
    "nothing is near enough": ("TOLERANCE", -1.0),
    "outputs that are no numbers": ("difference", lambda *_: float("nan")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been", "ignore:.*round 1 of 1 is not made")
@pytest.mark.parametrize("name", BROKEN)
def test_where_the_proof_fails_there_is_a_warning_and_no_cut(monkeypatch, name):
    expected = train(Quiet, [])[2]
    monkeypatch.setattr(lossless, *BROKEN[name])
    callback = NeuronPruningCallback(lossless=True)
    with pytest.warns(UserWarning, match="no plan could be made after epoch .*outputs would differ"):
        trainer, module, losses = train(Quiet, [callback])
    assert losses == expected
    assert_sound(trainer, module, callback, cut=False)
    assert widths(module) == widths(Quiet())


REFUSED = [
    ({"criterion": "fisher"}, "criterion='fisher' is not allowed: expected None with lossless=True"),
    ({"amount": 0.5}, "amount=0.5 is not allowed"),
    ({"target_params": 0.5}, "target_params=0.5 is not allowed"),
    ({"target_macs": 0.5}, "target_macs=0.5 is not allowed"),
    ({"threshold": 1.0}, "threshold=1.0 is not allowed"),
    ({"compensation": "mean"}, "compensation='mean' is not allowed: expected None with lossless=True"),
    ({"compensation": "none"}, "compensation='none' is not allowed"),
    ({"on_violation": "halve", "monitor": "val_loss", "max_drop": 0.1}, "on_violation='halve' is not allowed"),
    ({"lossless": 1}, "lossless=1 is not allowed"),
    ({"reestimate_norms": True}, "reestimate_norms=True is not allowed"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_what_contradicts_it_is_refused_at_once(given, message):
    with pytest.raises(MisconfigurationException, match=message):
        NeuronPruningCallback(**({"lossless": True} | given))
