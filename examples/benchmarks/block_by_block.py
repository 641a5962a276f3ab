"""A trained MobileNetV3-Small, block by block: what is silent goes, and nothing else.

    python examples/benchmarks/block_by_block.py --data FOLDER [--pictures 300] [--folder plans]

The recipe of activation-based pruning: a threshold on magnitudes, the deadness of every channel, a plan per block as
JSON, the cut, and a forward as proof that the structure still fits. Then the more careful plan: a coupled channel goes
only where all layers of its group find it dead, in three measurements on different pictures.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from cutting import accuracy

from lightning_neurons import NeuronReport, PruningBudget, PruningPlan, describe_structure, measure, prune
from lightning_neurons.pruning.decision import score
from lightning_neurons.pruning.planning import decide
from lightning_neurons.pruning.selection.select import select
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import Structure, discover


def deadness(model: nn.Module, pictures: Tensor, budget: PruningBudget) -> NeuronReport:
    """The share of silent values of every channel."""
    assert budget.measured is not None, "a threshold on deadness is measured"
    return measure(model, pictures.split(50), criteria=[budget.measured])


def block_plans(
    structure: Structure, model: nn.Module, report: NeuronReport, budget: PruningBudget
) -> dict[str, PruningPlan]:
    """By block, a plan for the groups that begin in it."""
    scores, _ = score(structure, model, budget, report=report)
    whole = decide(structure, budget, select(structure, scores, budget)).plan
    found: dict[str, dict[str, list[int]]] = {}
    for root in structure.groups:
        if whole.neurons.get(root):
            found.setdefault(structure.blocks[root], {})[root] = list(whole.neurons[root])
    return {block: PruningPlan.from_indices(neurons) for block, neurons in found.items()}


def careful(
    structure: Structure, model: nn.Module, reports: Sequence[NeuronReport], budget: PruningBudget
) -> PruningPlan:
    """What all layers of a group and all measurements agree on."""
    choices = [select(structure, score(structure, model, budget, report=r)[0], budget) for r in reports]
    earlier = [structure.neurons(choice.units) for choice in choices[:-1]]
    return decide(structure, budget, choices[-1], earlier).plan


def main() -> None:
    """Cut block by block, then more carefully."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--threshold", type=float, default=0.98, help="deadness from which a channel goes")
    parser.add_argument("--silence", type=float, default=0.01, help="in units of a layer's root mean square")
    parser.add_argument("--folder", type=Path, default=Path("plans"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(arguments.data))
    import lnn_data
    from mobilenet_v3 import mobilenet_v3

    weights = str(arguments.data / "mobilenet_v3_small.safetensors")
    pictures, labels = lnn_data.load_imagenet_sample()
    x, y = lnn_data.to_tensor(pictures, lnn_data.TF_MEAN, lnn_data.TF_STD), torch.from_numpy(labels)
    seen, test, answers = x[: arguments.pictures], x[arguments.pictures :], y[arguments.pictures :]
    rule = {"threshold": arguments.threshold, "activation_threshold": arguments.silence}

    model = mobilenet_v3("small", weights=weights)
    document = describe_structure(model, x[:2], path=arguments.folder / "structure.json")
    print(
        f"{len(document['blocks'])} blocks, {len(document['groups'])} groups, "
        f"top-1 {accuracy(model, test, answers):.1f} %"
    )
    budget = PruningBudget("deadness", **rule)
    plans = block_plans(discover(model, Example(x[:2])), model, deadness(model, seen, budget), budget)
    for block, plan in plans.items():
        plan.save(arguments.folder / f"{block}.json")
        report = prune(
            model, x[:2], PruningPlan.load(arguments.folder / f"{block}.json"), seen.split(50), compensation="mean"
        )
        cost = report.cost
        print(
            f"{block}: {len(report.plan)} neurons, MACs {cost.macs:,} -> {cost.macs_after:,}, "
            f"top-1 {accuracy(model, test, answers):.1f} %"
        )

    model = mobilenet_v3("small", weights=weights)
    structure = discover(model, Example(x[:2]))
    budget = PruningBudget("deadness", agreement="all", **rule)
    parts = seen.split(-(-len(seen) // 3))
    plan = careful(structure, model, [deadness(model, part, budget) for part in parts], budget)
    report = prune(model, x[:2], plan, seen.split(50), compensation="mean")
    print(
        f"careful: {len(plan)} neurons, MACs {report.cost.macs:,} -> {report.cost.macs_after:,}, "
        f"top-1 {accuracy(model, test, answers):.1f} %"
    )
    print(json.dumps({layer: len(neurons) for layer, neurons in plan.neurons.items()}))


if __name__ == "__main__":
    main()
