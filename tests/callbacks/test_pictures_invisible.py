"""A run with a callback that makes pictures is, bit by bit, the run without it, also if it is interrupted."""

import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest

from lightning_neurons import NeuronSensitivityCallback, SaliencyCallback
from tests.callbacks.modules import MemoryLogger, Plain, fit, loader, trainer_of
from tests.callbacks.pictured import ImageLogger, maximizer
from tests.callbacks.pruned import pruner
from tests.callbacks.test_invisible import bits, state_of
from tests.callbacks.test_nothing_left import assert_usable, traces
from tests.callbacks.test_studies_invisible import MODULES, Arms, Disarms, Dropping, Trapped, left

OWN = ("neurons/", "ablation/", "classes/", "pruning/")
PICTURES: dict[str, Callable[[], list[Any]]] = {
    "saliency": lambda: [SaliencyCallback(max_samples=3)],
    "smoothgrad": lambda: [SaliencyCallback(method="smoothgrad", max_samples=3)],
    "grad_cam": lambda: [SaliencyCallback(method="grad_cam", max_samples=3)],
    "maximization": lambda: [maximizer()],
    "maximization, neurons": lambda: [maximizer([("net.conv2", 1), "net.fc1"], parametrization="pixel", cards=1)],
    "figures and page": lambda: [NeuronSensitivityCallback(html=True, max_figures=1)],
    # Few of each, as drawing takes most of the time.
    "all": lambda: [
        maximizer(cards=1),
        NeuronSensitivityCallback(html=True, max_figures=1),
        SaliencyCallback(max_samples=3),
    ],
}


@pytest.fixture(autouse=True)
def _interrupts_work_afterwards() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Keeps(ImageLogger):
    """Has a folder of its own, as the loggers of users have."""

    @cached_property
    def save_dir(self) -> str:
        return tempfile.mkdtemp(prefix="kept", dir=".")


def looked_at(trainer: Any, module: Any, logger: MemoryLogger) -> dict[str, Any]:
    found = state_of(trainer, module, logger)
    found["series"] = [row for row in logger.rows if not row[0].startswith(OWN)]
    found["traces"] = traces(module)
    return found


def run(name: str, callbacks: list[Any], **kwargs: Any) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    module, logger = MODULES[name](), Keeps()
    trainer = fit(module, callbacks, logger=logger, **({"max_epochs": 2} | kwargs))
    assert bool(logger.images) == bool(callbacks)
    return bits(looked_at(trainer, module, logger))


@lru_cache
def without(name: str) -> dict[str, Any]:
    return run(name, [])


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [key for key in expected if found[key] != expected[key]]


SAMPLED = [(name, made) for made, name in zip([*PICTURES] * 2, cycle(MODULES))]
"""Each kind of picture with two modules."""


@pytest.mark.parametrize("name, pictures", SAMPLED)
def test_training_with_pictures_is_bitwise_training_without_them(name, pictures):
    callbacks = PICTURES[pictures]()
    assert differing(run(name, callbacks), without(name)) == []
    assert all((getattr(c, "found", None) or getattr(c, "report", None)) is not None for c in callbacks)
    assert any(Path().rglob("kept*/**/report.html")) == any(getattr(c, "html", False) for c in callbacks)


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
def test_nor_do_they_show_under_other_settings_of_the_trainer(kwargs):
    callbacks = [*PICTURES["saliency"](), *PICTURES["maximization"]()]
    assert differing(run("Dropping", callbacks, **kwargs), run("Dropping", [], **kwargs)) == []


@pytest.mark.filterwarnings("ignore:.*nothing has been cut")
@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_prunes_is_the_same_with_pictures_beside_it(first):
    def pruned(others: list[Any]) -> dict[str, Any]:
        cutting = pruner("fisher", compensation="least_squares")
        return run("Plain", [*others, cutting] if first else [cutting, *others], max_epochs=3)

    assert differing(pruned(PICTURES["all"]()), pruned([])) == []


@pytest.mark.parametrize("pictures", ["smoothgrad", "grad_cam", "maximization, neurons", "all"])
def test_validation_gives_the_same_results(pictures):
    def evaluate(callbacks: list[Any]) -> Any:
        L.seed_everything(0, verbose=False)
        module, logger = Dropping(), Keeps()
        trainer = trainer_of(callbacks, logger=logger)
        results = trainer.validate(module, loader(24, seed=1), verbose=False)
        return bits([results, looked_at(trainer, module, logger)])

    assert evaluate(PICTURES[pictures]()) == evaluate([])


class ArmsLate(Arms):
    """After the hooks at the end of the epoch of validation, as that of other callbacks would go off too."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_epoch_end(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Not yet."""


class DisarmsLate(Disarms):
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_epoch_end(trainer, pl_module)


TRAPPED = {"saliency": Arms, "smoothgrad": Arms, "grad_cam": Arms, "maximization": ArmsLate}


@pytest.mark.parametrize(
    "pictures, after", [("smoothgrad", 0), ("smoothgrad", 3), ("maximization", 0), ("maximization", 1)]
)
def test_an_interrupt_in_the_middle_comes_through_and_leaves_nothing(pictures, after):
    module = Trapped(after, KeyboardInterrupt)
    L.seed_everything(0, verbose=False)
    module.load_state_dict(Plain().state_dict())
    with pytest.raises(SystemExit):
        fit(module, [TRAPPED[pictures](), *PICTURES[pictures]()], train=loader())
    found = left(module)
    L.seed_everything(0, verbose=False)
    plain = Plain()
    fit(plain, [], train=loader())
    assert found["weights"] == bits(plain.state_dict())
    assert not found["hooks"]
    assert not found["parameter hooks"]
    assert found["grad mode"] == (True, False)
    assert found["function modes"] == 0
    assert all(found["requires_grad"].values())
    assert "log" not in vars(module)
    assert_usable(module)


@pytest.mark.parametrize("pictures", TRAPPED)
def test_pictures_that_fail_in_the_middle_leave_training_as_it_is_without_them(pictures):
    def trained(callbacks: list[Any]) -> dict[str, Any]:
        L.seed_everything(0, verbose=False)
        module = Trapped(0, RuntimeError)
        fit(module, [TRAPPED[pictures](), *callbacks, Disarms(), DisarmsLate()], max_epochs=2)
        return left(module)

    with pytest.warns(UserWarning, match="was not measured|nothing has been measured"):
        found = trained(PICTURES[pictures]())
    assert differing(found, trained([])) == []
