"""What a table of wrong arguments should meet: each row is refused, in the words beside it."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_neurons import ArgumentError


def not_refused(make: Callable[..., Any], rows: Iterable[tuple[dict[str, Any], str]]) -> dict[str, str]:
    """Rows that were taken, or refused otherwise than in one line that matches; the check is that there is none."""
    wrong = {}
    for arguments, message in rows:
        try:
            make(**arguments)
        except MisconfigurationException as refused:
            said = str(refused)
            if not (re.search(message, said) and isinstance(refused, ArgumentError) and "\n" not in said):
                wrong[str(arguments)] = said
        else:
            wrong[str(arguments)] = "was taken"
    return wrong
