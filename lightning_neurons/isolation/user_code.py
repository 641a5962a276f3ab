"""Ownership of code: only what the user has written is searched."""

import dis
import enum
import sys
import types
from functools import lru_cache

_FRAMEWORK = {
    "torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "numpy",
}  # fmt: skip
_OWN = __name__.partition(".")[0]
_NAMING = {
    number: int(name == "LOAD_GLOBAL") for name, number in dis.opmap.items() if name.endswith(("_GLOBAL", "_NAME"))
}
"""By operation that uses a global name, how many of the lowest bits of its argument are no part of the name's place."""
_DATA = {"Dataset", "DataLoader", "Sampler", "LightningDataModule", "Trainer", "Logger", "Strategy", "Accelerator"}


class Users:
    """The user's code: all that does not come with Python, is no framework, and was not installed.

    Args:
        kind: The class of the user's model; its packages count as the user's too.
    """

    def __init__(self, kind: type) -> None:
        self._packages = {_package(base.__module__) for base in kind.__mro__} - sys.stdlib_module_names
        self._known: dict[str, bool] = {}

    def wrote(self, module: str | None) -> bool:
        """Return whether a module, by name, is the user's."""
        package = _package(module)
        if package not in self._known:
            mine = package in self._packages or not _is_installed(package)
            self._known[package] = mine and not is_framework(package)
        return self._known[package]

    def own(self, kind: type) -> bool:
        """Return whether instances of a class are the user's own objects, except data sets and parts of a Trainer."""
        packages = [(_package(base.__module__), base.__name__) for base in kind.__mro__]
        alien = any(package == _OWN or (package in _FRAMEWORK and name in _DATA) for package, name in packages)
        return self.wrote(kind.__module__) and not alien and not issubclass(kind, enum.Enum | BaseException)

    def accumulates(self, kind: type) -> bool:
        """Return whether instances of an installed class collect something from step to step, as metrics do.

        Such classes have ``reset`` or ``partial_fit``. All others are assumed not to change in a run, or to reach the
        outside, as a logger does.
        """
        packages = {_package(base.__module__) for base in kind.__mro__} - {"builtins"}
        apart = _FRAMEWORK | sys.stdlib_module_names | {_OWN}
        gathers = any(callable(getattr(kind, name, None)) for name in ("reset", "partial_fit"))
        return gathers and packages.isdisjoint(apart - {"abc"}) and not issubclass(kind, type)


def is_framework(module: str | None) -> bool:
    """Return whether a module, by name, belongs to a framework that models are built on, or to this package."""
    return _package(module) in _FRAMEWORK | {_OWN}


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


@lru_cache(maxsize=1024)
def _is_installed(package: str) -> bool:
    """Return whether a package came with Python, or was installed: neither is where a user writes code."""
    if package == "__main__":
        return False
    if not package or package in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


@lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the global names that a function uses, and the names of all attributes that it reads."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return _used_in(code).union(*(used for used, _ in inner)), frozenset(code.co_names).union(*(a for _, a in inner))


def _used_in(code: types.CodeType) -> frozenset[str]:
    """Return the global names in the instructions of a function; ``dis`` would take ten times as long."""
    operations, arguments = code.co_code[::2], code.co_code[1::2]
    used = set()
    for place, operation in enumerate(operations):
        if operation in _NAMING:
            number, shift, before = arguments[place], 8, place - 1
            while before >= 0 and operations[before] == dis.EXTENDED_ARG:  # higher digits of the argument
                number |= arguments[before] << shift
                shift, before = shift + 8, before - 1
            used.add(code.co_names[number >> _NAMING[operation]])
    return frozenset(used)
