"""Loading of pruned checkpoints: the layers take the widths of the tensors in the file."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytorch_lightning
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_neurons.callbacks.pruning.weight_files import (
    NOT_OF_THE_FILE,
    first_line,
    read_weights,
    with_own_names,
    with_tied,
)
from lightning_neurons.dependency.conform import conform, conforming, narrowed, widened
from lightning_neurons.dependency.sizes import exchange_sizes
from lightning_neurons.errors import ArgumentError, PruningError
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.rounds import Rounds
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.followed_widths import followed_widths, sizes_by_widths
from lightning_neurons.pruning.structure.structure import discover


def fit_widths(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
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


def restore_attributes(models: Iterable[nn.Module], plan: PruningPlan, checkpoint: Mapping[str, Any]) -> None:
    """Give models the numbers in attributes, such as those of heads, that they had when a checkpoint was written.

    State dicts have them in their metadata, which averaging callbacks drop; the cuts in the pruning callback's state
    have them as well.

    Args:
        models: A module that has loaded the checkpoint, and copies of it.
        plan: All cuts of the module before it did.
        checkpoint: Of a Trainer.
    """
    there = _attributes_in(checkpoint)
    if there is None:
        return
    gone = {name: (now, first) for name, (first, now) in plan.attributes.items()}
    for model in models:
        exchange_sizes(model, gone)
        exchange_sizes(model, there)


def _attributes_in(checkpoint: Mapping[str, Any]) -> dict[str, tuple[int, int]] | None:
    """Return the numbers in attributes after the cuts of a checkpoint; None if no pruning callback has written it."""
    callbacks = checkpoint.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    found: list[dict[str, tuple[int, int]]] = []
    for state in states:
        if isinstance(state, dict) and isinstance(state.get("rounds"), dict):
            with suppress(Exception):  # the callback itself says what is wrong with its state
                found.append(dict(Rounds.from_state(state["rounds"]).plan.attributes))
    return found[0] if len(found) == 1 else None


class PrunedCheckpointMixin:
    """Mixin, put before ``LightningModule``, with which ``load_from_checkpoint`` accepts pruned checkpoints.

    Example:
        >>> import lightning as L
        >>> class Module(PrunedCheckpointMixin, L.LightningModule):
        ...     pass
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: object, **kwargs: object) -> Any:
        """Take the widths of what is loaded, then load it.

        Returns:
            What ``load_state_dict`` of the module returns.
        """
        assert isinstance(self, nn.Module), "the mixin of a LightningModule"
        with conforming(self, state_dict):
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]


@contextmanager
def pruned_widths() -> Iterator[None]:
    """Let every module take the widths of what is loaded into it, also inside other libraries.

    For libraries that build a model and load it in one call, such as ``SCVI.load``, ``NeuralForecast.load`` and
    ``LightningModule.load_from_checkpoint``. Inside, ``torch.nn.Module.load_state_dict`` is another for all threads.

    Example:
        >>> import torch
        >>> from lightning_neurons import prune
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = prune(net, torch.zeros(1, 4), {"0": [1, 6]})
        >>> whole = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with pruned_widths():
        ...     _ = whole.load_state_dict(net.state_dict())
        >>> whole[0].out_features
        6
    """
    with _taking_widths(nn.Module):
        yield


def load_pruned(model: Any, path: str | Path, *, example_inputs: Any = None, **kwargs: object) -> Any:
    """Load a pruned model, given what builds the model as it was before.

    Needs no history and no forward: the widths are those of the tensors in the file. Numbers of heads and the like are
    read from files of torch; safetensors has no place for them.

    Args:
        model: A LightningModule class, for a checkpoint; or another module class, or a function that makes the model,
            or the model itself, for a file with a state dict (or a checkpoint, if the model is a LightningModule).
        path: The file: of torch, of safetensors, or a folder that ``save_pretrained`` has written.
        example_inputs: One small batch, as ``prune`` takes it: for files that do not say the numbers in attributes that
            follow widths, such as ``num_heads``. They are then found again on the model, by trial.
        kwargs: For a LightningModule class those of ``load_from_checkpoint``; else what the class or function is given.

    Returns:
        The model with its weights; a LightningModule as ``load_from_checkpoint`` returns it.

    Raises:
        ArgumentError: If ``model`` makes no module, or the file is no such file.
        PruningError: If the file is of another architecture; a model that was given is then as it was.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lightning_neurons import prune
        >>> def make():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = make()
        >>> _ = prune(net, torch.zeros(1, 4), {"0": [1, 6]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(net.state_dict(), f"{folder}/net.pt")
        ...     load_pruned(make, f"{folder}/net.pt")[0].out_features
        6
    """
    if not (isinstance(model, nn.Module) or callable(model)) or (isinstance(model, nn.Module) and kwargs):
        allowed = "a LightningModule class, another module class, a function that makes a module, or a module"
        raise ArgumentError.of("model", model, f"{allowed} (which takes no further arguments)" if kwargs else allowed)
    if isinstance(model, type) and hasattr(model, "load_from_checkpoint"):
        return _from_checkpoint(model, path, kwargs, example_inputs)
    made = model if isinstance(model, nn.Module) else model(**kwargs)
    if not isinstance(made, nn.Module):
        raise ArgumentError.of("model", model, f"a function that makes a module, and not a {type(made).__name__}")
    what = type(made).__name__
    state = content = read_weights(path, f"a file with the state dict of a {what}")
    if isinstance(made, _LIGHTNING) and isinstance(content, dict) and "state_dict" in content:
        made.on_load_checkpoint(content)
        state = content["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ArgumentError.of("path", str(path), f"a file with the state dict of a {what}")
    state = with_tied(made, with_own_names(made, state))
    with _of_a_cut(made, state, example_inputs):
        wrong = _differences(made, state)
        if wrong:
            raise PruningError(f"{path} is of another architecture than {what}: {'; '.join(wrong)}")
        made.load_state_dict(state)
    if "callbacks" in content and isinstance(made, _LIGHTNING):
        restore_attributes([made], PruningPlan({}), content)
        _say_if_unjudged(content, path)
    return made


_LIGHTNING = (lightning.pytorch.LightningModule, pytorch_lightning.LightningModule)


@contextmanager
def _of_a_cut(model: nn.Module, state: Mapping[str, Any], example_inputs: Any = None) -> Iterator[None]:
    """Give a model the widths of a state dict as ``conforming`` does; say where a cut would have done more.

    Args:
        model: The model.
        state: Tensors by name.
        example_inputs: Inputs by which attributes that follow are found, if ``state`` does not say them.

    Raises:
        PruningError: If the file is of a wider network, which no cut can have made of the model.
    """
    names, kind = widened(model, state), type(model).__name__
    if names:
        raise PruningError(
            f"the file is of another architecture, or was written before {kind} was cut: larger than in the model are "
            f"{', '.join(names)}; load_pruned takes the model as it was before any cut"
        )
    made, read = narrowed(model, state, "makes"), narrowed(model, state, "reads")
    is_silent = example_inputs is not None and getattr(state, "_metadata", None) is None
    rules = followed_widths(discover(model, Example(example_inputs)).groups.values(), model) if is_silent else []
    with conforming(model, state):
        exchange_sizes(model, sizes_by_widths(model, rules))
        yield
    if bool(made) != bool(read):
        less, same = ("made", "read") if made else ("read", "made")
        rank_zero_warn(
            f"in the file fewer neurons are {less} than in {kind} (by {', '.join(made or read)}), but as many are "
            f"{same}; is it a file of another architecture, such as one for another number of classes?"
        )


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return the reasons why a state dict cannot be loaded into a model, in the words of torch."""
    own = model.state_dict()
    named = {"Missing key(s)": own.keys() - state.keys(), "Unexpected key(s)": state.keys() - own.keys()}
    found = [f"{what}: {', '.join(sorted(names))}" for what, names in named.items() if names]
    sized = [name for name, tensor in own.items() if isinstance(tensor, Tensor) and not is_lazy(tensor)]
    pairs = [(name, own[name], state[name]) for name in sized if name in state]
    found += [f"not dense: {name}" for name, ours, theirs in pairs if theirs.is_meta or ours.layout != theirs.layout]
    return found + [
        f"size mismatch for {name}: {tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the model"
        for name, ours, theirs in pairs
        if ours.shape != theirs.shape
    ]


def _from_checkpoint(module_class: Any, path: str | Path, kwargs: dict[str, Any], example_inputs: Any) -> Any:
    name = module_class.__name__
    expected = f"a checkpoint of a {name}; for a plain state dict, the class of the network itself"
    try:
        # On the class itself: it builds the module, and a class made for this would not be the one that it asks for.
        with _taking_widths(module_class, partial(_of_a_cut, example_inputs=example_inputs)):
            module = module_class.load_from_checkpoint(path, **kwargs)
    except (*NOT_OF_THE_FILE, PruningError):
        raise
    except Exception as error:
        content = read_weights(path, expected, kwargs.get("weights_only"))
        if isinstance(content, dict) and isinstance(error, RuntimeError) and "state_dict" in content:
            raise PruningError(f"{path} is of another architecture than {name}: {error}") from error
        raise ArgumentError.of("path", f"{path} ({first_line(error)})", expected) from error
    try:
        content = read_weights(path, expected, place="meta")
    except Exception:  # noqa: BLE001 (it has been loaded; what else is in it does not matter here)
        return module
    restore_attributes([module], PruningPlan({}), content)
    _say_if_unjudged(content, path)
    return module


@contextmanager
def _taking_widths(kind: Any, taking: Callable[..., AbstractContextManager[None]] = conforming) -> Iterator[None]:
    """Let modules of a class take the widths of what is loaded into them, by ``conforming`` or the like."""
    own, load = vars(kind).get("load_state_dict"), kind.load_state_dict

    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: object, **options: object) -> Any:
        with taking(module, state_dict):
            return load(module, state_dict, *args, **options)

    kind.load_state_dict = load_state_dict
    try:
        yield
    finally:
        if own is None:
            del kind.load_state_dict
        else:
            kind.load_state_dict = own


def _say_if_unjudged(content: dict[str, Any], path: str | Path) -> None:
    callbacks = content.get("callbacks")
    states = [state for state in callbacks.values() if isinstance(state, dict)] if isinstance(callbacks, dict) else []
    keeping = [state["keeping"] for state in states if isinstance(state.get("keeping"), dict)]
    if any(one.get("judge_after") is not None for one in keeping):
        rank_zero_warn(
            f"{path} was written while a cut was recovering: whether its metric keeps to max_drop was not known yet"
        )


def _naming_the_way(kind: Any) -> Callable[..., Any]:
    @functools.wraps(nn.Module.load_state_dict)
    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: object, **options: object) -> Any:
        try:
            return super(kind, module).load_state_dict(state_dict, *args, **options)
        except RuntimeError as error:
            if not (narrowed(module, state_dict, "makes") or narrowed(module, state_dict, "reads")):
                raise
            raise PruningError(
                f"{error}\nThe file is of a pruned network. load_pruned({type(module).__name__}, path) of "
                "lightning_neurons loads it, and so does whatever loads it inside of `with pruned_widths():`; a "
                "Trainer resumes it with the NeuronPruningCallback that it was trained with."
            ) from error

    return load_state_dict


# Whoever has imported this may have pruned checkpoints, and Lightning loads them in many ways: after an error about
# their sizes, and only then, the way out is said.
for _kind in _LIGHTNING:
    _kind.load_state_dict = _naming_the_way(_kind)  # type: ignore[method-assign]
