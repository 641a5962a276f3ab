"""The arguments that ``measure`` and the callbacks share, checked once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_neurons.criteria import CRITERIA, Criterion, resolve
from lightning_neurons.criteria.deadness import check_threshold, near_zero
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.data.batches import PerClass, targets_in
from lightning_neurons.errors import ArgumentError, check_choice
from lightning_neurons.layers.layer import Pattern
from lightning_neurons.measurement.losses import LOSS_REDUCTIONS, LossReduction

Inputs = Literal["clean", "fgsm"]


@dataclass(frozen=True)
class MeasurementSettings:
    """The checked arguments of ``measure`` and the callbacks. Build with ``checked``."""

    criteria: tuple[Criterion, ...]
    layers: tuple[Pattern, ...] | None
    per_class: PerClass
    threshold: float
    relative_threshold: bool
    normalize: Normalization
    inputs: Inputs
    eps: float
    loss_reduction: LossReduction

    @classmethod
    def checked(
        cls,
        *,
        criteria: Sequence[str | Criterion],
        layers: Sequence[Pattern] | None,
        per_class: PerClass,
        threshold: float,
        relative_threshold: bool,
        normalize: Normalization,
        inputs: Inputs,
        eps: float,
        loss_reduction: LossReduction,
    ) -> "MeasurementSettings":
        """Check every argument that can be checked without a model.

        Returns:
            The settings, with criteria in place of their names.

        Raises:
            ArgumentError: Naming the argument, what came and what is allowed.
        """
        check_choice("inputs", inputs, get_args(Inputs))
        check_threshold(eps, "eps")
        if (inputs == "fgsm") != (eps > 0):
            raise ArgumentError.of("eps", eps, 'a positive number with inputs="fgsm", and 0 with inputs="clean"')
        if not (isinstance(per_class, bool) or callable(per_class)):
            raise ArgumentError.of("per_class", per_class, "True, False or a function from a batch to its targets")
        if layers is not None and (isinstance(layers, str | type) or not len(layers)):
            raise ArgumentError.of("layers", layers, 'None for all layers, or a list such as ["net.conv*"]')
        for pattern in layers or ():
            if not isinstance(pattern, str) and not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
                raise ArgumentError.of("layers", pattern, "patterns of layer names, or subclasses of torch.nn.Module")
        if not isinstance(relative_threshold, bool):
            raise ArgumentError.of("relative_threshold", relative_threshold, "True or False")
        asked = near_zero(check_threshold(threshold), relative=relative_threshold)
        by_name = {c for c in criteria if isinstance(c, str)}  # a criterion of one's own has its own threshold
        return cls(
            criteria=tuple(asked if c.name == asked.name and c.name in by_name else c for c in resolve(criteria)),
            layers=None if layers is None else tuple(layers),
            per_class=per_class,
            threshold=float(threshold),
            relative_threshold=bool(relative_threshold),
            normalize=check_choice("normalize", normalize, get_args(Normalization)),  # type: ignore[arg-type]
            inputs=inputs,
            eps=float(eps),
            loss_reduction=check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS),  # type: ignore[arg-type]
        )

    @property
    def by_class(self) -> bool:
        """True if classes are kept apart."""
        return self.per_class is not False

    @property
    def may_fail(self) -> bool:
        """True if these may be at fault where nothing can be measured, rather than the model."""
        return self.by_class or self.inputs != "clean" or any(c.name not in CRITERIA for c in self.criteria)

    def targets(self, batch: Any) -> Tensor:
        """Return the class of each sample.

        Raises:
            MeasurementError: If the batch does not show them, or they are no class numbers.
        """
        return targets_in(batch, self.per_class)

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values, for reports and checkpoints."""
        names = [p if isinstance(p, str) else p.__name__ for p in self.layers or ()]
        return {
            "criteria": [c.name for c in self.criteria],
            "layers": names or None,
            "per_class": self.by_class,
            "threshold": self.threshold,
            "relative_threshold": self.relative_threshold,
            "normalize": self.normalize,
            "inputs": self.inputs,
            "eps": self.eps,
            "loss_reduction": self.loss_reduction,
        }
