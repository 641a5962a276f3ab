"""State of a pruning callback with other settings, found in a checkpoint."""

import ast
from collections.abc import Mapping
from typing import Any


def state_of_other_settings(checkpoint: Mapping[str, Any], own: str) -> tuple[dict[str, Any], str] | None:
    """Find the state of a pruning callback with other settings, and these; None if there is none, or one with the same.

    Args:
        checkpoint: Of a Trainer.
        own: The key of the callback's own state.

    Returns:
        The state, and the settings that differ as a text.
    """
    states = checkpoint.get("callbacks") or {}
    others = [key for key, state in states.items() if isinstance(state, dict) and {"rounds", "seed"} <= state.keys()]
    if own in states or len(others) != 1:
        return None
    return states[others[0]], "; ".join(f"{one} before" for one in _only_in(others[0], own))


def _only_in(key: str, other: str) -> list[str]:
    """Return the settings in a callback's key that are not in another key."""
    theirs, ours = _settings(key), _settings(other)
    return [f"{name}={value!r}" for name, value in theirs.items() if name not in ours or ours[name] != value]


def _settings(key: str) -> dict[str, Any]:
    try:
        return dict(ast.literal_eval(key[key.index("{") :]))
    except (ValueError, SyntaxError):  # a key in another form
        return {"": key}
