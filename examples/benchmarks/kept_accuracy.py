"""What accuracy is left right after a cut, without any training, and what it costs to keep it.

    python examples/benchmarks/kept_accuracy.py --data FOLDER [--nets lenet resnet20 resnet56] [--pictures 2000]

FOLDER holds trained networks and pictures. Accuracy is that of pictures which nothing was calibrated on.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from cutting import accuracy

from lightning_neurons import PruningBudget, prune
from lightning_neurons.measurement.measure import measure
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.layerwise import least_squares
from lightning_neurons.pruning.decision import candidates_of, score
from lightning_neurons.pruning.planning import allocations
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from lightning_neurons.results.neuron_report import NeuronReport

MERGING = {0.5: 88.69, 0.6: 86.92, 0.7: 82.75, 0.8: 80.02}
"""Neuron Merging (Kim et al., NeurIPS 2020), which sees no data, on the same network and choice."""

OUTER = ("conv1", "layer*.conv2")
"""The layers of the residual streams; without them, only the inner channels of blocks are cut."""


def lenet(data: Path) -> None:
    """LeNet-300-100 on Fashion-MNIST: the neurons of the published rule, and those of reconstruction."""
    import lnn_data
    import small_models

    pictures, labels = lnn_data.load_fashion_mnist("test")
    x, y = lnn_data.to_tensor(pictures, 0.5, 0.5), torch.from_numpy(labels)
    seen = lnn_data.to_tensor(lnn_data.load_fashion_mnist("train", 10_000)[0], 0.5, 0.5).split(500)

    def net() -> nn.Module:
        return small_models.load(small_models.LeNet300(), str(data / "lenet300_fashion.safetensors"))

    print(f"LeNet-300-100, dense {accuracy(net(), x, y):.2f} %")
    for share, merging in MERGING.items():
        model = net()
        plan = {}
        for name, layer in (("ip1", model.ip1), ("ip2", model.ip2)):
            norm = torch.cat([layer.weight, layer.bias[:, None]], 1).abs().sum(1)
            plan[name] = norm.argsort()[: len(norm) - round(len(norm) * (1 - share))].tolist()
        row = []
        for how in ("none", "mean", "least_squares"):
            model = net()
            prune(model, x[:2], plan, seen, compensation=how)
            row.append(f"{how} {accuracy(model, x, y):.2f}")
        for scope in ("layer", None):
            model = net()
            budget = PruningBudget("reconstruction", amount=share, scope=scope)
            prune(model, x[:2], budget, seen, compensation="least_squares")
            row.append(f"reconstruction{' (shares measured)' * (scope is None)} {accuracy(model, x, y):.2f}")
        print(f"{share:.0%} removed: {', '.join(row)}; published merging {merging}", flush=True)


def resnet(make: Callable[[], nn.Module], seen: list[Any], x: Tensor, y: Tensor) -> None:
    """The inner channels of blocks: chosen by L2 and by reconstruction, with each compensation."""
    print(f"dense {accuracy(make(), x, y):.2f} %")
    for share in (0.25, 0.5, 0.7):
        cost = None
        for how in ("none", "mean", "least_squares", "patch_least_squares"):
            model, begun = make(), time.perf_counter()
            report = prune(model, x[:2], PruningBudget("weight_l2", amount=share, ignore=OUTER), seen, compensation=how)
            cost = report.cost
            show(f"{share:.0%} removed, L2, {how}", model, report, begun, x, y)
        for how in ("least_squares", "patch_least_squares"):
            model, begun = make(), time.perf_counter()
            budget = PruningBudget("reconstruction", target_macs=cost.macs_after / cost.macs, ignore=OUTER)
            report = prune(model, x[:2], budget, seen, compensation=how)
            show(f"the same MACs, reconstruction, {how}", model, report, begun, x, y)
    model, begun = make(), time.perf_counter()
    budget = PruningBudget("weight_l2", amount=0.5, ignore=OUTER)
    report = prune(model, x[:2], budget, seen, compensation="patch_least_squares", reestimate_norms=True)
    show(f"50%, L2, norms: {report.notes[-1]}", model, report, begun, x, y)
    for criterion in ("random", "weight_l2", "reconstruction"):
        for how in ("none", "patch_least_squares"):
            model, begun = make(), time.perf_counter()
            report = prune(model, x[:2], PruningBudget(criterion, target_macs=0.5), seen, compensation=how)
            show(f"all that can be cut, half of the MACs, {criterion}, {how}", model, report, begun, x, y)


def show(what: str, model: nn.Module, report: Any, begun: float, x: Tensor, y: Tensor) -> None:
    """One line."""
    seconds, left = time.perf_counter() - begun, report.cost.macs_after / report.cost.macs
    print(f"{what}: MACs {left:.3f}, {accuracy(model, x, y):.2f} %, {seconds:.1f} s", flush=True)


def cost_of_calibration(make: Callable[[], nn.Module], seen: list[Any], repeats: int = 5) -> None:
    """CPU seconds of the calibration pass as a ratio to plain forwards of its pictures, and its memory."""
    model, inputs = make(), [batch[0] for batch in seen]
    structure = discover(model, Example(inputs[0][:2]))
    budget = PruningBudget("weight_l2", amount=0.5, ignore=OUTER)
    report = measured(model, inputs[:1], budget)
    choices = allocations(structure, budget, score(structure, model, budget, report=report)[0])
    (candidate,) = candidates_of(structure, budget, choices)
    calibration = Calibration(inputs, lambda m, batch: m(batch), lambda m, batch: m(batch).sum())
    seconds: dict[str, list[float]] = {"plain": [], "least_squares": [], "patch_least_squares": []}
    for _ in range(repeats):
        for name, times in seconds.items():
            begun = time.process_time()
            if name == "plain":
                with torch.no_grad():
                    for batch in inputs:
                        model(batch)
            else:
                patchwise = name == "patch_least_squares"
                least_squares(model, candidate.tensor_cuts, calibration, structure.wiring, patchwise=patchwise)
            times.append(time.process_time() - begun)
    plain = statistics.median(seconds.pop("plain"))
    for name, times in seconds.items():
        print(f"{name}: {statistics.median(times) / plain:.2f} plain forwards of {sum(map(len, inputs))} pictures")


def measured(model: nn.Module, inputs: list[Tensor], budget: PruningBudget) -> NeuronReport:
    """What a budget goes by."""
    assert budget.measured is not None, "it goes by weights"
    return measure(model, inputs, criteria=[budget.measured])


def main() -> None:
    """Run the networks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=["lenet", "resnet20", "resnet56"])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(arguments.data))
    import lnn_data
    from cifar_resnet import cifar_resnet

    if "lenet" in arguments.nets:
        lenet(arguments.data)
    pictures, labels = lnn_data.load_cifar10("test", arguments.pictures)
    x, y = lnn_data.to_tensor(pictures), torch.from_numpy(labels)
    pictures, labels = lnn_data.load_cifar10("train", arguments.calibration)
    seen = list(zip(lnn_data.to_tensor(pictures).split(128), torch.from_numpy(labels).split(128), strict=True))
    for depth in (20, 56):
        if f"resnet{depth}" in arguments.nets:
            print(f"ResNet-{depth}")
            weights = str(arguments.data / f"cifar_resnet{depth}.safetensors")
            resnet(lambda d=depth, w=weights: cifar_resnet(d, w).eval(), seen, x, y)
    if "cost" in arguments.nets:
        weights = str(arguments.data / "cifar_resnet20.safetensors")
        cost_of_calibration(lambda: cifar_resnet(20, weights).eval(), seen)


if __name__ == "__main__":
    main()
