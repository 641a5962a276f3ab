"""One watched forward and one replay per batch, however many callbacks of this package a Trainer has.

The first callback that reaches a hook does the work; the others find it done. A measurement that fails never takes the
training with it: it is dropped, and its callback says why.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_neurons.callbacks.observing.independence import independence_of
from lightning_neurons.callbacks.observing.member import Member, gradients_together, rows_in, together
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.step_replay import StepReplay, is_compiled
from lightning_neurons.callbacks.trainer.steps import takes_iterator
from lightning_neurons.data.batches import batch_size_of, map_tensors, tensors_of
from lightning_neurons.data.stratified_sample import Picked
from lightning_neurons.errors import MeasurementError, NoLossError
from lightning_neurons.isolation.model_state import ModelState
from lightning_neurons.measurement.losses import fgsm, summed
from lightning_neurons.measurement.measure import sampled_loss
from lightning_neurons.measurement.passes import Passes, TracedLayers

_TRACED: "WeakKeyDictionary[nn.Module, TracedLayers]" = WeakKeyDictionary()
_SESSIONS: "WeakKeyDictionary[Any, dict[str, Session]]" = WeakKeyDictionary()


class Session:
    """The shared passes over one stretch of data: a validation epoch, or the batches of a training epoch.

    Args:
        trainer: The Trainer.
        pl_module: The module that it runs.
        source: ``"val"`` watches the module's own forward; ``"train"`` runs batches once more in evaluation mode.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, source: str) -> None:
        self.trainer, self.source = trainer, source
        self.passes = Passes(pl_module, [], _TRACED.get(pl_module))
        self.members: list[Member] = []
        self._stack: ExitStack | None = None
        self._is_open = False
        self._again: Any = None  # the batch, if the step has to be run once more to be watched
        self._picked: list[tuple[list[Member], list[Picked]]] = []

    @classmethod
    def join(cls, trainer: Trainer, pl_module: LightningModule, source: str, member: Member) -> None:
        """Add a member to the Trainer's session; the first one begins it."""
        sessions = _SESSIONS.setdefault(trainer, {})
        session = sessions.setdefault(source, cls(trainer, pl_module, source))
        session.members.append(member)
        session.passes.add(member)

    @staticmethod
    def of(trainer: Trainer, source: str) -> "Session | None":
        """Return the Trainer's current session, if any."""
        return _SESSIONS.get(trainer, {}).get(source)

    @staticmethod
    def end(trainer: Trainer, source: str) -> None:
        """Close whatever is open, also in the middle of a batch, and forget the session."""
        session = _SESSIONS.get(trainer, {}).pop(source, None)
        if session is None:
            return
        if session._stack is not None:
            session._stack.close()
        for member in session.members:
            member.forget()
        if session.passes.traced is not None:
            _TRACED[session.passes.model] = session.passes.traced

    def leave(self, member: Member) -> None:
        """End one callback's part; the session ends with its last member."""
        for members in (self.members, self.passes.receivers):
            if member in members:
                members.remove(member)
        member.forget()
        if not self.members:
            self.end(self.trainer, self.source)

    def open(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Begin a batch, before the model's own step: copy samples, which the step may change, and set the hooks."""
        if self._is_open:
            return  # another callback was here first
        self._is_open = True
        self._shared(partial(self._open, batch, (batch_idx, dataloader_idx)))

    def _open(self, batch: object, place: tuple[int, int]) -> None:
        is_stream = isinstance(batch, Iterator) or takes_iterator(self.passes.model, self._own_step())
        for group in self._groups():
            self._pick(group, batch, place, is_stream=is_stream)
        if self.source == "train":
            return
        for member in self._alive():
            member.attempt(partial(member.start_batch, None if is_stream else batch))
        if self._alive() and self._is_compiled:
            together(self._alive(), partial(self._remember, batch, is_stream=is_stream))
        elif self._alive():
            self._stack = ExitStack()
            samples = None if is_stream else rows_in(batch)
            self._stack.enter_context(self.passes.observe(of_others=True, samples=samples))

    def close(self, batch_idx: int, dataloader_idx: int = 0) -> None:
        """End a batch, after the model's own step: remove the hooks and compute gradients for the picked samples."""
        if self._is_open:
            self._is_open = False
            self._shared(partial(self._close, batch_idx, dataloader_idx))

    def _close(self, batch_idx: int, dataloader_idx: int) -> None:
        stack, self._stack = self._stack, None
        again, self._again = self._again, None
        picked, self._picked = self._picked, []
        if stack is not None:
            stack.close()
        elif again is not None:
            self._observe_again(again, batch_idx, dataloader_idx)
        if self.source == "val":
            for member in self._alive():
                member.attempt(member.measurement.finish_batch)
        for group, batches in picked:
            for one in batches:
                self._differentiate([m for m in group if m.failure is None and m.lost is None], one)

    def finish(self) -> None:
        """End the data: compute gradients for picked samples that were not measured yet."""
        self._shared(self._finish)

    def _shared(self, action: Callable[[], None]) -> None:
        """Run an action once for all members; an error ends all of their measurements."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
            for member in self._alive():
                member.failure = error

    def _finish(self) -> None:
        for group in self._groups():
            for one in group[0].rest():
                self._differentiate(group, one)
        for member in self._alive() if self.source == "train" else ():
            member.failure = member.why_without_loss

    def _remember(self, batch: object, *, is_stream: bool) -> None:
        """Keep a batch for another run of the step."""
        if is_stream:
            raise MeasurementError("a compiled step that takes dataloader_iter can neither be watched nor run again")
        self._again = map_tensors(batch, Tensor.clone)

    def _pick(self, group: list[Member], batch: object, place: tuple[int, int], *, is_stream: bool) -> None:
        replay, picked = group[0].replay, list[Picked]()
        assert replay is not None, "members without a replay are in no group"

        def pick() -> None:
            if is_stream:
                raise NoLossError(
                    f"{self._own_step()} takes dataloader_iter, so no batch can be run again for its loss; let it take "
                    "(batch, batch_idx) to measure sensitivity"
                )
            if rows_in(batch) is None and not tensors_of(batch):
                raise NoLossError(
                    f"batch of type {type(batch).__name__}: nothing in it tells how many samples it has, so the loss "
                    "cannot be shared out among them; make it a tuple, dict or dataclass of tensors"
                )
            if not group[0].expects_loss(place[1]):
                for member in group:
                    member.pass_over(batch)
                return
            divisible, is_stateful = independence_of(replay, group[0].settings.loss_reduction, batch, place)
            group[0].pick(batch, place, picked, whole=not divisible)
            if is_stateful and self.source == "train":
                for member in group:
                    member.add_note(
                        f"the loss of {replay.step} depends on the batches that it has been run on before; each batch "
                        "here has it in the state that training has left"
                    )
            if is_stateful and self.source == "val":  # before the step moves on from the state that the batch meets
                while picked:
                    self._differentiate(group, picked.pop(0), is_stateful=True)

        gradients_together(group, pick, all_rests_on_it=self.source == "train")
        self._picked.append((group, picked))

    @cached_property
    def _is_compiled(self) -> bool:
        return is_compiled(self.passes.model)

    def _alive(self) -> list[Member]:
        return [m for m in self.members if m.failure is None]

    def _groups(self) -> list[list[Member]]:
        groups: dict[tuple[Any, ...], list[Member]] = {}
        for member in self._alive():
            if member.replay_key is not None:
                groups.setdefault(member.replay_key, []).append(member)
        return list(groups.values())

    def _own_step(self) -> str:
        """Return the name of the step that the Trainer runs."""
        if self.source == "train":
            return "training_step"
        return "test_step" if self.trainer.testing else "validation_step"

    def _observe_again(self, batch: object, batch_idx: int, dataloader_idx: int) -> None:
        """Run a compiled step once more without compilation: hooks would change what compiled code computes."""
        replay = StepReplay(self.trainer, cast(LightningModule, self.passes.model), self._own_step(), None)
        replay.place = batch_idx, dataloader_idx

        def observe() -> None:
            with replay.isolated(), torch.no_grad(), self.passes.observe():
                replay.run(batch)

        together(self._alive(), observe)

    def _differentiate(self, group: list[Member], picked: Picked, *, is_stateful: bool = False) -> None:
        if not group:
            return
        replay, settings = group[0].replay, group[0].settings
        assert replay is not None, "members without a replay are in no group"
        replay.place = picked.place

        def loss_of(given: object) -> Tensor:
            return summed(replay.loss(given), settings.loss_reduction, batch_size_of(given))

        def run() -> None:
            with replay.isolated():
                parts = self.passes.parts(picked.batch) if picked.divisible else [picked.batch]
                for number, part in enumerate(parts):
                    start = ModelState(self.passes.model) if is_stateful else None
                    with self._if_it_has_a_loss(group, part, picked.place[1]):
                        self._one_part(group, replay, loss_of, part, 1000 * picked.place[0] + number, start)

        gradients_together(group, run, all_rests_on_it=self.source == "train")
        for member in group:
            member.add_note(replay.doubt)
            if self.passes.weights_move and not all(c.statistics for c in member.measurement.criteria):
                member.add_note("the step exchanges weights while it runs: scores of weights are of those it leaves")

    @contextmanager
    def _if_it_has_a_loss(self, group: list[Member], part: object, dataloader: int) -> Iterator[None]:
        """Run an action; without a loss, only this batch is left out: a step may have a loss on some batches only."""
        try:
            yield
        except NoLossError as error:
            if self.source == "train" and error.__cause__ is not None:
                raise  # the step has failed, before all of the activity was seen
            for member in group:
                member.miss_loss(part, dataloader, error)
        else:
            for member in group:
                member.found_loss(dataloader)
        for member in group:
            member.measurement.finish_batch()

    def _one_part(
        self,
        group: list[Member],
        replay: StepReplay,
        loss_of: Callable[[Any], Tensor],
        part: object,
        seed: int,
        start: ModelState | None,
    ) -> None:
        settings, needs = group[0].settings, {need for m in group for need in m.measurement.needs}
        for member in group:
            member.start_batch(part)
        observe = self.source == "train"
        if settings.inputs == "fgsm":
            if observe:  # activity is that on the data itself
                with torch.no_grad(), self.passes.observe():
                    replay.run(part)
            part, observe = fgsm(self.passes.model, loss_of, part, settings.eps), False
        if observe or "gradient" in needs:
            self.passes.differentiate(loss_of, part, observe=observe, receivers=group, start=start)
        if "sampled_gradient" in needs:
            self.passes.differentiate(
                lambda given: sampled_loss(self.passes.model, given, seed),
                part,
                "sampled_gradient",
                receivers=group,
                start=start,
            )
