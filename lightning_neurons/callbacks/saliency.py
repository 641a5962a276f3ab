"""Callback that shows saliency maps of the same few validation images, epoch after epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_neurons.attribution.objective import OF, Of, target_parts
from lightning_neurons.attribution.saliency import METHODS, SaliencyMethod, check_smoothing, saliency
from lightning_neurons.callbacks.observing.sampled_study import SampledStudy
from lightning_neurons.callbacks.trainer.checks import lightning_errors, name_of
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer, is_fast_dev_run
from lightning_neurons.callbacks.trainer.outlet import Outlet, numbered
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.callbacks.trainer.steps import forward_of
from lightning_neurons.data.batches import batch_size_of, inputs_of, map_tensors, rows_of, targets_of, tensors_of
from lightning_neurons.data.joining import form_of, join
from lightning_neurons.errors import ArgumentError, MeasurementError, check_choice, check_count, check_flag
from lightning_neurons.feature_visualization.settings import check_normalization, range_of
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.report.figures.drawing import MISSING_MATPLOTLIB, can_draw
from lightning_neurons.report.figures.images import saliency_rows
from lightning_neurons.report.logging.images import keep_picture, show_figure

_TAG = "saliency"

_Fixed = tuple[Any, Tensor | None]
"""Inputs, a tensor or a dict of tensors, and their labels if there are any."""


@dataclass(frozen=True, eq=False)
class SaliencyMaps:
    """Attributions of the fixed images.

    Attributes:
        inputs: The images, as the model takes them.
        maps: The saliency maps, in the shape of ``inputs``.
        targets: The class of each sample that the map explains.
    """

    inputs: Float[Tensor, "batch ..."] | Int[Tensor, "batch ..."]
    maps: Float[Tensor, "batch ..."]
    targets: Int[Tensor, " batch"] | None


class SaliencyCallback(SampledStudy):
    """Show saliency maps of a fixed set of validation images, during training.

    The images are chosen at the first measurement, spread over the data and the classes, and stay the same, also
    after a resume. They go to loggers that show figures or images, under ``saliency``, and the latest to
    ``pictures/saliency.png`` in the log directory. Works in ``fit`` and ``validate``; needs matplotlib to draw.

    Args:
        method: See ``saliency``.
        target: A class, ``("layer", neuron)`` or the name of a layer; None takes each sample's label, or its predicted
            class if the batch shows no labels.
        of: The output of a class to explain: its ``"logit"``, softmax ``"probability"`` or ``"loss"``.
        absolute: Show magnitudes; otherwise, values are signed.
        smoothing: Standard deviation of a Gaussian that blurs maps; see ``saliency`` for what that costs.
        layer: The layer of Grad-CAM.
        max_samples: Number of images.
        every_n_epochs: Epochs between studies during ``fit``.
        mean: Mean that the normalisation of the inputs subtracts, a number or one per channel, to show true colours.
        std: Standard deviation by which it divides, likewise.
        forward: From the module and inputs to logits; None takes the module's forward, or its one network if it has
            none.

    Attributes:
        report: The latest ``SaliencyMaps``, or None before the first.

    Raises:
        MisconfigurationException: If an argument is out of range (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import SaliencyCallback
        >>> callback = SaliencyCallback(method="smoothgrad", max_samples=6, every_n_epochs=5)
        >>> # trainer = Trainer(callbacks=[callback]); trainer.fit(module); callback.report.maps
    """

    def __init__(
        self,
        *,
        method: SaliencyMethod = "gradient",
        target: int | str | tuple[str, int] | None = None,
        of: Of = "logit",
        absolute: bool = False,
        smoothing: float = 0.0,
        layer: str | None = None,
        max_samples: int = 8,
        every_n_epochs: int = 1,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        forward: Forward | None = None,
    ) -> None:
        with lightning_errors():
            check_choice("method", method, METHODS)
            check_choice("of", of, OF)
            if layer is not None and method != "grad_cam":
                raise ArgumentError.of("layer", layer, f'None with method="{method}"; it belongs to "grad_cam"')
            if forward is not None and (not callable(forward) or isinstance(forward, nn.Module | type)):
                raise ArgumentError.of("forward", type(forward).__name__, "a function (module, inputs) -> logits")
            self.settings: dict[str, Any] = {
                "method": method, "of": of, "absolute": check_flag("absolute", absolute), "smoothing": smoothing,
                "layer": layer,
            }  # fmt: skip
            check_smoothing(smoothing)
            check_normalization(mean, std)
            if target is not None:
                target_parts(target)
            if layer is not None and not isinstance(layer, str):
                raise ArgumentError.of("layer", layer, "the name of a layer")
            self.target, self.mean, self.std, self.forward = target, mean, std, forward
            super().__init__(None, every_n_epochs, check_count("max_samples", max_samples, least=2))
        self.report: SaliencyMaps | None = None
        self._fixed: _Fixed | None = None

    @property
    def found(self) -> SaliencyMaps | None:
        """The report, under its former name."""
        return self.report

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; differs where settings differ."""
        shown = {"mean": self.mean, "std": self.std}
        plain = {**self.settings, **shown, "target": self.target, "max_samples": self.max_samples}
        return self._generate_state_key(**plain, every_n_epochs=self.every_n_epochs, forward=name_of(self.forward))

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the last study, and the fixed images with their labels."""
        inputs, labels = self._fixed or (None, None)
        return {**super().state_dict(), "inputs": inputs, "labels": labels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the epoch of the last study and the images from a checkpoint."""
        super().load_state_dict(state_dict)
        inputs = state_dict.get("inputs")
        self._fixed = None if inputs is None else (inputs, state_dict.get("labels"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any time has been spent."""
        super().setup(trainer, pl_module, stage)
        if not can_draw():
            self._warn(MISSING_MATPLOTLIB)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if no map was made."""
        if self.report is None and not is_fast_dev_run(trainer):
            self._warn("nothing has been measured")

    @property
    def _may_fail(self) -> bool:
        return self.forward is not None

    def _try(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> None:
        self.shown(self._maps(pl_module, _fixed_of(batches, 1), is_trial=True))

    def _study(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> tuple[_Fixed, SaliencyMaps]:
        fixed = self._fixed or _fixed_of(batches, self.max_samples)
        return fixed, self._maps(pl_module, fixed)

    def _maps(self, pl_module: LightningModule, fixed: _Fixed, *, is_trial: bool = False) -> SaliencyMaps:
        inputs, labels = fixed
        target = labels if self.target is None else self.target
        settings = dict(self.settings)
        if is_trial and settings["method"] == "integrated_gradients":
            settings["steps"] = 1
        on_device = map_tensors(inputs, lambda t: t.to(pl_module.device))
        maps = saliency(pl_module, on_device, target, forward=self.forward or forward_of(pl_module), **settings).cpu()
        explained = next(t for t in tensors_of(inputs) if t.shape == maps.shape)
        return SaliencyMaps(explained, maps, labels if self.target is None else None)

    def _take(self, found: tuple[_Fixed, SaliencyMaps]) -> None:
        self._fixed, self.report = found

    def _publish(self, trainer: Trainer, outlet: Outlet, found: tuple[_Fixed, SaliencyMaps]) -> None:
        if not can_draw():
            return
        name = f"{_TAG}{numbered(trainer, self, SaliencyCallback)}"
        figure = self.figure()
        show_figure(outlet.loggers, name + outlet.apart, figure, outlet.step)
        if outlet.folder is not None:
            when = f"after epoch {trainer.current_epoch}" if trainer.state.fn == "fit" else ""
            caption = f"{self.settings['method']} of the {self.settings['of']}, {when}".strip(", ")
            keep_picture(outlet.folder, name, figure, "Saliency", caption)

    def figure(self) -> Any:
        """Return the latest maps as a matplotlib figure, one row per image.

        Raises:
            MissingPackageError: If matplotlib is not installed.
        """
        assert self.report is not None, "something has been measured"
        labels = self.report.targets
        titles = [f"sample {i}" if labels is None else f"class {int(labels[i])}" for i in range(len(self.report.maps))]
        return saliency_rows(self.shown(self.report), self.report.maps, titles, absolute=self.settings["absolute"])

    def shown(self, found: SaliencyMaps) -> Tensor | None:
        """Return the images that are explained, in [0, 1]; None for tokens.

        Raises:
            ArgumentError: If ``mean`` or ``std`` do not fit it.
        """
        if not found.inputs.is_floating_point():
            return None
        low, high = found.inputs.float().aminmax()
        spread = None if low < high else (float(low) - 0.5, float(low) + 0.5)  # nothing to see, and no reason to fail
        valid = range_of(spread, self.mean, self.std, "clip", [found.inputs], found.inputs.shape[1])
        return valid.shown(valid.pictures(found.inputs.float()))


def _fixed_of(batches: Sequence[Any], most: int) -> _Fixed:
    """Join the first samples of some batches.

    Returns:
        Inputs and labels of at most ``most`` samples, copies on the CPU; None for the labels if a batch has none.
    """
    inputs, labels = [inputs_of(batch) for batch in batches], [targets_of(batch) for batch in batches]
    if not all(isinstance(one, Tensor | dict) and form_of(one) == form_of(inputs[0]) for one in inputs):
        raise MeasurementError(
            f"batch of type {type(batches[0]).__name__}: expected (inputs, labels), or a dict with inputs and labels, "
            "of one shape in all batches; saliency() takes others"
        )
    sizes = [batch_size_of(one) for one in inputs]
    known = [one for one in labels if one is not None]
    first = rows_of(join(inputs, sizes), torch.arange(min(most, sum(sizes))), sum(sizes))
    first = map_tensors(first, lambda t: t.detach().to("cpu", copy=True))
    return first, torch.cat(known)[:most].cpu().clone() if len(known) == len(labels) else None
