"""A cut and what is written down of it are one thing: an interruption finds both or neither, wherever it comes."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor

from lightning_neurons import NeuronPruningCallback
from lightning_neurons.callbacks.pruning import pruner as pruner_module
from lightning_neurons.pruning.rounds import Rounds
from tests.callbacks.guarded import Scored, by_epoch, hidden, made
from tests.callbacks.modules import Plain, loader, trainer_of
from tests.callbacks.pruned import pruner
from tests.pruning.test_surgery_failures import Interrupted, failing_at

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*(nothing has|all cuts have) been", "ignore:.*taken back", "ignore:.*last model of"
    ),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


class Fragile(Plain):
    """Something happens to it when a smaller network is validated outside of validation."""

    def __init__(self, what: BaseException | None = None) -> None:
        super().__init__()
        self.what, self.happened = what, Mock()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.what is not None and hidden(self) < 18 and not self.trainer.validating:
            self.happened()
            raise self.what
        return super().validation_step(batch, batch_idx)


def callback() -> NeuronPruningCallback:
    """Everything that is written down: a guard's time of recovery, and a teacher's."""
    return pruner("weight_l2", monitor="val_loss", max_drop=9.0, recovery="distill", recovery_epochs=2)


def run(module: Any, cutting: NeuronPruningCallback, folder: Path | None = None, ckpt: Path | None = None) -> Any:
    saving = [] if folder is None else [OnExceptionCheckpoint(folder, "broken")]
    trainer = trainer_of([cutting, *saving], max_epochs=4, enable_checkpointing=bool(saving))
    trainer.fit(module, loader(), loader(24, seed=1), ckpt_path=ckpt)
    return trainer


def assert_one_cut(module: Any, cutting: NeuronPruningCallback) -> None:
    assert made(cutting) == [(1, 1, 6)]
    assert 18 - hidden(module) == len(cutting.plan) == 6
    assert cutting.pending is None


@pytest.mark.parametrize("where", ["metric", "latency", "logger"])
def test_an_interruption_after_the_cut_finds_it_written_down_and_the_run_goes_on_from_there(
    where, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    whole, uninterrupted = Plain(), callback()
    run(whole, uninterrupted)
    torch.manual_seed(0)
    module, cutting = Fragile(Interrupted() if where == "metric" else None), callback()
    if where == "latency":  # the second time it is measured is after the cut
        monkeypatch.setattr(pruner_module, "latency", failing_at(2, pruner_module.latency, late=False)[0])
    if where == "logger":
        monkeypatch.setattr(pruner_module, "round_scalars", Mock(side_effect=Interrupted))
    with pytest.raises(Interrupted):
        run(module, cutting, tmp_path)
    monkeypatch.undo()
    assert_one_cut(module, cutting)
    assert (cutting.keeping.judge_after, cutting.keeping.measured, cutting._pruner.distiller.until) == (2, False, 2)
    resumed, again = Plain(), callback()
    run(resumed, again, ckpt=tmp_path / "broken.ckpt")
    assert_one_cut(resumed, again)
    assert again.plan == uninterrupted.plan
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("error", [MemoryError("no room"), ArithmeticError("somebody's mistake")], ids=repr)
def test_a_metric_that_fails_after_the_cut_costs_no_more_than_itself(error):
    module, cutting = Fragile(error), callback()
    with pytest.warns(UserWarning, match="val_loss was not measured after the cut.*" + str(error)):
        trainer = run(module, cutting)
    assert module.happened.call_count == 1
    assert trainer.current_epoch == 4
    assert_one_cut(module, cutting)
    assert cutting.rounds.done[0].cut is None
    assert cutting.rounds.done[0].after is not None


def test_an_error_while_the_cut_is_written_down_takes_it_back(tmp_path, monkeypatch):
    module, cutting = Plain(), callback()
    monkeypatch.setattr(Rounds, "finish", failing_at(1, Rounds.finish, late=True)[0])
    with pytest.raises(Interrupted):
        run(module, cutting, tmp_path)
    monkeypatch.undo()
    assert (hidden(module), made(cutting), len(cutting.pending)) == (18, [], 6)
    resumed, again = Plain(), callback()
    run(resumed, again, ckpt=tmp_path / "broken.ckpt")
    assert_one_cut(resumed, again)


def test_an_error_while_it_is_written_down_that_a_cut_was_taken_back_leaves_the_cut(monkeypatch):
    module, cutting = Scored(by_epoch(0.75, 0.25, 0.75)), pruner("weight_l2", monitor="val_score", max_drop=0.125)
    monkeypatch.setattr(Rounds, "take_back", failing_at(1, Rounds.take_back, late=True)[0])
    with pytest.raises(Interrupted):
        run(module, cutting)
    assert_one_cut(module, cutting)
    assert (cutting.keeping.judge_after, cutting.keeping.stopped) == (1, False)
    assert cutting.rounds.undone == []


@pytest.mark.filterwarnings("ignore:.*no epoch follows")
def test_a_plan_that_could_not_be_checked_is_not_carried_out():
    class Unchecked(Plain):
        """Fails when it is run more often than there are batches."""

        def __init__(self) -> None:
            super().__init__()
            self.runs = Mock()

        def on_validation_epoch_start(self) -> None:
            self.runs.reset_mock()

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.runs()
            if self.runs.call_count > 3:
                raise ArithmeticError("somebody's mistake")
            return super().validation_step(batch, batch_idx)

    module = Unchecked()
    cutting = pruner("weight_l2", monitor="val_loss", max_drop=9.0, check="ablation")
    with pytest.warns(UserWarning, match="val_loss cannot be measured on kept samples.*somebody's mistake"):
        run(module, cutting)
    assert (hidden(module), made(cutting), cutting.pending) == (18, [], None)
