"""What holds for every callback that the package exports, on modules that do what users' modules do.

A callback that is exported and has no line in ``CALLBACKS`` fails the first test.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_neurons import Distillation, Guard, NeuronPruningCallback, callbacks
from lightning_neurons.callbacks.pruning.part import Part
from lightning_neurons.callbacks.trainer.namespaces import EitherCallback
from lightning_neurons.report.logging.tags import TAGS
from tests.callbacks.modules import MemoryLogger, Net, Noisy, Plain, WithMetrics, fit, loader
from tests.callbacks.pruned import assert_equal, weights
from tests.callbacks.test_invisible import bits, state_of
from tests.callbacks.test_nothing_left import traces

CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "ActivationMaximizationCallback": lambda: callbacks.ActivationMaximizationCallback([0], steps=2, cards=0),
    "ActivationStatisticsCallback": lambda: callbacks.ActivationStatisticsCallback(),
    "ClassNeuronsCallback": lambda: callbacks.ClassNeuronsCallback(controls=1, max_samples=8),
    "NeuronAblationCallback": lambda: callbacks.NeuronAblationCallback(ends=1, max_samples=16),
    "NeuronPruningCallback": lambda: callbacks.NeuronPruningCallback("weight_l2", threshold=0.0),
    "NeuronSensitivityCallback": lambda: callbacks.NeuronSensitivityCallback(max_figures=0),
    "SaliencyCallback": lambda: callbacks.SaliencyCallback(max_samples=2),
}
FORMER_NAMES = {
    "ActivationMaximizationCallback": "found", "NeuronAblationCallback": "ablation", "SaliencyCallback": "found",
}  # fmt: skip
"""Where the result of a callback has been before it was at ``report``."""
OWN = tuple({tag.name.partition("/")[0] for tag in TAGS})
"""The groups of the series that callbacks write."""

every_callback = pytest.mark.parametrize("name", CALLBACKS)


class MetricOfTwoNames(WithMetrics):
    """A metric that is reached under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.all_metrics = nn.ModuleDict({"accuracy": self.accuracy})


class FastPath(Plain):
    """An encoder that torch runs by its fast path, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.arange(6).expand(len(x), 6) > 4
        return self.head(self.encoder(x[:, 0], src_key_padding_mask=padded)[:, 0])


class Transforms(Plain):
    """Gradients of single samples by ``torch.func``, in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        def output(x: Tensor) -> Tensor:
            return self.net.fc2(torch.relu(self.net.fc1(x))).sum()

        gradients = torch.func.vmap(torch.func.grad(output))(batch[0][:, 0, 0])
        self.log("steepness", gradients.norm())
        return super().validation_step(batch, batch_idx)


class OwnGradients(Plain):
    """Looks at the gradient of the loss with respect to its input, in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            self.loss((x, batch[1])).backward()
        self.zero_grad()
        self.log("steepness", x.grad.norm())
        return super().validation_step(batch, batch_idx)


class Adapts(Plain):
    """Trains in validation, by the Trainer's own optimizer, with a learning rate that falls."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.trainer.optimizers[0]
        with torch.enable_grad():
            optimizer.zero_grad()
            self.loss(batch).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
        self.trainer.adapted = getattr(self.trainer, "adapted", 0) + 1
        self.log("adapted", float(self.trainer.adapted))
        return super().validation_step(batch, batch_idx)


class Copies(Plain):
    """Runs a changed copy of its network, and stores it, in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        twin = pickle.loads(pickle.dumps(copy.deepcopy(self.net)))
        with torch.no_grad():
            twin.fc1.bias += 1
        self.log("shifted", nn.functional.cross_entropy(twin(batch[0]), batch[1]))
        return super().validation_step(batch, batch_idx)


class BackwardHooks(Plain):
    """Listens to gradients of its own."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.net.conv2, self.net.fc1):
            layer.register_full_backward_hook(lambda module, *_: None)


class WrittenOut(Plain):
    """Activation functions that are written out, in place."""

    class Net(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.conv1(x)).clamp(min=0)
            x = self.norm2(self.conv2(x))
            x = (x * (x > 0)).mean((2, 3))
            x = self.fc1(x)
            x[x < 0] = 0
            return self.fc2(x)

    def __init__(self) -> None:
        super().__init__(self.Net())


class KeepsAndReturns(Plain):
    """Any arguments, a dict of results, and a list of the class."""

    losses: list[float] = []  # noqa: RUF012 (this is what is tested)

    def validation_step(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        loss = self.loss(args[0])
        self.losses.append(float(loss))
        self.log("seen", float(len(self.losses)))
        return {"loss": loss, "size": torch.tensor(len(args[0][1]))}


MODULES: dict[str, Callable[[], Plain]] = {
    one.__name__: one
    for one in (
        Noisy, MetricOfTwoNames, FastPath, Transforms, OwnGradients, Adapts, Copies, BackwardHooks, WrittenOut,
        KeepsAndReturns,
    )
} | {"Averaged": Plain}  # fmt: skip


def run(kind: str, observers: list[L.Callback], epochs: int) -> dict[str, Any]:
    """Everything that could have changed."""
    L.seed_everything(0, verbose=False)
    KeepsAndReturns.losses.clear()
    module, logger = MODULES[kind](), MemoryLogger()
    averages = [EMAWeightAveraging(decay=0.5)] if kind == "Averaged" else []
    data = {"train": loader(16), "val": loader(16, seed=1)}
    settings = {"logger": logger, "max_epochs": epochs, "inference_mode": kind not in ("OwnGradients", "Adapts")}
    trainer = fit(module, [*averages, *observers], **settings, **data)
    found = state_of(trainer, module, logger)
    found["series"] = [row for row in logger.rows if not row[0].startswith(OWN)]
    found["of the class"] = list(KeepsAndReturns.losses)
    return bits(found) | {"left": traces(module)}


def test_every_exported_callback_is_tested():
    exported = {name: getattr(callbacks, name) for name in callbacks.__all__}
    assert CALLBACKS.keys() == {n for n, c in exported.items() if inspect.isclass(c) and issubclass(c, L.Callback)}


@every_callback
def test_no_hook_goes_through_more_than_two_classes_of_ours(name):
    own = [cls for cls in type(CALLBACKS[name]()).__mro__ if cls.__module__.startswith("lightning_neurons.")]
    assert len([cls for cls in own if cls is not EitherCallback]) <= 2


def test_parts_of_the_pruning_callback_are_final():
    parts = NeuronPruningCallback(
        amount=0.5, guard=Guard("val_acc", 0.1), check="ablation", distillation=Distillation()
    )._pruner.parts
    assert len(parts) == len(Part.__subclasses__()) == 4
    assert all(type(part).__mro__[1:] == (Part, object) and type(part).__final__ for part in parts)


@pytest.mark.filterwarnings("ignore:.*(nothing (has been|is) cut|cannot cut|nested tensors)")
@pytest.mark.parametrize("kind", MODULES)
def test_it_is_invisible_and_leaves_nothing(kind):
    wrong, alone = {}, {epochs: run(kind, [], epochs) for epochs in (1, 2)}
    for name, make in CALLBACKS.items():
        epochs = 1 + (name == "NeuronPruningCallback")  # which would cut when the second epoch begins
        found, expected = run(kind, [make()], epochs), alone[epochs]
        wrong[name] = [key for key in expected if found[key] != expected[key]]
    assert {name: keys for name, keys in wrong.items() if keys} == {}


@pytest.mark.filterwarnings("ignore:.*nothing (has been|is) cut")
@every_callback
def test_it_reports_is_copied_and_pickled_before_and_after_a_run_and_resumes(name, tmp_path):
    callback = CALLBACKS[name]()
    assert callback.report is None
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.state_key == callback.state_key
    L.seed_everything(0, verbose=False)
    data = {"train": loader(16), "val": loader(16, seed=1)}
    saver = L.Callback()
    saver.on_train_epoch_end = lambda trainer, _: trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
    fit(Plain(), [callback, saver], **data, max_epochs=2)
    assert callback.report is not None, "the result of a callback, whatever it measures"
    assert name not in FORMER_NAMES or getattr(callback, FORMER_NAMES[name]) is callback.report
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert bits(other.state_dict()) == bits(callback.state_dict())
    resumed, follower = Plain(), CALLBACKS[name]()
    fit(resumed, [follower], **data, ckpt=tmp_path / "0.ckpt", max_epochs=2)
    assert_equal(weights(resumed), _two_epochs())


@lru_cache
def _two_epochs() -> dict[str, Tensor]:
    L.seed_everything(0, verbose=False)
    module = Plain()
    fit(module, train=loader(16), val=loader(16, seed=1), max_epochs=2)
    return weights(module)
