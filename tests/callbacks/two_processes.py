"""Run by ``test_processes.py`` as ``python two_processes.py FOLDER PROCESSES``: the same on one or two.

Each process writes what it found to its own files. Learning is switched off, so that one and two processes measure
the same weights.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback
from tests.callbacks.modules import MemoryLogger, Plain, dataset, trainer_of

SPLITS = {
    "even": ([*range(12)], [*range(12, 24)]),
    "uneven": ([*range(17)], [*range(17, 24)]),
    "one saw nothing": ([*range(24)], []),
}


class Shared(IterableDataset):
    """Each process sees its own rows; one process alone sees all."""

    def __init__(self, split: str, by_class: bool = False) -> None:
        self.data = dataset(24, seed=1)
        labels = self.data.tensors[1].tolist()
        kinds = [i for i, y in enumerate(labels) if y != 2], [i for i, y in enumerate(labels) if y == 2]
        self.rows = kinds if by_class else SPLITS[split]

    def __iter__(self) -> Iterator[Any]:
        distributed = torch.distributed.is_initialized()
        rows = self.rows[torch.distributed.get_rank()] if distributed else sorted([*self.rows[0], *self.rows[1]])
        return iter([self.data[i] for i in rows])


class Fixed(Plain):
    """Learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net.norm1.momentum = self.net.norm2.momentum = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def breaks_on_one(module: Any, batch: Any) -> Any:
    """A loss that fails on the last process in the first epoch."""
    if module.global_rank == module.trainer.world_size - 1 and module.current_epoch == 0:
        raise ValueError("no loss here")
    return module.loss(batch)


class MissesOnOne(Fixed):
    """The last process has no loss, if there are several."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.global_rank == 1 else self.loss(batch)


def run(
    processes: int, callback: Any, val: Any, stage: str = "validate", module_type: type[Fixed] = Fixed, **kwargs: Any
) -> Any:
    L.seed_everything(0, verbose=False)
    strategy = "ddp" if processes > 1 else "auto"
    trainer = trainer_of(
        [callback], devices=processes, strategy=strategy, precision="64-true", num_sanity_val_steps=0, **kwargs
    )
    module = module_type()
    if stage == "fit":
        trainer.fit(module, DataLoader(dataset(16), 4), val)
    else:
        getattr(trainer, stage)(module, val, verbose=False)
    return callback


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    full = DataLoader(dataset(24, seed=1), 4)
    found: dict[str, Any] = {"fit": run(processes, NeuronSensitivityCallback(), full, "fit", max_epochs=2)}
    found["sampler"] = run(processes, NeuronSensitivityCallback(per_class=True), full)
    found["statistics"] = run(processes, ActivationStatisticsCallback(), full, "test")
    for split in SPLITS:
        found[split] = run(processes, NeuronSensitivityCallback(), DataLoader(Shared(split), 5))
    classes = DataLoader(Shared("even", by_class=True), 5)
    found["classes"] = run(processes, NeuronSensitivityCallback(per_class=True), classes)
    found["small"] = run(processes, NeuronSensitivityCallback(max_samples=10), full)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kwargs = {"max_epochs": 2, "logger": MemoryLogger()}
        found["broken"] = run(processes, NeuronSensitivityCallback(loss_fn=breaks_on_one), full, "fit", **kwargs)
    found["missing"] = run(processes, NeuronSensitivityCallback(), full, "fit", MissesOnOne, **kwargs)
    rank = torch.distributed.get_rank() if processes > 1 else 0
    for name, callback in found.items():
        callback.report.save(folder / f"{name}.{rank}.json")
    history = [(e.epoch, e.step) for e in found["broken"].history.entries]
    notes = {name: callback.report.notes for name, callback in found.items()}
    messages = [str(w.message) for w in told]
    (folder / f"rest.{rank}.json").write_text(json.dumps({"history": history, "notes": notes, "told": messages}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
