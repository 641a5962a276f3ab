"""Callback that makes images which excite classes and neurons, during training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_neurons.attribution.objective import logits_of, objective_of, target_parts
from lightning_neurons.callbacks.observing.observer import NeuronObserver
from lightning_neurons.callbacks.observing.sampled_study import SampledStudy
from lightning_neurons.callbacks.trainer.checks import is_unfinished, lightning_errors, name_of
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer, callbacks_of, is_fast_dev_run
from lightning_neurons.callbacks.trainer.outlet import Outlet, numbered
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.callbacks.trainer.steps import forward_of
from lightning_neurons.data.batches import inputs_of
from lightning_neurons.errors import ArgumentError, MeasurementError, check_choice, check_count, check_seed
from lightning_neurons.feature_visualization.maximize import Target, maximized, objectives_of
from lightning_neurons.feature_visualization.parametrization import ParametrizationKind
from lightning_neurons.feature_visualization.result import MaximizedActivation
from lightning_neurons.feature_visualization.settings import MaximizationSettings, check_normalization, range_of
from lightning_neurons.feature_visualization.value_range import Validity
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.report.figures.drawing import MISSING_MATPLOTLIB, can_draw
from lightning_neurons.report.logging.cards import Chosen, chosen_neurons, neuron_cards, show_cards, show_maximized
from lightning_neurons.results.neuron_card import NeuronCard
from lightning_neurons.results.neuron_report import NeuronReport

_MOST_CLASSES = 10


@dataclass(frozen=True, eq=False)
class _Found:
    maximized: MaximizedActivation
    cards: tuple[NeuronCard, ...]


class ActivationMaximizationCallback(SampledStudy):
    """Make images that excite classes, and cards of the neurons that stand out in a measurement.

    With a ``NeuronSensitivityCallback`` (or any other that measures neurons) in the same Trainer, each measurement
    yields a card for its most important, least important and newly dead neurons: the validation images that excite
    the neuron most, one that was made to, and its numbers. Images go to loggers that show figures or images, under
    ``maximization`` and ``cards/...``, and the latest to ``pictures/`` in the log directory. Works in ``fit`` and
    ``validate``; needs matplotlib to draw.

    Args:
        targets: Targets to maximise, each as for ``maximize_activation``; None takes the first ten classes.
        cards: Number of neurons of each kind that get a card.
        of: The output of a class to maximise: its ``"logit"`` or softmax ``"probability"``.
        value_range: Least and largest value of a valid image; those of the sample if None.
        mean: Mean that the normalisation of the inputs subtracts, a number or one per channel.
        std: Standard deviation by which it divides, likewise.
        parametrization: As in ``maximize_activation``.
        validity: As in ``maximize_activation``.
        steps: As in ``maximize_activation``.
        learning_rate: As in ``maximize_activation``.
        total_variation: As in ``maximize_activation``.
        l2: As in ``maximize_activation``.
        seed: A single seed, as in ``maximize_activation``.
        max_samples: Number of validation images to compare with, spread over the data and over the classes.
        every_n_epochs: Epochs between studies during ``fit``.
        forward: From the module and inputs to logits; None takes the module's forward, or its one network if it has
            none.

    Attributes:
        report: The latest ``MaximizedActivation``, of ``targets`` and of the neurons on cards; None before the first.
        cards: The latest cards.

    Raises:
        MisconfigurationException: If an argument is out of range (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import ActivationMaximizationCallback
        >>> callback = ActivationMaximizationCallback(targets=[3, ("net.conv2", 7)], every_n_epochs=5)
        >>> # trainer = Trainer(callbacks=[callback]); trainer.fit(module); callback.report.images
    """

    def __init__(
        self,
        targets: Sequence[Target] | None = None,
        *,
        cards: int = 2,
        of: Literal["logit", "probability"] = "logit",
        value_range: tuple[float, float] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        parametrization: ParametrizationKind | None = None,
        validity: Validity = "sigmoid",
        steps: int = 128,
        learning_rate: float | None = None,
        total_variation: float = 0.0,
        l2: float = 0.0,
        seed: int = 0,
        max_samples: int = 256,
        every_n_epochs: int = 1,
        forward: Forward | None = None,
    ) -> None:
        with lightning_errors():
            self.settings = MaximizationSettings(parametrization, validity, steps, learning_rate, total_variation, l2)
            check_choice("of", of, ("logit", "probability"))
            self.targets = None if targets is None else _listed(targets)
            self.number_of_cards = check_count("cards", cards, least=0)
            self.seeds = (check_seed("seed", seed),)
            check_normalization(mean, std)
            self.of: Literal["logit", "probability"] = of
            self.value_range, self.mean, self.std, self.forward = value_range, mean, std, forward
            if value_range is not None:
                range_of(value_range, None, None, validity, [], 1)
            if forward is not None and (not callable(forward) or isinstance(forward, nn.Module | type)):
                raise ArgumentError.of("forward", type(forward).__name__, "a function (module, inputs) -> logits")
            super().__init__(None, every_n_epochs, max_samples)
        self.report: MaximizedActivation | None = None
        self.cards: tuple[NeuronCard, ...] = ()

    @property
    def found(self) -> MaximizedActivation | None:
        """The report, under its former name."""
        return self.report

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; differs where settings differ."""
        names = ("targets", "of", "seeds", "value_range", "mean", "std", "max_samples", "every_n_epochs")
        plain = {name: getattr(self, name) for name in names}
        return self._generate_state_key(
            **plain, **vars(self.settings), cards=self.number_of_cards, forward=name_of(self.forward)
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any time has been spent."""
        super().setup(trainer, pl_module, stage)
        if not can_draw():
            self._warn(MISSING_MATPLOTLIB)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse targets that the module does not have."""
        super().on_fit_start(trainer, pl_module)
        if self.targets is not None and not is_unfinished(pl_module):
            with lightning_errors():
                objectives_of(pl_module, self.targets, "logit")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the images wait for ``on_validation_end``, when all callbacks have made their reports."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the images."""
        super().on_validation_epoch_end(trainer, pl_module)
        super().on_validation_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if no image was made."""
        if self.report is None and not is_fast_dev_run(trainer):
            self._warn("nothing has been measured")

    @property
    def _may_fail(self) -> bool:
        return self.forward is not None

    def _try(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> None:
        self._maximized(pl_module, batches, MaximizationSettings(**{**vars(self.settings), "steps": 1}), ())

    def _study(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> _Found:
        report, died = _measured_now(replay.trainer)
        chosen = [] if report is None else chosen_neurons(report, died, self.number_of_cards)
        found = self._maximized(pl_module, batches, self.settings, chosen)
        pictures = torch.cat([_picture_in(batch)[1].cpu() for batch in batches])
        return _Found(found, neuron_cards(found, chosen, report, pictures))

    def _maximized(
        self, pl_module: LightningModule, batches: list[Any], settings: MaximizationSettings, chosen: Sequence[Chosen]
    ) -> MaximizedActivation:
        images = [_picture_in(batch)[1] for batch in batches]
        key, own = _picture_in(batches[0])[0], self.forward or forward_of(pl_module)

        def forward(module: nn.Module, inputs: Tensor) -> Any:
            return own(module, inputs if key is None else {key: inputs})

        targets = self.targets
        if targets is None:
            targets = list(range(min(logits_of(forward(pl_module, images[0][:1])).shape[1], _MOST_CLASSES)))
        objectives = [
            *(
                objective_of(pl_module, one, self.of if not isinstance(one, str | tuple) else "logit")
                for one in targets
            ),
            *(objective_of(pl_module, (one.layer, one.neuron)) for one in chosen),
        ]
        return maximized(
            pl_module, objectives, settings, self.seeds, input_shape=None, value_range=self.value_range, mean=self.mean,
            std=self.std, images=images, forward=forward,
        )  # fmt: skip

    def _take(self, found: _Found) -> None:
        self.report, self.cards = found.maximized, found.cards

    def _publish(self, trainer: Trainer, outlet: Outlet, found: _Found) -> None:
        if not can_draw():
            return
        loggers, step, folder, apart = outlet
        count = len(found.maximized.targets) - len(found.cards)
        suffix = numbered(trainer, self, ActivationMaximizationCallback)
        show_maximized(loggers, folder, found.maximized, count, step, f"maximization{suffix}", apart)
        show_cards(loggers, folder, found.cards, step, f"cards{suffix}", apart)


def _measured_now(trainer: Trainer) -> tuple[NeuronReport | None, Mapping[str, list[int]]]:
    """Return the report of this validation, if a callback made one, and the neurons that died since the last report."""
    for one in callbacks_of(trainer):
        if isinstance(one, NeuronObserver) and one.publishes and one._report is not None:
            if trainer.state.fn != "fit" and one._report.epoch is None:
                return one._report, {}
            if (one._report.epoch, one._report.step) == (trainer.current_epoch, trainer.global_step):
                return one._report, one.history.entries[-1].died
    return None, {}


def _picture_in(batch: object) -> tuple[Any, Tensor]:
    """Return the single tensor of inputs, and its key if they are a dict.

    Raises:
        MeasurementError: If there is none, or it cannot be optimised.
    """
    inputs = inputs_of(batch)
    found = list(inputs.items()) if isinstance(inputs, dict) else [(None, inputs)]
    key, tensor = found[0]
    if len(found) != 1 or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        types = [str(t.dtype) if isinstance(t, Tensor) else type(t).__name__ for _, t in found]
        raise MeasurementError(
            f"inputs of {', '.join(types)}: what is optimised is one tensor of floating point, in (inputs, labels) or "
            "a dict; tokens cannot be, SaliencyCallback explains them"
        )
    return key, tensor


def _listed(targets: object) -> list[Any]:
    """Return targets as a list.

    Raises:
        ArgumentError: If it is no list, or an empty one.
    """
    if isinstance(targets, str) or not isinstance(targets, Sequence | range) or not targets:
        raise ArgumentError.of("targets", targets, 'a list of targets such as [3, ("net.conv2", 7)], or None')
    for target in targets:
        target_parts(target, "targets")
    return list(targets)
