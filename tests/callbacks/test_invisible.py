"""A run with a callback that observes is, bit by bit, the run without it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import lightning as L  # noqa: N812
import numpy as np
import pytest
import torch
from torchmetrics import Metric

from lightning_neurons import NeuronSensitivityCallback, callbacks
from lightning_neurons.callbacks.observing.observer import NeuronObserver
from tests.callbacks import modules
from tests.callbacks.modules import MemoryLogger, Plain, WithMetrics, fit, loader, trainer_of

OBSERVERS = [callbacks.ActivationStatisticsCallback, callbacks.NeuronSensitivityCallback]

VARIANTS: dict[str, Callable[[], NeuronObserver]] = {
    "source=train": lambda: NeuronSensitivityCallback(source="train", max_samples=20),
    "source=train with loss_fn": lambda: NeuronSensitivityCallback(source="train", loss_fn=lambda m, b: m.loss(b)),
    "inputs=fgsm": lambda: NeuronSensitivityCallback(inputs="fgsm", eps=0.1),
    "per_class": lambda: NeuronSensitivityCallback(per_class=True, max_samples=10),
    "second_order_ggn": lambda: NeuronSensitivityCallback(criteria=["gradient", "second_order_ggn"]),
    "every second epoch": lambda: NeuronSensitivityCallback(every_n_epochs=2),
}


@dataclass(frozen=True)
class Scenario:
    module: Callable[[], Any] = WithMetrics
    trainer: dict[str, Any] = field(default_factory=dict)
    compiled: str | None = None
    val_loaders: int = 1


SCENARIOS = {
    "fp32": Scenario(),
    "bf16-mixed": Scenario(trainer={"precision": "bf16-mixed"}),
    "accumulated gradients": Scenario(trainer={"accumulate_grad_batches": 2}),
    "validation twice an epoch": Scenario(trainer={"val_check_interval": 0.5}),
    "torch.compile(net)": Scenario(compiled="function"),
    "net.compile()": Scenario(compiled="method"),
    "several validation dataloaders": Scenario(module=modules.SeveralLoaders, val_loaders=2),
    "no sanity check": Scenario(trainer={"num_sanity_val_steps": 0}),
    "gradient clipping": Scenario(trainer={"gradient_clip_val": 0.1}),
} | {
    module.__name__: Scenario(module=module)
    for module in (
        Plain, modules.ReturnsNone, modules.ReturnsDict, modules.Noisy, modules.PartlyFrozen, modules.Manual,
        modules.LogsDirectly,
    )
}  # fmt: skip


def run(scenario: Scenario, observers: list[NeuronObserver]) -> dict[str, Any]:
    """Everything that could have changed, as bytes."""
    torch._dynamo.reset()
    L.seed_everything(0, verbose=False)
    module, logger = scenario.module(), MemoryLogger()
    if scenario.compiled == "function":
        module.net = torch.compile(module.net, backend="eager")
    if scenario.compiled == "method":
        module.net.compile(backend="eager")
    val = [loader(24, seed=1 + i) for i in range(scenario.val_loaders)]
    trainer = fit(module, observers, val=val, logger=logger, max_epochs=2, **scenario.trainer)
    assert all(observer.report is not None for observer in observers)
    return bits(state_of(trainer, module, logger))


def state_of(trainer: Any, module: Any, logger: MemoryLogger) -> dict[str, Any]:
    return {
        "random states": (torch.get_rng_state(), np.random.get_state()[1:], random.getstate()),
        "weights and buffers": module.state_dict(),
        "gradients": [p.grad for p in module.parameters()],
        "optimizer": trainer.optimizers[0].state_dict() if trainer.optimizers else None,
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "series": [row for row in logger.rows if not row[0].startswith(("neurons/", "neurons_"))],
        "plain attributes": {n: v for n, v in vars(module).items() if n in ("outs", "steps_seen")},
        "metric states": {
            n: {**m.metric_state, "updates": m._update_count}
            for n, m in module.named_modules()
            if isinstance(m, Metric)
        },
        "metric results": module.forever.compute() if isinstance(module, WithMetrics) else None,
        "steps": trainer.global_step,
    }


def bits(value: Any) -> Any:
    """Equal if and only if every tensor and number is the same, bit by bit."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(v) for key, v in value.items()}
    return [bits(v) for v in value] if isinstance(value, list | tuple) else repr(value)


@lru_cache
def without(name: str) -> dict[str, Any]:
    return run(SCENARIOS[name], [])


WATCHED = [*((callbacks.NeuronSensitivityCallback, name) for name in SCENARIOS),
           *((callbacks.ActivationStatisticsCallback, name) for name in [*SCENARIOS][::2])]  # fmt: skip
VARIED = ["fp32", "bf16-mixed", "Noisy", "Manual", "net.compile()", "validation twice an epoch"]
"""Two of them for each variant, and two variants for each of them."""


@pytest.mark.parametrize("observer, name", WATCHED)
def test_training_with_a_callback_is_bitwise_training_without_it(observer, name):
    assert run(SCENARIOS[name], [observer()]) == without(name)


@pytest.mark.parametrize(
    "name, variant",
    [(VARIED[(place + step) % len(VARIED)], variant) for place, variant in enumerate(VARIANTS) for step in (2, 5)],
)
def test_no_argument_makes_a_callback_visible(name, variant):
    assert run(SCENARIOS[name], [VARIANTS[variant]()]) == without(name)


def test_all_callbacks_together_are_invisible():
    every = [*(observer() for observer in OBSERVERS), *(VARIANTS[v]() for v in ("source=train", "per_class"))]
    assert run(SCENARIOS["fp32"], every) == without("fp32")


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("stage, module_type", [("validate", WithMetrics), ("test", modules.Noisy)])
def test_evaluating_with_a_callback_gives_the_same_results(module_type, stage, observer):
    def evaluate(observers: list[NeuronObserver]) -> Any:
        L.seed_everything(0, verbose=False)
        module, logger = module_type(), MemoryLogger()
        trainer = trainer_of(observers, logger=logger)
        results = getattr(trainer, stage)(module, loader(24, seed=1), verbose=False)
        return bits([results, state_of(trainer, module, logger)])

    assert evaluate([observer()]) == evaluate([])
