"""A run with a callback that makes studies is, bit by bit, the run without it; also if a study is interrupted."""

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from unittest.mock import Mock

import lightning as L  # noqa: N812
import pytest
from torch import Tensor, nn

from lightning_neurons import ClassNeuronsCallback, NeuronAblationCallback, NeuronSensitivityCallback
from tests.callbacks import modules
from tests.callbacks.modules import MemoryLogger, Net, Plain, WithMetrics, fit, loader, trainer_of
from tests.callbacks.pruned import pruner
from tests.callbacks.test_invisible import bits, state_of
from tests.callbacks.test_nothing_left import assert_usable, traces

STUDIES: dict[str, Callable[[], Any]] = {
    "ablation": lambda: NeuronAblationCallback(ends=2),
    "ablation, resampled": lambda: NeuronAblationCallback("taylor", replacement="resample", max_samples=10, ends=2),
    "ablation, random at the ends": lambda: NeuronAblationCallback("second_order_ggn", replacement="mean", ends=2),
    "classes": lambda: ClassNeuronsCallback(controls=1),
    "classes, masking": lambda: ClassNeuronsCallback(method="masking", max_samples=12, replacement="mean"),
}
OWN = ("neurons/", "ablation/", "classes/", "pruning/")


class Dropping(WithMetrics):
    """Dropout while it trains, besides metrics, a list and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(dropout=0.5)


MODULES = {one.__name__: one for one in (Plain, Dropping, modules.Noisy, modules.PartlyFrozen, modules.LogsDirectly)}


@pytest.fixture(autouse=True)
def _interrupts_work_afterwards() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def run(name: str, callbacks: list[Any], **kwargs: Any) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    module, logger = MODULES[name](), MemoryLogger()
    trainer = fit(module, callbacks, logger=logger, **({"max_epochs": 2} | kwargs))
    found = state_of(trainer, module, logger)
    found["series"] = [row for row in logger.rows if not row[0].startswith(OWN)]
    found["traces"] = traces(module)
    return bits(found)


@lru_cache
def without(name: str) -> dict[str, Any]:
    return run(name, [])


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [key for key in expected if found[key] != expected[key]]


SAMPLED = [
    (name, study) for step in (0, 2) for name, study in zip(MODULES, [*STUDIES][step:] + [*STUDIES][:step], strict=True)
]
"""Each study with two modules, and each module with two studies."""


@pytest.mark.parametrize("name, study", SAMPLED)
def test_training_with_a_study_is_bitwise_training_without_it(name, study):
    callback = STUDIES[study]()
    assert differing(run(name, [callback]), without(name)) == []
    assert (getattr(callback, "ablation", None) or getattr(callback, "report", None)) is not None


@pytest.mark.parametrize(
    "kwargs",
    [
        {"precision": "bf16-mixed"},
        {"val_check_interval": 0.5},
        {"accumulate_grad_batches": 2},
        {"num_sanity_val_steps": 0},
    ],
    ids=str,
)
def test_nor_does_it_show_under_other_settings_of_the_trainer(kwargs):
    studies = [STUDIES["ablation"](), STUDIES["classes"]()]
    assert differing(run("Dropping", studies, **kwargs), run("Dropping", [], **kwargs)) == []


def test_studies_together_with_another_observer_are_invisible():
    every = [STUDIES[name]() for name in ("ablation", "classes")]
    found = run("Dropping", [every[0], NeuronSensitivityCallback(), every[1]])
    assert differing(found, without("Dropping")) == []


@pytest.mark.filterwarnings("ignore:.*nothing has been cut")
@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_prunes_is_the_same_with_studies_beside_it(first):
    def pruned(studies: list[Any]) -> dict[str, Any]:
        cutting = pruner("fisher", compensation="least_squares")
        return run("Plain", [*studies, cutting] if first else [cutting, *studies], max_epochs=3)

    studies = [STUDIES["ablation"](), STUDIES["classes"](), NeuronSensitivityCallback()]
    assert differing(pruned(studies), pruned([])) == []
    left = {"net.conv1": 3, "net.conv2": 4, "net.fc1": 5}
    assert {name: len(d) for name, d in studies[0].ablation.delta_loss.items()}.items() <= left.items()


@pytest.mark.parametrize("study", STUDIES)
def test_validation_gives_the_same_results(study):
    def evaluate(callbacks: list[Any]) -> Any:
        L.seed_everything(0, verbose=False)
        module, logger = Dropping(), MemoryLogger()
        trainer = trainer_of(callbacks, logger=logger)
        results = trainer.validate(module, loader(24, seed=1), verbose=False)
        found = state_of(trainer, module, logger)
        found["series"] = [row for row in logger.rows if not row[0].startswith(OWN)]
        return bits([results, found, traces(module)])

    assert evaluate([STUDIES[study]()]) == evaluate([])


COUNT = Mock()
"""Called with each forward; a number of the module's own would be put back."""


class Trap(nn.Module):
    """Passes values on, and raises after so many forwards in evaluation mode of an odd number of samples."""

    error: type[BaseException] = KeyboardInterrupt

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.armed = after, False
        COUNT.reset_mock()

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            COUNT()
            if COUNT.call_count > self.after:
                raise self.error("in the middle of a study")
        return x


class Trapped(Plain):
    """Its trap is armed when validation data has been seen, so that it goes off in a study."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        net = Net()
        net.drop = Trap(after)
        net.drop.error = error
        super().__init__(net)


class Arms(L.Callback):
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net.drop.armed = not trainer.sanity_checking


class Disarms(L.Callback):
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net.drop.armed = False


def left(module: Trapped) -> dict[str, Any]:
    found = traces(module)
    module.net.drop.armed, module.net.drop.after = False, 10**9
    return {**found, "weights": bits(module.state_dict()), "gradients": bits([p.grad for p in module.parameters()])}


INTERRUPTED = ["ablation", "ablation, random at the ends", "classes", "classes, masking"]


@pytest.mark.parametrize(
    "study, after", [*zip(INTERRUPTED, (0, 1, 3, 0), strict=True), ("ablation", 3), ("classes, masking", 1)]
)
def test_an_interrupt_in_the_middle_of_a_study_comes_through_and_leaves_nothing(study, after):
    module = Trapped(after, KeyboardInterrupt)
    L.seed_everything(0, verbose=False)
    module.load_state_dict(Plain().state_dict())
    with pytest.raises(SystemExit):
        fit(module, [Arms(), STUDIES[study]()], train=loader())
    plain, found = Plain(), left(module)
    L.seed_everything(0, verbose=False)
    plain = Plain()
    fit(plain, [], train=loader())
    assert found["weights"] == bits(plain.state_dict())
    assert not found["hooks"]
    assert not found["parameter hooks"]
    assert found["grad mode"] == (True, False)
    assert found["function modes"] == 0
    assert "log" not in vars(module)
    assert_usable(module)


@pytest.mark.parametrize("study, after", [("ablation", 0), ("ablation", 2), ("classes", 0), ("classes, masking", 2)])
def test_a_study_that_fails_in_the_middle_leaves_training_as_it_is_without_it(study, after):
    def trained(callbacks: list[Any]) -> dict[str, Any]:
        L.seed_everything(0, verbose=False)
        module = Trapped(after, RuntimeError)
        fit(module, [Arms(), *callbacks, Disarms()], max_epochs=2)
        return left(module)

    with pytest.warns(UserWarning, match="was not measured|nothing has been measured"):
        found = trained([STUDIES[study]()])
    expected = trained([])
    assert differing(found, expected) == []
