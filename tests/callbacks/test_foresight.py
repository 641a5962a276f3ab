"""A plan's neurons are silenced together before it is decided: what hurts is not cut, what does not is cut as ever."""

import warnings
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_neurons import ArgumentError, NeuronPruningCallback
from tests.callbacks.guarded import hidden, made
from tests.callbacks.modules import MemoryLogger, Net, Plain, fit, loader
from tests.callbacks.pruned import Probe, assert_equal, assert_sound, pruner, weights
from tests.callbacks.studied import accuracy_without, loss_without, samples

pytestmark = pytest.mark.filterwarnings("ignore:.*(nothing has been cut|no epoch follows)")


class Measured(Plain):
    """Logs loss and accuracy; it hardly learns, so that a cut hurts in the same way in every epoch."""

    def __init__(self, lr: float = 1e-6) -> None:
        super().__init__(Net(), lr)

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        self.log_dict({"val_loss": loss, "val_acc": (logits.argmax(1) == batch[1]).float().mean()})
        return loss


def checked(**kwargs: Any) -> NeuronPruningCallback:
    return pruner("weight_l2", **({"monitor": "val_loss", "max_drop": 99.0, "check": "ablation"} | kwargs))


def seeded(lr: float = 1e-6) -> Measured:
    L.seed_everything(0, verbose=False)
    return Measured(lr)


def predicted(logger: MemoryLogger) -> list[float]:
    return [value for name, _, value in logger.rows if name == "pruning/metric_predicted"]


NAIVE = {"val_loss": loss_without, "val_acc": accuracy_without}


@pytest.mark.parametrize("monitor", NAIVE)
@pytest.mark.parametrize("compensation", ["none", "least_squares"])
def test_the_predicted_metric_is_that_of_a_forward_with_hooks(monitor, compensation):
    callback, logger = checked(monitor=monitor, compensation=compensation, max_samples=24), MemoryLogger()

    def look(trainer: Any, module: Any) -> float:
        return NAIVE[monitor](module, samples(), callback.pending.neurons)

    after = Probe("on_validation_end", lambda t, m: look(t, m) if callback.pending else None)
    fit(seeded(), [callback, after], logger=logger, max_epochs=3)
    assert predicted(logger) == [pytest.approx(after.seen[0], abs=1e-6)]
    assert made(callback) == [(1, 1, 6)]


def test_samples_that_are_kept_are_those_it_is_predicted_on():
    callback, logger = checked(max_samples=10), MemoryLogger()
    few = tuple(column[:10] for column in samples())
    look = Probe("on_validation_end", lambda _, m: callback.pending and loss_without(m, few, callback.pending.neurons))
    fit(seeded(), [callback, look], logger=logger, max_epochs=2)
    assert predicted(logger) == [pytest.approx(look.seen[0], abs=1e-6)]


@pytest.mark.parametrize("kwargs", [{}, {"compensation": "least_squares"}, {"reestimate_norms": True}], ids=str)
def test_a_harmless_cut_is_made_exactly_as_without_the_check(kwargs):
    def run(check: Any) -> tuple[Any, Any]:
        callback, module = checked(check=check, **kwargs), seeded(1e-2)
        trainer = fit(module, [callback], max_epochs=4)
        assert_sound(trainer, module, callback)
        return module, callback

    (with_check, one), (without, other) = run("ablation"), run(None)
    assert_equal(weights(with_check), weights(without))
    assert_equal(dict(with_check.named_buffers()), dict(without.named_buffers()))
    assert one.plan.neurons == other.plan.neurons


def test_a_harmful_cut_is_not_made_and_is_tried_again_in_the_next_epoch():
    callback, logger, module = checked(amount=0.8, max_drop=1e-4), MemoryLogger(), seeded()
    before = weights(module)
    said = r"round 1 is not made at epoch \d: with its \d+ neurons silenced, val_loss goes from .* is the worst"
    with pytest.warns(UserWarning, match=said) as told:
        fit(module, [callback], logger=logger, max_epochs=4)
    assert len(predicted(logger)) == 3, "of epochs 0, 1 and 2: none follows the last"
    assert len([one for one in told if "neurons silenced" in str(one.message)]) == 3
    assert made(callback) == []
    assert hidden(module) == 18
    assert before.keys() == weights(module).keys()
    assert callback.pending is None


def test_a_cut_that_is_not_made_leaves_training_as_it_is_without_the_callback():
    module, plain = seeded(1e-2), seeded(1e-2)
    L.seed_everything(1, verbose=False)
    with pytest.warns(UserWarning, match="round 1 is not made"):
        fit(module, [checked(amount=0.8, max_drop=0.0)], max_epochs=3, train=loader())
    L.seed_everything(1, verbose=False)
    fit(plain, [], max_epochs=3, train=loader())
    assert_equal(weights(module), weights(plain))
    assert not [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]


def bounds_around(monitor: str, relative: bool) -> tuple[float, float]:
    """A drop that just allows the cut, and one that just does not, from what hooks say."""
    callback, module = checked(monitor=monitor, check=None), seeded()

    def look(_: Any, m: Any) -> Any:
        if not callback.pending:
            return None
        return NAIVE[monitor](m, samples(), {}), NAIVE[monitor](m, samples(), callback.pending.neurons)

    probe = Probe("on_validation_end", look)
    fit(module, [callback, probe], max_epochs=2)
    now, without = probe.seen[0]
    worse = (without - now if monitor == "val_loss" else now - without) / (now if relative else 1)
    assert worse > 1e-3, "this cut hurts"
    return worse * 1.02, worse * 0.98


@pytest.mark.parametrize("relative", [False, True])
def test_the_bound_is_max_drop_from_what_the_metric_is_now(relative):
    enough, too_little = bounds_around("val_loss", relative)
    kwargs: dict[str, Any] = {"relative_drop": relative, "recovery_epochs": 1}
    callback = checked(max_drop=enough, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(taken back|have been)")  # running statistics still move
        fit(seeded(), [callback], max_epochs=2)
    assert [*made(callback), *((o.number, o.epoch, len(o.plan)) for o in callback.rounds.undone)] == [(1, 1, 6)]
    callback = checked(max_drop=too_little, **kwargs)
    with pytest.warns(UserWarning, match="round 1 is not made at epoch 1"):
        fit(seeded(), [callback], max_epochs=2)
    assert (made(callback), callback.rounds.undone) == ([], [])


def test_later_rounds_silence_the_neurons_of_the_narrower_network():
    callback, logger = checked(amount=0.5, schedule="linear", start_epoch=1, end_epoch=3), MemoryLogger()
    seen: dict[int, float] = {}

    class Naive(L.Callback):
        """Silences by position: neurons carry their original number beside them."""

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            plan = callback.pending
            if plan and not trainer.sanity_checking:
                gone = callback.plan.neurons
                lowered = {}
                for layer, neurons in plan.neurons.items():
                    kept = [i for i in range(plan.widths[layer]) if i not in gone.get(layer, ())]
                    lowered[layer] = [kept.index(i) for i in neurons]
                seen[trainer.current_epoch] = loss_without(pl_module, samples(), lowered)

    fit(seeded(), [callback, Naive()], logger=logger, max_epochs=5)
    assert len(made(callback)) == 3
    assert predicted(logger) == pytest.approx([seen[0], seen[1], seen[2]], abs=1e-6)


def test_a_metric_that_is_not_logged_for_a_batch_cannot_be_checked_and_that_is_said():
    class AtTheEnd(Measured):
        def on_validation_epoch_end(self) -> None:
            self.log("val_score", 0.5)

    callback, logger = checked(monitor="val_score"), MemoryLogger()
    with pytest.warns(
        UserWarning, match="validation_step does not log val_score for a batch, so no cut can be checked"
    ):
        fit(AtTheEnd(), [callback], logger=logger, max_epochs=3)
    assert predicted(logger) == []
    assert made(callback) == [(1, 1, 6)]


def test_it_works_with_a_compiled_network():
    torch._dynamo.reset()
    callback, logger, module = checked(), MemoryLogger(), seeded()
    module.net = torch.compile(module.net, backend="eager")
    fit(module, [callback], logger=logger, max_epochs=3)
    plain = MemoryLogger()
    fit(seeded(), [checked()], logger=plain, max_epochs=3)
    assert predicted(logger) == pytest.approx(predicted(plain), abs=1e-5)


WRONG = [
    ({"check": "ablation"}, "check='ablation'.*without max_drop= and monitor="),
    ({"check": "ablation", "monitor": "val_loss"}, "check='ablation'.*without max_drop="),
    ({"check": "ablate", "monitor": "val_loss", "max_drop": 0.1}, "check='ablate'.*did you mean 'ablation'"),
    ({"check": True, "monitor": "val_loss", "max_drop": 0.1}, "check=True"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        NeuronPruningCallback("fisher", amount=0.3, **arguments)
    assert isinstance(caught.value, ArgumentError)


def test_a_lossless_cut_changes_nothing_when_it_is_checked():
    module, logger = seeded(), MemoryLogger()
    module.net.fc1.bias.data[[1, 4]] = -100.0
    callback = NeuronPruningCallback(lossless=True, check="ablation", monitor="val_loss", max_drop=1.0)
    fit(module, [callback], logger=logger, max_epochs=3)
    assert set(callback.plan.neurons["net.fc1"]) >= {1, 4}
    assert len(predicted(logger)) == 1
