"""A table of cases as one test, which says of each case that fails what went wrong."""

import functools
import inspect
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch


def seed() -> None:
    """Start every random number generator where each test finds it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def for_each(names: str, cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for every case in a loop, where ``pytest.mark.parametrize`` would make a test of every case.

    Each case begins with the seeds of a test; fixtures are those of the one test, shared by all cases.

    Args:
        names: The arguments that come from the table, with commas between them.
        cases: The rows; of several arguments each row is a tuple.
    """
    columns = [name.strip() for name in names.split(",")]
    rows = [row if len(columns) > 1 else (row,) for row in cases]

    def loop(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def of_all(**given: Any) -> None:
            wrong: dict[str, str] = {}
            cause = None
            for number, row in enumerate(rows):
                seed()
                try:
                    test(**given, **dict(zip(columns, row, strict=True)))
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - whatever it is, the others run too
                    case = ", ".join(getattr(value, "__name__", str(value)) for value in row)
                    wrong[f"{number}: {case}"[:200]] = f"{type(error).__name__}: {error}"
                    cause = cause or error
            if wrong or not rows:
                raise AssertionError(wrong or "a table without rows") from cause

        others = [parameter for name, parameter in signature.parameters.items() if name not in columns]
        of_all.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return of_all

    return loop
