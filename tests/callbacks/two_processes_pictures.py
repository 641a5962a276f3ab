"""Run by ``test_pictures_processes.py`` as ``python two_processes_pictures.py FOLDER PROCESSES``: on one or two.

Each process writes what it found in each case to its own file. Nothing is learned, so that one and two processes look
at the same weights, in double precision.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_neurons import NeuronSensitivityCallback, SaliencyCallback
from lightning_neurons.results.typed import plain
from tests.callbacks.modules import dataset, trainer_of
from tests.callbacks.pictured import files, maximizer
from tests.callbacks.two_processes import Fixed, Shared


class FailsFirst(Fixed):
    """In the first process and the first epoch no forward of so few samples works."""

    def forward(self, x: Any) -> Any:
        looking = not self.trainer.sanity_checking and x.requires_grad and not self.trainer.training
        if looking and self.trainer.global_rank == 0 and self.current_epoch == 0:
            raise RuntimeError("not here")
        return super().forward(x)


def maps(callback: Any) -> dict[str, Any]:
    found = callback.found
    return {} if found is None else {"inputs": found.inputs, "maps": found.maps, "targets": found.targets}


def made(callback: Any) -> dict[str, Any]:
    found = callback.found
    cards = [{**vars(c), "numbers": dict(c.numbers)} for c in callback.cards]
    values = {"images": found.images, "reached": found.activations, "data": found.data_activations}
    return {"targets": list(found.targets), "cards": cards, **values}


def full() -> DataLoader:
    return DataLoader(dataset(24, seed=1), 4)


def apart() -> DataLoader:
    return DataLoader(Shared("even", by_class=True), 5)


def one_sided() -> DataLoader:
    return DataLoader(Shared("one saw nothing"), 5)


def with_an_observer() -> list[Any]:
    return [maximizer(), NeuronSensitivityCallback(html=True, max_figures=1)]


FIT = {"max_epochs": 1, "use_distributed_sampler": True}
Case = tuple[Callable[[], list[Any]], Callable[[Any], Any], Callable[[], Any], dict[str, Any], type[Fixed]]
CASES: dict[str, Case] = {
    "saliency": (lambda: [SaliencyCallback()], maps, full, FIT, Fixed),
    "saliency, odd": (lambda: [SaliencyCallback(max_samples=5)], maps, apart, {}, Fixed),
    "saliency, one saw nothing": (lambda: [SaliencyCallback(max_samples=6)], maps, one_sided, {}, Fixed),
    "maximization": (with_an_observer, made, full, FIT, Fixed),
    "maximization, validate": (lambda: [maximizer([0, ("net.conv2", 1)])], made, apart, {}, Fixed),
    "fails": (lambda: [SaliencyCallback()], maps, full, FIT | {"max_epochs": 2}, FailsFirst),
}  # fmt: skip


def run(processes: int, name: str, folder: Path) -> tuple[Any, Any, list[str]]:
    make, look, val, kwargs, module_type = CASES[name]
    L.seed_everything(0, verbose=False)
    strategy = "ddp" if processes > 1 else "auto"
    callbacks, logger = make(), TensorBoardLogger(folder, name=name, version=0)
    trainer = trainer_of(
        callbacks, devices=processes, strategy=strategy, precision="64-true", num_sanity_val_steps=0, logger=logger,
        **kwargs,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if kwargs:
            trainer.fit(module_type(), DataLoader(dataset(16), 4), val())
        else:
            trainer.validate(module_type(), val(), verbose=False)
    return look(callbacks[0]), trainer, [str(one.message) for one in told]


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    for name in CASES:
        found, trainer, told = run(processes, name, folder)
        rank, directory = trainer.global_rank, trainer.log_dir  # asks all processes
        written = sorted(files(directory)) if rank == 0 else []
        events = len(list(Path(directory).glob("*tfevents*")))
        content = {"found": plain(found), "told": told, "written": written, "events": events}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
