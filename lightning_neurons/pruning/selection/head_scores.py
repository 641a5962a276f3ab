"""Scores of heads of ``nn.MultiheadAttention`` and of hidden units of recurrent layers, where nothing is measured."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_neurons.criteria import CRITERIA
from lightning_neurons.criteria.contract import Criterion, LayerTraits, Summary
from lightning_neurons.criteria.ranking import normalize
from lightning_neurons.dependency.groups import Group
from lightning_neurons.layers.attention import WEIGHTS_APART, has_separable_heads, has_weights_apart
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.recurrent import has_hidden_units, incoming_weights
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.selection.group_scores import GroupScores, group_scores

_INSTEAD: Criterion = CRITERIA["weight_l2"]
_NAMED = 3


def head_scores(
    groups: Mapping[str, Group], model: nn.Module, budget: PruningBudget, measured: Mapping[str, Tensor]
) -> tuple[dict[str, GroupScores], tuple[str, ...]]:
    """Return the scores of the units of each group that consists of heads or of hidden units, and notes.

    A criterion of the weights alone judges the rows of the packed projection of queries, keys and values, or those of
    the gates of the last recurrent layer. Instead of one that is measured, the L2 norm of these rows ranks the units
    among themselves; where they compete with other neurons, they have no score, and neither have they by deadness or
    for a threshold.

    Args:
        groups: By root.
        model: The model.
        budget: Says by what to judge.
        measured: By layer, scores that are known; groups with one of these layers are left out.

    Returns:
        By root, the lowest of which go first; and a note if another criterion than the budget's decides.
    """
    criterion, modules = budget.measured, modules_by_name(model)
    chosen = {
        root: group
        for root, group in groups.items()
        if not group.layers.keys() & measured.keys() and all(_is_unmeasured(modules[n]) for n in group.layers)
    }
    if criterion is None or not chosen:
        return {}, ()
    judge = criterion if not criterion.statistics else _INSTEAD
    if judge is not criterion and (budget.by_deadness or budget.rule[0] == "threshold" or budget.scopes != ("layer",)):
        return {}, ()
    names = [name for group in chosen.values() for name in group.layers]
    scores = {name: score for name in names if (score := _rows(name, modules[name], judge)) is not None}
    label = "" if judge is criterion else "L2 norm of weights"
    found = group_scores(chosen, normalize(scores, budget.normalization), budget)
    if judge is criterion:
        return found, ()
    listed = ", ".join(names[:_NAMED]) + f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)
    ranked = "heads and hidden units are ranked by the L2 norm of their weights"
    note = f"{ranked}, as {budget.label} is not measured in {listed}"
    return {root: replace(one, label=label) for root, one in found.items()}, (note,)


def _is_unmeasured(module: nn.Module) -> bool:
    return has_separable_heads(module) or has_hidden_units(module)


def _rows(name: str, module: nn.Module, criterion: Criterion) -> Tensor | None:
    """Return the score of each neuron of a module, or None if the criterion is not defined for it.

    Args:
        name: The attention or recurrent layer.
        module: The same.
        criterion: Of the weights alone.
    """
    if has_hidden_units(module):
        traits = LayerTraits(name, incoming=incoming_weights(module))
    else:
        apart = has_weights_apart(module)
        weights = [module.get_parameter(n).detach() for n in (WEIGHTS_APART if apart else ("in_proj_weight",))]
        columns = module.get_parameter("out_proj.weight").detach().T  # what a head makes, all of its rows stand for
        traits = LayerTraits(name, incoming=torch.cat(weights, 1), outgoing=columns.repeat(1 if apart else 3, 1))
    if criterion.refuse(traits) is not None:
        return None
    return criterion.judge(Summary(traits, {}))
