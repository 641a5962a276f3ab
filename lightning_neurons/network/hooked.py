"""A mode that sees calls of torch functions, with hooks on modules that live exactly as long as it is active."""

from collections.abc import Iterator
from typing import Self

from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


class HookedMode(TorchFunctionMode):
    """Common base: what is hooked when it is entered is unhooked when it is left, or cannot be entered."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []

    def _hook(self) -> Iterator[RemovableHandle]:
        """Register the hooks, one by one."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            for handle in self._hook():
                self._handles.append(handle)
        except BaseException:
            self._unhook()
            raise
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
