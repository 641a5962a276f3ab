"""One training step, tried on copies before a cut: training may run what validation does not.

An auxiliary head, a penalty on features, a copy of weights or a mask for gradients reads neurons, and only training
knows. So a step with its backward is run on a copy without the neurons that are to go and on one in which they are
zero: the gradients of all that stays must be the same. Norm layers over few values and activations with a kink can
magnify rounding to a difference, so what differs is run again in double precision, where that is possible.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor, nn

from lightning_neurons.callbacks.agreement import in_one_process
from lightning_neurons.callbacks.checks import overrides
from lightning_neurons.callbacks.replay import StepReplay
from lightning_neurons.callbacks.stand_ins import OptimizerStandIn, stand_in
from lightning_neurons.callbacks.steps import step_arguments, takes_iterator
from lightning_neurons.errors import in_short
from lightning_neurons.network.batches import map_tensors
from lightning_neurons.network.isolate import differentiable
from lightning_neurons.network.layer import public_name
from lightning_neurons.network.same_draws import SameDraws, alike_of
from lightning_neurons.network.users import Users
from lightning_neurons.pruning.example import twin_of
from lightning_neurons.pruning.surgery import Cut, cut, stays_of

_TOLERANCE, _COARSE = 1e-2, 1e-1
"""Of the largest gradient of a parameter: in float32, and where numbers have fewer digits."""

_LEAST = 1e-2
"""Of the largest of all gradients: what is much smaller than this is mostly rounding."""

BATCHES = 2
"""Steps that are tried one after the other: every second one may do something else."""

Gradients = dict[str, Tensor | None]


class TrainingTrial:
    """Runs a training step on copies of a module.

    Args:
        trainer: The Trainer.
        pl_module: Its module, in the mode in which it is trained.
    """

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        users = Users(type(pl_module))
        self._callbacks = [callback for callback in trainer.callbacks if users.own(type(callback))]
        self._batches: list[tuple[Any, int]] = []
        self._tolerance = _TOLERANCE if {"32", "64"} & {*str(trainer.precision).split("-")} else _COARSE
        self._modes = {name: module.training for name, module in pl_module.named_modules()}

    def add(self, batch: Any, batch_idx: int) -> None:
        """Keep a training batch, as the step gets it, unless there are enough, or the step takes no batches."""
        if len(self._batches) < BATCHES and not takes_iterator(self.pl_module, "training_step"):
            self._batches.append((map_tensors(batch, lambda t: t.detach().clone()), batch_idx))

    def can_try(self) -> bool:
        """Whether there is a batch to try a step on."""
        return bool(self._batches)

    def failure(self) -> str | None:
        """Why the step does not even run on a whole copy, or None."""
        while True:
            try:
                self._run((), {}, silent=True)
            except Exception as error:  # noqa: BLE001 (whatever it is: then nothing can be said)
                if not self._callbacks:
                    return in_short(error)
                self._callbacks = []  # they may not do with another module than their own
            else:
                return None

    def difference(self, cuts: Sequence[Cut]) -> str | None:
        """What is wrong with a cut in training, or None."""
        reason = self._difference(cuts)
        if reason != _DIFFERENT or not self._runs_in_double:
            return reason
        return self._difference(cuts, double=True)

    @cached_property
    def _runs_in_double(self) -> bool:
        try:
            self._run((), {}, silent=True, double=True)
        except Exception:  # noqa: BLE001 (a step may make numbers of another type, and a device may have no such)
            return False
        return True

    def _difference(self, cuts: Sequence[Cut], *, double: bool = False) -> str | None:
        try:
            expected, shapes = self._run(cuts, {}, silent=True, double=double)
        except Exception:  # noqa: BLE001 (zeros may lead anywhere; the cut itself is tried by itself)
            expected = None
        try:
            got, others = self._run(cuts, {}, silent=False, double=double)
        except Exception as error:  # noqa: BLE001
            return f"training_step fails without them ({in_short(error)}): something that only training runs reads them"
        if expected is None:
            return _DIFFERENT if double else None  # it did before
        alike = alike_of(shapes, others)
        if alike:
            expected, got = (self._run(cuts, alike, silent=silent, double=double)[0] for silent in (True, False))
        return None if alike is not None and self._are_same(expected, got, cuts) else _DIFFERENT

    def _run(
        self, cuts: Sequence[Cut], alike: Mapping[int, bool], *, silent: bool, double: bool = False
    ) -> tuple[list[Gradients], list[torch.Size]]:
        """The gradients at each optimizer step, and the shapes of all random numbers."""
        trainer, twin = self.trainer, _twin(self.pl_module)
        precision, batches = trainer.precision_plugin, self._batches
        if double:
            precision, twin = DoublePrecision(), twin.double()
            batches = [(map_tensors(batch, _in_double), batch_idx) for batch, batch_idx in batches]
        if silent:
            _silence(twin, cuts)
        else:
            cut(twin, cuts)
        for name, module in twin.named_modules():
            drops = isinstance(module, nn.modules.dropout._DropoutNd)
            module.training = self._modes.get(name, module.training) and not drops
        seen: list[Gradients] = []

        def look() -> None:
            given = ((public_name(name), p.grad) for name, p in twin.named_parameters())
            seen.append({name: None if gradient is None else gradient.clone() for name, gradient in given})

        replay = StepReplay(trainer, self.pl_module, "training_step", None)
        with replay.isolated(), warnings.catch_warnings(), SameDraws(alike) as draws:
            warnings.simplefilter("ignore")
            twin.trainer = trainer
            vars(twin).update(stand_in(trainer, self.pl_module, twin, look))
            with differentiable(), precision.train_step_context():
                for batch, batch_idx in batches:
                    self._step(twin, batch, batch_idx, look)
        return seen, draws.shapes

    def _step(self, twin: Any, batch: Any, batch_idx: int, look: Callable[[], None]) -> None:
        """What Lightning calls for a batch, in its order, but for the steps of optimizers."""
        twin.zero_grad()
        batch = map_tensors(batch, Tensor.clone)
        optimizers: Any = twin.optimizers()
        first: OptimizerStandIn | None = optimizers[0] if isinstance(optimizers, list) and optimizers else optimizers
        given = step_arguments(self.trainer, twin, "training_step", batch_idx, 0)
        if self._call(twin, "on_train_batch_start", batch, batch_idx) == -1:
            return
        out = twin.training_step(batch, *given)
        if twin.automatic_optimization:
            loss = out.get("loss") if isinstance(out, Mapping) else out
            if first and isinstance(loss, Tensor) and loss.requires_grad:
                self._call(twin, "on_before_zero_grad", first)
                self._call(twin, "on_before_backward", loss)
                twin.backward(loss)
                self._call(twin, "on_after_backward")
                self._call(twin, "on_before_optimizer_step", first)
        look()
        out = {"loss": out.detach()} if isinstance(out, Tensor) else out
        self._call(twin, "on_train_batch_end", out, batch, batch_idx)

    def _call(self, twin: Any, hook: str, *args: Any) -> Any:
        """A hook of the user's callbacks, which may hold averages or masks, and of the module."""
        for callback in self._callbacks:
            getattr(callback, hook)(self.trainer, twin, *args)
        return getattr(twin, hook)(*args) if overrides(twin, hook) else None

    def _are_same(self, expected: list[Gradients], got: list[Gradients], cuts: Sequence[Cut]) -> bool:
        if len(expected) != len(got):
            return False
        stays = stays_of(self.pl_module, cuts)
        return all(_same(a, b, stays, self._tolerance) for a, b in zip(expected, got, strict=True))


def failing(
    trainer: Any, trial: TrainingTrial, roots: Sequence[str], cuts_of: Callable[[Sequence[str]], Sequence[Cut]]
) -> dict[str, str]:
    """The groups that training cannot do with fewer neurons of, each with what happens. All processes take part.

    Args:
        trainer: The Trainer.
        trial: Of this process.
        roots: The groups of a plan.
        cuts_of: What of a plan belongs to some of its groups; asked in the first process.
    """
    if not roots:
        return {}
    reason = trial.difference(in_one_process(trainer, lambda: cuts_of(roots)))
    if trainer.strategy.reduce_boolean_decision(reason is None, all=True):
        return {}
    reason = trainer.strategy.broadcast(reason, 0) or "training_step fails without them in another process"
    if len(roots) == 1:
        return {roots[0]: reason}
    half = len(roots) // 2
    found = failing(trainer, trial, roots[:half], cuts_of) | failing(trainer, trial, roots[half:], cuts_of)
    # Fine one by one, and not together: then none of them can be trusted.
    return found or dict.fromkeys(roots, f"together with others, {reason}")


_DIFFERENT = (
    "the gradients of training_step differ from those with silenced neurons: something that only training runs, such "
    "as a mean over them or a place that is written out, depends on their number"
)


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _twin(pl_module: Any) -> Any:
    twin: Any = twin_of(pl_module)
    return twin


def _silence(twin: nn.Module, cuts: Sequence[Cut]) -> None:
    """Let everything be zero that is to go, where it is made and where it is read."""
    tensors = {public_name(name): t for name, t in (*twin.named_parameters(), *twin.named_buffers())}
    with torch.no_grad():
        for name, by_axis in stays_of(twin, cuts).items():
            for axis, stays in by_axis.items():
                kept = torch.zeros(tensors[name].shape[axis], device=tensors[name].device)
                shape = [-1 if i == axis else 1 for i in range(tensors[name].ndim)]
                kept[stays] = 1
                tensors[name].mul_(kept.view(shape).to(tensors[name].dtype))


def _same(expected: Gradients, got: Gradients, stays: Mapping[str, Mapping[int, Tensor]], tolerance: float) -> bool:
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, silent in expected.items():
        narrow = got.get(name)
        if (silent is None) != (narrow is None):
            return False
        if silent is None or narrow is None:
            continue
        for axis, index in stays.get(name, {}).items():
            silent = silent.index_select(axis, index.to(silent.device))
        if silent.shape != narrow.shape:
            return False
        pairs.append((silent.float(), narrow.float()))
    sizes = [float(a.abs().max()) if a.numel() else 0.0 for a, _ in pairs]
    bounds = [tolerance * max(size, _LEAST * max(sizes, default=0.0)) for size in sizes]
    return all(
        torch.allclose(a, b, rtol=0, atol=bound, equal_nan=True) for (a, b), bound in zip(pairs, bounds, strict=True)
    )
