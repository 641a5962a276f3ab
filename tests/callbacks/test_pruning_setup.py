"""What cannot work in a run is said before it begins, or before the first cut, and the model is as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from tests.callbacks.modules import Net, Plain, fit, loader, trainer_of
from tests.callbacks.pruned import assert_refused, pruner, widths
from tests.callbacks.test_bad_arguments import WithoutValidation
from tests.models import Single

WHOLE = {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3}


class FSDPStrategy(SingleDeviceStrategy):
    """Named like one that shards layers."""


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Named like one that shards layers."""


class OwnStrategy(DeepSpeedStrategy):
    """Derived from it."""


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, OwnStrategy])
def test_sharded_strategies_are_refused(strategy):
    name = "FSDPStrategy" if strategy is FSDPStrategy else "DeepSpeedStrategy"
    assert_refused(Plain(), rf'{name}.*strategy="ddp"', [pruner()], strategy=strategy(device=torch.device("cpu")))


class _MultiProcessingLauncher:
    """Named like the one that starts processes by spawn or fork."""

    is_interactive_compatible = True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def kill(self, signal: int) -> None:
        """There is nobody."""


def test_strategies_that_spawn_or_fork_their_processes_are_refused():
    strategy = SingleDeviceStrategy(device=torch.device("cpu"))
    strategy._launcher = _MultiProcessingLauncher()
    assert_refused(Plain(), r'spawn or fork.*strategy="ddp"', [pruner()], strategy=strategy)


@pytest.mark.parametrize("max_epochs, start_epoch", [(1, 1), (3, 3), (3, 7)])
def test_a_first_cut_after_the_last_epoch_is_refused(max_epochs, start_epoch):
    message = rf"start_epoch={start_epoch}.*max_epochs={max_epochs} ends before.*below {max_epochs}"
    assert_refused(Plain(), message, [pruner(start_epoch=start_epoch)], max_epochs=max_epochs)


def test_a_run_without_validation_is_refused():
    assert_refused(Plain(), r"no validation.*limit_val_batches=0.*prune\(\)", [pruner()], limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match=r"runs no validation.*no validation_step"):
        trainer_of([pruner()], max_epochs=3).fit(WithoutValidation(), loader())


def test_masks_of_another_callback_are_refused():
    masks = ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)
    assert_refused(Plain(), "masked by ModelPruning", [masks, pruner()])


class Consolidating(torch.optim.SGD):
    """Like one that spreads its state over processes."""

    def consolidate_state_dict(self) -> None:
        """Only its name matters."""


class WithOptimizer(Plain):
    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (lambda p: torch.optim.LBFGS(p), "state of LBFGS: use an optimizer with a state for each parameter"),
        (lambda p: Consolidating(p, 0.1), "state of Consolidating: use.*whole in each process"),
    ],
)
def test_optimizers_whose_state_cannot_be_cut_are_refused(optimizer, message):
    assert_refused(WithOptimizer(optimizer), message, [pruner()])


def test_a_pattern_that_matches_no_layer_is_refused_and_the_nearest_named():
    assert_refused(Plain(), r"ignore: nothing matches 'net\.cov1'.*'net\.conv1'", [pruner(ignore=["net.cov1"])])


def test_a_pattern_that_matches_no_layer_is_an_error_without_a_sanity_check_as_well():
    with pytest.raises(MisconfigurationException, match=r"ignore: nothing matches 'net\.cov1'.*'net\.conv1'"):
        fit(Plain(), [pruner(ignore=["net.cov1"])], max_epochs=3, num_sanity_val_steps=0)


def test_a_model_that_cannot_be_copied_is_refused():
    module = Plain()
    module.net.only = Single(1, 1)
    assert_refused(module, r"net\.only in Plain cannot be copied \(TypeError", [pruner()])


class Branching(Net):
    """Runs in evaluation mode only where it has been told that it is a trial."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.training:
            raise RuntimeError("not with gradients")
        return super().forward(x)


def test_a_model_that_cannot_be_traced_is_refused():
    assert_refused(Plain(Branching()), "not with gradients", [pruner("weight_l2")])


def test_a_metric_that_nobody_logs_is_doubted_at_once_and_refused_before_the_first_cut():
    callback, module = pruner(monitor="val_los"), Plain()
    doubt = pytest.warns(UserWarning, match=r"monitor: nothing matches 'val_los'.*'val_loss'.*Fine if training logs it")
    with doubt, pytest.raises(MisconfigurationException, match=r"monitor: nothing matches 'val_los'.*'val_loss'"):
        fit(module, [callback], max_epochs=3)
    assert widths(module) == WHOLE


def test_a_metric_that_only_training_logs_is_fine():
    callback, module = pruner(monitor="train_loss"), Plain()
    with pytest.warns(UserWarning, match="Fine if training logs it"):
        fit(module, [callback], max_epochs=3)
    assert callback.rounds.done[0].before is not None
    assert callback.rounds.done[0].cut is None, "the validation step does not log it"
    assert callback.rounds.done[0].after is not None


@pytest.mark.parametrize("kwargs", [{"check_val_every_n_epoch": 2}, {"val_check_interval": 6}])
def test_a_metric_that_is_logged_by_a_later_validation_is_waited_for(kwargs):
    callback, module = pruner(monitor="val_loss", start_epoch=2), Plain()
    if "val_check_interval" in kwargs:
        kwargs = kwargs | {"check_val_every_n_epoch": None}
    fit(module, [callback], max_epochs=3, **kwargs)
    assert callback.rounds.done[0].before is not None


def test_a_module_that_is_compiled_as_a_whole_is_refused_with_what_to_compile_instead():
    module = torch.compile(Plain(), backend="eager")
    with pytest.raises(MisconfigurationException, match=r"compile the network in it: self\.net\.compile\(\)"):
        fit(module, [pruner()], max_epochs=3)


def test_patience_that_takes_longer_than_training_is_refused():
    assert_refused(
        Plain(), r"patience=3\): the first cut could be made at the beginning of epoch 3", [pruner(patience=3)]
    )


def test_the_plan_of_a_callback_says_why_less_was_removed():
    callback = pruner(amount=0.5, min_neurons=4)
    with pytest.warns(UserWarning, match="3 neurons of the model should go as well, and may not"):
        fit(Plain(), [callback], max_epochs=2)
    assert any("as narrow as min_neurons" in note for note in callback.plan.notes)
