"""Exceptions and checks of arguments; every message names the argument, its value, and allowed values.

::

    ValueError
    └── ArgumentError            an argument that no model could make right
        └── UnknownNameError     a name that matches nothing; suggests the nearest ones
    RuntimeError
    ├── MeasurementError         the model or its data cannot be measured as asked
    │   └── NoLossError          there is nothing to differentiate; all else can be measured
    └── PruningError             the model cannot be cut as asked
    ImportError
    └── MissingPackageError      something optional is not installed

Misuse of a Lightning callback is reported as Lightning's own ``MisconfigurationException``.
"""

import difflib
from collections.abc import Collection, Iterable
from numbers import Real


class ArgumentError(ValueError):
    """An argument has a value that is not allowed."""

    @classmethod
    def of(cls, name: str, got: object, allowed: str) -> "ArgumentError":
        """Build the error with the common message: ``name`` is the argument, ``allowed`` what would work.

        Returns:
            The error, not raised.
        """
        return cls(f"{name}={got!r} is not allowed: expected {allowed}" + ("" if allowed.endswith("?") else "."))


class UnknownNameError(ArgumentError):
    """A name or pattern that matches nothing."""

    @classmethod
    def among(cls, name: str, got: str, known: Iterable[str]) -> "UnknownNameError":
        """Build the error with the known names in its message.

        Returns:
            The error, not raised, with the nearest names first and at most 20 of the known ones.
        """
        known = list(known)
        near = nearest(got, known)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        return cls(f"{name}: nothing matches {got!r}.{hint} Known: {listed or '(none)'}.")


class MeasurementError(RuntimeError):
    """The model or its data cannot be measured in the way that was asked for."""


class NoLossError(MeasurementError):
    """The step has no differentiable loss; what needs no gradients can be measured."""


class PruningError(RuntimeError):
    """The model cannot be cut in the way that was asked for; it is as it was before."""


class MissingPackageError(ImportError):
    """An optional package is not installed; the message says how to install it."""


def in_short(error: BaseException) -> str:
    r"""Return an error's type and the first line of its message.

    Example:
        >>> in_short(RuntimeError("shapes differ\n  and more"))
        'RuntimeError: shapes differ'
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def nearest(got: str, known: Collection[str], count: int = 3) -> list[str]:
    """Return the ``count`` names most like ``got``; a pattern's wildcards are left out of the comparison.

    Example:
        >>> nearest("net.cov1", ["net.conv1", "net.conv2", "head"], count=1)
        ['net.conv1']
    """
    return difflib.get_close_matches(got.replace("*", ""), list(known), n=count, cutoff=0.4)


def is_number(value: object) -> bool:
    """Return True for a real number, of Python or numpy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_share(name: str, value: float, *, zero: bool = True) -> float:
    """Return ``value`` if it lies in [0, 1] (in (0, 1] unless ``zero``).

    Raises:
        ArgumentError: Otherwise.
    """
    if not is_number(value) or not value <= 1 or not (value >= 0 if zero else value > 0):
        raise ArgumentError.of(name, value, f"a share in {'[0, 1]' if zero else '(0, 1]'}, such as 0.1 for 10 %")
    return float(value)


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``least``.

    Raises:
        ArgumentError: Otherwise.
    """
    if not is_number(value) or not hasattr(value, "__index__") or value < least:
        raise ArgumentError.of(name, value, f"a whole number of at least {least}")
    return int(value)


def check_seed(name: str, value: int) -> int:
    """Return ``value`` if it can seed random numbers.

    Raises:
        ArgumentError: Otherwise.
    """
    if check_count(name, value, least=0) >= 2**63:
        raise ArgumentError.of(name, value, "a whole number below 2**63")
    return int(value)


def check_flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is True or False.

    Raises:
        ArgumentError: Otherwise.
    """
    if not isinstance(value, bool):
        raise ArgumentError.of(name, value, "True or False")
    return value


def check_choice(name: str, value: str, allowed: Collection[str]) -> str:
    """Return ``value`` if it is among ``allowed``.

    Raises:
        ArgumentError: Otherwise, naming the nearest choice.
    """
    if value not in allowed:
        near = nearest(str(value), allowed, count=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ArgumentError.of(name, value, f"one of {', '.join(map(repr, allowed))}{hint}")
    return value
