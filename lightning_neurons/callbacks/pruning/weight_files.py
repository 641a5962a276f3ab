"""Files with weights: of torch, of safetensors, and folders of them as ``save_pretrained`` writes them."""

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.errors import ArgumentError

NOT_OF_THE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError)
"""Errors that say nothing of what a file holds; of a broken one, torch may say that an argument is invalid."""

_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_weights(path: str | Path, what: str, weights_only: bool | None = True, place: str = "cpu") -> Any:
    """Load a file with ``torch.load``, or one of safetensors, or a folder that ``save_pretrained`` has written.

    Args:
        path: The file or folder.
        what: Words for what it should be, for errors.
        weights_only: Of ``torch.load``.
        place: The device to load tensors to.

    Returns:
        What the file holds; of safetensors, tensors by name.

    Raises:
        ArgumentError: If it is broken, or a folder without weights.
        UnpicklingError: If it holds objects, which could run code.
    """
    try:
        if Path(path).is_dir():
            return {n: t for file in _files_in(Path(path)) for n, t in _load(file, True, place).items()}
        return _load(Path(path), weights_only, place)
    except (*NOT_OF_THE_FILE, ArgumentError):
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise  # torch says what could be done
        raise ArgumentError.of("path", f"{path} ({first_line(error)})", what) from error


def _files_in(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():  # it is in several files
        names = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        return [folder / name for name in dict.fromkeys(names)]
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
    raise ArgumentError.of("path", str(folder), f"a file, or a folder with one of {', '.join((*_WEIGHTS, _INDEX))}")


def _load(path: Path, weights_only: bool | None, place: str) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location=place, weights_only=weights_only)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ArgumentError.of("path", str(path), "a file of torch, or this one with safetensors installed") from error
    return load_file(path, device=place)


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def with_tied(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict with the tensors that a file has under another of their names only, as safetensors does."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor), []).append(name)
    tied = {n: next((m for m in same if m in state), None) for same in names.values() if len(same) > 1 for n in same}
    more = {name: state[other] for name, other in tied.items() if other is not None and name not in state}
    if not more:
        return state
    whole = OrderedDict({**state, **more})
    whole._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    return whole


def with_own_names(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict under the names of the model's tensors, where ``save_pretrained`` has written others.

    Hugging Face's models may write the names of their first version. Which they write is found by renaming numbers
    in place of tensors.
    """
    names = list(model.state_dict())
    if not hasattr(model, "save_pretrained") or not set(names) - set(state):
        return state
    try:
        from transformers.core_model_loading import revert_weight_conversion

        written = revert_weight_conversion(model, {name: torch.tensor(i) for i, name in enumerate(names)})
        own = {other: names[int(number)] for other, number in written.items()}
    except Exception:  # noqa: BLE001 (another version, or tensors are converted as well: names are left as they are)
        return state
    return {own.get(name, name): tensor for name, tensor in state.items()}
