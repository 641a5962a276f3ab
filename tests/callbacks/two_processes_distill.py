"""Run by ``test_distillation_processes.py`` as ``python two_processes_distill.py FOLDER``, on two processes.

Each process writes what it found in each case to its own file.
"""

import os
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from tests.callbacks.distilled import EPOCHS, TAUGHT, NoForward, Pair, Student, cutter, distiller
from tests.callbacks.modules import trainer_of
from tests.callbacks.two_processes_pruning import everywhere_same, spread


@dataclass
class Case:
    """What is trained, and how."""

    kind: type[Student]
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)


CASES = {
    "forward": Case(Student),
    "no forward": Case(NoForward),
    "no forward, by name": Case(NoForward, {"output": "net"}),
    "inside": Case(Pair, {"output": "net.fc2"}),
    "no forward, inside": Case(NoForward, {"output": "net.fc2"}),
    "accumulated": Case(NoForward, trainer={"accumulate_grad_batches": 2}),
    "view": Case(Student, strategy={"gradient_as_bucket_view": True, "static_graph": True}),
    "no sanity check": Case(NoForward, trainer={"num_sanity_val_steps": 0}),
}


class Watch(L.Callback):
    """After every batch: whether both processes hold the same."""

    def __init__(self) -> None:
        super().__init__()
        self.same: list[bool] = []
        self.wrapped: set[bool] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.wrapped.add(isinstance(trainer.strategy.model, DistributedDataParallel))
        states = [v for p in pl_module.parameters() for v in trainer.optimizers[0].state.get(p, {}).values()]
        self.same.append(everywhere_same([*pl_module.parameters(), *states]))


def train(case: Case, module: Student, callbacks: list[Any], ckpt: Any = None) -> dict[str, Any]:
    """Train on two processes; what is left."""
    watch = Watch()
    trainer = trainer_of(
        [*callbacks, watch], strategy=DDPStrategy(timeout=timedelta(seconds=30), **case.strategy), devices=2,
        max_epochs=EPOCHS, use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks), **case.trainer,
    )  # fmt: skip
    trainer.fit(module, spread(0, 2), spread(1, 2), ckpt_path=ckpt)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    return {"state": module.state_dict(), "same": watch.same, "wrapped": sorted(watch.wrapped), "hooks": hooks}


def made(case: Case, **kwargs: Any) -> Student:
    L.seed_everything(0, verbose=False)
    return case.kind(**kwargs)


def run(case: Case) -> dict[str, Any]:
    """The same by a callback, by hand and without a teacher."""
    return {
        "callback": train(case, made(case), [distiller(**case.options)]),
        "by hand": train(case, made(case, epochs=TAUGHT), [cutter()]),
        "alone": train(case, made(case), [cutter()]),
    }


def resume(folder: Path) -> dict[str, Any]:
    """A run that is resumed at the end of the first epoch of the recovery."""
    case, callback = CASES["no forward"], distiller()
    whole = train(case, made(case), [callback, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)])
    path = folder / "epoch=1.ckpt"
    found = train(case, made(case), [distiller(), ModelCheckpoint(folder, "{epoch}", save_top_k=0)], path)
    saved = torch.load(path, weights_only=True)["callbacks"][callback.state_key]["distillation"]
    return {"callback": found, "by hand": whole, "saved": saved["teacher"] is not None}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    jobs: dict[str, Any] = {name: lambda case=case: run(case) for name, case in CASES.items()}
    jobs["resume"] = lambda: resume(folder / "checkpoints")
    for name, job in jobs.items():
        try:
            found = job()
        except Exception:  # noqa: BLE001 (the test tells of it)
            found = {"error": traceback.format_exc()[-1500:]}
        torch.save(found, folder / f"{name}.{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
