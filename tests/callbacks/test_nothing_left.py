"""However a run ends, the module is left as a run without the callback leaves it."""

import copy
import io
import pickle
import signal
from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback
from tests.callbacks.modules import Net, Plain, fit, loader, trainer_of

OBSERVERS: dict[str, Callable[[], Any]] = {
    "statistics": ActivationStatisticsCallback,
    "sensitivity": NeuronSensitivityCallback,
    "source=train": lambda: NeuronSensitivityCallback(source="train", loss_fn=Plain.loss),
}
with_each_observer = pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS.keys())


def traces(module: nn.Module) -> dict[str, Any]:
    """Whatever code that watches could leave behind."""
    modules = dict(module.named_modules())
    return {
        "hooks": {(n, k): len(v) for n, m in modules.items() for k, v in vars(m).items() if "_hooks" in k and v},
        "parameter hooks": [p._backward_hooks for p in module.parameters() if p._backward_hooks],
        "global hooks": {k: len(v) for k, v in vars(nn.modules.module).items() if "_hooks" in k and v},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "modes": {n: m.training for n, m in modules.items()},
        "buffers": {n: (b.shape, b.dtype, b.is_inference()) for n, b in module.named_buffers()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "function modes": torch._C._len_torch_function_stack(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "stance": str(torch._dynamo.eval_frame._stance.stance),
    }  # fmt: skip


class Bomb(nn.Module):
    """Lets values through until it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error("in the middle of a forward")
        return x


class Explosive(Plain):
    """Raises at the place that it is told, at the second batch after the sanity check."""

    def __init__(self, where: str = "nowhere", error: type[BaseException] = RuntimeError) -> None:
        net = Net()
        net.drop = Bomb()
        super().__init__(net)
        self.where, self.error = where, error

    def _step(self, name: str, step: Callable[[Any, int], Any], batch: Any, batch_idx: int) -> Any:
        due = batch_idx == 1 and (not self.trainer.sanity_checking or self.where.startswith("sanity"))
        if due and self.where.endswith(f"{name} before forward"):
            raise self.error("before")
        if due and self.where.endswith(f"{name} in forward"):
            self.net.drop.error = self.error
        out = step(batch, batch_idx)
        if due and self.where.endswith(f"{name} after forward"):
            raise self.error("after")
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._step("training_step", super().training_step, batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self._step("validation_step", super().validation_step, batch, batch_idx)


class RaisesIn(L.Callback):
    """A callback of somebody else that raises in one hook."""

    def __init__(self, hook: str) -> None:
        super().__init__()

        def raising(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if not trainer.sanity_checking:
                raise RuntimeError(hook)

        setattr(self, hook, raising)


@pytest.fixture(autouse=True)
def _interrupts_work_afterwards() -> Iterator[None]:
    """Lightning ignores further interrupts once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


PLACES = [
    f"{step} {where}"
    for step in ("training_step", "validation_step")
    for where in ("before forward", "in forward", "after forward")
]


@pytest.mark.parametrize(
    "stage, observer",
    [(stage, OBSERVERS[name]) for stage in ("fit", "validate", "test") for name in ("statistics", "sensitivity")]
    + [("fit", OBSERVERS["source=train"])],
)
def test_a_finished_run_leaves_nothing(stage, observer):
    def run(callbacks: list[Any]) -> dict[str, Any]:
        module, trainer = Plain(), trainer_of(callbacks)
        if stage == "fit":
            trainer.fit(module, loader(), loader())
        else:
            getattr(trainer, stage)(module, loader(), verbose=False)
        return traces(module)

    before = traces(Plain())
    without = run([])
    assert not before["hooks"]
    assert not without["hooks"]
    assert run([observer()]) == without


RAISING = list(product([*PLACES, "sanity validation_step in forward"], [RuntimeError, KeyboardInterrupt]))


@pytest.mark.parametrize("where, error, observer", [(*case, of) for case, of in zip(RAISING, cycle(OBSERVERS))])
def test_an_exception_comes_through_and_leaves_nothing(where, error, observer):
    def run(callbacks: list[Any]) -> tuple[dict[str, Any], Explosive]:
        module = Explosive(where, error)
        with pytest.raises(SystemExit if error is KeyboardInterrupt else RuntimeError) as caught:
            fit(module, callbacks)
        if error is RuntimeError:
            assert str(caught.value) in ("before", "after", "in the middle of a forward")
        return traces(module), module

    expected, _ = run([])  # first: what is left behind for all modules would be found in both
    after, module = run([OBSERVERS[observer]()])
    assert after == expected
    assert_usable(module)


HOOKS = ["on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_train_batch_end"]


@pytest.mark.parametrize(
    "hook, first, observer", [(*case, of) for case, of in zip(product(HOOKS, [True, False]), cycle(OBSERVERS))]
)
def test_an_exception_in_another_callback_leaves_nothing(hook, first, observer):
    def run(callbacks: list[Any]) -> tuple[dict[str, Any], Plain]:
        module = Plain()
        with pytest.raises(RuntimeError, match=hook):
            fit(module, callbacks)
        return traces(module), module

    expected, _ = run([RaisesIn(hook)])
    ours = OBSERVERS[observer]()
    after, module = run([RaisesIn(hook), ours] if first else [ours, RaisesIn(hook)])
    assert after == expected
    assert_usable(module)


@with_each_observer
def test_the_callback_works_again_after_an_exception(observer):
    callback, module = observer(), Explosive("validation_step in forward")
    with pytest.raises(RuntimeError):
        fit(module, [callback])
    disarm(module)
    fit(module.train(), [callback])
    assert callback.report.counts["net.conv1"].samples.tolist() == [32 if callback.source == "train" else 24] * 4


@with_each_observer
def test_a_second_fit_leaves_nothing_and_measures_again(observer):
    callback, module = observer(), Plain()
    fit(module, [callback])
    first, after_one = callback.report, traces(module)
    fit(module, [callback])
    assert traces(module) == after_one
    assert callback.report is not first
    assert len(callback.history) == 2
    assert_usable(module)


@with_each_observer
def test_the_module_can_be_trained_after_it_was_validated(observer):
    callback, module = observer(), Plain()
    if callback.source == "val":
        trainer_of([callback]).validate(module, loader(), verbose=False)
    fit(module, [callback])
    assert not any(b.is_inference() for b in module.buffers())
    assert callback.report.epoch == 0


@with_each_observer
def test_after_fit_the_callback_can_be_copied_and_pickled_as_strategies_that_spawn_processes_do(observer):
    callback = observer()
    fit(Plain(), [callback])
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert len(twin.history) == 1
        assert torch.equal(twin.report.deadness["net.conv1"], callback.report.deadness["net.conv1"])


def disarm(module: Any) -> None:
    if isinstance(module, Explosive):
        module.where, module.net.drop.error = "nowhere", None


def assert_usable(module: Any) -> None:
    """It runs, learns, is copied and is stored like any module."""
    disarm(module)
    twin = copy.deepcopy(module)
    stored = io.BytesIO(pickle.dumps(module))
    x = torch.randn(2, 1, 6, 6)
    module.eval(), twin.eval()
    same = pickle.load(stored).eval()
    assert torch.equal(module(x), twin(x))
    assert torch.equal(module(x), same(x))
    fit(module.train())
