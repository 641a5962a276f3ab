"""Conversion to plain values for JSON, which has no NaN, no infinity and no tensor, and back."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_WORDS = ("inf", "-inf")


def plain(value: Any) -> Any:
    """Convert a value for JSON: tensors to lists, keys to strings, NaN to null, infinities to words.

    Example:
        >>> plain({3: torch.tensor([1.0, float("nan")]), "high": float("inf")})
        {'3': [1.0, None], 'high': 'inf'}
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else repr(value)
    return value


def number(value: Any) -> float:
    """Return the number that ``plain`` made null or a word.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> number("-inf"), number(2)
        (-inf, 2.0)
    """
    if value is None or value in _WORDS:
        return float("nan" if value is None else value)
    if not isinstance(value, int | float):
        raise ValueError(f"a number is expected, and not a {type(value).__name__}")
    return float(value)


def floats(values: Any) -> Tensor:
    """Return the tensor that ``plain`` made a list of."""

    def numbers(value: Any) -> Any:
        return [numbers(v) for v in value] if isinstance(value, list) else number(value)

    return torch.tensor(numbers(values), dtype=torch.float64)
