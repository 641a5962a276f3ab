"""Code that no torch function mode can follow, and the words by which a report describes it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

HIDDEN = "an autograd function of the model's own"
SCRIPT = "TorchScript"
TRANSFORM = "a transform of torch.func"
DATA = "a function that overwrites them behind autograd's back"
PYTHON = "numpy or plain Python"
UNUSED = "did not run as a module (unused, or its weights are used by a function)"
ANYWHERE = "its values go on to code that cannot be looked into, or to nothing"

LEAVES = frozenset({
    Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.apply_, Tensor.map_, Tensor.map2_
})  # fmt: skip
"""Functions that hand a tensor's numbers to code outside of torch."""


@contextmanager
def script_functions(tell: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Report calls of functions in TorchScript, which no mode sees.

    Args:
        tell: Called with the arguments, the keyword arguments and the result of each.
    """
    kind: Any = torch.jit.ScriptFunction
    run = kind.__call__

    def told(function: Any, *args: Any, **kwargs: Any) -> Any:
        out = run(function, *args, **kwargs)
        tell(args, kwargs, out)
        return out

    kind.__call__ = told
    try:
        yield
    finally:
        kind.__call__ = run
