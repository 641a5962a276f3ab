"""Run by ``test_studies_processes.py`` as ``python two_processes_studies.py FOLDER PROCESSES``: the same on one or two.

Each process writes what it found in each case to its own file. Nothing is learned, so that one and two processes
measure the same weights, in double precision.
"""

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_neurons import ClassNeuronsCallback, NeuronAblationCallback
from lightning_neurons.results.typed import plain
from tests.callbacks.modules import MemoryLogger, dataset
from tests.callbacks.pruned import pruner
from tests.callbacks.two_processes import Fixed, Shared, run


class FailsUnderStudy(Fixed):
    """In the first process, in the first epoch, where the sample is larger than a batch."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) > 5 and self.trainer.global_rank == 0 and self.current_epoch == 0:
            raise RuntimeError("not here")
        return super().validation_step(batch, batch_idx)


def ablated(callback: Any) -> dict[str, Any]:
    if callback.ablation is None:
        return {}
    return {"report": vars(callback.ablation), "agreement": vars(callback.agreement)}


def classes(callback: Any) -> dict[str, Any]:
    report = callback.report
    members = {name: m.int() for name, m in report.members.items()}
    accuracies = [row._asdict() for row in report.accuracies]
    return {
        "importance": report.importance,
        "members": members,
        "accuracies": accuracies,
        "counts": report.class_counts,
    }


def cut(callback: Any) -> dict[str, Any]:
    return {"plan": callback.plan.neurons, "made": [one.number for one in callback.rounds.done]}


def full() -> DataLoader:
    return DataLoader(dataset(24, seed=1), 4)


def checked(max_drop: float) -> Any:
    return pruner("weight_l2", amount=0.5, monitor="val_loss", mode="min", max_drop=max_drop, check="ablation")


FIT = {"stage": "fit", "max_epochs": 2, "use_distributed_sampler": True}
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[], Any], dict[str, Any]]] = {
    "ablation": (lambda: NeuronAblationCallback(ends=None), ablated, full, FIT),
    "ablation, validate": (lambda: NeuronAblationCallback("rms", ends=3), ablated, full, {}),
    "ablation, uneven": (
        lambda: NeuronAblationCallback(ends=None, replacement="mean"), ablated,
        lambda: DataLoader(Shared("uneven"), 5), {},
    ),
    "ablation, one saw nothing": (
        lambda: NeuronAblationCallback(ends=None), ablated, lambda: DataLoader(Shared("one saw nothing"), 5), {}
    ),
    "classes": (ClassNeuronsCallback, classes, full, FIT),
    "classes, masking": (lambda: ClassNeuronsCallback(method="masking", controls=1), classes, full, {}),
    "classes apart": (
        ClassNeuronsCallback, classes, lambda: DataLoader(Shared("even", by_class=True), 5), {}
    ),
    "check holds": (lambda: checked(99.0), cut, full, FIT),
    "check refuses": (lambda: checked(0.0), cut, full, FIT),
    "fails": (
        lambda: NeuronAblationCallback(ends=None), ablated, full, {**FIT, "module_type": FailsUnderStudy}
    ),
}  # fmt: skip


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    for name, (make, look, val, kwargs) in CASES.items():
        logger = MemoryLogger()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            callback = run(processes, make(), val(), logger=logger, **kwargs)
        rank = torch.distributed.get_rank() if processes > 1 else 0
        series = [row for row in logger.rows if row[0].startswith(("ablation/", "classes/", "pruning/metric"))]
        series = [row for row in series if not math.isnan(row[2])]
        found = {"found": plain(look(callback)), "series": series, "told": [str(one.message) for one in told]}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
