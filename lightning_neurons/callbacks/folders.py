"""Where the files of a run go: a folder that no other run writes to."""

from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_neurons.results.whole_file import Place, inside, is_there

_RESULTS = ("neurons.json", "history.json", "ablation.json", "classes.json", "pruning.json", "pictures")
_OWN = "lightning_neurons"

_CHOSEN: "WeakKeyDictionary[Any, dict[tuple[str, str], Place]]" = WeakKeyDictionary()
"""By Trainer: by what it does and where its runs lie, the folder."""

_FITTED: "WeakSet[Any]" = WeakSet()
"""The loggers that have seen a fit."""

_BESIDE: "WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]]" = WeakKeyDictionary()
"""By Trainer: by what it does and with which loggers, whether these are those of another Trainer's fit."""


def folder_of(trainer: Any) -> Place | None:
    """The folder of the Trainer's run, or None if it keeps no files. Call it in all processes.

    It is the log directory of a ``TensorBoardLogger`` or ``CSVLogger``. The directory of other loggers is shared by
    runs; there it is ``name/version``, as for checkpoints. Without a logger nothing is written, unless an observer has
    ``html=True``; then it is a new ``lightning_neurons/version_0`` in the Trainer's folder. What ``validate`` and
    ``test`` find after a fit lies in a folder of that name in it.
    """
    chosen: Place | None = None
    if trainer.is_global_zero and not trainer.fast_dev_run:
        try:
            chosen = _chosen(trainer)
        except Exception as error:  # noqa: BLE001 (the other processes wait; training goes on)
            rank_zero_warn(f"lightning_neurons finds no folder for its files: {type(error).__name__}: {error}")
    found: Place | None = trainer.strategy.broadcast(chosen, 0)
    return found


def has_fitted(trainer: Any) -> bool:
    """Whether this Trainer evaluates now what it has trained before."""
    return bool(trainer.state.fn != "fit" and trainer.fit_loop.epoch_loop._batches_that_stepped > 0)


def is_beside_a_fit(trainer: Any) -> bool:
    """Whether this Trainer evaluates what another has trained, into the same logger. Call it in all processes."""
    if trainer.state.fn == "fit":
        _FITTED.update(trainer.loggers)
        return False
    if has_fitted(trainer):
        return False
    key = trainer.state.fn.value, *map(id, trainer.loggers)
    known = _BESIDE.setdefault(trainer, {})
    if key not in known:  # once, as the first process alone asks later on
        found = any(logger in _FITTED for logger in trainer.loggers)
        if not found and trainer.is_global_zero and not trainer.fast_dev_run:
            with suppress(Exception):  # who finds no folder is told so where it is written to
                root, parts = _place_of_runs(trainer)
                found = root is not None and parts is not None and is_there(inside(root, *parts, "history.json"))
        known[key] = bool(trainer.strategy.broadcast(found, 0))
    return known[key]


def apart(trainer: Any) -> str:
    """What keeps the series of such an evaluation apart from those of the fit: ``"_test"``, or nothing."""
    return f"_{trainer.state.fn.value}" if is_beside_a_fit(trainer) else ""


def _chosen(trainer: Any) -> Place | None:
    known = _CHOSEN.setdefault(trainer, {})
    root, parts = _place_of_runs(trainer)
    if root is None:
        return None
    if parts is None:
        if ("run", str(root)) not in known:
            known["run", str(root)] = _new_version(inside(root, _OWN))
        run = known["run", str(root)]
    else:
        run = inside(root, *parts)
    stage = trainer.state.fn.value
    if stage == "fit":
        known["fit", str(run)] = run
    elif ("fit", str(run)) in known:
        known[stage, str(run)] = inside(run, stage)
    elif (stage, str(run)) not in known:
        is_taken = any(is_there(inside(run, name)) for name in _RESULTS)
        known[stage, str(run)] = inside(run, stage) if is_taken else run
    return known[stage, str(run)]


def _place_of_runs(trainer: Any) -> tuple[str | None, list[str] | None]:
    """A directory, and the folders in it that are this run's alone; None for those if nothing tells runs apart."""
    needed = trainer.default_root_dir if any(getattr(one, "html", False) for one in trainer.callbacks) else None
    if not trainer.loggers:
        return needed, None
    logger = trainer.loggers[0]
    # By name: Lightning's two namespaces have two classes of each.
    if {base.__name__ for base in type(logger).__mro__} & {"TensorBoardLogger", "CSVLogger"}:
        return logger.log_dir, []
    name, version = logger.name, logger.version
    folders = [str(name)] if name not in {None, ""} else []
    if version in {None, ""}:
        return logger.save_dir or needed, None
    return logger.save_dir or needed, [*folders, version if isinstance(version, str) else f"version_{version}"]


def _new_version(folder: Place) -> Place:
    """The first ``version_...`` that is not there yet; it is made, so that nobody else takes it."""
    number = 0
    while True:
        place = inside(folder, f"version_{number}")
        try:
            if isinstance(place, Path):
                place.mkdir(parents=True)
                return place
            if not is_there(place):
                return place
        except FileExistsError:
            pass
        number += 1
