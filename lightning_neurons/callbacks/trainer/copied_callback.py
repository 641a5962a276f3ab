"""A hint for those whose callback was copied by the tool that they gave it to: the copy has run, not theirs."""

from typing import Any


class Trail:
    """What a callback and its copies share: where the one that has measured last has left its report, in words."""

    def __init__(self) -> None:
        self.hint: str | None = None

    def __deepcopy__(self, memo: Any) -> "Trail":
        return self

    def leave(self, folder: Any) -> None:
        """Say where the report is.

        Args:
            folder: With its files; None if there are none.
        """
        where = "it wrote no files" if folder is None else f"its files are in {folder} (NeuronReport.load)"
        self.hint = (
            "this callback has measured nothing, but a copy of it has (some tools copy the callbacks that they are "
            f"given): {where}"
        )
