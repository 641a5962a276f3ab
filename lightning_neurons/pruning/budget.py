"""The budget of a cut: the criterion, how much to remove, from where, and what must stay."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_neurons.criteria import CRITERIA, Criterion, resolve
from lightning_neurons.criteria.deadness import SILENT, check_threshold, near_zero
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.errors import (
    ArgumentError,
    UnknownNameError,
    check_choice,
    check_count,
    check_share,
    is_number,
)

Scope = Literal["global", "block", "layer"]
Aggregate = Literal["mean", "sum", "max"]
Agreement = Literal["mean", "all"]

_RULES = ("amount", "target_params", "target_macs", "threshold")


@dataclass(frozen=True)
class PruningBudget:
    """The amount to remove, by exactly one of ``amount``, ``target_params``, ``target_macs`` and ``threshold``.

    Attributes:
        criterion: A name, a ``Criterion``, ``"deadness"`` (the measure ``near_zero``), ``"reconstruction"`` (the
            error that downstream layers cannot make up for), or ``"random"``, the control.
        amount: The share of neurons to remove; coupled neurons count once.
        target_params: The share of parameters that may stay.
        target_macs: The share of multiply-accumulate operations that may stay.
        threshold: Remove what is at least so dead, or for other criteria at most so important; for
            ``"reconstruction"``, as long as downstream layers lose at most this share of their variance.
        scope: Whether only neurons of one ``"layer"`` compete (each layer then loses the same share), those of a
            ``"block"``, or those of the whole model, ``"global"``. None is ``"layer"``; with ``"reconstruction"`` it is
            ``"layer"`` or ``"global"``, whichever has the lower loss on the calibration data.
        aggregate: The reduction of the scores of coupled layers to one: ``"mean"``, ``"sum"`` or ``"max"``.
        agreement: ``"all"`` removes a coupled neuron only where every layer of its group agrees: the layer that needs
            it most decides, and with ``amount`` it must be in the lowest share of every layer.
        normalize: The normalization of each layer's scores. None divides by the L2 norm, except for what is
            comparable as it is: deadness, and criteria in units of the loss.
        min_neurons: Smallest number of neurons that a layer keeps.
        max_amount: The largest share that a layer may lose, of its original width.
        round_to: Widths become multiples of this.
        ignore: Patterns of layers that keep all their neurons, and so do those that are coupled with them.
        activation_threshold: For ``"deadness"``: what counts as silent, in units of the layer's root mean square.
        relative_threshold: False takes ``activation_threshold`` in activation units.

    Raises:
        ArgumentError: If not exactly one rule is given, or a value is out of range.

    Example:
        >>> PruningBudget("weight_l2", target_macs=0.5).rule
        ('target_macs', 0.5)
    """

    criterion: str | Criterion = "fisher"
    amount: float | None = None
    target_params: float | None = None
    target_macs: float | None = None
    threshold: float | None = None
    scope: Scope | None = None
    aggregate: Aggregate = "mean"
    agreement: Agreement = "mean"
    normalize: Normalization | None = None
    min_neurons: int = 1
    max_amount: float = 1.0
    round_to: int = 1
    ignore: Sequence[str] = ()
    activation_threshold: float = SILENT
    relative_threshold: bool = True

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _RULES if getattr(self, name) is not None}
        if len(given) != 1:
            raise ArgumentError.of("budget", given, f"exactly one of {', '.join(_RULES)}")
        for name in ("amount", "target_params", "target_macs"):
            value = getattr(self, name)
            if value is not None:
                check_share(name, value, zero=False)
        if self.scope is not None:
            check_choice("scope", self.scope, get_args(Scope))
        check_choice("aggregate", self.aggregate, get_args(Aggregate))
        check_choice("agreement", self.agreement, get_args(Agreement))
        if self.normalize is not None:
            check_choice("normalize", self.normalize, get_args(Normalization))
        check_count("min_neurons", self.min_neurons)
        check_count("round_to", self.round_to)
        check_share("max_amount", self.max_amount, zero=False)
        check_threshold(self.activation_threshold, "activation_threshold")
        if not isinstance(self.relative_threshold, bool):
            raise ArgumentError.of("relative_threshold", self.relative_threshold, "True or False")
        listed = isinstance(self.ignore, Sequence) and not isinstance(self.ignore, str)
        if not listed or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise ArgumentError.of("ignore", self.ignore, 'a list of patterns of layers, such as ["net.stem*"]')
        self._check_criterion()

    def _check_criterion(self) -> None:
        criterion = self.measured
        if self.threshold is None:
            return
        if not is_number(self.threshold) or math.isnan(self.threshold):
            raise ArgumentError.of("threshold", self.threshold, "a number")
        if self.criterion == "random":
            raise ArgumentError.of(
                "threshold", self.threshold, "amount, target_params or target_macs with random scores"
            )
        if self.by_reconstruction and self.threshold < 0:
            raise ArgumentError.of("threshold", self.threshold, "a share of the variance of at least 0")
        if criterion is not None and criterion.kind == "deadness" and not 0 < self.threshold <= 1:
            raise ArgumentError.of("threshold", self.threshold, "a deadness in (0, 1]; 1 removes what never fires")

    @property
    def rule(self) -> tuple[str, float]:
        """The one rule that is given, and its value."""
        return next((name, float(getattr(self, name))) for name in _RULES if getattr(self, name) is not None)

    @property
    def measured(self) -> Criterion | None:
        """The criterion that has to be measured, or None for random scores and reconstruction."""
        if isinstance(self.criterion, str):
            if self.criterion in ("random", "reconstruction"):
                return None
            if self.criterion in ("deadness", "near_zero"):
                return near_zero(self.activation_threshold, relative=self.relative_threshold)
            if self.criterion not in CRITERIA:
                raise UnknownNameError.among(
                    "criterion", self.criterion, ["deadness", "random", "reconstruction", *CRITERIA]
                )
        return resolve([self.criterion], name="criterion")[0]

    @property
    def label(self) -> str:
        """The criterion's name."""
        return str(self.criterion) if self.measured is None else self.measured.name

    @property
    def by_reconstruction(self) -> bool:
        """True if the criterion is the error that downstream layers cannot make up for."""
        return self.criterion == "reconstruction"

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes to choose from."""
        if self.scope is not None:
            return (self.scope,)
        return ("layer", "global") if self.by_reconstruction and self.threshold is None else ("layer",)

    @property
    def by_deadness(self) -> bool:
        """True if the most silent neurons are removed, rather than the least important ones."""
        return self.measured is not None and self.measured.kind == "deadness"

    @property
    def normalization(self) -> Normalization:
        """The normalization that makes layers comparable."""
        if self.normalize is not None:
            return self.normalize
        criterion = self.measured
        comparable = criterion is None or criterion.in_loss_units or criterion.kind == "deadness"
        # A threshold is meant in the criterion's own units, and within a layer nothing has to be compared.
        return "none" if comparable or self.threshold is not None or self.scopes == ("layer",) else "l2"

    def at(self, progress: float) -> "PruningBudget":
        """Return the budget that is due after a round: ``progress`` of the share to be removed."""
        name, value = self.rule
        if name == "threshold" or progress >= 1:
            return self
        due = value * progress if name == "amount" else 1 - (1 - value) * progress
        return replace(self, **{name: due})  # type: ignore[arg-type]

    def ignores(self, layers: Sequence[str]) -> set[str]:
        """Return the layers that keep all their neurons.

        Raises:
            UnknownNameError: If a pattern matches no layer; names the nearest.
        """
        found: set[str] = set()
        for pattern in self.ignore:
            matching = {n for n in layers if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
            if not matching:
                raise UnknownNameError.among("ignore", pattern, layers)
            found |= matching
        return found
