"""Hint for a callback that has measured nothing because a tool has copied it and run the copy."""

from typing import Any


class Trail:
    """A message that a callback shares with its copies: the place of the last report that one of them made."""

    def __init__(self) -> None:
        self.hint: str | None = None

    def __deepcopy__(self, memo: Any) -> "Trail":
        return self

    def leave(self, folder: Any) -> None:
        """Set the message to the place of the report.

        Args:
            folder: With its files; None if there are none.
        """
        where = "it wrote no files" if folder is None else f"its files are in {folder} (NeuronReport.load)"
        self.hint = (
            "this callback has measured nothing, but a copy of it has (some tools copy the callbacks that they are "
            f"given): {where}"
        )
