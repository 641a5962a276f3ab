"""Run by ``test_guard_processes.py`` as ``python two_processes_guard.py FOLDER``, on two processes.

Each process writes what it found in each case to its own file; one process alone runs some of the cases in the test.
"""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tests.callbacks.guarded import Scored, by_epoch, by_neurons, guard, hidden, made, undone
from tests.callbacks.modules import Net, trainer_of
from tests.callbacks.pruned import Probe
from tests.callbacks.two_processes import Shared
from tests.callbacks.two_processes_pruning import Smooth, Watch, everywhere_same, spread

EPOCHS, BATCHES = 5, 3
FALLS = by_epoch(0.75, 0.25, 0.75)  # the cut of epoch 1 is taken back when epoch 2 begins


def of_rank(first: Callable[[Any], float], second: Callable[[Any], float]) -> Callable[[Any], float]:
    """A score that is not the same in both processes."""
    return lambda module: (first if module.global_rank == 0 else second)(module)


@dataclass
class Case:
    """How the network is trained, and what its score is."""

    score: Callable[[Any], float] = by_neurons
    net: Callable[[], nn.Module] = Net
    pruning: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Any]] = list
    split: str | None = None  # how validation data is spread, if not evenly


SOLVED = {"compensation": "least_squares"}
CASES = {
    "plain": Case(),
    "static": Case(strategy={"static_graph": True}),
    "accumulated": Case(trainer={"accumulate_grad_batches": 2}),
    "averaged": Case(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "halve": Case(pruning={"on_violation": "halve"}),
    "at the end": Case(by_epoch(0.75, 0.75, 0.75, 0.75, 0.25)),
    "first falls": Case(of_rank(FALLS, by_epoch(0.75))),
    "second falls": Case(of_rank(by_epoch(0.75), FALLS)),
    "second is NaN": Case(of_rank(by_epoch(0.75), by_epoch(float("nan")))),
    "solved": Case(FALLS, net=Smooth, pruning=SOLVED, trainer={"precision": "64-true"}),
    "solved, uneven": Case(FALLS, net=Smooth, pruning=SOLVED, trainer={"precision": "64-true"}, split="uneven"),
    "second saw nothing": Case(FALLS, net=Smooth, pruning=SOLVED, split="one saw nothing"),
}


def shifts(callback: Any) -> dict[str, list[float]]:
    """What compensates for the cut that is pending."""
    pending = callback.rounds.pending
    return {} if pending is None else {name: s.flatten().tolist() for name, s in pending.shifts.items()}


def run(case: Case, processes: int) -> dict[str, Any]:
    """What one process finds."""
    L.seed_everything(0, verbose=False)
    module, callback, watch = Scored(case.score, case.net()), guard(**case.pruning), Watch()
    solved = Probe("on_train_epoch_start", lambda *_: shifts(callback))
    same = Probe("on_train_epoch_start", lambda _, m: everywhere_same([*m.parameters(), *m.buffers()]))
    count = Probe("on_train_batch_start", lambda _, m: hidden(m))
    strategy = DDPStrategy(timeout=timedelta(seconds=30), **case.strategy) if processes > 1 else "auto"
    trainer = trainer_of(
        [solved, callback, same, *case.callbacks(), watch, count], strategy=strategy, devices=processes,
        max_epochs=EPOCHS, use_distributed_sampler=False, **case.trainer,
    )  # fmt: skip
    val = spread(1, processes) if case.split is None else DataLoader(Shared(case.split), 5)
    trainer.fit(module, spread(0, processes), val)
    # Every process has buffers of its own until the first does a forward, so that only parameters are compared.
    return {
        "same": [*watch.same, everywhere_same([*module.parameters()])],
        "after": [same.seen[epoch] for epoch in range(EPOCHS)],
        "hidden": [*count.seen.values(), hidden(module)],
        "wrapped": [isinstance(one, DistributedDataParallel) for one in watch.wrappers],
        "made": made(callback),
        "undone": undone(callback),
        "shifts": solved.seen,
        "baseline": callback.keeping.baseline,
        "step": callback.keeping.step,
        "weights": torch.cat([p.detach().flatten().double() for p in module.parameters()]).tolist(),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, case in CASES.items():  # the last one may leave processes that wait for one another
        found = run(case, 2)
        (folder / f"{name}.{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
