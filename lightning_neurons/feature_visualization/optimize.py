"""The loop that optimises images for an objective, with regularisers that keep them smooth and near grey."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_neurons.attribution.objective import Objective
from lightning_neurons.attribution.readout import Readout
from lightning_neurons.attribution.smoothing import gaussian_blur
from lightning_neurons.errors import MeasurementError
from lightning_neurons.feature_visualization.parametrization import Latent, Parametrization, ParametrizationKind
from lightning_neurons.feature_visualization.settings import LEARNING_RATES, MaximizationSettings
from lightning_neurons.feature_visualization.transforms import Robustness
from lightning_neurons.feature_visualization.value_range import Range


def total_variation(shown: Latent) -> Float[Tensor, " row"]:
    """Return the mean magnitude of the difference between neighbours, summed over axes.

    Args:
        shown: Images in [0, 1].

    Returns:
        One value per image, in units of the range.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
        tensor([1.])
    """
    axes = [axis for axis in range(2, shown.ndim) if shown.shape[axis] > 1]
    parts = [shown.diff(dim=axis).abs().flatten(1).mean(1) for axis in axes]
    return torch.stack(parts).sum(0) if parts else shown.new_zeros(len(shown))


def distance_from_grey(shown: Latent) -> Float[Tensor, " row"]:
    """Return the mean square of the distance from the middle of the range.

    Args:
        shown: Images in [0, 1].

    Returns:
        One value per image, in units of the squared range.

    Example:
        >>> distance_from_grey(torch.tensor([[[0.5, 1.0]]]))
        tensor([0.1250])
    """
    return (shown - 0.5).square().flatten(1).mean(1)


_STEPS_PER_BLUR = 4


@dataclass
class Ascent:
    """Gradient ascent on one objective for each row of a batch; rows do not influence one another.

    Attributes:
        readout: The model, open.
        objectives: The objective of each row.
        settings: The settings of the optimisation.
        kind: The parametrization's name.
        parametrization: From the values that are optimised to images, and back.
        range: The values that images may have.
        robustness: The random movements of images.
    """

    readout: Readout
    objectives: Sequence[Objective]
    settings: MaximizationSettings
    kind: ParametrizationKind
    parametrization: Parametrization
    range: Range
    robustness: Robustness

    def __post_init__(self) -> None:
        self.trajectory: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.stopped: dict[int, int] = {}
        """By row, the step at which its values were no longer finite."""

    def run(self, raw: Tensor, generators: Sequence[torch.Generator]) -> tuple[Latent, Float[Tensor, " row"]]:
        """Take all steps from a start.

        Returns:
            The images ``(row, channel, *space)``, and the objective of each row on its own image, in units of
            activations.
        """
        settings = self.settings
        draws = self.robustness.draws(generators, settings.steps)
        self._rows = {
            objective: torch.tensor([other == objective for other in self.objectives], device=raw.device)
            for objective in self.objectives
        }
        self._odds = torch.tensor([objective.climbed != objective for objective in self.objectives], device=raw.device)
        raw = raw.requires_grad_()
        good = raw.detach().clone()
        rate = LEARNING_RATES[self.kind] if settings.learning_rate is None else settings.learning_rate
        optimizer = (torch.optim.NAdam if self.kind == "maco" else torch.optim.Adam)([raw], lr=rate)
        kept = self._kept_steps()
        for step in range(settings.steps):
            if step in kept:
                self.frames.append(self.pictures(raw).cpu())
            values, raw.grad = self._gradient(raw, draws[step])
            self.trajectory.append(self._as_read(values.detach()).cpu())
            fine = self._fine_rows(values.detach().isfinite() & raw.grad.flatten(1).isfinite().all(1), step)
            good[fine] = raw.detach()[fine]
            raw.grad[~fine] = 0
            optimizer.step()
            with torch.no_grad():
                self._constrain(raw, step)
                raw[~fine] = good[~fine]
            if not bool(fine.any()):
                break
        images = self.pictures(raw)
        reached = self.read(images)
        fine = self._fine_rows(reached.isfinite(), settings.steps)
        if not bool(fine.all()):
            images = self.pictures(raw.detach().where(fine.view(-1, *[1] * (raw.ndim - 1)), good))
            reached = self.read(images)
        if settings.frames:
            self.frames.append(images.cpu())
        return images, reached

    def pictures(self, raw: Tensor) -> Latent:
        """Return the valid images that parameters describe."""
        return self.range.valid(self.parametrization.decode(raw.detach()))

    def read(self, images: Latent) -> Float[Tensor, " row"]:
        """Return the objective of each row on its image."""
        with torch.no_grad():
            return self._read(images, climbing=False)

    def _kept_steps(self) -> set[int]:
        count = min(self.settings.frames - 1, self.settings.steps)
        return {i * self.settings.steps // count for i in range(count)} if count > 0 else set()

    def _gradient(self, raw: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        images = self.range.valid(self.parametrization.decode(raw))
        values = self._read(self.robustness.applied(images, draws), climbing=True)
        objective = values.sum()
        if self.settings.total_variation:
            objective = objective - self.settings.total_variation * total_variation(self.range.shown(images)).sum()
        if self.settings.l2:
            objective = objective - self.settings.l2 * distance_from_grey(self.range.shown(images)).sum()
        if not values.requires_grad:
            raise MeasurementError(
                "target: it does not depend on the inputs by anything that can be differentiated (does the model "
                "detach them, or run under no_grad?)"
            )
        return values, torch.autograd.grad(-objective, raw)[0]

    def _read(self, images: Latent, *, climbing: bool) -> Float[Tensor, " row"]:
        parameter = next(self.readout.model.parameters(), images)
        inputs = self.range.inputs(images).to(parameter.dtype)
        outputs, activations = self.readout(inputs)
        before = self.readout.capture.before if climbing and self.readout.capture is not None else None
        values: Tensor = images.new_zeros(len(images))
        for objective, mine in self._rows.items():
            wanted = objective.climbed if climbing else objective
            read = wanted.read(outputs, activations, self.readout.layers, len(images), before=before)
            values = torch.where(mine, read.to(values.dtype), values)
        return values

    def _as_read(self, climbed: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return values that were maximised in the units of the objectives."""
        return torch.where(self._odds, climbed.sigmoid(), climbed)

    def _fine_rows(self, finite: Bool[Tensor, " row"], step: int) -> Bool[Tensor, " row"]:
        """Return the rows that have been finite up to this step."""
        for row in (~finite).nonzero().flatten().tolist():
            self.stopped.setdefault(row, step)
        fine = torch.ones_like(finite)
        fine[list(self.stopped)] = False
        return fine

    def _constrain(self, raw: Tensor, step: int) -> None:
        """Blur now and then, and clip, after a step."""
        if self.settings.blur and (step + 1) % _STEPS_PER_BLUR == 0:
            latent = self.parametrization.decode(raw)
            raw.copy_(self.parametrization.encode(gaussian_blur(latent, self.settings.blur)))
        if self.range.validity == "clip" and self.kind != "maco":  # whose magnitudes are fixed: clipped when shown
            raw.copy_(self.range.projected(raw, self.parametrization))
