"""Checkpoints of models that have become smaller: the file tells the widths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_neurons.errors import ArgumentError
from lightning_neurons.network.widths import conform


def fit_widths(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A pre-hook of ``load_state_dict``. A function of a module, as EMA and SWA copy it with the model."""
    changed = conform(module, state_dict, prefix)
    if changed:
        rank_zero_info(
            f"{type(module).__name__} takes the widths of the checkpoint: {len(changed)} tensors changed size"
        )


def follow_checkpoints(module: nn.Module) -> None:
    """Let a module take the widths of whatever is loaded into it, until ``stop_following``."""
    stop_following(module)
    module.register_load_state_dict_pre_hook(fit_widths)


def stop_following(module: nn.Module) -> None:
    """Remove the hook, also one that a copy has inherited."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is fit_widths]:
        del hooks[key]


class PrunedCheckpointMixin:
    """Put before ``LightningModule`` in a class's bases, this makes ``load_from_checkpoint`` accept pruned checkpoints.

    Example:
        >>> import lightning as L
        >>> class Module(PrunedCheckpointMixin, L.LightningModule):
        ...     pass
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take the widths of what is loaded, then load it."""
        assert isinstance(self, nn.Module), "the mixin of a LightningModule"
        conform(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]


def load_pruned(module_class: type[nn.Module], path: str | Path, **kwargs: Any) -> Any:
    """Load a pruned model, given the class that builds the model as it was before.

    Needs no history and no forward: the widths are those of the tensors in the file.

    Args:
        module_class: A LightningModule class, for a checkpoint; any other module class, for a file with a state dict.
        path: The file.
        kwargs: For a LightningModule those of ``load_from_checkpoint``; else what the class is made with.

    Returns:
        The model with its weights; a LightningModule as ``load_from_checkpoint`` returns it.

    Raises:
        ArgumentError: If ``module_class`` is no module class, or the file is no such file.

    Example:
        >>> import tempfile
        >>> from lightning_neurons import prune
        >>> class Net(nn.Sequential):
        ...     def __init__(self):
        ...         super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = Net()
        >>> _ = prune(net, torch.zeros(1, 4), {"0": [1, 6]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(net.state_dict(), f"{folder}/net.pt")
        ...     load_pruned(Net, f"{folder}/net.pt")[0].out_features
        6
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise ArgumentError.of("module_class", module_class, "a LightningModule class, or another module class")
    if hasattr(module_class, "load_from_checkpoint"):
        return _from_checkpoint(module_class, path, kwargs)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (LookupError, EOFError, RuntimeError) as error:
        got = f"{path} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        raise ArgumentError.of("path", got, f"a file with the state dict of a {module_class.__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ArgumentError.of("path", str(path), f"a file with the state dict of a {module_class.__name__}")
    model = module_class(**kwargs)
    conform(model, state)
    model.load_state_dict(state)
    return model


def _from_checkpoint(module_class: Any, path: str | Path, kwargs: dict[str, Any]) -> Any:
    own = vars(module_class).get("load_state_dict")
    load = module_class.load_state_dict

    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        conform(module, state_dict)
        return load(module, state_dict, *args, **options)

    # On the class itself: it builds the module, and a class made for this would not be the one that it asks for.
    module_class.load_state_dict = load_state_dict
    try:
        module = module_class.load_from_checkpoint(path, **kwargs)
        _say_if_unjudged(path)
        return module
    except (KeyError, IndexError, TypeError) as error:
        content = torch.load(path, map_location="cpu", weights_only=kwargs.get("weights_only", True))
        if isinstance(content, dict) and "state_dict" in content:
            raise
        allowed = f"a checkpoint of a {module_class.__name__}; for a plain state dict, the class of the network itself"
        raise ArgumentError.of("path", str(path), allowed) from error
    finally:
        if own is None:
            del module_class.load_state_dict
        else:
            module_class.load_state_dict = own


def _say_if_unjudged(path: str | Path) -> None:
    try:
        callbacks = torch.load(path, map_location="meta", weights_only=True).get("callbacks", {})
    except Exception:  # noqa: BLE001 (it has been loaded; what else is in it does not matter here)
        return
    states = [state.get("keeping", {}) for state in callbacks.values() if isinstance(state, dict)]
    if any(keeping.get("judge_after") is not None for keeping in states):
        rank_zero_warn(
            f"{path} was written while a cut was recovering: whether its metric keeps to max_drop was not known yet"
        )
