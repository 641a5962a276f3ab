"""Trial of training steps on copies before a cut: training may run what validation does not.

An auxiliary head, a penalty on features, a copy of weights or a mask for gradients reads neurons, and only training
knows, perhaps only from some epoch on, or with every fifth batch. So steps with their backward, and the hooks around
them, are run at several later moments on a copy without the neurons of a cut and on one in which these are
zero: what runs there must run here, and the gradients of all that stays must be the same. Norm layers over few values
and activations with a kink can magnify rounding to a difference, so what differs is run again in double precision,
where that is possible.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor, nn

from lightning_neurons.callbacks.pruning.gradient_comparison import (
    NOTHING,
    UNLIKE,
    Comparison,
    Gradients,
    compared,
)
from lightning_neurons.callbacks.pruning.moments import Moment, moments_to_come, moving
from lightning_neurons.callbacks.pruning.stand_ins import nothing, stand_in
from lightning_neurons.callbacks.pruning.training_course import Course, HookError
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer, callbacks_of
from lightning_neurons.callbacks.trainer.processes import in_one_process
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.callbacks.trainer.steps import takes_iterator
from lightning_neurons.data.batches import map_tensors
from lightning_neurons.errors import in_short
from lightning_neurons.isolation.isolation import differentiable
from lightning_neurons.isolation.surroundings import silent, writing_nothing
from lightning_neurons.isolation.user_code import Users, is_framework
from lightning_neurons.layers.layer import public_name
from lightning_neurons.pruning.structure.example import twin_of
from lightning_neurons.pruning.structure.norm_streams import Norms, narrowed
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut, stays_of
from lightning_neurons.replay.same_draws import SameDraws, alike_of

_FINE, _TOLERANCE, _COARSE = 1e-4, 1e-2, 1e-1
"""Tolerance of differences, as a share of a parameter's largest gradient: what rounding in float32 seldom reaches, what
it may reach, and what it may reach in lower precision. A part of the loss with a small weight differs by less than
that; so a difference that is the same in double precision is not taken for rounding."""

BATCHES = 2
"""Number of batches kept of an epoch, and the least number of steps tried: every second one may do something else."""

_STEP = {"training_step", "backward"}
"""Hooks without which a trial is impossible."""


@dataclass(frozen=True)
class _Outcome:
    """The gradients and calls of one run.

    Attributes:
        gradients: The gradients by parameter, at each step of an optimizer.
        draws: The shapes of all random numbers.
        calls: By moment, the functions that were called.
        moved: Parameters that have other values, although no optimizer has stepped.
    """

    gradients: list[Gradients]
    draws: list[torch.Size]
    calls: list[tuple[Any, ...]]
    moved: frozenset[str]


class TrainingTrial:
    """A trial that runs later training steps on copies of a module.

    Args:
        trainer: The Trainer.
        pl_module: Its module, in the mode in which it is trained.

    Attributes:
        moved: Parameters that training will move without an optimizer, as far as that has been seen.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer, self.pl_module, self.moved = trainer, pl_module, frozenset[str]()
        self._norms = Norms()
        users = Users(type(pl_module))
        self._callbacks = [c for c in callbacks_of(trainer) if users.own(type(c)) and _is_plain(type(c))]
        self._batches: list[tuple[Any, int]] = []
        self._validation: Any = None
        self._moments: list[Moment] = []
        self._untried: set[tuple[Any, str]] = set()
        self._tolerance = _TOLERANCE if {"32", "64"} & {*str(trainer.precision).split("-")} else _COARSE
        self._modes = {name: module.training for name, module in pl_module.named_modules()}

    def add(self, batch: object, batch_idx: int) -> None:
        """Keep a training batch, as the step gets it, unless there are enough, or the step takes no batches."""
        if len(self._batches) < BATCHES and not takes_iterator(self.pl_module, "training_step"):
            self._batches.append((map_tensors(batch, lambda t: t.detach().clone()), batch_idx))

    def add_validation(self, batch: object) -> None:
        """Keep the first validation batch."""
        if self._validation is None:
            self._validation = map_tensors(batch, lambda t: t.detach().clone())

    def can_try(self) -> bool:
        """Return True if there is a batch to try a step on."""
        return bool(self._batches)

    def failure(self) -> str | None:
        """Return the reason why the step does not run even on an uncut copy, or None.

        What else fails there is not tried.
        """
        self._moments = moments_to_come(self.trainer)
        while True:
            try:
                found = self._run((), {}, silent=True)
            except HookError as error:
                if error.hook not in _STEP:
                    self._untried.add(error.key)
                elif self._callbacks:
                    self._callbacks = []  # they may not do with another module than their own
                else:
                    return str(error)
            except Exception as error:  # noqa: BLE001 (whatever it is: then nothing can be said)
                return in_short(error)
            else:
                self.moved, self._moments = found.moved, _worth_trying(self._moments, found.calls)
                return None

    def difference(self, cuts: Sequence[TensorCut], norms: Norms) -> str | None:
        """Return what is wrong with a cut in training, or None.

        Args:
            cuts: The cut.
            norms: Modules that may take their statistics over the neurons that stay.
        """
        self._norms = norms
        reason, first = self._compare(cuts)
        if reason is not None or first.is_within(_FINE):
            return reason
        if not self._runs_in_double:
            return None if first.is_within(self._tolerance) else _DIFFERENT
        reason, again = self._compare(cuts, double=True)
        if reason is not None or again.is_within(_FINE):
            return reason
        # Steps may make numbers of few digits themselves; their rounding is another one each time.
        return None if again.is_within(self._tolerance) and not again.resembles(first) else _DIFFERENT

    @cached_property
    def _runs_in_double(self) -> bool:
        try:
            self._run((), {}, silent=True, double=True)
        except Exception:  # noqa: BLE001 (a step may make numbers of another type, and a device may have no such)
            return False
        return True

    def _compare(self, cuts: Sequence[TensorCut], *, double: bool = False) -> tuple[str | None, Comparison]:
        """Return what fails without the neurons, or None; and compare gradients with zeros there and without them."""
        try:
            expected = self._run(cuts, {}, silent=True, double=double)
        except Exception:  # noqa: BLE001 (zeros may lead anywhere; the cut itself is tried by itself)
            expected = None
        try:
            got = self._run(cuts, {}, silent=False, double=double)
        except Exception as error:  # noqa: BLE001
            what, why = (error.hook, error) if isinstance(error, HookError) else ("training_step", in_short(error))
            return f"{what} fails without them ({why}): something that only training runs reads them", UNLIKE
        if expected is None:
            return None, UNLIKE if double else NOTHING  # it did before
        alike = alike_of(expected.draws, got.draws)
        if alike is None:
            return None, UNLIKE
        if alike:
            try:
                expected, got = (self._run(cuts, alike, silent=silent, double=double) for silent in (True, False))
            except Exception:  # noqa: BLE001 (numbers that are all the same may lead anywhere)
                return None, UNLIKE
        return None, compared(expected.gradients, got.gradients, stays_of(self.pl_module, cuts))

    def _run(
        self, cuts: Sequence[TensorCut], alike: Mapping[int, bool], *, silent: bool, double: bool = False
    ) -> _Outcome:
        """Train a copy from the end of this epoch on, without the neurons of ``cuts``, and record its gradients.

        Returns:
            The gradients and calls at the moments that are tried.
        """
        trainer, twin = self.trainer, _twin(self.pl_module)
        precision, batches, validation = trainer.precision_plugin, self._batches, self._validation
        if double:
            precision, twin = DoublePrecision(), twin.double()
            batches, validation = map_tensors((batches, validation), _in_double)
        for name, module in twin.named_modules():
            drops = isinstance(module, nn.modules.dropout._DropoutNd)
            module.training = self._modes.get(name, module.training) and not drops
        seen: list[Gradients] = []

        def look() -> None:
            given = ((public_name(name), p.grad) for name, p in twin.named_parameters())
            seen.append({name: None if gradient is None else gradient.clone() for name, gradient in given})

        replay, calls = StepReplay(trainer, self.pl_module, "training_step", None), list[tuple[Any, ...]]()
        with replay.isolated(), _unheard(trainer), SameDraws(alike) as draws, moving(trainer) as move:
            twin.trainer = trainer
            listen = None if twin.automatic_optimization else look
            vars(twin).update(stand_in(trainer, self.pl_module, twin, listen))
            course = Course(trainer, move, twin, self._callbacks, self._untried, look)
            with differentiable(), precision.train_step_context():
                course.finish()
                with _silenced(twin, cuts, self._norms) if silent else _cut(twin, cuts):
                    for moment in self._moments:
                        before = len(draws.calls)
                        if moment.kind == "step":
                            course.step(batches[moment.batch_idx % len(batches)][0], moment)
                        else:
                            course.end(validation, moment)
                        calls.append(tuple(draws.calls[before:]))
        return _Outcome(seen, draws.shapes, calls, frozenset() if cuts else _moved(self.pl_module, twin))


@contextmanager
def _unheard(trainer: Trainer) -> Iterator[None]:
    """Suppress output, warnings and files, as far as that is possible."""
    with silent(), writing_nothing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.save_checkpoint = nothing  # type: ignore[method-assign]
        yield


def _is_plain(kind: type) -> bool:
    """Return True if a callback's class has no base among Lightning's callbacks, which write, remove and stop."""
    return all(base.__name__ == "Callback" or not is_framework(base.__module__) for base in kind.__mro__)


def failing(
    trainer: Trainer,
    trial: TrainingTrial,
    roots: Sequence[str],
    cuts_of: Callable[[Sequence[str]], Sequence[TensorCut]],
    norms: Norms,
) -> dict[str, str]:
    """Return groups that training needs whole, each with what fails without. Call it in all processes.

    Args:
        trainer: The Trainer.
        trial: Of this process.
        roots: The groups of a plan.
        cuts_of: Returns the part of a plan in some of its groups; called in the first process.
        norms: Modules that may take their statistics over the neurons that stay.

    Returns:
        By root, the reason; empty if training works without the neurons of all groups.
    """
    if not roots:
        return {}
    reason = trial.difference(in_one_process(trainer, lambda: cuts_of(roots)), norms)
    if trainer.strategy.reduce_boolean_decision(reason is None, all=True):
        return {}
    reason = trainer.strategy.broadcast(reason, 0) or "training_step fails without them in another process"
    if len(roots) == 1:
        return {roots[0]: reason}
    half = len(roots) // 2
    first, second = (failing(trainer, trial, some, cuts_of, norms) for some in (roots[:half], roots[half:]))
    found = first | second
    # Fine one by one, and not together: then none of them can be trusted.
    return found or dict.fromkeys(roots, f"together with others, {reason}")


_DIFFERENT = (
    "the gradients of training_step differ from those with silenced neurons: something that only training runs, such "
    "as a mean over them or a place that is written out, depends on their number"
)


def _worth_trying(moments: Sequence[Moment], calls: Sequence[tuple[Any, ...]]) -> list[Moment]:
    """Return the steps up to the last one with calls that no earlier one made, and the ends of epochs with such calls.

    The very last step is kept in any case: what has grown from zero by then was called before as well.
    """
    new = {number for number, called in enumerate(calls) if called and called not in calls[:number]}
    last = max(BATCHES - 1, *(number for number in new if moments[number].kind == "step"), 0)
    kept = new | {*range(last + 1), max(number for number, one in enumerate(moments) if one.kind == "step")}
    return [one for number, one in enumerate(moments) if number in kept and (one.kind == "step" or number in new)]


def _moved(before: nn.Module, after: nn.Module) -> frozenset[str]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return frozenset(public_name(name) for (name, old), new in pairs if not torch.equal(old, new.to(old.dtype)))


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _twin(pl_module: LightningModule) -> Any:
    twin: Any = twin_of(pl_module)
    return twin


@contextmanager
def _silenced(twin: nn.Module, cuts: Sequence[TensorCut], norms: Norms) -> Iterator[None]:
    _silence(twin, [one for one in cuts if not norms.narrows(one)])
    with narrowed(twin, [one for one in cuts if norms.narrows(one)], norms):
        yield


@contextmanager
def _cut(twin: nn.Module, cuts: Sequence[TensorCut]) -> Iterator[None]:
    cut(twin, cuts)
    yield


def _silence(twin: nn.Module, cuts: Sequence[TensorCut]) -> None:
    """Set weights to zero that make or read the neurons of ``cuts``."""
    tensors = {public_name(name): t for name, t in (*twin.named_parameters(), *twin.named_buffers())}
    with torch.no_grad():
        for name, by_axis in stays_of(twin, cuts).items():
            for axis, stays in by_axis.items():
                kept = torch.zeros(tensors[name].shape[axis], device=tensors[name].device)
                shape = [-1 if i == axis else 1 for i in range(tensors[name].ndim)]
                kept[stays] = 1
                tensors[name].mul_(kept.view(shape).to(tensors[name].dtype))
