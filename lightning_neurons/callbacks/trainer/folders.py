"""Folder of a run's files, to which no other run writes."""

from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_neurons.callbacks.trainer.namespaces import Trainer, callbacks_of, is_fast_dev_run, running
from lightning_neurons.results.whole_file import Place, inside, is_there

_RESULTS = ("neurons.json", "history.json", "ablation.json", "classes.json", "pruning.json", "pictures")
_OWN = "lightning_neurons"
_MOST = 10_000  # runs in one log directory

_CHOSEN: "WeakKeyDictionary[Any, dict[tuple[str, str], _Chosen]]" = WeakKeyDictionary()
"""By Trainer: by what it does and where its runs lie, the folder."""

_FITS: "WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[str, _Chosen]]]" = WeakKeyDictionary()
"""By Trainer and module: by where runs lie, the folder of the fit."""

_FITTED: "WeakSet[Any]" = WeakSet()
"""The loggers that have seen a fit."""

_BESIDE: "WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]]" = WeakKeyDictionary()
"""By Trainer: by what it does and with which loggers, whether these are those of another Trainer's fit."""


class _Chosen(NamedTuple):
    """A folder, and the suffix of its fit among those that share a log directory: ``"_fit_2"``; empty for the first."""

    place: Place
    fit: str = ""


def folder_of(trainer: Trainer) -> tuple[Place | None, str]:
    """Return the folder of the Trainer's run, or None if it keeps no files. Call it in all processes.

    It is the log directory of a ``TensorBoardLogger`` or ``CSVLogger``. The directory of other loggers is shared by
    runs; there it is ``name/version``, as for checkpoints. Without a logger nothing is written, unless an observer has
    ``html=True``; then it is a new ``lightning_neurons/version_0`` in the Trainer's folder. What ``validate`` and
    ``test`` find after a fit lies in a folder of that name in it. Where another fit has left its files (folds of a
    cross-validation that share a logger, a Trainer that fits several modules), those of the next lie in ``fit_2`` and
    so on; a fit resumed from a checkpoint continues with the last.

    Returns:
        The folder, and the suffix of the series of a later fit: ``"_fit_2"``, or an empty string.
    """
    chosen: _Chosen | None = None
    if trainer.is_global_zero and not is_fast_dev_run(trainer):
        try:
            chosen = _chosen(trainer)
        except Exception as error:  # noqa: BLE001 (the other processes wait; training goes on)
            rank_zero_warn(f"lightning_neurons finds no folder for its files: {type(error).__name__}: {error}")
    found: _Chosen | None = trainer.strategy.broadcast(chosen, 0)
    return (None, "") if found is None else (found.place, found.fit)


def has_fitted(trainer: Trainer) -> bool:
    """Return True if this Trainer validates or tests now and has trained before."""
    return bool(trainer.state.fn != "fit" and trainer.fit_loop.epoch_loop._batches_that_stepped > 0)


def is_beside_a_fit(trainer: Trainer) -> bool:
    """Return True if this Trainer evaluates into the logger of another Trainer's fit. Call it in all processes."""
    if trainer.state.fn == "fit":
        _FITTED.update(trainer.loggers)
        return False
    if has_fitted(trainer):
        return False
    key = running(trainer), *map(id, trainer.loggers)
    known = _BESIDE.setdefault(trainer, {})
    if key not in known:  # once, as the first process alone asks later on
        found = any(logger in _FITTED for logger in trainer.loggers)
        if not found and trainer.is_global_zero and not is_fast_dev_run(trainer):
            with suppress(Exception):  # a missing folder is reported where files are written
                root, parts = _place_of_runs(trainer)
                found = root is not None and parts is not None and is_there(inside(root, *parts, "history.json"))
        known[key] = bool(trainer.strategy.broadcast(found, 0))
    return known[key]


def apart(trainer: Trainer) -> str:
    """Return the suffix for the series of an evaluation: ``"_test"``, or an empty string for those of the fit.

    A test after a fit has one, and so have evaluations by another Trainer, whose steps are not those of the fit. Call
    it in all processes.
    """
    is_beside = is_beside_a_fit(trainer)
    return f"_{running(trainer)}" if is_beside or (trainer.testing and has_fitted(trainer)) else ""


def _chosen(trainer: Trainer) -> _Chosen | None:
    known = _CHOSEN.setdefault(trainer, {})
    root, parts = _place_of_runs(trainer)
    if root is None:
        return None
    if parts is None:
        if ("run", str(root)) not in known:
            known["run", str(root)] = _Chosen(_new_version(inside(root, _OWN)))
        run = known["run", str(root)].place
    else:
        run = inside(root, *parts)
    stage = running(trainer)
    if stage == "fit":
        fits = _FITS.setdefault(trainer, WeakKeyDictionary()).setdefault(trainer.lightning_module, {})
        if str(run) not in fits:
            is_own = any(chosen.place == run for (what, _), chosen in known.items() if what not in ("run", "fit"))
            fits[str(run)] = _Chosen(run) if is_own else _of_fit(run, resumes=bool(trainer.ckpt_path))
        known["fit", str(run)] = fits[str(run)]
    elif (fit := known.get(("fit", str(run)))) is not None:
        known[stage, str(run)] = _Chosen(inside(fit.place, stage), fit.fit)
    elif (stage, str(run)) not in known:
        known[stage, str(run)] = _Chosen(_free(run, stage))
    return known[stage, str(run)]


def _of_fit(run: Place, *, resumes: bool) -> _Chosen:
    """Return a folder for another fit, or that of the last one if it is resumed."""
    names = ["", *(f"fit_{number}" for number in range(2, _MOST))]
    taken = list(takewhile(lambda name: _is_taken(inside(run, name) if name else run), names))
    name = taken[-1] if taken and resumes else names[len(taken)]
    return _Chosen(inside(run, name), f"_{name}") if name else _Chosen(run)


def _free(run: Place, stage: str) -> Place:
    """Return a folder for an evaluation by a Trainer that has not trained."""
    names = [stage, *(f"{stage}_{number}" for number in range(2, _MOST))]
    places = [run, *(inside(run, name) for name in names)]
    return next(place for place in places if not _is_taken(place))


def _is_taken(folder: Place) -> bool:
    return any(is_there(inside(folder, name)) for name in _RESULTS)


def _place_of_runs(trainer: Trainer) -> tuple[str | None, list[str] | None]:
    """Return a directory, and the path in it that only this run has; None if the logger gives runs no such path."""
    needed = trainer.default_root_dir if any(getattr(one, "html", False) for one in callbacks_of(trainer)) else None
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
    """Choose the first ``version_...`` that does not exist yet, and make it on a local disk.

    Returns:
        The path of the new folder; on remote storage, a URL whose folder comes into being with its first file.
    """
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
