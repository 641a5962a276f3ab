"""What the contract is about, and what it is not about; and where the logits of a teacher come from."""

import copy
import pickle
import warnings
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons import NeuronPruningCallback, load_pruned
from tests.callbacks.guarded import Scored, by_epoch, differences, guard, hidden, made, state_of
from tests.callbacks.modules import Plain, loader, trainer_of
from tests.callbacks.pruned import Probe, pruner

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*training ends before", "ignore:.*taken back", "ignore:.*last good state"
)


def fit(module: Any, callbacks: list[Any], **kwargs: Any) -> Any:
    trainer = trainer_of(callbacks, **kwargs)
    trainer.fit(module, loader(16), loader(24, seed=1))
    return trainer


def test_when_no_cut_stands_training_is_nobodys_business():
    callback, module = guard(), Scored(lambda m: 0.0 if hidden(m) < 18 else (1.0 if m.current_epoch < 5 else 0.5))
    trained = Probe("on_train_batch_end", lambda trainer, m: state_of(trainer, m)["model"])
    trainer = fit(module, [callback, trained], max_epochs=6)
    assert made(callback) == []
    assert callback.keeping.good is None
    assert differences(state_of(trainer, module)["model"], trained.seen[5]) == []


def test_the_last_good_state_is_that_of_the_last_good_epoch():
    callback, module = guard(), Scored(by_epoch(1, 1, 1, 1, 1, 0))
    begins = Probe("on_train_epoch_start", state_of)
    trainer = fit(module, [callback, begins], max_epochs=6)
    assert made(callback) != []
    assert differences(state_of(trainer, module)["model"], begins.seen[5]["model"]) == []


def test_steps_that_no_validation_has_seen_do_not_count():
    callback, module = guard(), Scored(by_epoch(1.0))
    begins = Probe("on_train_epoch_start", state_of)
    trainer = fit(module, [callback, begins], max_epochs=6, max_steps=7)  # two steps an epoch
    assert trainer.global_step == 7
    assert differences(state_of(trainer, module)["model"], begins.seen[3]["model"]) == []


@pytest.mark.parametrize(
    "name, mode", [("val_loss", "min"), ("val_acc", "max"), ("word_error_rate", "min"), ("f1", "max")]
)
def test_the_direction_of_a_metric_goes_by_its_name_unless_it_is_given(name, mode):
    assert NeuronPruningCallback(amount=0.5, monitor=name, max_drop=0.1).pruning.guard.mode == mode
    assert NeuronPruningCallback(amount=0.5, monitor=name, max_drop=0.1, mode="max").pruning.guard.mode == "max"


@pytest.mark.parametrize("given", [{"mode": "min"}, {"monitor": ""}, {"on_violation": "halve"}])
def test_what_would_have_no_effect_is_refused(given):
    with pytest.raises(MisconfigurationException, match=next(iter(given))):
        NeuronPruningCallback(amount=0.5, **({"monitor": "val_acc"} | given))


def test_weights_that_no_validation_sees_are_warned_of():
    with pytest.warns(UserWarning, match="no validation has seen"):
        fit(Scored(by_epoch(1.0)), [guard(), StochasticWeightAveraging(1e-3, swa_epoch_start=1)], max_epochs=2)


def test_a_checkpoint_of_a_cut_that_has_not_been_judged_says_so(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, monitor="val_score")
    fit(Scored(by_epoch(1.0)), [guard(recovery_epochs=2), saves], max_epochs=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="while a cut was recovering"):
        load_pruned(Scored, tmp_path / "epoch=1.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pruned(Scored, tmp_path / "epoch=0.ckpt")


def test_a_callback_can_be_pickled_and_copied_before_and_after_training():
    callback = pruner(recovery="distill", monitor="val_loss")
    for _ in range(2):
        again = pickle.loads(pickle.dumps(callback))
        other = copy.deepcopy(callback)
        assert again.plan == other.plan == callback.plan
        assert other._pruner.distiller is not callback._pruner.distiller
        fit(Plain(), [callback], max_epochs=2)
        assert callback.plan


class Overriding(Plain):
    """Has a forward, and leaves it aside in training."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class Evaluating(Plain):
    """Trains in evaluation mode, as people do who tune a network with frozen norm layers."""

    def on_train_epoch_start(self) -> None:
        self.net.eval()


class Shifting(nn.Module):
    """Changes its inputs in place."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inner = net

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(0.1))


@pytest.mark.parametrize(
    "kind, output", [(Overriding, "net"), (Overriding, "net.fc2"), (Evaluating, "net"), (Plain, None)]
)
def test_the_teacher_hears_whatever_is_given_the_batch(kind, output):
    weights = []
    for how in ({}, {"recovery": "distill", "output": output, "distillation_weight": 5.0}):
        torch.manual_seed(0)
        module, callback = kind(), pruner(monitor="val_loss", **how)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*eval mode")
            fit(module, [callback], max_epochs=2)
        weights.append(module.net.fc2.weight.detach())
    assert weights[0].shape == weights[1].shape
    assert not torch.equal(*weights)


def test_the_teacher_is_given_the_inputs_as_they_were():
    torch.manual_seed(0)
    module = Plain()
    module.net = Shifting(module.net)
    seen = Mock(return_value=None)  # a list would be copied along with the hook
    callback = pruner(recovery="distill", monitor="val_loss")
    module.net.inner.conv1.register_forward_pre_hook(lambda m, args: seen(m.training, args[0].clone()))
    fit(module, [callback], max_epochs=2)
    # The copy that teaches has the hook as well, and is in evaluation mode: it reads what the module reads.
    calls = [call.args for call in seen.call_args_list]
    pairs = [(x, y) for (learns, x), (other, y) in pairwise(calls) if learns and not other and x.shape == y.shape]
    assert sum(torch.equal(x, y) for x, y in pairs) == 2
