"""Run by ``test_pruning_processes.py`` as ``python two_processes_pruning.py FOLDER``, on two processes.

Each process writes what it found in each case to its own file; one process alone runs some of the cases in the test.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_neurons import NeuronPruningCallback
from tests.callbacks.modules import Net, Plain, dataset, trainer_of
from tests.callbacks.two_processes import Shared
from tests.models import Single

EPOCHS = 4


class Smooth(nn.Module):
    """Without norm layers, whose statistics depend on how batches are spread."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3))
        return self.fc2(torch.tanh(self.fc1(x)))


class PartlyUsed(Net):
    """Trains a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(5, 5)


class Uncopyable(Net):
    """Cannot be copied, so that no cut can be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.only = Single(1, 1).requires_grad_(False)


class Watch(L.Callback):
    """After every batch: whether all processes hold the same, and what Lightning runs."""

    def __init__(self) -> None:
        super().__init__()
        self.same: list[bool] = []
        self.widths: list[list[int]] = []
        self.wrappers: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        wrapper = trainer.strategy.model
        if not any(wrapper is one for one in self.wrappers):
            self.wrappers.append(wrapper)
        self.widths.append([len(p) for p in pl_module.parameters()])
        optimizer = trainer.optimizers[0]
        states = [v for p in pl_module.parameters() for v in optimizer.state.get(p, {}).values()]
        self.same.append(everywhere_same([*pl_module.parameters(), *states]))


def everywhere_same(tensors: list[Tensor]) -> bool:
    """Whether all processes hold the same, bit by bit."""
    if not torch.distributed.is_initialized():
        return True
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    torch.distributed.all_gather(sizes, torch.tensor([len(flat)]))
    if sizes[0] != sizes[1]:
        return False
    found = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(found, flat)
    return torch.equal(*found)


@dataclass
class Case:
    """How the network is trained."""

    criterion: str = "weight_l2"
    net: Callable[[], nn.Module] = Net
    pruning: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    split: str | None = None  # how validation data is spread, if not as Lightning does it
    callbacks: Callable[[], list[Any]] = list


MEAN = {"compensation": "mean", "monitor": "val_loss"}
CASES = {
    "plain": Case(),
    "accumulated": Case(trainer={"accumulate_grad_batches": 2}),
    "unused": Case(net=PartlyUsed, strategy={"find_unused_parameters": True}),
    "static": Case(strategy={"static_graph": True}),
    "view": Case(strategy={"gradient_as_bucket_view": True}, trainer={"accumulate_grad_batches": 2}),
    "clipped": Case("random", trainer={"gradient_clip_val": 0.1}),
    "averaged": Case("fisher", pruning=MEAN, callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "patient": Case("deadness", net=Smooth, pruning={"patience": 2, "start_epoch": 2, "end_epoch": 2}),
    "uneven": Case("fisher", net=Smooth, pruning=MEAN, split="uneven"),
    "l2": Case(net=Smooth, trainer={"precision": "64-true"}),
    "fisher": Case("fisher", net=Smooth, pruning=MEAN, trainer={"precision": "64-true"}),
}


def spread(seed: int, processes: int) -> DataLoader:
    """The same samples in the same steps for one process and for two; Lightning's own sampler would shuffle them."""
    data, rank = dataset(24, seed), int(os.environ.get("LOCAL_RANK", "0"))
    return DataLoader(data, 8 // processes, sampler=DistributedSampler(data, processes, rank, shuffle=False))


def train(
    case: Case, processes: int, extra: tuple[Any, ...] = (), ckpt: Any = None
) -> tuple[Any, Any, NeuronPruningCallback]:
    """Train on the same data in as many processes."""
    L.seed_everything(0, verbose=False)
    module = Plain(case.net())
    plain = {"amount": 0.4, "schedule": "linear", "start_epoch": 1, "end_epoch": 2}
    callback = NeuronPruningCallback(case.criterion, **(plain | case.pruning))
    strategy = DDPStrategy(timeout=timedelta(seconds=30), **case.strategy) if processes > 1 else "auto"
    saves = any(isinstance(one, ModelCheckpoint) for one in extra)
    trainer = trainer_of(
        [callback, *case.callbacks(), *extra], strategy=strategy, devices=processes, max_epochs=EPOCHS,
        use_distributed_sampler=False, enable_checkpointing=saves, **case.trainer,
    )  # fmt: skip
    val = spread(1, processes) if case.split is None else DataLoader(Shared(case.split), 5)
    trainer.fit(module, spread(0, processes), val, ckpt_path=ckpt)
    return trainer, module, callback


def run(case: Case, processes: int) -> dict[str, Any]:
    """What one process finds."""
    watch = Watch()
    _, _, callback = train(case, processes, (watch,))
    rounds = callback.rounds.done
    return {
        "same": watch.same,
        "widths": watch.widths,
        "wrappers": [isinstance(one, DistributedDataParallel) for one in watch.wrappers],
        "plan": callback.plan.to_dict()["neurons"],
        "rounds": [[one.number, one.epoch, one.step, len(one.plan)] for one in rounds],
        "metrics": [[one.before, one.cut, one.after] for one in rounds],
    }


def state_of(trainer: Any, module: Any) -> dict[str, Tensor]:
    found = {f"model.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        found |= {f"{name}.{k}": v.clone() for k, v in trainer.optimizers[0].state[parameter].items()}
    return found


def resume(folder: Path, processes: int) -> dict[str, Any]:
    """Whether a run that is resumed from each of its checkpoints ends as the whole one."""
    case = Case("fisher", pruning=MEAN)
    trainer, module, callback = train(case, processes, (ModelCheckpoint(folder, "{epoch}", save_top_k=-1),))
    whole, found = state_of(trainer, module), {}
    for epoch in range(EPOCHS - 1):
        path = folder / f"epoch={epoch}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
        resumed, twin, again = train(case, processes, (ModelCheckpoint(folder, "{epoch}", save_top_k=0),), path)
        ours = state_of(resumed, twin)
        same = ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in ours)
        found[str(epoch)] = [state["rounds"]["pending"] is not None, same, again.plan == callback.plan]
    return found


def failure(case: Case, processes: int) -> dict[str, Any]:
    """How training fails."""
    try:
        train(case, processes)
    except Exception as error:  # noqa: BLE001 (which one is what the test asks)
        return {"types": [base.__name__ for base in type(error).__mro__], "message": str(error)}
    return {}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    jobs: dict[str, Callable[[], Any]] = {name: lambda name=name: run(CASES[name], 2) for name in CASES}
    jobs["resume"] = lambda: resume(folder / "checkpoints", 2)
    jobs["pattern"] = lambda: failure(Case(pruning={"ignore": ["net.nothing*"]}), 2)
    jobs["uncopyable"] = lambda: failure(Case(net=Uncopyable), 2)
    jobs["uncopyable, found late"] = lambda: run(Case(net=Uncopyable, trainer={"num_sanity_val_steps": 0}), 2)
    # The last: processes that wait for one another may never come back.
    jobs["nothing"] = lambda: run(Case("fisher", net=Smooth, pruning=MEAN, split="one saw nothing"), 2)
    for name, job in jobs.items():
        found = job()
        (folder / f"{name}.{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
